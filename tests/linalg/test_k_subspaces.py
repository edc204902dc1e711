"""K-subspaces: recovery, monotone objective, empty clusters, starts and affine subspaces."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, metrics
from subspace_jax.linalg.k_subspaces import _fit, _run

K_SUBSPACES = jax.jit(linalg.k_subspaces, static_argnames=("k", "d", "restarts", "affine"))

STEP = jax.jit(lambda x, init: _run(x, 3, 2, _fit(x, init, jnp.full(len(x), jnp.inf), 3, 2, False), False, 1))


def drawn(seed, n, d, k, each, dtype=np.float32):
    rng = np.random.default_rng(seed)
    bases = np.linalg.qr(rng.standard_normal((k, n, d)))[0]
    coefficients = rng.standard_normal((k, each, d))
    coefficients /= np.linalg.norm(coefficients, axis=2, keepdims=True)
    return np.einsum("ked,knd->ken", coefficients, bases).reshape(-1, n).astype(dtype), bases.astype(dtype)


def recovered(seed, n, d, k, each):
    x, bases = drawn(seed, n, d, k, each)
    found = K_SUBSPACES(jax.random.key(seed), x, k=k, d=d, restarts=60)
    return metrics.match_subspaces(found.bases, jnp.asarray(bases)).errors.max() < 1e-3


def test_k_subspaces_recovers_two_subspaces_from_twice_their_dimension_in_points():
    # Ten of ten seeds do; with as many points as dimensions none can.
    assert sum(recovered(seed, 24, 3, 2, 6) for seed in range(3)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("each", "least", "most"), [(2, 0, 0), (3, 1, 6), (4, 10, 10), (6, 10, 10), (12, 10, 10), (30, 10, 10)]
)
def test_recovery_of_two_subspaces_by_number_of_points(each, least, most):
    assert least <= sum(recovered(seed, 24, 3, 2, each) for seed in range(10)) <= most


@pytest.mark.slow
@pytest.mark.parametrize(("each", "least", "most"), [(4, 0, 0), (5, 2, 7), (8, 8, 10), (40, 10, 10)])
def test_recovery_of_three_subspaces_by_number_of_points(each, least, most):
    assert least <= sum(recovered(seed, 48, 4, 3, each) for seed in range(10)) <= most


def test_the_objective_never_decreases_from_given_assignments_and_an_empty_cluster_gets_the_worst_rows():
    x, _ = drawn(0, 8, 2, 3, 12)
    at, found = jnp.asarray(np.where(np.arange(36) < 12, 0, 1), jnp.int32), []  # cluster 2 is empty
    for _ in range(8):
        one = STEP(x, at)
        at = one.assignments
        found.append(float(one.objective))
    assert all(b >= a - 1e-6 for a, b in itertools.pairwise(found))
    assert found[0] < found[-1]
    assert len(np.unique(at)) == 3
    np.testing.assert_allclose(found[-1], 1, atol=1e-4)
    assert linalg.orthonormality_error(one.bases).max() < 1e-5


def test_affine_subspaces_away_from_the_origin_are_found_and_the_objective_is_the_explained_length():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 40, 1)) * rng.standard_normal((2, 1, 6)) + 5 * rng.standard_normal((2, 1, 6))
    x = x.reshape(80, 6).astype(np.float32)
    found = K_SUBSPACES(jax.random.key(0), x, k=2, d=1, restarts=5, affine=True)
    assert metrics.clustering_accuracy(np.repeat([0, 1], 40), found.assignments) == 1
    np.testing.assert_allclose(found.objective, np.square(x).sum(1).mean(), rtol=1e-4)
    at = np.asarray(found.assignments)
    left = x - np.asarray(found.means)[at]
    left = left - np.einsum("rn,rnd,rmd->rm", left, np.asarray(found.bases)[at], np.asarray(found.bases)[at])
    assert np.abs(left).max() < 1e-2


def test_k_means_gives_an_emptied_cluster_the_farthest_row():
    # A single step from these centers leaves the last one empty.
    x = jnp.asarray([[0.0], [0.1], [1.0], [1.1], [9.0]])
    from subspace_jax.linalg.kmeans import _moved

    moved = _moved(jnp.asarray([[0.0], [1.0], [50.0]]), jnp.asarray([False, False, True]), x, jnp.square(x[:, 0]), 0.1)
    np.testing.assert_array_equal(moved, [[0.0], [1.0], [9.0]])


X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"k": 0, "d": 1}, "k: expected 1 to 6, the number of rows, got 0"),
        ({"k": 7, "d": 1}, "k: expected 1 to 6, the number of rows, got 7"),
        ({"k": 2, "d": 4}, "d: expected 1 to 3, the width of the rows, got 4"),
        ({"k": 2, "d": 1, "restarts": 0}, "restarts: expected at least 1"),
        ({"k": 2, "d": 1, "init": np.zeros(5, np.int32)}, r"init: expected integers \[6\]"),
        ({"k": 2, "d": 1, "x": X[0]}, r"x: expected \[rows, n\]"),
        ({"k": 2, "d": 1, "x": X / 0 * 0}, "x: expected finite numbers, got NaN"),
    ],
)
def test_k_subspaces_refuses_what_can_not_serve(options, error):
    with pytest.raises(ValueError, match=error), np.errstate(all="ignore"):
        linalg.k_subspaces(jax.random.key(0), **{"x": X, **options})


def test_explained_energy_of_constant_means_is_that_of_numpy():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 200)).astype(np.float32)
    bases = np.linalg.qr(rng.standard_normal((16, 200, 2)))[0].astype(np.float32)
    for means in (np.zeros((16, 200), np.float32), rng.standard_normal((16, 200)).astype(np.float32)):
        apart = x[:, None] - means[None]
        left = np.sum(apart**2, axis=2) - np.sum(np.einsum("rkn,knd->rkd", apart, bases) ** 2, axis=2)
        found = jax.jit(functools.partial(linalg.explained_energy, means=jnp.asarray(means)))(x, bases)
        np.testing.assert_allclose(found, np.sum(x**2, axis=1, keepdims=True) - left, atol=2e-3)
