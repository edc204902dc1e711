"""Adapters merged in their core space against the sum of their dense updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import adapters, train
from subspace_jax.adapters.config import LowRankUpdate
from subspace_jax.merge.adapters import Adapter, AdapterMerge, check_merge, merge_adapters
from subspace_jax.merge.core_space import merge_core
from subspace_jax.merge.subspace_fusion import ties_merge

SHAPES = {"q/kernel": (3, 16, 8), "conv/kernel": (2, 2, 4, 8)}
RULES = {
    "lora": {"q": adapters.LoRA((2, 0, 3), (4.0, 1.0, 5.0)), "conv": adapters.LoRA(2, 2.0, window=2)},
    "flora": {"q": adapters.FLoRA((3, 2), 0.5), "conv": adapters.FLoRA((3, 2, 1, 2), 2.0)},
    "svfit": {"q": adapters.SVFit(2, "log")},
    "dora": {"q": adapters.DoRA((2, 1, 0), 3.0), "conv": adapters.DoRA(2, 2.0, window=2)},
    # Without a config by layers, of one weight.
    "one": {"q": adapters.LoRA(3, 2.0, rslora=True)},
    "two": {"q": adapters.DoRA(2, 2.0)},
}
WEIGHTS = {"lora": 0.7, "flora": -0.4, "svfit": 1.1, "dora": -0.3, "one": 0.6, "two": 0.5}


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


@functools.cache
def params():
    return {path[:-7]: {"kernel": jnp.asarray(draw(*shape, seed=len(path)))} for path, shape in SHAPES.items()}


@functools.cache
def adapter(name):
    """An adapter away from its start, with zeros behind the ranks of layers, as PEFT's are read."""
    rules = RULES[name]
    frozen, start = jax.jit(functools.partial(adapters.prepare, settings=rules))(jax.random.key(1), params())
    leaves, structure = jax.tree.flatten(start)
    # In NumPy, which compiles nothing.
    leaves = [np.asarray(x) + np.float32(0.3) * draw(*x.shape, seed=10 + i) for i, x in enumerate(leaves)]
    if name in ("lora", "dora"):
        own = jax.tree.unflatten(structure, leaves)["q"]["kernel"]
        behind = np.arange(max(rules["q"].rank))[None] >= np.array(rules["q"].rank)[:, None]
        own["a"][np.broadcast_to(behind[:, None], own["a"].shape)] = 0
        own["b"][behind] = 0
    moved = jax.tree.unflatten(structure, [jnp.asarray(x) for x in leaves])
    return Adapter(moved, rules, frozen, name)


def dense(one):
    """The update of every weight, from the effective weights."""
    made = jax.jit(functools.partial(adapters.materialize, settings=one.settings))(one.frozen, one.trainable)
    return jax.tree.map(lambda x, w: np.asarray(x, np.float64) - np.asarray(w, np.float64), made, params())


update_of = functools.cache(lambda name: dense(adapter(name)))


def dense_of(merged):
    return dense(Adapter(merged.trainable, merged.settings, params()))


def weighted(*names):
    return jax.tree.map(lambda *xs: sum(WEIGHTS[n] * x for n, x in zip(names, xs, strict=True)), *map(update_of, names))


@functools.cache
def merge(*names, how=None):
    return merge_adapters(params(), [adapter(n) for n in names], [WEIGHTS[n] for n in names], how)


def assert_close(got, expected, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm((x - y).ravel()) <= tolerance * np.linalg.norm(y.ravel())


def config_of(merged, path):
    return next(config for rule, config in merged.settings.items() if rule.fullmatch(path))


def test_merge_adapters_of_lora_flora_and_svfit_is_the_dense_sum():
    names = ("lora", "flora", "svfit")
    merged = merge(*names)
    assert_close(dense_of(merged), weighted(*names))
    assert config_of(merged, "q/kernel") == adapters.LoRA((6, 4, 7), (6.0, 4.0, 7.0))
    assert config_of(merged, "conv/kernel") == adapters.LoRA(4, 4.0, window=2)
    for path, loss in merged.losses.items():
        update = weighted(*names)[path[:-7]]["kernel"].reshape(*loss.size.shape, -1)
        np.testing.assert_allclose(loss.size, np.linalg.norm(update, axis=-1), rtol=1e-5)
        assert np.max(loss.error) < 1e-6


def test_merge_adapters_of_dora_and_lora_is_one_dora_exactly():
    merged = merge("lora", "dora")
    assert_close(dense_of(merged), weighted("lora", "dora"))
    assert config_of(merged, "q/kernel") == adapters.DoRA((4, 1, 3), (4.0, 1.0, 3.0))
    for path, loss in merged.losses.items():
        update = weighted("lora", "dora")[path[:-7]]["kernel"].reshape(*loss.size.shape, -1)
        np.testing.assert_allclose(loss.size, np.linalg.norm(update, axis=-1), rtol=1e-5)


def test_merge_adapters_of_a_lower_rank_is_the_best_approximation_with_its_error():
    merged = merge("one", "svfit", how=AdapterMerge(rank=2))
    exact = weighted("one", "svfit")["q"]["kernel"]
    left, s, right = np.linalg.svd(exact, full_matrices=False)
    best = (left[..., :2] * s[:, None, :2]) @ right[:, :2]
    assert_close(dense_of(merged)["q"]["kernel"], best)
    error = np.linalg.norm(s[:, 2:], axis=-1) / np.linalg.norm(s, axis=-1)
    np.testing.assert_allclose(merged.losses["q/kernel"].error, error, rtol=1e-4)
    np.testing.assert_allclose(merged.losses["q/kernel"].spectrum[:, :5], s[:, :5], rtol=1e-4)
    assert error.min() > 0.1


def test_merge_adapters_by_ties_approximates_the_ties_merge_of_each_matrix():
    how = AdapterMerge("ties", rank=8, keep=0.3)
    # The adapters' ranks add up to 5, below that of a trimmed matrix.
    merged = merge("one", "two", how=how)
    scaled = [WEIGHTS[name] * update_of(name)["q"]["kernel"] for name in ("one", "two")]
    by_ties = jax.jit(ties_merge, static_argnums=1)
    exact = np.stack([by_ties([np.asarray(x[i], np.float32) for x in scaled], 0.3) for i in range(3)])
    assert type(config_of(merged, "q/kernel")) is adapters.LoRA
    assert_close(dense_of(merged)["q"]["kernel"], exact)
    assert np.max(merged.losses["q/kernel"].error) < 1e-5


def test_merge_adapters_plain_approximates_dora_by_lora_with_its_error():
    merged = merge("two", how=AdapterMerge(rank=4, plain=True))
    exact = weighted("two")["q"]["kernel"]
    assert type(config_of(merged, "q/kernel")) is adapters.LoRA
    s = np.linalg.svd(exact, compute_uv=False)
    error = merged.losses["q/kernel"].error
    lost = np.linalg.norm(dense_of(merged)["q"]["kernel"] - exact, axis=(-2, -1)) / np.linalg.norm(s, axis=-1)
    np.testing.assert_allclose(error, lost, rtol=1e-3)
    best = np.linalg.norm(s[:, 4:], axis=-1) / np.linalg.norm(s, axis=-1)
    assert np.all(error <= 1.02 * best)
    assert best.min() > 0.05


def layout(length, rows, columns, count, rank, make):
    """Updates of a stacked weight of so many layers."""
    return [LowRankUpdate(make((length, rows, rank)), make((length, rank, columns))) for _ in range(count)]


def test_merge_core_of_ten_adapters_of_an_8b_layout_needs_temporaries_below_twice_their_bytes():
    make = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    updates = layout(32, 14336, 4096, 10, 16, make)
    size = sum(4 * x.size for x in jax.tree.leaves(updates))
    limits = jax.ShapeDtypeStruct((32,), jnp.int32)
    compiled = jax.jit(merge_core, static_argnums=3).lower(updates, make((10,)), limits, 160).compile()
    memory = compiled.memory_analysis()
    # And the scaled factors of one side.
    assert memory.temp_size_in_bytes + size / 2 < 2 * size
    assert memory.temp_size_in_bytes < 0.3 * size
    assert memory.temp_size_in_bytes < 4 * 14336 * 4096


@pytest.mark.eight_devices
def test_sharded_factors_and_weights_give_the_merge_of_one_device():
    mesh = train.make_mesh(data=1, fsdp=8)
    alone = merge("lora", "dora")

    def placed(tree):
        def put(x):
            # Rows or outputs, whichever is divided by eight.
            axis = next((i for i in range(x.ndim)[::-1] if i and x.shape[i] % 8 == 0), None)
            spec = P(*("fsdp" if i == axis else None for i in range(x.ndim)))
            return jax.device_put(x, NamedSharding(mesh, spec))

        return jax.tree.map(put, tree)

    base = placed(params())
    own = [Adapter(placed(adapter(n).trainable), RULES[n], base, n) for n in ("lora", "dora")]
    assert not own[0].trainable["q"]["kernel"]["a"].sharding.is_fully_replicated
    merged = merge_adapters(base, own, [WEIGHTS["lora"], WEIGHTS["dora"]])
    assert_close(dense_of(merged), dense_of(alone), 1e-6)
    for path, loss in alone.losses.items():
        np.testing.assert_allclose(merged.losses[path].size, loss.size, rtol=1e-6)


def refuse(error, match, base, own, weights=(1.0,), how=None):
    with pytest.raises(error, match=match):
        merge_adapters(base, own, weights, how)


def test_merge_adapters_refuses_adapters_of_another_model_and_lists_them():
    one = adapter("one")
    refuse(ValueError, r"no weights for \['one: q/kernel'\]", {"conv": params()["conv"]}, [one])
    other = {"q": {"kernel": jnp.zeros((3, 16, 9))}}
    refuse(ValueError, r"shapes differ: \['one: q/kernel: factors \(3, 16, 3\) and \(3, 3, 8\)", other, [one])


def test_merge_adapters_refuses_what_is_no_low_rank_update_of_the_weight():
    whole = Adapter({"q": {"kernel": {"full": params()["q"]["kernel"]}}}, {"q": adapters.Full()}, None, "head")
    refuse(ValueError, r"\['head: q/kernel: Full\(\)'\] train whole parameters", params(), [whole])
    pissa = adapter("one")._replace(settings={"q": adapters.LoRA(3, 2.0, init="pissa")})
    refuse(ValueError, r"one: q/kernel: LoRA.*start from changed weights", params(), [pissa])
    effort = Adapter({"q": {"kernel": dict.fromkeys(("u", "s", "vt"), jnp.zeros(()))}}, {"q": adapters.Effort()})
    refuse(ValueError, r"adapter 0: q/kernel: Effort.*start from changed weights", params(), [effort])
    grouped = {"conv": adapters.LoRA(2, 2.0, window=2, groups=2)}
    arrays = {"conv": {"kernel": {"a": jnp.zeros((2, 2, 4, 2)), "b": jnp.zeros((1, 8))}}}
    refuse(ValueError, "adapter 0: conv/kernel: the update of a grouped conv", params(), [Adapter(arrays, grouped)])


def test_merge_adapters_refuses_nan_and_gains_that_cancel_and_dora_without_weights():
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), adapter("one").trainable)
    refuse(ValueError, "one: q/kernel: expected finite", params(), [adapter("one")._replace(trainable=broken)])
    # A column without a magnitude: what is scaled by 0 can't be a product with its gain.
    own = adapter("dora").trainable
    arrays = own["conv"]["kernel"]
    own = own | {"conv": {"kernel": arrays | {"magnitude": arrays["magnitude"].at[0].set(0)}}}
    parts = [adapter("lora"), adapter("dora")._replace(trainable=own)]
    refuse(ValueError, "conv/kernel: the merged update is not finite; the weighted gains", params(), parts, (0.0, 1.0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params())
    refuse(TypeError, r"params: DoRA needs the weights.*\['q/kernel'\]", shapes, [adapter("two")])


def test_check_merge_refuses_weights_and_settings_that_cannot_serve():
    for how, count, weights, match in (
        (AdapterMerge(), 0, (), "adapters: expected at least one"),
        (AdapterMerge(), 2, (1.0,), "weights: expected 2, one for each adapter, got 1"),
        (AdapterMerge(), 1, (float("nan"),), "weights: expected finite"),
        (AdapterMerge("dare"), 1, (1.0,), "method: expected one of"),
        (AdapterMerge(rank=0), 1, (1.0,), "rank: expected an integer of at least 1, got 0"),
        (AdapterMerge(keep=0.0), 1, (1.0,), r"keep: expected a share in \(0, 1\], got 0.0"),
    ):
        with pytest.raises(ValueError, match=match):
            check_merge(how, count, weights)


@pytest.mark.slow
def test_merge_core_equals_the_dense_sum_at_the_size_of_a_layer_of_8b():
    rng = np.random.default_rng(0)
    updates = layout(1, 14336, 4096, 10, 16, lambda shape: jnp.asarray(rng.standard_normal(shape, np.float32)))
    updates = [LowRankUpdate(a[0], b[0]) for a, b, _ in updates]
    weights = np.linspace(-0.5, 1, 10, dtype=np.float32)
    got = jax.jit(merge_core, static_argnums=3)(updates, jnp.asarray(weights), jnp.asarray(160, jnp.int32), 160)
    exact = sum(w * (np.asarray(a) @ np.asarray(b)) for w, (a, b, _) in zip(weights, updates, strict=True))
    error = np.linalg.norm(np.asarray(got.a) @ np.asarray(got.b) - exact) / np.linalg.norm(exact)
    assert error < 1e-5
