"""Contrastive losses with several positives: golden vectors, definitions, blocks, devices, bad input."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import losses


@pytest.fixture(scope="module")
def labelled():
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.integers(0, 5, 40), jnp.int32)
    return jnp.asarray(rng.standard_normal((40, 6), np.float32)), labels


@functools.partial(jax.jit, static_argnames="block_size")
def split_loss(z, labels, **options):
    return losses.supervised_infonce(z, labels, 0.1, **options)


@functools.partial(jax.jit, static_argnames="block_size")
def contrastive(z, labels, **options):
    return losses.supervised_contrastive(z, jnp.flip(z, 1), labels, labels, 0.1, **options)


@jax.jit
def multi_positive(z, labels):
    same = labels[:, None] == labels[None]
    return losses.multi_positive_infonce(z @ z.T, same, ~same)


def test_supervised_infonce_gives_the_golden_values_and_gradients(x64, golden):
    vectors = golden("xfactors/loss")
    z, labels = jnp.asarray(vectors["z_t"]), jnp.asarray(vectors["labels"])
    starts = np.cumsum([0, *vectors["dims_by_factor"]])
    blocks = [z[:, a:b] for a, b in itertools.pairwise(starts)]
    temperature = float(vectors["temperature"])
    loss = jax.jit(losses.supervised_infonce, static_argnums=2)
    got = [loss(block, labels[:, k], temperature) for k, block in enumerate(blocks)]
    chex.assert_trees_all_close(jnp.stack(got), jnp.asarray(vectors["nce_per_factor"]), rtol=1e-9)


def test_supervised_contrastive_gives_the_golden_value(x64, golden):
    vectors = golden("lambda-orthogonality/training")
    h_new, h_old, labels = (jnp.asarray(vectors[name]) for name in ("h_new", "h_old", "labels"))
    anchors = h_new @ vectors["W_b0"] + vectors["b_b0"][None]
    loss = jax.jit(losses.supervised_contrastive, static_argnums=4)
    got = loss(anchors, h_old, labels, labels, float(vectors["temperature"]))
    chex.assert_trees_all_close(got, jnp.float64(vectors["terms0"][2]), rtol=1e-9)


@pytest.mark.parametrize(("prefix", "reduction"), [("global", "global"), ("subspace", "global")])
def test_multi_positive_infonce_gives_the_golden_values(x64, golden, prefix, reduction):
    vectors = golden("hydra/loss")
    first, second, keys = (jnp.asarray(vectors[name])[:, None] for name in ("y1", "y2", "key_labels"))
    positives, negatives = second == keys.T, (first != keys.T) & (second != keys.T)
    logits = jnp.asarray(vectors[f"{prefix}_logits"])
    got = losses.multi_positive_infonce(logits, positives, negatives, reduction=reduction)
    chex.assert_trees_all_close(got, jnp.float64(vectors[f"{prefix}_loss"]), rtol=1e-9)


def test_multi_positive_infonce_averages_over_anchors_and_counts_those_without_positives(labelled):
    z, labels = labelled
    logits = np.asarray(z @ z.T, np.float64)
    total = 0.0
    for i in range(40):
        positives = [j for j in range(40) if labels[j] == (labels[i] + 4) % 6]  # label 5 never occurs
        negatives = sum(np.exp(logits[i, m]) for m in range(40) if labels[m] == labels[i])
        each = [np.log(np.exp(logits[i, j]) + negatives) - logits[i, j] for j in positives]
        total += np.mean(each) if each else 0.0
    positive = labels[None] == (labels[:, None] + 4) % 6
    got = losses.multi_positive_infonce(z @ z.T, positive, labels[:, None] == labels[None])
    chex.assert_trees_all_close(got, jnp.float32(total / 40), rtol=1e-5)


@pytest.mark.parametrize("loss", [split_loss, contrastive])
@pytest.mark.parametrize("block_size", [7, pytest.param(20, marks=pytest.mark.slow)])
def test_blocks_of_keys_give_the_loss_and_the_gradient_of_all_keys_at_once(loss, block_size, labelled):
    in_blocks = jax.jit(jax.value_and_grad(functools.partial(loss, block_size=block_size)))(*labelled)
    at_once = jax.jit(jax.value_and_grad(loss))(*labelled)
    # Sums in another order, of exponentials up to e^10.
    chex.assert_trees_all_close(in_blocks, at_once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [split_loss, contrastive, multi_positive])
def test_losses_are_the_same_for_a_permuted_batch(loss, labelled):
    z, labels = labelled
    order = jnp.asarray(np.random.default_rng(1).permutation(40))
    chex.assert_trees_all_close(loss(z[order], labels[order]), loss(z, labels), rtol=1e-5)


@pytest.mark.parametrize("loss", [split_loss, contrastive])
def test_gradients_at_a_zero_vector_are_finite(loss, labelled):
    z, labels = labelled
    value, gradient = jax.value_and_grad(loss)(z.at[3].set(0), labels)
    chex.assert_tree_all_finite((value, gradient))


def test_supervised_infonce_is_zero_for_equal_labels_and_for_distinct_ones(labelled):
    z, labels = labelled
    for some in (jnp.zeros_like(labels), jnp.arange(40, dtype=jnp.int32)):
        value, gradient = jax.value_and_grad(split_loss)(z, some)
        # Of equal labels both logarithms are of the same sum, whose gradients cancel but for rounding.
        chex.assert_trees_all_close((value, gradient), (jnp.float32(0), jnp.zeros_like(z)), atol=1e-5)


def test_supervised_infonce_of_two_equal_positives_among_orthogonal_vectors_is_near_zero():
    z = jnp.concatenate([jnp.eye(5)[:1], jnp.eye(5)])
    labels = jnp.asarray([0, 0, 1, 2, 3, 4], jnp.int32)
    loss = jax.jit(losses.supervised_infonce, static_argnums=2)
    assert float(loss(z, labels, 0.02)) < 1e-6  # exp(-50) for each other vector
    chex.assert_trees_all_close(split_loss(3 * z, labels), split_loss(z, labels), rtol=1e-6)


def test_memory_of_supervised_contrastive_is_that_of_a_block():
    block_size = 64
    shape = jax.ShapeDtypeStruct((2048, 16), jnp.float32)
    labels = jax.ShapeDtypeStruct((2048,), jnp.int32)
    step = jax.jit(jax.value_and_grad(functools.partial(contrastive, block_size=block_size)))
    memory = step.lower(shape, labels).compile().memory_analysis().temp_size_in_bytes
    # Some arrays of a block, and the carry of each block; the array of all cosines takes 16.8 MB.
    assert memory < 4 * 2048 * (6 * block_size + 4 * 2048 // block_size + 40 * 16)


@pytest.mark.eight_devices
@pytest.mark.parametrize("loss", [split_loss, contrastive, multi_positive])
def test_eight_devices_compare_with_the_keys_of_all(loss, labelled):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(labelled, NamedSharding(mesh, P("data")))
    options = {} if loss is multi_positive else {"block_size": 16}
    step = jax.jit(jax.value_and_grad(functools.partial(loss, **options)))
    # Sums in another order; the bound.
    chex.assert_trees_all_close(step(*placed), step(*labelled), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: losses.supervised_infonce(z, y[:3], 0.1), r"z, labels: expected .*\(40, 6\) and \(3,\)"),
        (lambda z, y: losses.supervised_infonce(z, y, 0.0), "temperature: expected a positive number, got 0.0"),
        (lambda z, y: losses.supervised_infonce(z, y, 0.1, block_size=0), "block_size: expected at least 1, got 0"),
        (lambda z, y: losses.supervised_contrastive(z, z[:, :2], y, y, 0.1), "one width, got 6 and 2"),
        (lambda z, y: losses.supervised_contrastive(z, z, y, y, -1.0), "temperature"),
        (lambda z, y: losses.multi_positive_infonce(z, z > 0, z[:2] > 0), "logits, positives, negatives: expected"),
        (lambda z, y: losses.multi_positive_infonce(z, z > 0, z < 0, reduction="sum"), "'anchor' or 'global'"),
    ],
)
def test_bad_arguments_are_named(call, message, labelled):
    with pytest.raises(ValueError, match=message):
        call(*labelled)
