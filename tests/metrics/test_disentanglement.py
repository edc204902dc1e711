"""Metrics of disentanglement: golden vectors of disentanglement_lib and of the authors of XFactors, known cases."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import metrics

EXACT = {"rtol": 0, "atol": 1e-10}


def grid(values=5):
    """All pairs of two factors, four of each, and their float codes."""
    pairs = np.stack(np.meshgrid(np.arange(values), np.arange(values), indexing="ij"), -1).reshape(-1, 2)
    factors = np.repeat(pairs, 4, axis=0).astype(np.int32)
    return factors.astype(np.float32), factors


@pytest.fixture(scope="module")
def rotated():
    codes, factors = grid()
    turn = np.float32([[1, 1], [-1, 1]]) / np.sqrt(np.float32(2))
    return (codes - codes.mean(axis=0)) @ turn, factors


def test_golden_discretised_codes_and_mutual_information(golden, x64):
    g = golden("xfactors/metrics")
    bins = metrics.histogram_discretize(g["codes"])
    np.testing.assert_array_equal(bins.T, g["discretised"])
    chex.assert_trees_all_close(metrics.mutual_information_matrix(bins, g["factors"]), g["mutual_information"], **EXACT)
    chex.assert_trees_all_close(metrics.factor_entropy(g["factors"]), g["factor_entropy"], **EXACT)


@pytest.mark.parametrize("name", ["mig", "modularity", "sap_continuous"])
def test_golden_scores_of_codes_and_factors(golden, x64, name):
    g = golden("xfactors/metrics")
    chex.assert_trees_all_close(getattr(metrics, name)(g["codes"], g["factors"]), g[name], **EXACT)


def test_golden_sap_from_scores(golden, x64):
    g = golden("xfactors/metrics")
    for kind, matrix in (("continuous", "continuous"), ("linear_svc", "linear_svc")):
        got = metrics.sap_from_scores(g[f"sap_score_matrix_{matrix}"])
        chex.assert_trees_all_close(got, g[f"sap_{kind}"], **EXACT)


def test_golden_dci_both_ways(golden, x64):
    g = golden("xfactors/metrics")
    lib = metrics.dci_from_importance(g["dci_importance"])
    chex.assert_trees_all_close(
        tuple(lib[:4]),
        tuple(
            g[f"dci_{name}"]
            for name in (
                "disentanglement",
                "completeness",
                "disentanglement_per_code",
                "completeness_per_factor",
            )
        ),
        **EXACT,
    )
    own = metrics.dci_from_importance(g["dci_importance"], "xfactors")
    # Ten times tighter: the two variants differ by 1e-10.
    chex.assert_trees_all_close((own[0], own[1]), (g["xf_dci_d"], g["xf_dci_c"]), rtol=0, atol=1e-11)


def test_golden_dci_scores_take_given_importances_and_scores(golden, x64):
    g = golden("xfactors/metrics")
    arguments = [g[name] for name in ("codes", "factors", "codes_test", "factors_test")]
    got = metrics.dci_scores(
        *arguments,
        importance_fn=lambda *four: (g["dci_importance"], np.clip(g["xf_dci_r2"], 0, 1)),
        variant="xfactors",
    )
    chex.assert_trees_all_close((got.disentanglement, got.informativeness), (g["xf_dci_d"], g["xf_dci_i"]), **EXACT)


def test_golden_factor_vae_votes_and_accuracies(golden, x64):
    g = golden("xfactors/metrics")
    dims = tuple(metrics.factor_vae_votes(g[f"fv_codes_{s}"], g[f"fv_batch_index_{s}"]) for s in ("val", "test"))
    for own, split in zip(dims, ("val", "test"), strict=True):
        np.testing.assert_array_equal(own, g[f"fv_argmin_{split}"])
    got = metrics.factor_vae_from_votes(dims, (g["fv_factor_val"], g["fv_factor_test"]), (3, 5))
    np.testing.assert_array_equal(got.votes, g["fv_votes_val"])
    chex.assert_trees_all_close((got.accuracy, got.score), (g["fv_train_accuracy"], g["fv_eval_accuracy"]), **EXACT)


def test_codes_that_are_the_factors_score_one():
    codes, factors = grid()
    assert metrics.mig(codes, factors) == pytest.approx(1, abs=1e-5)
    assert metrics.modularity(codes, factors) == pytest.approx(1, abs=1e-5)
    assert metrics.sap_continuous(codes, factors) == pytest.approx(1, abs=1e-5)
    both = (jnp.asarray(codes), jnp.asarray(factors))
    found = metrics.factor_vae_score(jax.random.key(0), *both, *both, num_votes=64, batch_size=8)
    assert found.score == 1
    assert found.accuracy == 1
    assert found.votes.sum() == 64
    for variant in ("disentanglement_lib", "xfactors"):
        scores = metrics.dci_from_importance(jnp.eye(3), variant)
        assert (scores.disentanglement, scores.completeness) == (pytest.approx(1, abs=1e-5),) * 2
        scores = metrics.dci_from_importance(jnp.ones((4, 3)), variant)
        assert (scores.disentanglement, scores.completeness) == (pytest.approx(0, abs=1e-5),) * 2


def test_mig_of_two_factors_rotated_by_45_degrees_is_near_zero(rotated):
    assert metrics.mig(*rotated) == pytest.approx(0, abs=0.05)
    assert metrics.modularity(*rotated) == pytest.approx(0, abs=0.05)


def test_mutual_information_is_symmetric_and_at_most_the_entropy():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-3, 4, (200, 3)), rng.integers(0, 5, (200, 3))
    there, back = metrics.mutual_information_matrix(a, b), metrics.mutual_information_matrix(b, a)
    chex.assert_trees_all_close(there, back.T, atol=1e-6)
    assert jnp.all(there <= jnp.minimum(metrics.factor_entropy(a)[:, None], metrics.factor_entropy(b)[None, :]) + 1e-6)
    assert jnp.all(there > 0)


def test_histogram_discretize_puts_a_constant_dimension_into_one_bin():
    bins = metrics.histogram_discretize(np.stack([np.ones(9), np.arange(9)], 1).astype(np.float32), 3)
    assert np.unique(bins[:, 0]).size == 1
    np.testing.assert_array_equal(bins[:, 1], [1, 1, 1, 2, 2, 2, 3, 3, 3])


def test_a_constant_dimension_never_wins_a_vote_of_factor_vae():
    codes, factors = grid()
    codes = jnp.concatenate([jnp.ones((100, 1)), jnp.asarray(codes)], axis=1)
    found = metrics.factor_vae_score(jax.random.key(0), codes, factors, codes, factors, num_votes=64, batch_size=8)
    assert found.score == 1
    assert not found.votes[:, 0].any()


@pytest.mark.slow
def test_batches_of_factor_vae_share_one_value_and_repeat_examples_only_where_there_are_too_few():
    from subspace_jax.metrics.disentanglement_votes import _fixed_factor_batches

    factors = np.int32([[0, 0]] * 30 + [[1, 1]] * 6 + [[1, 2]] * 6)
    rows, fixed = _fixed_factor_batches(jax.random.key(0), jnp.asarray(factors), num_votes=600, batch_size=8)
    of_first = []
    for own, factor in zip(np.asarray(rows), np.asarray(fixed), strict=True):
        values = factors[own, factor]
        assert (values == values[0]).all()
        few = (factors[:, factor] == values[0]).sum() < 8
        assert few or np.unique(own).size == 8
        of_first += [values[0]] if factor == 0 else []
    # Values are uniform, not examples (30 of 42 have value 0); five standard errors of 300 draws.
    assert np.mean(of_first) == pytest.approx(0.5, abs=0.15)
    assert np.mean(fixed) == pytest.approx(0.5, abs=0.1)


def test_l1_importance_finds_the_dimension_of_each_factor():
    rng = np.random.default_rng(0)
    factors = rng.integers(0, 3, (300, 2)).astype(np.int32)
    codes = np.concatenate([factors - 1, rng.standard_normal((300, 1))], axis=1).astype(np.float32)
    found = metrics.dci_scores(codes[:200], factors[:200], codes[200:], factors[200:])
    assert found.informativeness == 1
    assert found.disentanglement > 0.98
    assert found.completeness > 0.98
    importance, _ = metrics.l1_importance(codes[:200], factors[:200], codes[200:], factors[200:])
    assert importance[2].max() < 0.02 * importance.max()


@pytest.mark.slow
def test_l1_importance_is_at_a_minimum_of_its_loss(x64):
    rng = np.random.default_rng(1)
    codes = rng.standard_normal((60, 3))
    factors = (codes @ rng.standard_normal((3, 1)) > 0).astype(np.int32)
    sklearn = pytest.importorskip("sklearn.linear_model")
    penalty = 0.05
    importance, _ = metrics.l1_importance(codes, factors, codes, factors, penalty=penalty, num_steps=2000)
    # One logit w of two classes is the difference of two of w / 2 each: the same penalty.
    model = sklearn.LogisticRegression(l1_ratio=1.0, C=1 / (penalty * 60), solver="saga", tol=1e-10, max_iter=20_000)
    model.fit(codes, factors[:, 0])
    np.testing.assert_allclose(importance[:, 0], np.abs(model.coef_[0]), atol=1e-5)


CODES, FACTORS = grid(3)
FOUR = (CODES, FACTORS, CODES, FACTORS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.mig(np.full_like(CODES, np.nan), FACTORS), "codes: expected finite numbers"),
        (lambda: metrics.histogram_discretize(CODES + np.inf), "codes: expected finite numbers"),
        (lambda: metrics.mig(CODES, FACTORS * 0), "factors: expected several values of each, factor 0 has one"),
        (lambda: metrics.sap_continuous(CODES, FACTORS * 0), "factors: expected several values of each"),
        (lambda: metrics.mig(CODES[:, :1], FACTORS), "codes: expected at least two dimensions"),
        (lambda: metrics.mig(CODES, FACTORS[:-1]), r"factors: expected \[36, factors\], got shape \(35, 2\)"),
        (lambda: metrics.mig(CODES, FACTORS[:, 0]), r"factors: expected \[36, factors\], got shape \(36,\)"),
        (lambda: metrics.mig(CODES, CODES), "factors: expected integers"),
        (lambda: metrics.mutual_information_matrix(CODES, FACTORS), "bins: expected integers"),
        (lambda: metrics.histogram_discretize(CODES, 0), "num_bins: expected at least 1"),
        (lambda: metrics.modularity(CODES, FACTORS[:, :1]), "factors: expected at least two, got 1"),
        (lambda: metrics.dci_from_importance(np.ones((3, 1))), "factors: expected at least two, got 1"),
        (lambda: metrics.dci_from_importance(np.ones((1, 3))), "importance: expected at least two dimensions"),
        (lambda: metrics.dci_from_importance(-np.ones((3, 3))), "importance: expected no negative entry"),
        (lambda: metrics.dci_from_importance(np.ones((3, 3)), "lib"), "variant: expected one of"),
        (lambda: metrics.dci_scores(CODES, FACTORS[:, :1], CODES, FACTORS[:, :1]), "factors: expected at least two"),
        (lambda: metrics.dci_scores(CODES * np.nan, *FOUR[1:]), "codes: expected finite numbers"),
        (lambda: metrics.l1_importance(*FOUR, penalty=-1.0), "penalty, num_steps"),
        (lambda: metrics.sap_from_scores(np.ones((1, 2))), "scores: expected at least two dimensions"),
        (lambda: metrics.factor_vae_votes(CODES, np.zeros((3, 1), int)), "batch_idx: expected"),
        (lambda: metrics.factor_vae_score(jax.random.key(0), *FOUR, num_votes=0), "num_votes: expected at least 1"),
        (
            lambda: metrics.factor_vae_score(jax.random.key(0), CODES, FACTORS, CODES[:, :1], FACTORS),
            "codes_test, y_test: expected as many dimensions",
        ),
    ],
)
def test_metrics_of_disentanglement_refuse_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_scores_of_disentanglement_are_the_same_under_jit(rotated):
    for score in (metrics.mig, metrics.modularity, metrics.sap_continuous):
        chex.assert_trees_all_close(jax.jit(functools.partial(score))(*rotated), score(*rotated), atol=1e-6)
