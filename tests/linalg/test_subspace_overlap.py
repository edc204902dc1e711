import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from subspace_jax import linalg

from .cases import gaussian

ETAS = (0.01, 0.1, 0.5, 0.9, 0.99)
# One compilation for every share of a shape.
overlap = jax.jit(linalg.mode_subspace_overlap, static_argnums=3)
basis = jax.jit(linalg.energy_basis, static_argnums=2)


@pytest.mark.parametrize("name", ["a.w", "b.w"])
def test_mode_subspace_overlap_is_golden(golden, name):
    g = golden("safety-subspaces/mso")
    du, dh = (jnp.asarray(g[f"{name}/{x}"]) for x in ("du", "dh"))
    for eta in ETAS:
        got = overlap(du, dh, eta)
        chex.assert_trees_all_close(got.mso, g[f"{name}/{eta}/mso"], rtol=0, atol=1e-3)
        assert (got.k_a, got.k_b) == (g[f"{name}/{eta}/ku"], g[f"{name}/{eta}/kh"])
        chex.assert_trees_all_close(got.random_baseline, g[f"{name}/{eta}/rand"], rtol=1e-6)


def test_energy_bases_have_the_golden_principal_angles(golden):
    g = golden("safety-subspaces/mso")
    for eta in (0.1, 0.9):
        q = [basis(jnp.asarray(g[f"a.w/{x}"]), eta) for x in ("du", "dh")]
        a, b = (x.q[:, : int(x.kept.sum())] for x in q)
        cosines = np.cos(linalg.principal_angles(a, b))
        chex.assert_trees_all_close(cosines, np.minimum(g[f"a.w/{eta}/angles_cos"], 1), rtol=0, atol=1e-3)
        chex.assert_trees_all_close(linalg.subspace_overlap(a, b), np.mean(cosines**2), rtol=1e-5)


def test_mode_subspace_overlap_has_its_invariances(x64):
    a, b = jnp.asarray(gaussian(0, 12, 20)), jnp.asarray(gaussian(1, 12, 20))
    turn = jnp.asarray(np.linalg.qr(gaussian(2, 20, 20))[0])
    got = overlap(a, b, 0.5)
    assert 0 < got.mso < 1
    chex.assert_trees_all_close(overlap(b, a, 0.5).mso, got.mso, rtol=1e-12)
    chex.assert_trees_all_close(overlap(3e3 * a @ turn, 1e-9 * b, 0.5), got, rtol=1e-9)
    chex.assert_trees_all_close(overlap(a, a, 0.5).mso, 1.0, rtol=1e-12)


def test_mode_subspace_overlap_is_0_of_orthogonal_and_1_of_nested_spaces(x64):
    frame = np.linalg.qr(gaussian(0, 12, 12))[0]
    first, nested, rest = (
        jnp.asarray(frame[:, k] @ gaussian(1, n, 20)) for k, n in ((slice(4), 4), (slice(2), 2), (slice(4, 12), 8))
    )
    chex.assert_trees_all_close(overlap(first, rest, 1.0).mso, 0.0, atol=1e-20)
    chex.assert_trees_all_close(overlap(first, nested, 1.0), linalg.MSOResult(1.0, 4, 2, 4 / 12), rtol=1e-12)


def test_subspace_overlap_is_the_mean_squared_cosine_of_scipys_angles(x64):
    a, b = (np.linalg.qr(gaussian(seed, 3, 9, 4))[0] for seed in (0, 1))
    want = [np.mean(np.cos(scipy.linalg.subspace_angles(x, y)) ** 2) for x, y in zip(a, b, strict=True)]
    chex.assert_trees_all_close(linalg.subspace_overlap(jnp.asarray(a), jnp.asarray(b)), np.array(want), rtol=1e-10)


def test_mode_subspace_overlap_of_independent_matrices_is_its_baseline():
    got = overlap(*(jax.random.normal(jax.random.key(i), (300, 12, 20)) for i in (0, 1)), 0.5)
    d = 12
    want = got.k_a * got.k_b / (d * np.minimum(got.k_a, got.k_b))
    chex.assert_trees_all_close(got.random_baseline, want, rtol=1e-6)
    assert abs(np.mean(got.mso) / np.mean(want) - 1) < 0.05


@pytest.mark.parametrize(("eta", "k"), [(0.25, 1), (0.5, 2), (0.51, 3), (1.0, 4)])
def test_energy_basis_takes_an_exact_threshold_as_reached(eta, k):
    equal = jnp.stack([jnp.eye(4), jnp.asarray(np.linalg.qr(gaussian(0, 4, 4))[0], jnp.float32)])
    assert basis(equal, eta).kept.sum(-1).tolist() == [k, k]


def test_energy_basis_finds_a_planted_rank_with_few_vectors():
    low = jnp.asarray(gaussian(0, 30, 3) @ gaussian(1, 3, 25), jnp.float32)
    exact, sketched = basis(low, 0.9999), basis(low, 0.9999, 5)
    assert exact.q.shape == (30, 25)
    assert sketched.q.shape == (30, 5)
    assert exact.kept.sum() == sketched.kept.sum() == 3
    chex.assert_trees_all_close(linalg.subspace_overlap(exact.q[:, :3], sketched.q[:, :3]), 1.0, rtol=1e-5)


def test_zero_and_infinite_matrices_have_no_subspace_and_an_overlap_of_nan():
    one = jnp.eye(4)
    for bad in (jnp.zeros((4, 4)), one.at[0, 0].set(jnp.inf)):
        got = overlap(bad, one, 0.5)
        assert np.isnan(got.mso)
        assert (got.k_a, got.k_b) == (0, 2)


def test_energy_basis_of_half_precision_and_of_tiny_values_is_that_of_the_matrix():
    x = jnp.asarray(gaussian(0, 6, 5), jnp.bfloat16)
    want = basis(x.astype(jnp.float32), 0.9)
    got = basis(x, 0.9)
    assert got.q.dtype == jnp.float32
    chex.assert_trees_all_equal(got, want)
    assert (basis(x.astype(jnp.float32) * jnp.float32(2.0**-80), 0.9).kept == want.kept).all()


def test_mode_subspace_overlap_broadcasts_leading_axes(x64):
    a, b = jnp.asarray(gaussian(0, 3, 6, 5)), jnp.asarray(gaussian(1, 6, 4))
    got = overlap(a, b, 0.5)
    for i in range(3):
        want = overlap(a[i], b, 0.5)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], got), want, rtol=1e-9)


def test_wrong_input_of_overlaps_is_refused():
    x = jnp.ones((4, 3))
    for eta in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="eta"):
            linalg.energy_basis(x, eta)
    with pytest.raises(ValueError, match="max_rank"):
        linalg.energy_basis(x, 0.5, 0)
    with pytest.raises(ValueError, match="m: expected matrices"):
        linalg.energy_basis(jnp.ones((4, 0)), 0.5)
    with pytest.raises(TypeError, match="m: expected floating"):
        linalg.energy_basis(jnp.ones((4, 3), jnp.int32), 0.5)
    with pytest.raises(ValueError, match="of one d"):
        linalg.mode_subspace_overlap(x, jnp.ones((5, 3)), 0.5)
    with pytest.raises(ValueError, match="one space"):
        linalg.subspace_overlap(x, jnp.ones((5, 3)))
