import json
import pathlib
import tempfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from subspace_jax import interop

TYPES = [np.float32, np.float16, np.float64, np.int64, np.int32, np.uint8, np.bool_]
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
    st.sampled_from(TYPES).flatmap(lambda t: hnp.arrays(t, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0))),
    max_size=4,
)


def write(file, tensors):
    interop.write_safetensors(file, {n: (t.shape, t.dtype) for n, t in tensors.items()}, tensors.values())


@settings(max_examples=40, deadline=None)
@given(TENSORS)
def test_what_is_written_is_read(tensors):
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "t.safetensors"
        write(file, tensors)
        read, metadata = interop.read_header(file)
        assert metadata == {"format": "pt"}
        assert list(read) == list(tensors)
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert np.array_equal(np.array(read[name].read()), tensor, equal_nan=tensor.dtype.kind == "f")


@settings(max_examples=20, deadline=None)
@given(TENSORS)
def test_the_usual_package_reads_what_is_written_and_writes_what_is_read(tensors):
    theirs = pytest.importorskip("safetensors.numpy")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "t.safetensors"
        write(file, tensors)
        for name, tensor in theirs.load_file(file).items():
            np.testing.assert_array_equal(tensor, tensors[name])
        theirs.save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, file)
        read, _ = interop.read_header(file)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(np.array(read[name].read()).ravel(), tensor.ravel())


def test_slices_are_read_without_the_rest_and_bfloat16_is_itself(tmp_path):
    tensor = np.arange(24, dtype=np.float32).reshape(4, 6).astype(ml_dtypes.bfloat16)
    write(tmp_path / "t.safetensors", {"a": np.ones(3, np.int8), "b": tensor})
    stored = interop.read_header(tmp_path / "t.safetensors")[0]["b"]
    assert (stored.dtype, stored.nbytes) == (ml_dtypes.bfloat16, 48)
    part = stored.read((slice(1, 3), slice(2, 4)))
    assert isinstance(part.base, np.memmap)
    np.testing.assert_array_equal(part, tensor[1:3, 2:4])


def test_shapes_that_were_not_announced_and_types_without_a_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a: expected \(2,\) float32, got \(3,\) float32"):
        interop.write_safetensors(tmp_path / "t", {"a": ((2,), np.float32)}, [np.ones(3, np.float32)])
    with pytest.raises(ValueError, match="a: type complex64 can't be stored"):
        interop.write_safetensors(tmp_path / "t", {"a": ((2,), np.complex64)}, [])


def _file(tmp_path, header, body=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "t.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    return tmp_path / "t.safetensors"


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "the header is not what a safetensors file has"),
        (b"[]", "the header is not what a safetensors file has"),
        ({"a": {"dtype": "F32"}}, "the header is not what a safetensors file has"),
        ({"a": entry(0, 8, dtype="F4")}, "'a' has dtype 'F4'; expected one of"),
        ({"a": entry(0, 12)}, r"'a' has 12 bytes, 8 are expected of its shape \(2,\)"),
        ({"a": entry(-4, 4)}, "'a' has 8 bytes"),
        ({"a": entry(0, 8, (-2,))}, "are expected of its shape"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "'b' overlaps the tensor before it"),
        ({"a": entry(0, 8), "b": entry(8, 24, (4,))}, "cut off: 'b' ends at byte"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path, header, message):
    with pytest.raises(ValueError, match=message):
        interop.read_header(_file(tmp_path, header))


@pytest.mark.parametrize("content", [b"", b"abc", (10**6).to_bytes(8, "little") + b"{}", b"\xff" * 64])
def test_files_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"t.safetensors: not a safetensors file, or cut off"):
        interop.read_header(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ("{", ValueError, "expected JSON with a weight_map"),
        ('{"weights": {}}', ValueError, "expected JSON with a weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', ValueError, "a shard is a file beside the index"),
        ('{"weight_map": {"a": "m.safetensors", "c": "m.safetensors"}}', ValueError, r"their shards lack: \['c'\]"),
        ('{"weight_map": {"a": "m.safetensors"}}', ValueError, r"the index does not name: \['b'\]"),
        ('{"weight_map": {"a": "n.safetensors"}}', FileNotFoundError, "shard 'n.safetensors' of the index is missing"),
    ],
)
def test_an_index_has_to_fit_its_shards(tmp_path, index, error, message):
    write(tmp_path / "m.safetensors", {"a": np.ones(2), "b": np.ones(2)})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(error, match=message):
        interop.open_folder(tmp_path)


def test_a_folder_has_to_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        interop.open_folder(tmp_path / "nowhere")
