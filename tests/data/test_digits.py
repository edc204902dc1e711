import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from subspace_jax import data
from subspace_jax.data.sources.digits import prepare_digits


def test_both_splits_together_hold_exactly_the_digits_of_scikit_learn(tfds_dir):
    splits = [data.load_arrays(data.image_source("digits", split, tfds_dir)) for split in ("train", "test")]
    assert [len(split["labels"]) for split in splits] == [1200, 597]
    inputs, labels = (np.concatenate([split[field] for split in splits]) for field in ("inputs", "labels"))
    assert inputs.shape == (1797, 8, 8, 1)
    assert inputs.dtype == np.float32
    assert labels.dtype == np.int32
    pixels, target = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(1797)
    np.testing.assert_array_equal(inputs.reshape(1797, 64) * 16, pixels[order])
    np.testing.assert_array_equal(labels, target[order])


def test_source_knows_classes_and_shape(digits):
    assert digits.num_classes == 10
    assert digits.image_shape == (8, 8, 1)
    assert digits[3]["inputs"].shape == (8, 8, 1)
    assert len(list(digits)) == 1200


def test_slices_of_a_split_cut_the_stored_order(tfds_dir, digit_arrays):
    part = data.load_arrays(data.image_source("digits", "train[:90%]", tfds_dir))
    np.testing.assert_array_equal(part["inputs"], digit_arrays["inputs"][:1080])


def test_preparing_again_writes_nothing(tmp_path):
    folder = prepare_digits(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert prepare_digits(tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.slow
def test_two_processes_with_equal_seeds_may_prepare_at_a_time(tmp_path):
    code = f"import random, subspace_jax.data.sources.digits as d; random.seed(0); d.prepare_digits({str(tmp_path)!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]
    assert len(data.image_source("digits", "test", tmp_path)) == 597


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"data_dir: can't write the set digits below .*file/sets"):
        data.image_source("digits", "train", tmp_path / "file" / "sets")


def test_url_is_refused():
    with pytest.raises(ValueError, match=r"data_dir: .* got gs://bucket"):
        data.image_source("digits", "train", "gs://bucket")


def test_default_folder_is_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert data.default_data_dir() == str(tmp_path)
    data.image_source("digits", "train")
    assert (tmp_path / "digits" / "1.0.0" / "dataset_info.json").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", "~/sets")
    assert data.default_data_dir() == str(tmp_path / "sets")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert data.default_data_dir().endswith("tensorflow_datasets")


def test_importing_data_touches_no_device_and_no_heavy_package():
    code = (
        "import sys, subspace_jax.data; from jax._src import xla_bridge; assert not xla_bridge._backends; "
        "assert not {'tensorflow_datasets', 'grain', 'sklearn', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
