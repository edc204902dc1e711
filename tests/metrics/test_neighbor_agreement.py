"""Agreement of neighbourhoods and kernels, and the Chamfer distance: the reference code's numbers, bounds, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, metrics

NEIGHBOURS = (metrics.mutual_knn, metrics.cycle_knn, metrics.lcs_knn, metrics.cknna)


@functools.partial(jax.jit, static_argnames="k")
def AGREEMENT(x, y, k=8):
    return {
        "mutual_knn": metrics.mutual_knn(x, y, k=k),
        "cycle_knn": metrics.cycle_knn(x, y, k=k),
        "lcs_knn": metrics.lcs_knn(x, y, k=k),
        "cknna": metrics.cknna(x, y, k=k),
        "cknna_biased": metrics.cknna(x, y, k=k, biased=True),
    }


@jax.jit
def ALIGNMENT(x, y, sigmas=(1.0, 1.0)):
    return {
        "cka_linear": metrics.cka(x, y),
        "cka_unbiased": metrics.unbiased_cka(x, y),
        "cka_rbf_sigma1": metrics.cka(x, y, kernel="rbf", sigma=jnp.stack(sigmas)),
    }


def features(n=60, p=7, q=5):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.standard_normal((n, width)).astype(np.float32)) for width in (p, q))


def test_agreement_and_alignment_are_those_of_the_reference_code(golden, x64):
    file = golden("platos-cave-3d/kernel_metrics")
    a, b = jnp.asarray(file["A"]), jnp.asarray(file["B"])
    found = AGREEMENT(a, b, int(file["topk"])) | ALIGNMENT(linalg.unit_vectors(a), linalg.unit_vectors(b))
    for name, value in found.items():
        chex.assert_trees_all_close(value, file[name], atol=1e-6)
    medians = (metrics.median_sigma(a), metrics.median_sigma(b))
    chex.assert_trees_all_close(ALIGNMENT(a, b, medians)["cka_rbf_sigma1"], file["cka_rbf_median"], atol=1e-6)
    clipped = metrics.clip_outliers(a, 0.95)
    chex.assert_trees_all_close(clipped, file["outlier_clipped_A_q95"], atol=1e-12)
    assert metrics.clip_outliers(a, 1.0) is a


def test_agreement_in_float32_is_that_in_float64(golden):
    file = golden("platos-cave-3d/kernel_metrics")
    a, b = (jnp.asarray(file[name], jnp.float32) for name in "AB")
    found = AGREEMENT(a, b) | ALIGNMENT(linalg.unit_vectors(a), linalg.unit_vectors(b))
    for name, value in found.items():
        assert value.dtype == jnp.float32
        chex.assert_trees_all_close(value, np.float32(file[name]), atol=1e-4)


def test_agreement_of_a_space_with_itself_is_perfect_and_with_noise_is_that_of_chance():
    x, y = features(120, 20, 14)  # shapes of the golden vectors, compiled once
    own = AGREEMENT(jnp.pad(y, ((0, 0), (0, 6))), 3 * y)  # zeros change no cosine
    assert own["mutual_knn"] == 1
    assert own["lcs_knn"] == 8
    assert own["cknna"] == pytest.approx(1, abs=1e-2)  # 1e-6 beside a norm of about 1e-4
    noise = AGREEMENT(x, y)
    # Of 960 slots 65 agree by chance, with a deviation of about 8.
    chance = 8 / 119
    assert abs(noise["mutual_knn"] - chance) < 4 * (chance / 960) ** 0.5
    assert abs(noise["cknna"]) < 0.1


def test_cka_by_features_is_that_by_rows_and_unbiased_where_there_are_few_examples():
    x, y = features(120, 20, 14)
    wide = jnp.pad(x, ((0, 0), (0, 100)))  # as many features as call for rows
    found, by_rows = ALIGNMENT(x, y), ALIGNMENT(wide, y)
    chex.assert_trees_all_close(by_rows, found, rtol=1e-4)
    chex.assert_trees_all_close(found["cka_linear"], _plain_cka(x, y, biased=True), rtol=1e-4)
    chex.assert_trees_all_close(found["cka_unbiased"], _plain_cka(x, y, biased=False), atol=1e-5)
    x, y = features(60, 200, 200)
    biased, unbiased = metrics.cka(x, y), metrics.unbiased_cka(x, y)
    assert biased > 0.7
    assert abs(unbiased) < 0.1


def _plain_cka(x, y, biased):
    """CKA by the matrices of all pairs."""
    x, y = (np.asarray(z, np.float64) for z in (x, y))
    n = len(x)
    k, l = x @ x.T, y @ y.T

    def hsic(k, l):
        if biased:
            h = np.eye(n) - 1 / n
            return np.trace(k @ h @ l @ h)
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
        sums = k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k @ l).sum() / (n - 2)
        return (np.trace(k @ l) + sums) / (n * (n - 3))

    return np.float32(hsic(k, l) / (np.sqrt(hsic(k, k) * hsic(l, l)) + 1e-6))


def test_cka_rbf_takes_a_width_for_each_space():
    x, y = features()
    both = metrics.cka(x, 10 * y, kernel="rbf", sigma=jnp.asarray([2.0, 20.0]))
    chex.assert_trees_all_close(both, metrics.cka(x, y, kernel="rbf", sigma=2.0), rtol=1e-4)


def test_chamfer_distance_is_the_sum_of_both_mean_distances_with_its_gradient():
    p, q = features(40, 3, 3)
    q = q[:23] + 100.0
    p = p + 100.0
    squares = np.sum((np.asarray(p)[:, None] - np.asarray(q)[None]) ** 2, -1)
    found, gradient = jax.value_and_grad(metrics.chamfer_distance)(p, q)
    assert found == pytest.approx(squares.min(1).mean() + squares.min(0).mean(), rel=1e-4)
    assert metrics.chamfer_distance(p, p) == 0
    nearest = np.asarray(q)[squares.argmin(1)]
    expected = 2 / 40 * (np.asarray(p) - nearest)
    for j, i in enumerate(squares.argmin(0)):
        expected[i] += 2 / 23 * (np.asarray(p)[i] - np.asarray(q)[j])
    chex.assert_trees_all_close(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("measure", NEIGHBOURS)
def test_neighbour_metrics_refuse_too_many_neighbours_other_counts_and_nan(measure):
    x, y = features(12)
    with pytest.raises(ValueError, match=r"k: expected [12] to 11 neighbours of 12 examples, got 12"):
        measure(x, y, k=12)
    with pytest.raises(ValueError, match=r"x, y: expected features of the same examples .* \(12, 7\) and \(11, 5\)"):
        measure(x, y[:-1], k=3)
    with pytest.raises(ValueError, match="y: expected finite features, got NaN or infinity"):
        measure(x, y.at[3, 1].set(jnp.nan), k=3)
    with pytest.raises(TypeError, match="x: expected floating-point features, got int32"):
        measure(jnp.ones((12, 3), jnp.int32), y, k=3)


def test_alignment_refuses_one_neighbour_an_unknown_kernel_few_examples_and_bad_points():
    x, y = features(12)
    with pytest.raises(ValueError, match="k: expected 2 to 11"):
        metrics.cknna(x, y, k=1)
    with pytest.raises(ValueError, match="kernel: expected one of linear, rbf, got 'cosine'"):
        metrics.cka(x, y, kernel="cosine")
    with pytest.raises(ValueError, match="expected at least 4 examples, got 3"):
        metrics.unbiased_cka(x[:3], y[:3])
    with pytest.raises(ValueError, match=r"p, q: expected points of one dimension \[points, d\]"):
        metrics.chamfer_distance(x, y)
    with pytest.raises(ValueError, match="x, q: expected entries and a quantile"):
        metrics.clip_outliers(x, 0.0)
