"""Manifolds of subspaces and of orthonormal frames, as modules of pure functions."""

from subspace_jax.manifolds import grassmann, stiefel

__all__ = ["grassmann", "stiefel"]


def __dir__():
    return __all__
