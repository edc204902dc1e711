"""Headers of GGUF files: what they say, and what is refused."""

import struct
import tracemalloc

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from subspace_jax.interop import gguf

from . import gguf_files

META = {"general.architecture": "llama", "n": 3, "x": 0.25, "yes": True, "names": ["a", "ß"], "scores": [0.5, 2.0]}
ROW = np.arange(64, dtype=np.float32)


def written(tmp_path, metadata=META, tensors=None):
    return gguf_files.write(tmp_path / "a.gguf", metadata, {"w": ROW.reshape(2, 32)} if tensors is None else tensors)


def refused(tmp_path, data, match):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as error:
            gguf.read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert str(error.value).startswith(f"{path}: ")


def test_read_header_returns_metadata_and_tensors(tmp_path):
    half = (np.arange(6, dtype=np.float16)).reshape(3, 2)
    header = gguf.read_header(written(tmp_path, tensors={"w": ROW.reshape(2, 32), "h": half}))
    assert header.version == 3
    assert {name: header.metadata[name] for name in ("n", "x", "yes", "names")} == {
        "n": 3, "x": 0.25, "yes": True, "names": ["a", "ß"],
    }  # fmt: skip
    np.testing.assert_array_equal(header.metadata["scores"], [0.5, 2.0])
    assert list(header.tensors) == ["w", "h"]
    np.testing.assert_array_equal(header.tensors["w"].read(), ROW.reshape(2, 32), strict=True)
    np.testing.assert_array_equal(header.tensors["h"].read((slice(1, 3),)), half[1:], strict=True)


def test_read_header_gives_float32_values_their_shortest_decimals(tmp_path):
    assert gguf.read_header(written(tmp_path, {"eps": 1e-5})).metadata["eps"] == 1e-5


def test_read_header_reads_files_of_the_gguf_package():
    header = gguf.read_header(gguf_files.GOLDEN / "tiny_llama.gguf")
    assert header.metadata["general.architecture"] == "llama"
    kinds = {tensor.block.name for tensor in header.tensors.values()}
    assert kinds == {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"}


def test_is_gguf_knows_a_file_by_its_name_or_its_first_bytes(tmp_path):
    path = written(tmp_path)
    renamed = path.rename(tmp_path / "sha256-0")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "other").write_bytes(b"GG")
    assert gguf.is_gguf(renamed)
    assert gguf.is_gguf(tmp_path / "empty.gguf")
    assert not any(gguf.is_gguf(tmp_path / name) for name in ("other", "absent.gguf", ""))


def test_read_header_refuses_a_file_cut_off_anywhere(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    for length in range(0, len(data), 3):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut off|not a GGUF file"):
            gguf.read_header(path)


ENTRY = gguf_files.place("w", (2, 32), 0, 0)
BODY = ROW.tobytes()


def made(metadata=META, places=(ENTRY,), body=BODY, **counts):
    return gguf_files.padded(gguf_files.header(metadata, list(places), **counts)) + body


WRONG = {
    "magic": (made(magic=b"GGML"), "begins with b'GGML'"),
    "version 1": (made(version=1), "version 1 of GGUF"),
    "big endian": (made(version=3 << 24), "big-endian"),
    "number of tensors": (made(num_tensors=2**62), "tensors: .* damaged or cut off"),
    "number of entries": (made(num_entries=2**63), "metadata: .* damaged or cut off"),
    "one tensor more": (made(num_tensors=2), "cut off|expected|none of"),
    "name too long": (made([(b"k" * 70_000, 1)]), "its length is 70000; expected at most 65535"),
    "name of a tensor too long": (made(places=[gguf_files.place("w" * 600, (2, 32), 0, 0)]), "length is 600"),
    "length of a string": (made({"a": struct.pack("<IQ", 8, 2**60) + b"x"}), "'a': .* cut off"),
    "no UTF-8": (made({"a": struct.pack("<I", 8) + gguf_files.string(b"\xff\xfe")}), "'a': .*UTF-8"),
    "type of a value": (made({"a": struct.pack("<II", 99, 0)}), "'a': type 99"),
    "no boolean": (made({"a": struct.pack("<IB", 7, 2)}), "'a': expected booleans"),
    "length of an array": (made({"a": struct.pack("<IIQ", 9, 4, 2**61)}), "'a': .* cut off"),
    "length of an array of strings": (made({"a": struct.pack("<IIQ", 9, 8, 2**61)}), "'a': .* cut off"),
    "array of arrays": (made({"a": struct.pack("<IIQ", 9, 9, 1)}), "'a': .*elements of type 9"),
    "entry twice": (made([("a", 1), ("a", 2)]), "'a' stands twice"),
    "alignment of zero": (made({"general.alignment": 0}), "general.alignment: .* power of two"),
    "alignment of three": (made({"general.alignment": 24}), "general.alignment: .* power of two"),
    "alignment too large": (made({"general.alignment": 2**31}), "general.alignment: .* power of two"),
    "alignment a text": (made({"general.alignment": "32"}), "general.alignment: .* power of two"),
    "no axes": (made(places=[gguf_files.place("w", (), 0, 0)]), "'w': expected 1 to 4 axes, got 0"),
    "too many axes": (made(places=[gguf_files.place("w", (1,) * 5, 0, 0)]), "'w': expected 1 to 4 axes, got 5"),
    "very many axes": (
        made(places=[gguf_files.string("w") + struct.pack("<I", 2**31) + bytes(40)]),
        "'w': expected 1 to 4 axes",
    ),
    "unknown type": (made(places=[gguf_files.place("w", (2, 32), 16, 0)]), "type 16 of ggml is not supported; .* Q6_K"),
    "no rows": (made(places=[gguf_files.place("w", (0, 32), 0, 0)]), "'w': expected rows of whole blocks"),
    "part of a block": (made(places=[gguf_files.place("w", (2, 48), 8, 0)]), "whole blocks of 32 Q8_0 numbers"),
    "size": (made(places=[gguf_files.place("w", (2**40, 2**40), 0, 0)]), "'w': .* the file has"),
    "sizes that overflow": (made(places=[gguf_files.place("w", (2**62, 8), 0, 0)]), "'w': .* the file has"),
    "offset": (made(places=[gguf_files.place("w", (2, 32), 0, 2**63)]), "'w': .* the file has"),
    "offset not aligned": (
        made(places=[gguf_files.place("w", (1, 32), 0, 4)]),
        "offset that is a multiple of 32, got 4",
    ),
    "tensor twice": (made(places=[ENTRY, ENTRY]), "the tensor 'w' stands twice"),
    "tensors overlap": (made(places=[ENTRY, gguf_files.place("v", (1, 32), 0, 32)]), "'w' and 'v' overlap"),
}


@pytest.mark.parametrize("name", WRONG)
def test_read_header_refuses(name, tmp_path):
    data, match = WRONG[name]
    refused(tmp_path, data, match)


def test_read_header_refuses_an_empty_file_and_a_folder(tmp_path):
    refused(tmp_path, b"", "cut off in its first 24 bytes")
    with pytest.raises(IsADirectoryError):
        gguf.read_header(tmp_path)
    with pytest.raises(FileNotFoundError):
        gguf.read_header(tmp_path / "absent.gguf")


def test_read_header_bounds_the_size_of_a_header(tmp_path, monkeypatch):
    monkeypatch.setattr("subspace_jax.interop.gguf.format._MAX_HEADER", 1000)
    refused(tmp_path, made({"a": ["x"] * 200}), r"'a': .* left of the 1000 of a header; it is damaged")
    assert gguf.read_header(written(tmp_path, {}, {"w": np.zeros((8, 64), np.float32)})).tensors["w"].shape == (8, 64)


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=6))
def test_read_header_reads_or_refuses_damaged_bytes(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    data = bytearray(made())
    for at, byte in changes:
        data[at % len(data)] = byte
    path.write_bytes(data)
    try:
        header = gguf.read_header(path)
    except ValueError as error:
        if not str(error).startswith(f"{path}: "):
            raise
    else:
        for tensor in header.tensors.values():
            assert tensor.read().shape == tensor.shape
