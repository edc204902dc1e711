"""Points and tangent vectors of both manifolds, by seed."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.manifolds import grassmann, stiefel

from ..linalg.cases import gaussian

MANIFOLDS = [grassmann, stiefel]
every_manifold = pytest.mark.parametrize("manifold", MANIFOLDS, ids=lambda m: m.__name__.rsplit(".", 1)[1])
# Each function is compiled once for every shape; options are static.
compiled = functools.cache(lambda f, **options: jax.jit(functools.partial(f, **options)))


def point(seed, shape):
    lead, n, k = shape
    return jnp.asarray(np.linalg.qr(gaussian(seed, *lead, n, k))[0])


def tangent(manifold, s, seed, size=None):
    """A random tangent vector, of the given norm where one is given; made by numpy."""
    s = np.asarray(s)
    x = gaussian(seed, *s.shape)
    overlap = s.mT @ x
    h = x - s @ (overlap if manifold is grassmann else (overlap + overlap.mT) / 2)
    if size is not None:
        norm = np.sqrt((h**2).sum((-2, -1)) - ((s.mT @ h) ** 2).sum((-2, -1)) / 2)[..., None, None]
        h = h * np.divide(size, norm, out=np.zeros_like(norm), where=norm > 1e-12)
    return jnp.asarray(h)


def projector(s):
    return np.asarray(s) @ np.asarray(s).mT


def same_point(manifold, got, want, atol):
    """Frames are compared as they are, subspaces by their projectors."""
    show = projector if manifold is grassmann else np.asarray
    chex.assert_trees_all_close(show(got), show(want), rtol=1e-7, atol=atol)


def stencil(f, h=1e-3):
    """Derivative at 0 by a difference of fourth order."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
