"""Specs of the parts that vision models are made of."""

import math

from subspace_jax.nn.param_specs import ParamSpec


def dense(
    m: int, n: int, axes: tuple[str | None, str | None], stddev: float, bias: bool = True
) -> dict[str, ParamSpec]:
    """A kernel ``[m, n]`` and its bias."""
    spec = {"kernel": ParamSpec((m, n), axes, stddev)}
    return {**spec, "bias": ParamSpec((n,), axes[1:])} if bias else spec


def scale_and_bias(width: int, scale: float = 1.0) -> dict[str, ParamSpec]:
    """The parameters of a normalisation."""
    return {"scale": ParamSpec((width,), (None,), value=scale), "bias": ParamSpec((width,), (None,))}


def conv_kernel(side: int, m: int, n: int, groups: int = 1) -> dict[str, ParamSpec]:
    """A kernel ``[side, side, m / groups, n]``, normal with deviation ``sqrt(2 / (side^2 n))``.

    The deviation keeps the variance of what flows back through a ReLU (He et al., arXiv 1502.01852).
    """
    stddev = math.sqrt(2 / (side * side * n / groups))
    return {"kernel": ParamSpec((side, side, m // groups, n), (None, None, "embed", None), stddev)}
