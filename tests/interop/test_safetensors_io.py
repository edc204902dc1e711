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
    with pytest.raises(ValueError, match="__metadata__: this name is the format's own"):
        interop.write_safetensors(tmp_path / "t", {"__metadata__": ((2,), np.float32)}, [])


def _file(tmp_path, header, body=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "t.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    return tmp_path / "t.safetensors"


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "invalid JSON in header"),
        (b"[]", "invalid JSON in header"),
        (b'{"\xff": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}', "invalid UTF-8 in header"),
        (b'{"a": ' + b"[" * 10_000, "recursion limit exceeded"),
        ({"a": {"dtype": "F32"}}, "missing field"),
        ({"a": entry(0, 16, (4,), dtype="F5")}, "unknown variant `F5`"),
        ({"a": entry(0, 16, (4,), dtype="U32")}, "'a' has dtype 'U32'; expected one of"),
        ({"a": entry(0, 16, (4,), dtype="F\n" * 10_000)}, r"unknown variant `F F F [^\n]{,300}$"),
        ({"a": entry(0, 16)}, "invalid shape, data type, or offset"),
        ({"a": entry(-4, 12, (4,))}, "invalid value: integer `-4`"),
        ({"a": entry(0, 16, (-4,))}, "invalid value: integer `-4`"),
        ({"a": entry(0, 16, (True, 4))}, "invalid type: boolean"),
        ({"a": entry(0, 16, (4.0,))}, "invalid type: floating point"),
        ({"a": entry(0, 16, (2**62, 8))}, "overflow"),
        ({"a": entry(0, 16, (2**70,))}, "invalid type"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, "invalid offset for tensor `b`"),
        ({"a": entry(0, 4, (1,)), "b": entry(8, 16)}, "invalid offset for tensor `b`"),
        ({"a": entry(0, 8)}, "file not fully covered"),
        ({"a": entry(0, 8), "b": entry(8, 24, (4,))}, "file not fully covered"),
        ({"__metadata__": {"format": 1}, "a": entry(0, 16, (4,))}, "expected a string"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(entry(0, 16, (4,))).encode(),) * 2), "the name 'a' stands twice"),
    ],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path, header, message):
    with pytest.raises(ValueError, match=f"t.safetensors: .*{message}"):
        interop.read_header(_file(tmp_path, header))


@pytest.mark.parametrize("content", [b"", b"abc", (10**6).to_bytes(8, "little") + b"{}", b"\xff" * 64])
def test_files_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"t.safetensors: not a safetensors file, or cut off"):
        interop.read_header(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ("{", ValueError, "model.safetensors.index.json: not JSON"),
        ("[" * 100_000, ValueError, "model.safetensors.index.json: not JSON: nested too deeply"),
        ('{"weights": {}}', ValueError, "expected JSON with a weight_map, an object, got None"),
        ('{"weight_map": ["m.safetensors"]}', ValueError, "expected JSON with a weight_map, an object, got"),
        ('{"weight_map": {"a": "../x.safetensors"}}', ValueError, "a shard is a .safetensors file beside the index"),
        ('{"weight_map": {"a": "/x.safetensors"}}', ValueError, "a shard is a .safetensors file beside the index"),
        ('{"weight_map": {"a": ".."}}', ValueError, r"a shard is a .safetensors file beside the index, got '\.\.'"),
        ('{"weight_map": {"a": "%s.safetensors"}}' % ("x" * 5000), ValueError, "a shard is a .safetensors file"),
        ('{"weight_map": {"a": 1}}', ValueError, "a shard is a .safetensors file beside the index, got 1"),
        ('{"weight_map": {"a": ["m.safetensors"]}}', ValueError, "a shard is a .safetensors file beside the index"),
        ('{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}', ValueError, "the name 'a' stands twice"),
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


def test_a_tensor_in_two_shards_is_refused_by_open_folder(tmp_path):
    write(tmp_path / "m.safetensors", {"a": np.ones(2), "b": np.ones(2)})
    write(tmp_path / "n.safetensors", {"b": np.zeros(2), "c": np.ones(2)})
    weight_map = {"a": "m.safetensors", "b": "m.safetensors", "c": "n.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index.json: tensors that stand in more than one shard: \['b'\]"):
        interop.open_folder(tmp_path)


@pytest.mark.parametrize("index", ["{", '{"weight_map": {"a": "m.safetensors"}}'])
def test_a_single_file_comes_before_an_index_in_open_folder(tmp_path, index):
    write(tmp_path / "model.safetensors", {"a": np.full(2, 1.0)})
    write(tmp_path / "m.safetensors", {"a": np.full(2, 2.0)})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert interop.open_folder(tmp_path)["a"].read()[0] == 1.0


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"Is a directory: .*model.safetensors"):
        interop.open_folder(tmp_path)


def test_stored_tensors_are_compared_by_value_slice_by_slice(tmp_path, monkeypatch):
    monkeypatch.setattr("subspace_jax.interop.safetensors_io._COMPARED_BYTES", 30)
    table = np.arange(35, dtype=np.float32).reshape(7, 5)
    table[6, 4] = np.nan
    other = table.copy()
    other[6, 3] += 1
    exact = np.arange(35, dtype=np.float32).reshape(7, 5)
    narrow = exact.astype(ml_dtypes.bfloat16)
    tensors = {"table": table, "same": table.copy(), "other": other, "wide": table.T.copy(), "exact": exact}
    write(tmp_path / "t.safetensors", {**tensors, "narrow": narrow, "empty": np.zeros((0, 5), np.float32)})
    stored = interop.read_header(tmp_path / "t.safetensors")[0]
    assert stored["table"].equals(stored["same"])
    assert stored["exact"].equals(stored["narrow"])
    assert stored["empty"].equals(stored["empty"])
    for name in ("other", "wide", "exact", "empty"):
        assert not stored["table"].equals(stored[name])
