"""Agreement of partitions, beside scikit-learn and SciPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import normalized_mutual_info_score

from subspace_jax import metrics

NMI = jax.jit(metrics.normalized_mutual_info)
MATCH = jax.jit(metrics.match_assignments, static_argnums=2)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), parts=st.sampled_from([1, 2, 5, 60]), noise=st.floats(0, 1))
def test_normalized_mutual_info_is_that_of_scikit_learn(seed, parts, noise):
    rng = np.random.default_rng(seed)
    labels = rng.integers(parts, size=60).astype(np.int32) - 3
    found = np.where(rng.random(60) < noise, rng.integers(4, size=60), labels).astype(np.int32)
    # Entropies of some nats in float32, of which a difference is taken.
    np.testing.assert_allclose(NMI(labels, found), normalized_mutual_info_score(labels, found), atol=3e-6)


def test_normalized_mutual_info_refuses_other_numbers_of_examples():
    with pytest.raises(ValueError, match="labels, assignments: expected"):
        metrics.normalized_mutual_info(np.zeros(3, np.int32), np.zeros(4, np.int32))
    with pytest.raises(ValueError, match="labels, assignments: expected"):
        metrics.normalized_mutual_info(np.zeros(0, np.int32), np.zeros(0, np.int32))


def test_match_assignments_undoes_every_permutation_of_the_names():
    previous = np.random.default_rng(0).integers(4, size=30).astype(np.int32)
    for names in itertools.permutations(range(4)):
        np.testing.assert_array_equal(MATCH(previous, np.asarray(names, np.int32)[previous], 4), previous)


def test_match_assignments_is_the_authors_corrected_relabelling(golden):
    pieces = golden("dynamic-subspace-learners/pieces")
    previous, current = (pieces[f"reassign_{name}"].astype(np.int32) for name in ("prev", "curr"))
    found = np.asarray(MATCH(previous, current, 4))
    np.testing.assert_array_equal(found, pieces["reassign_out"])
    costs = pieces["reassign_costs"]
    reached = sum(costs[c, found[current == c][0]] for c in range(4))
    assert reached == costs[linear_sum_assignment(costs)].sum()


def test_match_assignments_keeps_examples_that_are_in_no_cluster():
    previous = np.asarray([0, 0, 1, 1, -1, 1], np.int32)
    current = np.asarray([1, 1, 0, 0, 0, -1], np.int32)
    np.testing.assert_array_equal(MATCH(previous, current, 2), [0, 0, 1, 1, 1, -1])


def test_match_assignments_refuses_what_does_not_fit():
    x = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="previous, current: expected"):
        metrics.match_assignments(x, x[:2], 2)
    with pytest.raises(ValueError, match="num_clusters: expected at least 1"):
        metrics.match_assignments(x, x, 0)
