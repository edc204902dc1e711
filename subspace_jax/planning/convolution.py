"""Counts what a convolution of a compiled module really multiplies."""

import functools
import math
import re
from collections.abc import Mapping

from subspace_jax.planning.hlo import Op


def convolution_flops(op: Op, ops: Mapping[str, Op]) -> int:
    """Counts two FLOPs for every product of a convolution that is of two numbers and not of padding.

    The TPU compiler writes batched products as convolutions with dilated, padded windows, in which most places meet
    padding; those cost nothing.
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
    products = math.prod(out[out_dims.index(label)] for label in "bf") * right[right_dims.index("i")]
    for i, label in enumerate(sorted(spatial)):
        sizes = (out[out_dims.index(label)], right[right_dims.index(label)], left[left_dims.index(label)])
        products *= _meetings(*sizes, stride[i], dilate[i], inner[i], low[i])
    return 2 * products


@functools.cache
def _meetings(out: int, kernel: int, size: int, stride: int, dilate: int, inner: int, low: int) -> int:
    """Pairs of a place of the result and one of the window that meet a number."""
    if (kernel, stride, dilate, low) == (1, 1, 1, 0):
        return min(out, size)
    span = (size - 1) * dilate + 1
    count = 0
    for place in range(out):
        starts = (place * stride + k * inner - low for k in range(kernel))
        count += sum(1 for at in starts if 0 <= at < span and at % dilate == 0)
    return count
