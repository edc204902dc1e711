import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_optax_on_smoothed_labels(smoothing):
    logits = jax.random.normal(jax.random.key(0), (6, 5))
    labels = jnp.array([0, 1, 2, 3, 4, 0])
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 5), smoothing)
    expected = optax.softmax_cross_entropy(logits, targets)
    np.testing.assert_allclose(losses.cross_entropy(logits, labels, smoothing), expected, rtol=1e-5)


def test_cross_entropy_is_finite_for_huge_logits():
    loss = losses.cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    np.testing.assert_allclose(loss, 2e4)


def test_cross_entropy_refuses_shapes_that_do_not_match():
    with pytest.raises(ValueError, match="expected logits"):
        losses.cross_entropy(jnp.ones((3, 2)), jnp.ones((4,), jnp.int32))
