"""The margin loss: golden vectors of the authors' code, invariances, what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import losses

from ..variants import rest_slow

BETA = float(np.float32(1.2))  # that of the authors


@pytest.fixture
def pieces(golden):
    return golden("dynamic-subspace-learners/pieces")


def loss_of(m, labels, beta=1.2, block_size=None):
    return losses.margin_loss(m, labels, 4, beta=beta, block_size=block_size)[0]


GRADIENTS = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 2)), static_argnums=3)


@pytest.mark.parametrize("block_size", rest_slow([None, 5]))
@pytest.mark.parametrize("name", ["hard", "easy"])
def test_margin_loss_and_its_gradients_are_those_of_the_authors_code(name, block_size, pieces, x64):
    m, labels = jnp.asarray(pieces[f"{name}_embeddings"]), jnp.asarray(pieces[f"{name}_labels"])
    loss, (gradient, by_beta) = GRADIENTS(m, labels, BETA, block_size)
    np.testing.assert_allclose(loss, pieces[f"{name}_loss"], atol=1e-6)
    np.testing.assert_allclose(gradient, pieces[f"{name}_grad"], atol=1e-6)
    np.testing.assert_allclose(by_beta, pieces[f"{name}_grad_beta"][0], atol=1e-6)
    pairs = losses.sample_pairs(m, labels, 4)
    assert len(pairs.anchors) == pieces[f"{name}_n_pairs"]


@pytest.mark.parametrize(("dtype", "tolerance"), rest_slow([(jnp.float32, 1e-5), (jnp.bfloat16, 0.05)]))
def test_margin_loss_in_lower_precision_is_near_the_authors(dtype, tolerance, pieces):
    # bfloat16 has three digits: distances near the margins move by some 0.01, and pairs change.
    m = jnp.asarray(pieces["easy_embeddings"]).astype(dtype)
    loss, terms = losses.margin_loss(m, jnp.asarray(pieces["easy_labels"], jnp.int32), 4)
    assert loss.dtype == terms.total.dtype == jnp.float32
    np.testing.assert_allclose(loss, pieces["easy_loss"], atol=tolerance)


def batch_of(rng, classes=4, per_class=4, n=8):
    m = rng.standard_normal((classes * per_class, n)).astype(np.float32)
    return m / np.linalg.norm(m, axis=1, keepdims=True), np.repeat(np.arange(classes, dtype=np.int32), per_class)


TERMS = jax.jit(functools.partial(losses.margin_loss, per_class=4))
PAIRS = jax.jit(losses.sample_pairs, static_argnums=(2, 3))


def test_sample_pairs_takes_the_nearest_negatives_beyond_the_cutoff_and_matches_by_index():
    m, labels = batch_of(np.random.default_rng(0))
    distances = np.linalg.norm(m[:, None] - m[None], axis=-1)
    cutoff = 0.9  # some negatives are nearer
    anchors, positives, negatives = map(np.asarray, PAIRS(m, labels, 4, cutoff))
    np.testing.assert_array_equal(anchors, np.repeat(np.arange(16), 3))
    barred = 0
    for i in range(16):
        same = labels == labels[i]
        np.testing.assert_array_equal(positives[anchors == i], np.flatnonzero(same & (np.arange(16) != i)))
        allowed = np.flatnonzero(~same & (distances[i] >= cutoff))
        barred += np.sum(~same) - len(allowed)
        nearest = allowed[np.argsort(distances[i, allowed])[:3]]
        np.testing.assert_array_equal(negatives[anchors == i], np.sort(nearest))
    assert barred > 0


def test_sample_pairs_takes_the_first_others_of_a_label_whatever_the_order_of_the_batch():
    rng = np.random.default_rng(6)
    m, labels = batch_of(rng)
    labels = rng.permutation(np.where(labels == 3, 0, labels) - 5).astype(np.int32)  # negative, one label twice
    positives = np.asarray(PAIRS(m, labels, 4, 0.5).positives).reshape(16, 3)
    for i in range(16):
        np.testing.assert_array_equal(positives[i], np.flatnonzero((labels == labels[i]) & (np.arange(16) != i))[:3])


def test_sample_pairs_falls_back_to_the_nearest_of_all_where_negatives_are_too_few():
    m, labels = batch_of(np.random.default_rng(1), classes=2)
    distances = np.linalg.norm(m[:, None] - m[None], axis=-1)
    negatives = np.asarray(PAIRS(m, labels, 4, 3.0).negatives).reshape(8, 3)  # no unit vectors lie 3 apart
    # The anchor itself is the nearest, at the lower bound of 0.01.
    np.testing.assert_array_equal(negatives, np.sort(np.argsort(distances, axis=1)[:, :3], axis=1))


def test_sample_pairs_in_blocks_gives_the_same_pairs_and_holds_no_square_of_distances():
    m, labels = batch_of(np.random.default_rng(2))
    blocked = functools.partial(losses.sample_pairs, per_class=4, block_size=3)
    chex.assert_trees_all_equal(jax.jit(blocked)(m, labels), PAIRS(m, labels, 4, 0.5))
    rows = jax.ShapeDtypeStruct((1000, 8), jnp.float32), jax.ShapeDtypeStruct((1000,), jnp.int32)
    text = str(jax.make_jaxpr(jax.grad(lambda m, y: losses.margin_loss(m, y, 4, block_size=50)[0]))(*rows))
    assert "[50,1000]" in text
    assert "1000,1000]" not in text
    # XLA sorts whole rows for a top_k of integers on CPUs: those of a block are found without.
    assert "i32[50,1000]" not in text


def test_margin_loss_is_zero_where_positives_coincide_and_negatives_are_far():
    m = jnp.repeat(jnp.eye(4, 8), 4, axis=0)  # classes sqrt(2) apart
    labels = jnp.repeat(jnp.arange(4), 4)
    loss, terms = TERMS(m, labels)
    assert (loss, terms.total, terms.active) == (0, 0, 0)
    assert jnp.all(GRADIENTS(m, labels, 1.2, None)[1][0] == 0)
    assert TERMS(0.9 * m, labels)[0] > 0  # 1.27 apart, less than beta + margin


def test_margin_loss_does_not_change_under_a_rotation_or_with_the_order_of_the_batch():
    rng = np.random.default_rng(3)
    m, labels = batch_of(rng)
    _, terms = TERMS(m, labels)
    assert terms.active > 0
    rotation, _ = np.linalg.qr(rng.standard_normal((8, 8)))
    # Rounding of the inner products.
    np.testing.assert_allclose(TERMS((m @ rotation).astype(np.float32), labels)[0], TERMS(m, labels)[0], rtol=1e-5)
    order = rng.permutation(16)
    np.testing.assert_allclose(TERMS(m[order], labels[order])[1].total, terms.total, rtol=1e-5)


def test_margin_loss_of_a_class_that_comes_twice_takes_no_example_of_it_as_negative():
    m, labels = batch_of(np.random.default_rng(4))
    labels = labels // 2 * 2  # two classes of eight
    pairs = losses.sample_pairs(m, labels, 4)
    assert np.all(labels[pairs.anchors] == labels[pairs.positives])
    assert np.all(labels[pairs.anchors] != labels[pairs.negatives])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.repeat(np.arange(4), [5, 3, 4, 4])}, r"labels: expected 4 examples of each class, got {0: 5"),
        ({"labels": np.zeros(15, np.int32)}, r"m, labels: expected \[batch, n\]"),
        ({"m": np.full((16, 8), np.nan, np.float32)}, "m: expected finite embeddings"),
        ({"per_class": 1}, "per_class: expected at least 2"),
        ({"per_class": 5}, "per_class: expected at least 2"),
        ({"per_class": 16}, "per_class: expected at least 2"),
        ({"cutoff": 0.0}, "cutoff: expected a distance above 0, got 0"),
        ({"block_size": 0}, "block_size: expected at least 1"),
    ],
)
def test_margin_loss_refuses_what_it_cannot_sample(change, message):
    m, labels = batch_of(np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        losses.margin_loss(**{"m": m, "labels": labels, "per_class": 4, **change})


def test_margin_loss_of_a_traced_batch_that_lacks_positives_is_nan():
    m, labels = batch_of(np.random.default_rng(0))
    assert np.isnan(TERMS(m, np.where(labels == 0, np.arange(16, dtype=np.int32), labels))[0])


@pytest.mark.eight_devices
def test_margin_loss_on_eight_devices_has_the_value_and_gradients_of_one():
    m, labels = batch_of(np.random.default_rng(5), classes=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (m, labels))
    one, eight = GRADIENTS(jnp.asarray(m), jnp.asarray(labels), BETA, None), GRADIENTS(*sharded, BETA, None)
    # Sums over the batch in another order.
    chex.assert_trees_all_close(jax.device_get(eight), jax.device_get(one), rtol=1e-5, atol=1e-6)
