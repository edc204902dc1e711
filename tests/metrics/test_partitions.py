"""Scores of clusterings and of coefficients: golden values, scikit-learn, invariances and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as peer
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_jax import linalg, metrics


@pytest.mark.parametrize("case", range(5))
def test_scores_are_the_golden_ones(case, golden, x64):
    pieces = golden("clustering-common/pieces")
    y, p = pieces[f"m{case}_true"], pieces[f"m{case}_pred"]
    # Each example as often as the others changes no share, and gives all cases one shape to compile.
    nmi = float(metrics.normalized_mutual_info(*(np.tile(labels, 86100 // len(y)) for labels in (y, p))))
    scores = metrics.cluster_scores(y, p)
    found = [
        scores.accuracy, nmi, scores.ari, *metrics.pair_f_score(y, p), scores.macro_f1, scores.purity, scores.ami
    ]  # fmt: skip
    np.testing.assert_allclose(found, pieces[f"m{case}_values"], atol=1e-12)
    assert scores.nmi == pytest.approx(nmi, abs=1e-12)
    assert scores.pair_f == found[5]


labels = st.lists(st.integers(-2, 3), min_size=30, max_size=30)


@settings(max_examples=25, deadline=None)
@given(y=labels, p=labels, names=st.permutations(range(100, 106)))
def test_scores_are_those_of_scikit_learn_under_any_names(y, p, names):
    y, p = np.asarray(y), np.asarray(p)
    found = metrics.cluster_scores(y, np.asarray(names)[p + 2])
    assert found.nmi == pytest.approx(peer.normalized_mutual_info_score(y, p), abs=1e-9)
    assert found.ari == pytest.approx(peer.adjusted_rand_score(y, p), abs=1e-9)
    assert found.ami == pytest.approx(peer.adjusted_mutual_info_score(y, p), abs=1e-9)
    other = metrics.cluster_scores(np.asarray(names)[y + 2], p)
    # The matched F1 depends on the matching, of which several may be the best.
    np.testing.assert_allclose(found._replace(macro_f1=0), other._replace(macro_f1=0), atol=1e-9)
    assert found.purity >= found.accuracy
    np.testing.assert_array_equal(metrics.contingency(y, p), peer.cluster.contingency_matrix(y, p))
    matched = metrics.best_label_map(y, p)
    assert found.accuracy == np.mean([matched.get(int(b)) == a for a, b in zip(y, p, strict=True)])
    renamed = np.asarray([matched.get(int(b), 99) for b in p])
    macro = peer.f1_score(y, renamed, average="macro", labels=np.unique(y), zero_division=0)
    assert metrics.matched_macro_f1(y, p) == pytest.approx(macro, abs=1e-9)


def test_scores_of_equal_partitions_are_one_and_of_one_cluster_the_largest_share():
    y = np.asarray([5, 5, 5, 9, 9, -1])
    np.testing.assert_allclose(metrics.cluster_scores(y, y + 7), 1)
    one = metrics.cluster_scores(y, np.zeros(6, int))
    assert (one.accuracy, one.nmi, one.ari) == (0.5, 0, 0)
    np.testing.assert_allclose(metrics.cluster_scores([3], [4]), 1)


def test_adjusted_rand_index_of_random_labels_is_zero_on_average():
    rng = np.random.default_rng(0)
    draws = [metrics.adjusted_rand_index(rng.integers(5, size=2000), rng.integers(4, size=2000)) for _ in range(200)]
    assert abs(np.mean(draws)) < 0.02


def test_pair_counts_of_a_hundred_thousand_examples_do_not_overflow():
    y = np.arange(100_000, dtype=np.int32) % 2
    assert metrics.adjusted_rand_index(y, 1 - y) == 1
    assert metrics.pair_f_score(y, y * 0).precision == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("average", ["arithmetic", "geometric", "max", "min"])
def test_normalized_mutual_info_takes_the_means_of_scikit_learn(average):
    y, p = np.asarray([0, 0, 1, 1, 2, 2], np.int32), np.asarray([0, 0, 0, 1, 1, 1], np.int32)
    found = metrics.normalized_mutual_info(y, p, average)
    assert found == pytest.approx(peer.normalized_mutual_info_score(y, p, average_method=average), abs=1e-6)
    assert metrics.normalized_mutual_info(y, y * 0, average) == 0


def test_subspace_preserving_error_is_the_share_of_coefficients_of_other_labels():
    c = jnp.asarray([[0.0, 3.0, -1.0], [2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    y = jnp.asarray([0, 0, 1])
    expected = (0.25 + 0 + 1) / 3
    error = jax.jit(metrics.subspace_preserving_error)
    assert error(c, y) == pytest.approx(expected, abs=1e-6)
    assert error(linalg.top_entries(c, 2), y) == pytest.approx(expected, abs=1e-6)


def test_connectivity_is_the_least_second_eigenvalue_over_classes():
    from scipy.sparse.csgraph import laplacian

    rng = np.random.default_rng(0)
    c, y = rng.standard_normal((24, 24)).astype(np.float32), np.repeat([0, 1, 2], 8)
    c[rng.random((24, 24)) < 0.6] = 0
    half = np.abs(c) / np.linalg.norm(c, axis=1, keepdims=True) / 2
    w = half + half.T
    seconds = [np.linalg.eigvalsh(laplacian(w[y == k][:, y == k], normed=True))[1] for k in range(3)]
    found = jax.jit(lambda c: (metrics.connectivity(c, y), metrics.connectivity(linalg.top_entries(c, 24), y)))
    np.testing.assert_allclose(found(c), min(seconds), atol=1e-5)
    c[y == 1] = 0  # a class without a link has eight parts
    np.testing.assert_allclose(found(c), 0, atol=1e-5)


def test_match_subspaces_finds_the_permutation_and_the_errors():
    bases = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 6, 2)))[0].astype(np.float32)
    found = metrics.match_subspaces(jnp.asarray(bases[[2, 0, 1]]), jnp.asarray(bases))
    np.testing.assert_array_equal(found.order, [1, 2, 0])
    assert found.errors.max() < 1e-3


def test_scores_of_clusterings_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"y, p: expected labels \[examples\] of one length, got \[3\] and \[2\]"):
        metrics.cluster_scores([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match=r"y, p: expected labels \[examples\] of one length, got \[0\] and \[0\]"):
        metrics.contingency(np.zeros(0, int), np.zeros(0, int))
    with pytest.raises(TypeError, match="y, p: expected integers, got float64"):
        metrics.purity([0.5, 1], [1, 2])
    with pytest.raises(ValueError, match="average: expected one of arithmetic"):
        metrics.normalized_mutual_info(np.zeros(3, int), np.zeros(3, int), "harmonic")
    with pytest.raises(ValueError, match=r"c: expected coefficients \[n, n\]"):
        metrics.subspace_preserving_error(jnp.ones((3, 2)), jnp.ones(3, int))
    with pytest.raises(ValueError, match=r"labels: expected one of each row, \[3\]"):
        metrics.connectivity(jnp.ones((3, 3)), np.ones(2, int))
    with pytest.raises(ValueError, match="labels: expected a class of two examples or more"):
        metrics.connectivity(jnp.ones((3, 3)), np.arange(3))
    with pytest.raises(ValueError, match="found, true: expected bases"):
        metrics.match_subspaces(jnp.ones((2, 3, 1)), jnp.ones((3, 3, 1)))
