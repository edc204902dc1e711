"""Coding rates: identities, bounds, gradients by blocks, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import losses

N, D, K = 24, 6, 3


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def examples():
    """Unit rows in three orthogonal planes, and labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(N) % K
    z = np.zeros((N, D))
    for i, label in enumerate(labels):
        z[i, 2 * label : 2 * label + 2] = rng.standard_normal(2)
    return unit(z), labels


Z, LABELS = examples()
MIXED = unit(Z + 0.3 * np.random.default_rng(1).standard_normal((N, D)))
SHARES = np.random.default_rng(2).dirichlet(np.ones(5), N)


def dense(z, m, eps_sq, unit_mass):
    """The rate as it is written, by ``slogdet``."""
    n, d = z.shape
    masses = np.ones(m.shape[1]) if unit_mass else m.sum(0)
    grams = np.einsum("ni,nj,nk->jik", z, m, z)
    dets = [np.linalg.slogdet(np.eye(d) + d / (mass * eps_sq) * g)[1] for mass, g in zip(masses, grams, strict=True)]
    return float(masses @ dets) / n


@functools.partial(jax.jit, static_argnames=("mass", "block_size"))
def rate_and_gradients(z, m, mass, block_size):
    def rate(z, m):
        return losses.coding_rate_membership(z, m, 0.1, mass, block_size=block_size)

    return jax.value_and_grad(rate, argnums=(0, 1))(z, m)


# 2 does not divide 5 clusters.
@pytest.mark.parametrize("mass", ["actual", "unit"])
def test_coding_rate_membership_is_the_formula_and_its_gradients_are_differences(mass, x64):
    z, m = jnp.asarray(MIXED), jnp.asarray(SHARES)
    value, grads = rate_and_gradients(z, m, mass, 2)
    np.testing.assert_allclose(value, dense(MIXED, SHARES, 0.1, mass == "unit"), rtol=1e-7)
    rng, h = np.random.default_rng(3), 1e-5
    for i, x in enumerate((MIXED, SHARES)):
        direction = rng.standard_normal(x.shape) * x  # keeps memberships positive
        ends = [[MIXED, SHARES], [MIXED, SHARES]]
        ends[0][i], ends[1][i] = x + h * direction, x - h * direction
        slope = np.subtract(*(dense(*end, 0.1, mass == "unit") for end in ends)) / (2 * h)
        np.testing.assert_allclose(np.sum(np.asarray(grads[i]) * direction), slope, rtol=1e-5)
    whole = rate_and_gradients(z, m, mass, 5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), (value, grads), whole)


def test_coding_rate_membership_and_its_gradient_hold_no_matrix_of_each_cluster():
    z, m = jnp.asarray(MIXED, jnp.float32), jnp.asarray(np.eye(N), jnp.float32)
    text = str(jax.make_jaxpr(lambda z, m: rate_and_gradients(z, m, "unit", 4))(z, m))
    assert f"f32[4,{D},{D}]" in text  # those of a block
    assert f"f32[{N},{D},{D}]" not in text
    assert f"f32[{N},{N},{D}]" not in text


def test_coding_rate_membership_of_float32_and_bfloat16_is_near_that_of_float64():
    expected = dense(MIXED, SHARES, 0.1, False)
    z, m = jnp.asarray(MIXED, jnp.float32), jnp.asarray(SHARES, jnp.float32)
    np.testing.assert_allclose(rate_and_gradients(z, m, "actual", 2)[0], expected, rtol=1e-5)
    half = losses.coding_rate_membership(z.astype(jnp.bfloat16), m.astype(jnp.bfloat16), 0.1, check=False)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, rtol=2e-2)


def test_coding_rate_is_that_of_the_transposed_and_zero_of_zeros_alone(x64):
    z = jnp.asarray(MIXED)
    a = D / (N * 0.1)
    np.testing.assert_allclose(losses.coding_rate(z, 0.1), np.linalg.slogdet(np.eye(D) + a * MIXED.T @ MIXED)[1])
    # Fewer examples than features: the Gram matrix of the other side, with the same value.
    few = MIXED[:4]
    expected = np.linalg.slogdet(np.eye(D) + D / 0.4 * few.T @ few)[1]
    np.testing.assert_allclose(losses.coding_rate(jnp.asarray(few), 0.1), expected, atol=1e-8)
    assert losses.coding_rate(0 * z, 0.1, check=False) == 0
    assert losses.coding_rate(1e-3 * z, 0.1, check=False) > 0


def test_coding_rate_in_clusters_is_at_most_that_of_all_and_reaches_it_where_they_are_alike(x64):
    z = jnp.asarray(MIXED)
    whole = losses.coding_rate(z, 0.1)
    for seed in range(5):
        m = np.random.default_rng(seed).dirichlet(np.full(5, 0.5), N)
        assert rate_and_gradients(z, jnp.asarray(m), "actual", 2)[0] <= whole
    alike = np.tile(np.random.default_rng(9).dirichlet(np.ones(5)), (N, 1))
    np.testing.assert_allclose(rate_and_gradients(z, jnp.asarray(alike), "actual", 2)[0], whole, rtol=1e-7)
    uniform = jnp.full((N, N), 1 / N)
    for mass in ("actual", "unit"):
        np.testing.assert_allclose(losses.coding_rate_membership(z, uniform, 0.1, mass), whole, rtol=1e-7)


def test_coding_rate_of_examples_alone_is_that_of_unit_vectors(x64):
    found = losses.coding_rate_membership(jnp.asarray(MIXED), jnp.eye(N), 0.1, "unit")
    np.testing.assert_allclose(found, np.log(1 + D / 0.1), rtol=1e-12)


def test_mcr2_loss_prefers_the_right_labels_of_orthogonal_subspaces_to_100_permutations(x64):
    z = jnp.asarray(Z)
    rng = np.random.default_rng(0)
    orders = np.stack([np.arange(N), *(rng.permutation(N) for _ in range(100))])
    one_hot = jnp.asarray(np.eye(K)[LABELS[orders]])
    found, *others = -jax.lax.map(lambda m: losses.mcr2_loss(z, m, 0.5)[0], one_hot)
    assert found > 0
    assert found > max(others)


def test_tcr_loss_normalizes_means_of_views_if_asked():
    z = jnp.asarray(MIXED, jnp.float32)
    other = jnp.asarray(Z, jnp.float32)
    mean = unit(np.asarray(z + other))
    expected = -losses.coding_rate(jnp.asarray(mean), 0.2) / 2
    np.testing.assert_allclose(losses.tcr_loss(z, other, 0.2, 0.0, normalize_mean=True), expected, rtol=1e-5)
    assert losses.tcr_loss(z, other, 0.2, 0.0) > expected


NAN = np.where(np.eye(N, D) > 0, np.nan, Z)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: losses.coding_rate(Z, 0.0), "eps_sq: expected a squared precision above 0, got 0.0"),
        (lambda: losses.mcr2_loss(Z, SHARES, -1.0), "eps_sq: expected a squared precision above 0, got -1.0"),
        (lambda: losses.tcr_loss(Z, Z, float("nan"), 1.0), "eps_sq: expected"),
        (lambda: losses.coding_rate(Z[0], 0.1), r"z: expected features \[n, d\], got shape \(6,\)"),
        (lambda: losses.coding_rate(NAN, 0.1), "z: expected finite numbers, got NaN"),
        (lambda: losses.coding_rate(1.01 * Z, 0.1), "z: expected rows of unit length, got one that is off by 0.01"),
        (lambda: losses.coding_rate_membership(2 * Z, SHARES, 0.1), "z: expected rows of unit length"),
        (lambda: losses.tcr_loss(Z, 2 * Z, 0.1, 1.0), "z2: expected rows of unit length"),
        (lambda: losses.tcr_loss(Z, Z[:3], 0.1, 1.0), "z1, z2: expected two views of the same shape"),
        (lambda: losses.coding_rate_membership(Z, SHARES[1:], 0.1), r"m: expected memberships \[24, clusters\]"),
        (lambda: losses.coding_rate_membership(Z, SHARES - 1, 0.1), "m: expected memberships that are not negative"),
        (lambda: losses.coding_rate_membership(Z, SHARES * np.nan, 0.1), "m: expected finite numbers"),
        (
            lambda: losses.coding_rate_membership(Z, SHARES * [1, 1, 0, 1, 1], 0.1, "unit"),
            "m: expected an example in each cluster of unit mass, got none in column 2",
        ),
        (lambda: losses.coding_rate_membership(Z, SHARES, 0.1, "none"), "mass: expected one of"),
        (lambda: losses.coding_rate_membership(Z, SHARES, 0.1, block_size=0), "block_size: expected at least 1"),
    ],
)
def test_coding_rates_refuse_what_can_not_serve(call, error):
    with pytest.raises(ValueError, match=error):
        call()


def test_coding_rates_take_other_lengths_and_empty_clusters_where_they_may():
    z, m = jnp.asarray(2 * Z, jnp.float32), jnp.asarray(SHARES * [1, 1, 0, 1, 1], jnp.float32)
    assert losses.coding_rate(z, 0.1, check=False) > losses.coding_rate(z / 2, 0.1)
    value, grads = rate_and_gradients(z / 2, m, "actual", 2)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)
