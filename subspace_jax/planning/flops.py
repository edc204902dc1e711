"""Counts matmul FLOPs in a traced function, before compilation."""

import math
from typing import NamedTuple

from jax.extend import core


class MatmulFlops(NamedTuple):
    """Matmuls and convolutions of a traced function, over all devices.

    Attributes:
      flops: Two per multiply-add.
      nbytes: Bytes of their operands and results.
    """

    flops: int = 0
    nbytes: int = 0


def count_matmul_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> MatmulFlops:
    """Counts the matmul FLOPs of a jaxpr; the body of a scan counts once per iteration.

    A ``while`` of data-dependent length counts once, a ``cond`` as its most expensive branch.  Of an op with a
    reference and a kernel, the reference counts.  The body of a ``shard_map`` counts on each of its devices.

    Args:
      jaxpr: From ``jax.make_jaxpr(f)(...)`` or ``jax.jit(f).trace(...).jaxpr``.

    Returns:
      The sums.
    """
    flops = nbytes = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        own = _own_flops(eqn)
        if own:
            flops += own
            nbytes += sum(_nbytes(v.aval) for v in (*eqn.invars, *eqn.outvars))
            continue
        inner, times = _inner(eqn)
        flops += times * inner.flops
        nbytes += times * inner.nbytes
    return MatmulFlops(flops, nbytes)


def _own_flops(eqn) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2 * eqn.outvars[0].aval.size * math.prod(left[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel, out_feature = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec[0]
        return 2 * eqn.outvars[0].aval.size * math.prod(kernel) // kernel[out_feature]
    return 0


def _inner(eqn) -> tuple[MatmulFlops, int]:
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        return max((count_matmul_flops(branch) for branch in params["branches"]), key=lambda p: p.flops), 1
    if name == "reference_or_kernel":
        return count_matmul_flops(params["reference"]), 1
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        mesh = params["mesh"]
        axes = params.get("newly_manual_axes", params.get("manual_axes", mesh.axis_names))
        times = math.prod(mesh.shape[axis] for axis in axes)
    if name == "custom_jvp_call":
        return count_matmul_flops(params["call_jaxpr"]), 1
    found = [count_matmul_flops(p) for p in params.values() if isinstance(p, core.ClosedJaxpr | core.Jaxpr)]
    return MatmulFlops(sum(p.flops for p in found), sum(p.nbytes for p in found)), times


def _nbytes(aval) -> int:
    return aval.size * aval.dtype.itemsize if hasattr(aval, "dtype") else 0
