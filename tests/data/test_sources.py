import importlib.util
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import subspace_jax.data.prepare as prepare
from subspace_jax import data
from tests.data.conftest import TinyRgb, tiny_pixels


class VaryingSize(TinyRgb):
    """Images of no fixed size."""

    def _info(self):
        info = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(info), supervised_keys=("image", "label")
        )

    def _generate_examples(self, count):
        yield 0, {"image": Image.fromarray(np.zeros((5, 7, 3), np.uint8)), "label": 0}


class Unlabelled(VaryingSize):
    """No labels at all."""

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"x": np.int64}))

    def _generate_examples(self, count):
        yield 0, {"x": 1}


def test_other_sets_are_read_as_pixels_over_255(tfds_dir):
    source = data.image_source("tiny_rgb", "test", tfds_dir)
    pixels, labels = tiny_pixels(7)
    arrays = data.load_arrays(source)
    assert arrays["inputs"].dtype == np.float32
    np.testing.assert_allclose(arrays["inputs"], pixels / 255, atol=1e-7)
    np.testing.assert_array_equal(arrays["labels"], labels)
    assert (source.num_classes, source.image_shape, len(source)) == (10, (32, 32, 3), 7)
    assert len(data.image_source("tiny_rgb", "train[:90%]", tfds_dir)) == 18


def test_mean_and_std_standardise_each_channel(tfds_dir):
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    arrays = data.load_arrays(data.image_source("tiny_rgb", "test", tfds_dir, mean=mean, std=std))
    expected = (tiny_pixels(7)[0] / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(arrays["inputs"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": (0.5,) * 3}, "mean and std: expected both"),
        ({"mean": (0.5,), "std": (1.0,)}, "mean: expected 3 numbers"),
        ({"mean": (0.5,) * 3, "std": (1.0, 0.0, 1.0)}, "std: expected positive"),
    ],
)
def test_mean_and_std_that_do_not_fit_are_refused(tfds_dir, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.image_source("tiny_rgb", "test", tfds_dir, **arguments)


def test_index_out_of_range_is_an_index_error(tfds_dir):
    source = data.image_source("tiny_rgb", "test", tfds_dir)
    np.testing.assert_array_equal(source[-1]["inputs"], source[6]["inputs"])
    with pytest.raises(IndexError):
        source[7]


def test_set_that_is_not_prepared_gives_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="the set 'cifar10' is not prepared under") as caught:
        data.image_source("cifar10", "train[:90%]", tmp_path)
    assert f"-m subspace_jax.data.prepare cifar10 --data_dir {tmp_path}" in str(caught.value)


def test_unknown_set_gives_near_misses(tmp_path):
    with pytest.raises(ValueError, match=r"no set 'cifra10'.*did you mean 'cifar10'"):
        data.image_source("cifra10", "train", tmp_path)
    with pytest.raises(ValueError, match=r"did you mean .*'digits'"):
        data.image_source("digit", "train", tmp_path)


@pytest.mark.parametrize("name", ["photos/train", "./photos", "~/photos", "/none/photos", "photos.npz", "photos.zip"])
def test_names_that_look_like_paths_are_missing_folders(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"photos.*: no such folder of images"):
        data.image_source(name, "train", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"photos.*: no such folder of images"):
        data.describe_images(name, tmp_path)


@pytest.mark.parametrize("name", ["", "a b", "x:y:z", "ünï", "cifar10:9.9.9", "digits:2.0.0", "cifar10/foo"])
def test_names_that_tfds_can_not_take_are_refused_in_one_line(name, tmp_path):
    with pytest.raises(ValueError, match=r"name: TFDS (knows|has) no") as caught:
        data.describe_images(name, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "tiny_rgb-train.array_record-00000-of-00001"])
def test_damaged_files_of_a_set_are_named(name, tfds_dir, tmp_path):
    shutil.copytree(tfds_dir / "tiny_rgb", tmp_path / "tiny_rgb")
    file = tmp_path / "tiny_rgb" / "1.0.0" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(
        (ValueError, OSError), match=r"tiny_rgb is damaged: |tiny_rgb train: can't read records: "
    ) as caught:
        data.load_arrays(data.image_source("tiny_rgb", "train", tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["valid", "train[:x]", "train[5:", "", "valid[:10%]"])
def test_unknown_split_lists_the_splits(tfds_dir, split):
    with pytest.raises(ValueError, match=r"split: .*\['test', 'train'\] and slices"):
        data.image_source("tiny_rgb", split, tfds_dir)


def test_sets_that_are_not_images_of_one_size_are_refused(tmp_path):
    for builder in (VaryingSize, Unlabelled):
        builder(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    with pytest.raises(ValueError, match="images of one size"):
        data.image_source("varying_size", "train", tmp_path)
    with pytest.raises(ValueError, match="expected a set of labeled images"):
        data.image_source("unlabelled", "train", tmp_path)


def test_set_in_a_format_without_random_access_is_refused(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir / "tiny_rgb", tmp_path / "tiny_rgb")
    info = tmp_path / "tiny_rgb" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"as tfrecord, which can't be read by index.*another folder") as caught:
        data.image_source("tiny_rgb", "train", tmp_path)
    assert f"--data_dir {tmp_path}_array_record" in str(caught.value)


def test_prepare_names_the_packages_that_a_set_needs(tmp_path, capsys):
    if importlib.util.find_spec("tensorflow") is not None:
        pytest.skip("TensorFlow is installed")

    class NeedsTensorFlow(TinyRgb):
        """Reads as most sets of TFDS do."""

        def _generate_examples(self, count):
            import tensorflow  # noqa: F401

            yield from super()._generate_examples(count)

    assert prepare.main(["needs_tensor_flow", "--data_dir", str(tmp_path)]) == 1
    assert "reading it doesn't: pip install tensorflow-cpu" in capsys.readouterr().err


def test_prepare_is_a_command_that_prepares_digits(tmp_path, capsys):
    assert prepare.main(["digits", "--data_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == f"digits is in {tmp_path / 'digits' / '1.0.0'}"
    run = [sys.executable, "-m", "subspace_jax.data.prepare", "--help"]
    assert "cifar10 --data_dir" in subprocess.run(run, capture_output=True, text=True, check=True).stdout


def test_prepare_refuses_unknown_names(tmp_path, capsys):
    assert prepare.main(["cifra10", "--data_dir", str(tmp_path)]) == 1
    assert "did you mean 'cifar10'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_prepare_writes_array_record(tmp_path):
    folder = prepare.prepare("tiny_rgb", tmp_path)
    assert folder == str(tmp_path / "tiny_rgb" / "1.0.0")
    assert len(data.image_source("tiny_rgb", "train", tmp_path)) == 20


@pytest.mark.slow
def test_first_image_is_read_without_advice_on_opencv_and_other_warnings_stay(tfds_dir):
    code = (
        "import sys, subspace_jax.data as d; from absl import logging; "
        "d.image_source('tiny_rgb', 'test', sys.argv[1])[0]; logging.warning('something else')"
    )
    run = subprocess.run([sys.executable, "-c", code, tfds_dir], capture_output=True, text=True, check=True)
    assert "something else" in run.stderr
    assert "OpenCV" not in run.stderr
