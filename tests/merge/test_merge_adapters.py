"""Adapters merged in their core space against the sum of their dense updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, train
from subspace_jax.merge.adapters import Adapter, AdapterMerge, merge_adapters

SHAPES = {"q/kernel": (3, 14, 10), "up/kernel": (3, 10, 14), "conv/kernel": (2, 2, 6, 8), "head/embedding": (16, 10)}
RULES = (
    {
        "q": adapters.LoRA((2, 0, 3), (4.0, 1.0, 5.0)),
        "up": adapters.LoRA(2, 3.0, rslora=True),
        "conv": adapters.LoRA(2, 2.0, window=2),
    },
    {"q": adapters.FLoRA((3, 2), 0.5), "conv": adapters.FLoRA((3, 2, 1, 2), 2.0), "head": adapters.LoRA(2, 2.0)},
    {"q": adapters.SVFit(3, "log"), "up": adapters.SVFit(2), "head": adapters.FLoRA((2, 3))},
)
DORA = {"q": adapters.DoRA((2, 1, 0), 3.0), "up": adapters.DoRA(2, 3.0), "conv": adapters.DoRA(2, 2.0, window=2)}
WEIGHTS = (0.7, -0.4, 1.1)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), jnp.float32)


@functools.cache
def params():
    tree = {}
    for seed, (path, shape) in enumerate(SHAPES.items()):
        module, name = path.split("/")
        tree[module] = {name: draw(*shape, seed=seed)}
    return tree


@functools.cache
def adapter(which):
    """An adapter away from its start, with padded layers as PEFT's are read."""
    rules = DORA if which == "dora" else RULES[which]
    frozen, trainable = jax.jit(functools.partial(adapters.prepare, settings=rules))(jax.random.key(1), params())
    leaves, structure = jax.tree.flatten(trainable)
    moved = jax.tree.unflatten(structure, [x + 0.3 * draw(*x.shape, seed=10 + i) for i, x in enumerate(leaves)])
    if isinstance(rank := rules["q"].rank, tuple) and len(rank) == 3:
        there = jnp.arange(max(rank))[None] < jnp.asarray(rank)[:, None]
        own = moved["q"]["kernel"]
        own |= {"a": jnp.where(there[:, None], own["a"], 0), "b": jnp.where(there[..., None], own["b"], 0)}
    return Adapter(moved, rules, frozen)


def dense(one):
    """The update of every weight, from the effective weights."""
    made = jax.jit(functools.partial(adapters.materialize, settings=one.settings))(one.frozen, one.trainable)
    return jax.tree.map(jnp.subtract, made, params())


def dense_of(merged):
    return dense(Adapter(merged.trainable, merged.settings, params()))


def weighted(which, weights):
    updates = [dense(adapter(name)) for name in which]
    return jax.tree.map(lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=False)), *updates)


def relative(got, expected):
    """The largest relative error among the weights."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.linalg.norm((x - y).ravel()) / jnp.linalg.norm(y.ravel())) for x, y in pairs)


@functools.cache
def merged_of(which, how=None):
    return merge_adapters(params(), [adapter(name) for name in which], WEIGHTS[: len(which)], how)


def test_merge_adapters_of_lora_flora_and_svfit_is_the_dense_sum():
    merged = merged_of((0, 1, 2))
    assert relative(dense_of(merged), weighted((0, 1, 2), WEIGHTS)) < 1e-5
    assert {type(config) for config in merged.settings.values()} == {adapters.LoRA}
    ranks = {rule.pattern.split("/")[0]: config.rank for rule, config in merged.settings.items()}
    assert ranks == {"q": (7, 5, 8), "up": 4, "conv": 4, "head": 4}
    assert all(np.max(loss.error) < 1e-6 for loss in merged.losses.values())


def test_merge_adapters_of_dora_and_lora_is_one_dora_exactly():
    merged = merged_of((0, "dora"))
    assert {type(config) for config in merged.settings.values()} == {adapters.DoRA}
    assert relative(dense_of(merged), weighted((0, "dora"), WEIGHTS)) < 1e-5
    sizes = jax.tree.map(jnp.linalg.norm, weighted((0, "dora"), WEIGHTS)["conv"]["kernel"].ravel())
    np.testing.assert_allclose(merged.losses["conv/kernel"].size, sizes, rtol=1e-5)
