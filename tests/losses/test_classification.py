import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_optax_on_smoothed_labels(smoothing):
    logits = jax.random.normal(jax.random.key(0), (6, 5))
    labels = jnp.array([0, 1, 2, 3, 4, 0])
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 5), smoothing)
    expected = optax.softmax_cross_entropy(logits, targets)
    chex.assert_trees_all_close(losses.cross_entropy(logits, labels, smoothing), expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_equals_optax_summed_over_classes(smoothing):
    logits = 3 * jax.random.normal(jax.random.key(0), (6, 5))
    labels = jnp.array([0, 1, 2, 3, 4, 0])
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 5), smoothing)
    expected = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)
    chex.assert_trees_all_close(losses.binary_cross_entropy(logits, labels, smoothing), expected, rtol=1e-5)


def test_binary_cross_entropy_and_its_gradient_are_finite_for_huge_logits():
    logits = jnp.array([[1e4, -1e4]])
    loss, gradient = jax.value_and_grad(lambda x: losses.binary_cross_entropy(x, jnp.array([1]))[0])(logits)
    chex.assert_trees_all_close(loss, 2e4, rtol=1e-7)
    chex.assert_trees_all_close(gradient, np.array([[1.0, -1.0]]), rtol=1e-7, atol=1e-6)


def test_cross_entropy_is_finite_for_huge_logits():
    loss = losses.cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))
    chex.assert_trees_all_close(loss, 2e4, rtol=1e-7)


def test_cross_entropy_refuses_shapes_that_do_not_match():
    with pytest.raises(ValueError, match="expected logits"):
        losses.cross_entropy(jnp.ones((3, 2)), jnp.ones((4,), jnp.int32))


def test_low_precision_logits_give_a_float32_loss():
    logits = jax.random.normal(jax.random.key(0), (6, 5)).astype(jnp.bfloat16)
    labels = jnp.array([0, 1, 2, 3, 4, 0])
    loss = losses.cross_entropy(logits, labels, 0.1)
    assert loss.dtype == jnp.float32
    chex.assert_trees_all_equal(loss, losses.cross_entropy(logits.astype(jnp.float32), labels, 0.1))


def test_label_out_of_range_shows_as_nan_and_spoils_no_other_row():
    loss = losses.cross_entropy(jnp.zeros((4, 3)), jnp.array([3, -1, 0, 2]))
    chex.assert_trees_all_equal(jnp.isnan(loss), np.array([True, True, False, False]))
    assert losses.cross_entropy(jnp.zeros((1, 300)), jnp.array([7], jnp.uint8)) == pytest.approx(np.log(300))


def test_labels_that_are_not_integers_and_smoothing_out_of_range_are_refused():
    with pytest.raises(TypeError, match="labels: expected integers, got float32"):
        losses.cross_entropy(jnp.ones((3, 2)), jnp.ones(3))
    for smoothing in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"label_smoothing: expected a number in \[0, 1\)"):
            losses.cross_entropy(jnp.ones((3, 2)), jnp.ones(3, jnp.int32), smoothing)


@pytest.mark.eight_devices
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classes_split_over_devices_stay_split_in_loss_and_gradient(axis_type, smoothing):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(axis_type,) * 2)
    logits = jax.random.normal(jax.random.key(0), (16, 48))
    labels = jax.random.randint(jax.random.key(1), (16,), 0, 48)

    def loss(logits, labels):
        return jnp.mean(losses.cross_entropy(logits, labels, smoothing))

    expected = jax.value_and_grad(loss)(logits, labels)
    with jax.set_mesh(mesh):
        split = jax.device_put(
            (logits, labels), (NamedSharding(mesh, P("data", "tensor")), NamedSharding(mesh, P("data")))
        )
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*split).compile()
        value, gradient = compiled(*split)
    chex.assert_trees_all_close(value, expected[0], rtol=1e-6)
    chex.assert_trees_all_close(gradient, expected[1], rtol=1e-5, atol=1e-8)
    # One number a row crosses the class axis; neither the logits nor their gradient do.
    assert "all-gather" not in compiled.as_text()
    assert "all-to-all" not in compiled.as_text()
    assert gradient.sharding.is_equivalent_to(split[0].sharding, 2)
