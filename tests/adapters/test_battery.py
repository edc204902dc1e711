"""The contract of every method on every kind of weight, on one device and on a mesh of eight."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

from subspace_jax import adapters, nn, train

from ..variants import rest_slow

# Shape of the weight, its logical axes, the shape of the input, and how the weight is applied.
KINDS = {
    "linear": ((16, 24), ("embed", "mlp"), (4, 16)),
    "stacked": ((3, 16, 24), ("layers", "embed", "mlp"), (4, 16)),
    "conv": ((3, 2, 8, 16), (None, None, "embed", "mlp"), (4, 5, 6, 16)),
    "embedding": ((16, 24), ("vocab", "embed"), (4, 3)),
}
every_kind = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "stacked" else pytest.mark.slow) for kind in KINDS]
)
GROUPS = 2  # of the convolution


def apply(kind, x, weight):
    if kind == "linear":
        return nn.linear(x, weight)
    if kind == "stacked":
        return jax.lax.scan(lambda carry, own: (carry, nn.linear(x, own)), None, weight)[1]
    if kind == "conv":
        return nn.conv(x, weight, strides=2, padding=1, groups=GROUPS)
    return nn.unembed(jnp.sin(nn.embed(x, weight, jnp.float32)), weight)


@functools.cache
def rules_of(kind):
    """A config for the weight of each name; those called int8 are quantized."""
    conv = {"window": 2, "groups": GROUPS} if kind == "conv" else {}
    rules = {
        "lora": adapters.LoRA(4, 8.0, **conv),
        "dora": adapters.DoRA(4, 8.0, **conv),
        "flora": adapters.FLoRA((3, 4, 2, 2)[: 4 if conv else 2], 2.0),
        "int8_lora": adapters.LoRA(4, 8.0, **conv),
        "int8_dora": adapters.DoRA(4, 8.0, **conv),
    }
    # A convolution's kernel has no singular vectors of its own.
    return rules if conv else rules | {"svfit": adapters.SVFit(4), "effort": adapters.Effort(2, project=True)}


def put(tree, kind):
    """The same leaf name for all, for a table is known by it."""
    leaf = "embedding" if kind == "embedding" else "kernel"
    return {name: {leaf: value} for name, value in tree.items()}


def get(tree, name):
    return next(iter(tree[name].values()))


@functools.cache
def case(kind):
    """The frozen tree, the start, adapters away from it, and an input."""
    shape, _, seen = KINDS[kind]
    draw = np.random.default_rng(0).normal
    w = jnp.asarray(draw(size=shape), jnp.float32)
    params = put(dict.fromkeys(rules_of(kind), w), kind)
    params = adapters.quantize(params, ["int8_*/*"], window=2 if kind == "conv" else 0)
    base, start = jax.jit(lambda p: adapters.prepare(jax.random.key(1), p, rules_of(kind)))(params)
    moved = jax.tree.map(lambda p: p + jnp.asarray(0.1 * draw(size=p.shape), p.dtype), start)
    x = (
        jnp.arange(12, dtype=jnp.int32).reshape(seen)
        if kind == "embedding"
        else jnp.asarray(draw(size=seen), "float32")
    )
    return params, base, start, moved, x


@functools.cache
def step(kind):
    rules = rules_of(kind)

    @jax.jit
    def run(base, trainable, x):
        def outputs(base, trainable, x):
            bound = adapters.bind(base, trainable, rules)
            return {name: apply(kind, x, get(bound, name)) for name in rules}

        def loss(trainable, base):
            with jax.default_matmul_precision("highest"):
                y = outputs(base, trainable, x)
            return sum(jnp.mean(jnp.sin(v)) for v in y.values()), y

        grads, y = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(trainable, base)
        return y, *grads

    return run


@functools.cache
def single(kind):
    _, base, _, moved, x = case(kind)
    return step(kind)(base, moved, x)


def assert_close(got, expected, tolerance=1e-5):
    """Compares float32 sums, relative to the largest entry of each array."""
    jax.tree.map(
        lambda x, y: chex.assert_trees_all_close(x, y, rtol=1e-7, atol=tolerance * float(jnp.abs(y).max())),
        got,
        expected,
    )


@every_kind
def test_bind_gives_the_outputs_of_materialize_and_gradients_reach_adapters_only(kind):
    _, base, _, moved, x = case(kind)
    y, grads, frozen = single(kind)

    @jax.jit
    def expect(base, moved, x):
        dense = adapters.materialize(base, moved, rules_of(kind))
        return jax.vmap(functools.partial(apply, kind, x))(jnp.stack([get(dense, n) for n in y]))

    expected = expect(base, moved, x)
    for name, wanted in zip(y, expected, strict=True):
        assert_close(y[name], wanted)
        assert all(np.any(g) for g in jax.tree.leaves(grads[name]))
    assert jax.tree.structure(grads) == jax.tree.structure(moved)
    floats = [g for g in jax.tree.leaves(frozen) if g.dtype != jax.dtypes.float0]
    assert not any(np.any(g) for g in floats)


@every_kind
def test_new_adapters_give_the_outputs_of_the_weight(kind):
    params, base, start, _, x = case(kind)
    y = step(kind)(base, start, x)[0]
    plain = {name: jax.jit(functools.partial(apply, kind))(x, get(params, name)) for name in ("lora", "int8_lora")}
    for name in y:
        wanted = plain["int8_lora" if "int8" in name else "lora"]
        # In one program with others a matmul may add in another order; Effort adds what it subtracted.
        assert_close(y[name], wanted, 1e-5 if name == "effort" else 2e-6)
    doras = ("dora", "int8_dora")
    bound = adapters.bind(base, {n: start[n] for n in doras}, {n: rules_of(kind)[n] for n in doras})
    for name in doras:
        np.testing.assert_array_equal(get(bound, name).gain, 1.0)


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "conv" else pytest.mark.slow) for kind in KINDS]
)
def test_sharded_weights_give_the_outputs_and_gradients_of_one_device(kind):
    _, base, _, moved, x = case(kind)
    rules, names = rules_of(kind), P(*KINDS[kind][1])
    mesh = train.make_mesh(data=2, fsdp=2, tensor=2)
    axes = adapters.quantize(put(dict.fromkeys(rules, names), kind), ["int8_*/*"], window=2 if kind == "conv" else 0)
    axes = adapters.logical_axes(axes, moved, rules)
    placed = [
        jax.device_put(tree, train.param_shardings(tree, own, mesh))
        for tree, own in zip((base, moved), axes, strict=True)
    ]
    sharded = [leaf for leaf in jax.tree.leaves(placed[1]) if not leaf.sharding.is_fully_replicated]
    assert len(sharded) >= 5
    y, grads, _ = step(kind)(*placed, jax.device_put(x, train.batch_sharding(mesh)))
    expected_y, expected_grads, _ = single(kind)
    assert_close(y, expected_y)
    assert_close(grads, expected_grads, 1e-4)


@pytest.mark.parametrize("kind", rest_slow(["stacked", "linear"]))
def test_bind_works_under_vmap(kind):
    _, base, _, moved, x = case(kind)
    rules = rules_of(kind)

    def run(trainable, x):
        bound = adapters.bind(base, trainable, rules)
        return {name: apply(kind, x, get(bound, name)) for name in rules}

    # Two adapters at once, each with an input of its own.
    both = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), moved)
    got = jax.jit(jax.vmap(run))(both, jnp.stack([x, x]))
    assert_close(jax.tree.map(lambda y: y[0], got), single(kind)[0])


@pytest.mark.parametrize("kinds", rest_slow([["stacked", "conv", "embedding"], ["linear"]]), ids=" ".join)
def test_a_checkpoint_restores_every_adapter(tmp_path, kinds):
    tree = {kind: case(kind)[3] for kind in kinds} | {"frozen": case(kinds[0])[1]}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", tree)
        saver.wait_until_finished()
        back = saver.restore(tmp_path / "state", jax.eval_shape(lambda: tree))
    chex.assert_trees_all_equal(back, tree)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("linear", "dora"),
        ("conv", "flora"),
        *(pytest.param("linear", name, marks=pytest.mark.slow) for name in ("lora", "flora", "svfit", "effort")),
        *(pytest.param("conv", name, marks=pytest.mark.slow) for name in ("lora", "dora")),
    ],
)
def test_a_gradient_step_holds_no_array_of_the_size_of_the_weight(kind, name):
    rules = {"w": rules_of(kind)[name]}
    shape, seen = ((2048, 2048), (4, 2048)) if kind == "linear" else ((3, 3, 768, 768), (1, 4, 4, 768 * GROUPS))

    w, x = (jax.ShapeDtypeStruct(size, jnp.float32) for size in (shape, seen))
    base, trainable = jax.eval_shape(lambda w: adapters.prepare(jax.random.key(0), {"w": w}, rules), w)

    def temporaries(weight, *args):
        def loss(trained, x, *frozen):
            return jnp.sum(jnp.sin(apply(kind, x, weight(trained, *frozen))))

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # On CPUs the gradient of a convolution's input copies the kernel.
    plain = temporaries(lambda _, w: jax.lax.stop_gradient(w), x, x, w)
    adapted = temporaries(lambda t, b: adapters.bind(b, t, rules)["w"], trainable, x, base)
    # The norm of DoRA holds eight MiB of rows at a time there.
    assert adapted - plain < 0.6 * 4 * np.prod(shape)
