"""Files of features: their fields are checked before an array is read."""

import zipfile

import numpy as np
import pytest

from subspace_jax import represent
from subspace_jax.represent import features_file
from subspace_jax.represent.gcr import task as classify
from subspace_jax.represent.labels import count_classes

GOOD = {"features": np.ones((3, 2), np.float32), "labels": np.arange(3)}


def header(shape, descr):
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\1\0" + (len(text) + 1).to_bytes(2, "little") + text + b"\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": np.array([0, 1, 2**31 - 1])}, "labels: expected 0 to 65535 of 3 classes, got 2147483647"),
        ({"labels": np.array([0, 1, 2**63], np.uint64)}, "labels: expected 0 to 65535 of 3 classes, got 9223372"),
        ({"labels": np.array([0, -1, 2])}, "labels: expected integers in 0 to 2, got -1 to 2"),
        ({"labels": np.array([0.0, 1.0, 2.0])}, "expected integers .3. as labels, got float64"),
        ({"labels": np.arange(4)}, "expected integers .3. as labels, got int64 .4."),
        ({"labels": np.arange(3)[:, None]}, "expected integers .3. as labels"),
        ({"labels": np.array([0, 1, None])}, "labels holds pickled objects"),
        ({"class_names": np.array(["a", None, "c"])}, "class_names holds pickled objects"),
        ({"class_names": np.array(["a", "b"])}, "labels: expected integers in 0 to 1, got 0 to 2"),
        ({"class_names": np.array("abc")}, "expected texts .classes. as class_names"),
        ({"features": np.array([[1.0, np.nan]] * 3)}, "expected finite features"),
        ({"features": np.full((3, 2), 1e300)}, "expected finite features in the range of float32"),
        ({"features": np.ones((3, 2), complex)}, "expected numbers .examples, n. as features, got complex128"),
        ({"features": np.array([["1", "2"]] * 3)}, "expected numbers .examples, n. as features, got <U1"),
        ({"features": np.ones(3)}, "expected numbers .examples, n. as features"),
        ({"features": np.ones((3, 0))}, "expected numbers .examples, n. as features"),
    ],
)
def test_read_features_names_file_and_field_that_are_invalid(fields, message, tmp_path):
    np.savez(tmp_path / "f.npz", **{**GOOD, **fields})
    with pytest.raises(ValueError, match=rf"f.npz: .*{message}") as caught:
        represent.read_features(tmp_path / "f.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            header((10**12, 10**6), "<f4") + b"1234",
            "features is declared as float32 .1000000000000, 1000000.",
        ),
        (header((3, 2**40), "<U0"), "features is declared as <U0"),
        (header((3, -2), "<f4") + bytes(24), "features is declared as"),
        (header((3, 2), "O") + b"cos\nsystem\n", "features holds pickled objects"),
        (header((3, 10**6), "<f4") + bytes(12 * 10**6), "features would take 12000000 bytes, compressed to"),
        (b"no array", "can't be read as .npz"),
    ],
    ids=["shape", "nothing", "negative", "pickle", "compressed", "junk"],
)
def test_read_features_refuses_arrays_larger_than_the_file_can_hold(features, message, tmp_path, monkeypatch):
    monkeypatch.setattr(features_file, "_UNCHECKED_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "f.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("features.npy", features)
        archive.writestr("labels.npy", header((3,), "<i8") + np.arange(3).tobytes())
    with pytest.raises(ValueError, match=rf"f.npz: .*{message}"):
        represent.read_features(tmp_path / "f.npz")


def test_read_features_refuses_damaged_files(tmp_path):
    path = tmp_path / "f.npz"
    np.savez(path, **GOOD)
    whole = path.read_bytes()
    for i in range(0, len(whole), 11):
        for content in (whole[:i], whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :]):
            path.write_bytes(content)
            try:
                found = represent.read_features(path)
            except ValueError as error:
                found, message = None, str(error)
            if found is None:
                assert message.startswith(f"features: {path}: ")
                assert "\n" not in message
            else:
                np.testing.assert_array_equal(found.features, GOOD["features"])
                np.testing.assert_array_equal(found.labels, GOOD["labels"])
    path.write_bytes(whole)
    with pytest.raises(FileNotFoundError, match=r"g.npz: no such file; did you mean 'f.npz'"):
        represent.read_features(tmp_path / "g.npz")


def test_read_features_reads_other_dtypes_and_names_as_bytes(tmp_path):
    features = np.arange(6).reshape(3, 2)
    for dtype in (np.float16, ">f8", np.int64):
        names = np.array([b"a", "ü".encode(), b"c"])
        np.savez_compressed(tmp_path / "f.npz", features=features.astype(dtype), labels=np.arange(3), class_names=names)
        found = represent.read_features(tmp_path / "f.npz")
        assert (found.features.dtype, found.class_names) == (np.float32, ("a", "ü", "c"))
        np.testing.assert_array_equal(found.features, features)


def test_count_classes_gives_the_largest_label_plus_one_by_default():
    assert count_classes(np.array([0, 5])) == 6
    assert count_classes(np.array([0, 5]), 10) == 10
    assert count_classes(np.arange(70_000)) == 70_000
    for labels, classes in (([0, 5], 5), ([-1, 5], None), ([0, 2**40], None), ([0.0], None), ([], None), ([[0]], 3)):
        with pytest.raises(ValueError, match="labels: expected"):
            count_classes(np.array(labels), classes)


def test_large_labels_allocate_no_large_arrays():
    features = np.array([[1.0, 0.0], [0.0, 1.0]] * 2, np.float32)
    labels = np.array([3, 2**31 - 1] * 2)
    assert represent.scores_of(labels, labels) == (1.0, 1.0)
    found = represent.nearest_classes(features, labels, features, k=1, num_classes=2**31)
    np.testing.assert_array_equal(found, labels)
    with pytest.raises(ValueError, match=r"labels: expected examples of most of 2147483648 classes"):
        represent.linear_probe(features, labels, num_classes=2**31)
    with pytest.raises(ValueError, match="labels: expected 0 to 65535 of 2 classes, got 2147483647"):
        represent.few_shot(*[represent.Features(features, labels, ())] * 2, shots=1)
    with pytest.raises(ValueError, match="grid: expected one or more finite penalties"):
        represent.linear_probe(features, np.array([0, 1, 0, 1]), grid=(float("nan"),))
    with pytest.raises(ValueError, match="queries: expected finite values"):
        represent.nearest_classes(features, np.array([0, 1, 0, 1]), features * np.nan, k=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "foldr"}, "data.name: no set 'foldr'; did you mean 'folder'"),
        ({"name": "union_of_subspace"}, "did you mean 'union_of_subspaces'"),
        ({"name": "folder"}, "data.name: 'folder' needs the folder as data.data_dir"),
        ({"name": "{folder}"}, "is a folder; give data.name=folder and data.data_dir="),
        ({"name": "./photos"}, "photos: no such folder of images"),
        ({"name": "union_of_subspaces", "eval_batch_size": 0}, "eval_batch_size: expected an integer of at least 1"),
    ],
)
def test_build_names_data_that_do_not_exist(fields, message, tmp_path):
    config = classify.default_config()
    config.data.update({name: tmp_path.as_posix() if value == "{folder}" else value for name, value in fields.items()})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        classify.build(config)
