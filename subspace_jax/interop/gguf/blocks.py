"""Types of GGUF tensors: blocks of quantized numbers and their scales, decoded to float32.

A row of a tensor is a sequence of blocks, each of ``size`` numbers in ``nbytes`` bytes.  The layouts are those of
ggml's ``block_q8_0``, ``block_q4_K`` and so on.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

Decode = Callable[[np.ndarray], np.ndarray]

_FLOAT32 = np.dtype("<f4")


class BlockType(NamedTuple):
    """The type of a tensor.

    Attributes:
      name: Its name in ggml.
      size: Numbers of a block.
      nbytes: Bytes of a block.
      dtype: Dtype of the numbers, decoded.
      decode: Maps the bytes of blocks ``[n, nbytes]`` to numbers ``[n, size]``; None for plain floating point.
    """

    name: str
    size: int
    nbytes: int
    dtype: np.dtype
    decode: Decode | None


def _scale(blocks: np.ndarray, start: int) -> np.ndarray:
    """Returns the half-precision number at an offset of each block, ``[n, 1]``."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(_FLOAT32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Returns the lower halves of ``m`` bytes, then the upper ones: ``[..., 2m]``."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    """Returns the fifth bits of the 32 numbers of a block, in their place."""
    return np.unpackbits(blocks[:, start : start + 4], axis=-1, bitorder="little") << 4


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks, 0) * blocks[:, 2:].view(np.int8)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _scale(blocks, 0) * (_nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8))


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    numbers = _scale(blocks, 0) * _nibbles(blocks[:, 4:])
    numbers += _scale(blocks, 2)
    return numbers


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    numbers = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return _scale(blocks, 0) * (numbers.view(np.int8) - np.int8(16))


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    numbers = _scale(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4))
    numbers += _scale(blocks, 2)
    return numbers


def _scaled_groups(blocks: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Scales and shifts ``[n, 8, 32]`` numbers by the eight pairs of six bits that bytes 4 to 16 of a block hold."""
    low, high, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([low & 63, (both & 15) | (low >> 6) << 4], axis=-1)
    shift = np.concatenate([high & 63, (both >> 4) | (high >> 6) << 4], axis=-1)
    scaled = (_scale(blocks, 0) * scale)[:, :, None] * numbers
    scaled -= (_scale(blocks, 2) * shift)[:, :, None]
    return scaled.reshape(-1, 256)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _scaled_groups(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    return _scaled_groups(blocks, _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    numbers = ((low | high << 4).view(np.int8) - np.int8(32)).reshape(-1, 16, 16)
    scales = _scale(blocks, 208) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return (scales[:, :, None] * numbers).reshape(-1, 256)


_PLAIN = {0: ("F32", _FLOAT32), 1: ("F16", np.dtype("<f2")), 30: ("BF16", np.dtype(ml_dtypes.bfloat16))}
_QUANTIZED = {
    2: ("Q4_0", 32, 18, _q4_0),
    3: ("Q4_1", 32, 20, _q4_1),
    6: ("Q5_0", 32, 22, _q5_0),
    7: ("Q5_1", 32, 24, _q5_1),
    8: ("Q8_0", 32, 34, _q8_0),
    12: ("Q4_K", 256, 144, _q4_k),
    13: ("Q5_K", 256, 176, _q5_k),
    14: ("Q6_K", 256, 210, _q6_k),
}

# By their numbers in a file.
BLOCK_TYPES = {
    **{number: BlockType(name, 1, dtype.itemsize, dtype, None) for number, (name, dtype) in _PLAIN.items()},
    **{number: BlockType(*fields[:3], _FLOAT32, fields[3]) for number, fields in _QUANTIZED.items()},
}
