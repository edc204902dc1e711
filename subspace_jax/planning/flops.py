"""Counts products in a traced function, before any compiler has seen it."""

import math
from typing import NamedTuple

from jax.extend import core


class Products(NamedTuple):
    """Matrix products and convolutions of a traced function, over all devices.

    Attributes:
      flops: Two for each multiplication with its addition.
      nbytes: Bytes of what they take and give.
    """

    flops: int = 0
    nbytes: int = 0


def count_products(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> Products:
    """Counts the products of a jaxpr; the body of a scan counts as often as it runs.

    A ``while`` whose length depends on data counts once, a ``cond`` as its most expensive branch.  Where an op has a
    reference and a kernel, the reference counts.  What ``shard_map`` runs counts on each of its devices.

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
    return Products(flops, nbytes)


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


def _inner(eqn) -> tuple[Products, int]:
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        return max((count_products(branch) for branch in params["branches"]), key=lambda p: p.flops), 1
    if name == "reference_or_kernel":
        return count_products(params["reference"]), 1
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":
        mesh = params["mesh"]
        axes = params.get("newly_manual_axes", params.get("manual_axes", mesh.axis_names))
        times = math.prod(mesh.shape[axis] for axis in axes)
    if name == "custom_jvp_call":
        return count_products(params["call_jaxpr"]), 1
    found = [count_products(p) for p in params.values() if isinstance(p, core.ClosedJaxpr | core.Jaxpr)]
    return Products(sum(p.flops for p in found), sum(p.nbytes for p in found)), times


def _nbytes(aval) -> int:
    return aval.size * aval.dtype.itemsize if hasattr(aval, "dtype") else 0
