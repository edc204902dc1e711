"""Terms of variational autoencoders."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import losses


def test_gaussian_kl_is_zero_with_zero_gradient_at_the_prior():
    zero = jnp.zeros((3, 2))
    value, grads = jax.value_and_grad(losses.gaussian_kl, argnums=(0, 1))(zero, zero)
    assert value == 0
    assert not any(g.any() for g in grads)


def test_gaussian_kl_is_the_mean_over_the_batch_of_the_sum_over_dimensions():
    mu, logvar = jnp.asarray([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros((2, 2))
    chex.assert_trees_all_close(losses.gaussian_kl(mu, logvar), (0.5 + 2.0) / 2)


def test_gaussian_kl_and_reparameterize_clip_the_logarithm_of_the_variance():
    mu, big = jnp.zeros((2, 1)), jnp.full((2, 1), 200.0)
    assert jnp.isfinite(losses.gaussian_kl(mu, big))
    assert jnp.all(losses.reparameterize(jax.random.key(0), mu, -big) == pytest.approx(0, abs=1e-3))
    assert jnp.all(jnp.isfinite(losses.reparameterize(jax.random.key(0), mu, big)))


def test_gaussian_kl_of_no_dimensions_is_zero():
    assert losses.gaussian_kl(jnp.zeros((3, 0)), jnp.zeros((3, 0))) == 0


@pytest.mark.slow
def test_reparameterize_has_the_moments_and_the_gradient_of_its_gaussian():
    mu, logvar = jnp.full((40_000, 1), 2.0), jnp.full((40_000, 1), np.log(0.25).astype(np.float32))
    drawn = losses.reparameterize(jax.random.key(0), mu, logvar)
    # Five standard errors of 40,000 draws.
    assert jnp.mean(drawn) == pytest.approx(2.0, abs=0.0125)
    assert jnp.std(drawn) == pytest.approx(0.5, abs=0.01)
    noise = (drawn - mu) / 0.5
    _, pull = jax.vjp(lambda m, v: losses.reparameterize(jax.random.key(0), m, v), mu, logvar)
    of_mu, of_logvar = pull(jnp.ones_like(mu))
    chex.assert_trees_all_close(of_mu, jnp.ones_like(mu))
    chex.assert_trees_all_close(of_logvar, 0.25 * noise, rtol=1e-5, atol=1e-6)


def test_cross_correlation_is_that_of_numpy(x64):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((20, 3)), rng.standard_normal((20, 2))
    # 1e-8 is added to the product of deviations, which are about 1.
    chex.assert_trees_all_close(losses.cross_correlation(a, b), np.corrcoef(a.T, b.T)[:3, 3:], atol=1e-7)


def test_cross_correlation_penalty_has_a_finite_gradient_where_a_column_is_constant_or_nothing_correlates():
    b = jnp.asarray([[1.0], [-1.0], [1.0], [-1.0]])
    for a in (jnp.zeros((4, 2)), jnp.asarray([[1.0], [1.0], [-1.0], [-1.0]])):
        value, grad = jax.value_and_grad(losses.cross_correlation_penalty)(a, b)
        assert value == 0
        assert jnp.all(jnp.isfinite(grad))


@pytest.mark.slow
def test_cross_correlation_penalty_stops_at_one_without_gradient():
    a = jax.random.normal(jax.random.key(0), (6, 3))
    value, grad = jax.value_and_grad(losses.cross_correlation_penalty)(a, a)
    assert value == 1
    assert not grad.any()


@pytest.mark.parametrize("call", [losses.gaussian_kl, lambda m, v: losses.reparameterize(jax.random.key(0), m, v)])
def test_shapes_of_gaussians_that_do_not_match_are_refused(call):
    with pytest.raises(ValueError, match=r"mu, logvar: expected \[batch, dims\] alike, got \(3, 2\), \(3, 1\)"):
        call(jnp.zeros((3, 2)), jnp.zeros((3, 1)))


def test_cross_correlation_of_one_example_is_refused():
    with pytest.raises(ValueError, match="of at least two examples, got"):
        losses.cross_correlation_penalty(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
