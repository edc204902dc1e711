"""Types of GGUF tensors, against the decoder of package ``gguf``.

``tests/golden/gguf/blocks.npz`` has random blocks of each type, and what ``gguf.quants.dequantize`` of gguf 0.19.0
gives for them; scales are normal in half precision.
"""

import numpy as np
import pytest

from subspace_jax.interop.gguf.blocks import BLOCK_TYPES
from subspace_jax.interop.gguf.tensors import BlockTensor

from . import gguf_files

KINDS = {kind.name: kind for kind in BLOCK_TYPES.values()}


@pytest.fixture(scope="module")
def golden():
    with np.load(gguf_files.GOLDEN / "blocks.npz") as archive:
        return dict(archive)


def tensor(tmp_path, kind, data, shape, heads=0):
    file = tmp_path / "blocks"
    file.write_bytes(bytes(64) + data.tobytes())
    return BlockTensor(file, "w", kind.dtype, shape, 64, kind, heads)


def test_block_types_are_all_that_the_golden_file_has(golden):
    assert {name.removesuffix("_bytes") for name in golden if name.endswith("_bytes")} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_blocks_decode_to_the_numbers_of_the_gguf_package(name, golden, tmp_path):
    data, values = golden[f"{name}_bytes"], golden[f"{name}_values"]
    read = tensor(tmp_path, KINDS[name], data, (len(data) // 2, 2 * KINDS[name].size)).read()
    np.testing.assert_array_equal(read.astype(np.float32), values.reshape(read.shape), strict=True)
    assert read.dtype == KINDS[name].dtype


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("heads", [0, 2])
def test_block_tensor_reads_any_slice(name, heads, golden, tmp_path):
    kind, count = KINDS[name], len(golden[f"{name}_bytes"]) // 4 * 4
    stored = tensor(tmp_path, kind, golden[f"{name}_bytes"][:count], (4, count // 4 * kind.size), heads)
    whole = np.asarray(stored.read()).astype(np.float32)
    width = stored.shape[1]
    for rows in (slice(0, 4), slice(1, 3), slice(3, 4), slice(2, 2)):
        for columns in (slice(0, width), slice(width // 2, width), slice(5, 9), slice(width - 3, width), slice(3, 3)):
            part = np.asarray(stored.read((rows, columns))).astype(np.float32)
            np.testing.assert_array_equal(part, whole[rows, columns], strict=True)


def test_block_tensor_reads_vectors_and_stacks(golden, tmp_path):
    values = golden["Q8_0_values"]
    stored = tensor(tmp_path, KINDS["Q8_0"], golden["Q8_0_bytes"], (12 * 32,))
    np.testing.assert_array_equal(stored.read((slice(40, 90),)), values.reshape(-1)[40:90])
    stored = tensor(tmp_path, KINDS["Q8_0"], golden["Q8_0_bytes"], (3, 2, 64))
    np.testing.assert_array_equal(stored.read((slice(1, 3), slice(0, 1))), values.reshape(3, 2, 64)[1:3, :1])


def test_block_tensor_brings_alternating_rows_into_halves(tmp_path):
    rows = np.arange(8, dtype=np.float32).reshape(8, 1)
    halves = [[0], [2], [1], [3], [4], [6], [5], [7]]
    np.testing.assert_array_equal(tensor(tmp_path, KINDS["F32"], rows, (8, 1), heads=2).read(), halves)
    np.testing.assert_array_equal(tensor(tmp_path, KINDS["F32"], rows, (8,), heads=2).read(), np.ravel(halves))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.decode])
def test_blocks_of_any_bytes_decode_without_warnings(name, tmp_path):
    kind = KINDS[name]
    data = np.random.default_rng(0).integers(0, 256, (256, kind.nbytes), np.uint8)
    data[:8] = 255
    read = tensor(tmp_path, kind, data, (256, kind.size)).read()
    assert read.shape == (256, kind.size)
    assert read.dtype == np.float32
