"""Retrieval metrics: golden vectors, definitions, bad input."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import metrics

cmc = jax.jit(metrics.cmc, static_argnames=("ks", "exclude_self"))
retrieval_map = jax.jit(metrics.retrieval_map, static_argnames="exclude_self")
recall_at_k = jax.jit(metrics.recall_at_k, static_argnames="ks")


@pytest.mark.parametrize("name", ["self", "other"])
def test_cmc_and_retrieval_map_give_the_golden_values(x64, golden, name):
    vectors = golden("lambda-orthogonality/retrieval")
    labels = jnp.asarray(vectors["labels_gallery"])
    query_labels = labels if name == "self" else jnp.asarray(vectors["labels_query_other"])
    pairs = (jnp.asarray(vectors[f"query_{name}"]), jnp.asarray(vectors["gallery"]), query_labels, labels)
    shares = cmc(*pairs, ks=(1, 2, 3, 4, 5), exclude_self=name == "self")
    chex.assert_trees_all_close(shares, jnp.asarray(vectors[f"cmc_{name}"]), atol=1e-12)
    found = retrieval_map(*pairs, exclude_self=name == "self")
    chex.assert_trees_all_close(found, jnp.float64(vectors[f"map_{name}"]), atol=1e-12)


@pytest.fixture(scope="module")
def clusters():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), 20)
    x = 10 * rng.standard_normal((5, 4))[labels] + 0.1 * rng.standard_normal((100, 4))
    return jnp.asarray(x, jnp.float32), jnp.asarray(labels, jnp.int32)


def test_metrics_of_separated_classes_are_one(clusters):
    x, labels = clusters
    assert float(retrieval_map(x, x, labels, labels, exclude_self=True)) == pytest.approx(1)
    chex.assert_trees_all_close(recall_at_k(x, labels, ks=(1, 4)), jnp.ones(2))


def test_cmc_grows_with_k_and_without_exclusion_finds_the_query_itself(clusters):
    _, labels = clusters
    noise = jnp.asarray(np.random.default_rng(1).standard_normal((100, 4)), jnp.float32)
    shares = recall_at_k(noise, labels, ks=(1, 2, 5, 500))
    assert np.all(np.diff(shares) >= 0)
    assert float(shares[0]) < 0.5
    assert float(shares[-1]) == 1
    assert float(cmc(noise, noise, labels, labels, ks=(1,))[0]) == 1


def test_queries_without_a_match_do_not_count(clusters):
    x, labels = clusters
    own = labels.at[0].set(99).at[1].set(98)
    chex.assert_trees_all_close(cmc(x, x, own, labels, ks=(1,), exclude_self=True), jnp.ones(1))
    assert float(retrieval_map(x, x, own, labels)) == pytest.approx(1)
    assert np.isnan(cmc(x[:2], x, own[:2], labels, ks=(1,))[0])


@pytest.mark.parametrize("name", ["cmc", "retrieval_map"])
def test_memory_is_that_of_a_block_of_queries(name):
    call = {"cmc": lambda *a: metrics.cmc(*a, (1, 5)), "retrieval_map": metrics.retrieval_map}[name]
    shapes = [jax.ShapeDtypeStruct((8192, 8), jnp.float32)] * 2 + [jax.ShapeDtypeStruct((8192,), jnp.int32)] * 2
    memory = jax.jit(call).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert memory < 96e6  # all distances take 268 MB; 1024 x 4096 of a block take 17, with sorting some of them


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: metrics.cmc(x, x, y[:3], y, (1,)), "query: expected"),
        (lambda x, y: metrics.cmc(x, x[:, :2], y, y, (1,)), "one width, got 4 and 2"),
        (lambda x, y: metrics.cmc(x, x, y, y, (0,)), r"ks: expected numbers from 1, got \(0,\)"),
        (lambda x, y: metrics.recall_at_k(x, y, ()), "ks: expected"),
        (lambda x, y: metrics.retrieval_map(x[:3], x, y[:3], y, exclude_self=True), "exclude_self: .* got 3 and 100"),
    ],
)
def test_bad_arguments_are_named(call, message, clusters):
    with pytest.raises(ValueError, match=message):
        call(*clusters)
