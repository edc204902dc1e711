"""Counts the FLOPs of a convolution in a compiled module."""

import functools
import math
import re
from collections.abc import Mapping

from subspace_jax.planning.hlo import Op


def convolution_flops(op: Op, ops: Mapping[str, Op]) -> int:
    """Counts two FLOPs per multiply-add of a convolution, without those that multiply padding.

    The TPU compiler writes batched matmuls as convolutions with dilated, padded windows, which mostly cover padding;
    that part is free.
    """
    left, right = (ops[name].results[0].shape for name in op.operands[:2])
    out = op.made.shape
    inputs, _, out_dims = (op.attribute("dim_labels") or "").partition("->")
    left_dims, _, right_dims = inputs.partition("_")
    spatial = [label for label in out_dims if label.isdigit()]
    window = op.attribute("window") or ""

    def field(name: str, default: int) -> list[int]:
        found = re.search(rf"\b{name}=([\d_x\-]+)", window)
        return [int(v) for v in found[1].split("x")] if found else [default] * len(spatial)

    pads = re.search(r"\bpad=([\d_x\-]+)", window)
    low = [int(p.split("_")[0]) for p in pads[1].split("x")] if pads else [0] * len(spatial)
    stride, dilate, inner = field("stride", 1), field("lhs_dilate", 1), field("rhs_dilate", 1)
    multiply_adds = math.prod(out[out_dims.index(label)] for label in "bf") * right[right_dims.index("i")]
    for i, label in enumerate(sorted(spatial)):
        sizes = (out[out_dims.index(label)], right[right_dims.index(label)], left[left_dims.index(label)])
        multiply_adds *= _overlaps(*sizes, stride[i], dilate[i], inner[i], low[i])
    return 2 * multiply_adds


@functools.cache
def _overlaps(out: int, kernel: int, size: int, stride: int, dilate: int, inner: int, low: int) -> int:
    """Counts the pairs of an output position and a window position that read an element of the input."""
    if (kernel, stride, dilate, low) == (1, 1, 1, 0):
        return min(out, size)
    span = (size - 1) * dilate + 1
    count = 0
    for position in range(out):
        starts = (position * stride + k * inner - low for k in range(kernel))
        count += sum(1 for at in starts if 0 <= at < span and at % dilate == 0)
    return count
