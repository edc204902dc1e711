"""Inputs of the geometry tests: few shapes, so that compiled functions are reused, and values by seed."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

few = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**31)

# Leading axes, n, k: a batch, a single column, k = n, and normal parts that can't have full rank.
SHAPES = [((3,), 7, 3), ((), 6, 1), ((), 4, 4), ((2, 1), 5, 4)]
every_shape = pytest.mark.parametrize(
    "shape", [SHAPES[0], *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES[1:])], ids=str
)


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def conditioned(seed, shape, cond):
    """Matrices ``[..., n, k]`` whose singular values run from 1 to ``1 / cond``."""
    lead, n, k = shape
    left = np.linalg.qr(gaussian(seed, *lead, n, k))[0]
    right = np.linalg.qr(gaussian(seed + 1, *lead, k, k))[0]
    return (left * np.geomspace(1, 1 / cond, k)) @ right


def defect(q):
    """Largest deviation of ``q^T q`` from the identity, in float64."""
    q = np.asarray(q, np.float64)
    return np.abs(q.mT @ q - np.eye(q.shape[-1])).max()


def nearest_orthonormal(x):
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vt
