"""Several adapters on one model, and sums of adapters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, nn

DRAW = np.random.default_rng(0).normal
SHAPES = {"embed/embedding": (16, 8), "layers/q/kernel": (3, 8, 8), "layers/up/kernel": (3, 8, 8)}
LORA = (
    {"q": adapters.LoRA(4, 8.0)},
    {"q": adapters.LoRA(2, 1.0, rslora=True), "embed": adapters.LoRA(3, 3.0), "up": adapters.LoRA((1, 0, 2), 2.0)},
)
DORA = ({"q": adapters.DoRA(3, 6.0), "embed": adapters.DoRA(2, 2.0)},) * 2


def params():
    embed, q, up = (jnp.asarray(np.random.default_rng(1).normal(size=s), jnp.float32) for s in SHAPES.values())
    return {"embed": {"embedding": embed}, "layers": {"q": {"kernel": q}, "up": {"kernel": up}}}


@jax.jit
def model(params, tokens):
    """A table, layers under a scan, and the table again."""
    table = params["embed"]["embedding"]

    def layer(x, own):
        return jnp.tanh(nn.linear(x, own["q"]["kernel"])) + 0.1 * nn.linear(x, own["up"]["kernel"]), None

    return nn.unembed(jax.lax.scan(layer, nn.embed(tokens, table), params["layers"])[0], table)


def trained(rules):
    start = jax.jit(lambda p: [adapters.init(jax.random.key(i), p, r) for i, r in enumerate(rules)])(params())
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * DRAW(size=x.shape), x.dtype), start)


@pytest.mark.parametrize("rules", [LORA, pytest.param(DORA, marks=pytest.mark.slow)], ids=["LoRA", "DoRA"])
def test_bind_multi_adapter_gives_each_example_its_adapter(rules):
    trainables, tokens = trained(rules), jnp.arange(12, dtype=jnp.int32).reshape(4, 3)
    bind = jax.jit(lambda *args: adapters.bind_multi_adapter(args[0], args[1], rules, args[2]))
    bound = bind(params(), trainables, jnp.array([1, -1, 0, 1]))
    got = model(bound, tokens)
    for i, rows in ((0, [2]), (1, [0, 3])):
        expected = model(adapters.merge(params(), trainables[i], rules[i]), tokens)[np.array(rows)]
        # Three layers of matmuls in float32.
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(got[np.array(rows)], expected, rtol=1e-5, atol=1e-5 * scale)
    plain = model(params(), tokens)
    np.testing.assert_allclose(got[1], plain[1], rtol=1e-6, atol=1e-6 * float(jnp.abs(plain).max()))
    assert float(jnp.abs(got - plain)[np.array([0, 2, 3])].max(axis=(1, 2)).min()) > 1e-2
    again = model(adapters.with_adapter_indices(bound, jnp.array([-1, 1, 0, 2])), tokens)
    np.testing.assert_array_equal(again[2], got[2])
    assert np.all(np.isnan(again[3]))


def test_bind_multi_adapter_has_three_matmuls_for_any_batch():
    rules = {"w": adapters.LoRA(2, 2.0)}
    params = {"w": jnp.ones((6, 5))}
    own = [adapters.init(jax.random.key(i), params, rules) for i in range(3)]

    def run(indices, x):
        return nn.linear(x, adapters.bind_multi_adapter(params, own, rules, indices)["w"])

    for batch in (2, 16):
        jaxpr = jax.make_jaxpr(run)(jnp.zeros(batch, jnp.int32), jnp.ones((batch, 3, 6)))
        assert str(jaxpr).count("dot_general") == 3


def test_combine_adds_up_the_updates():
    own = trained(LORA)
    total, rules = adapters.combine(own, LORA, (0.5, -2.0))

    @jax.jit
    def updates(*trees):
        pairs = zip(trees, (*LORA, rules), strict=True)
        return [jax.tree.map(jnp.subtract, adapters.materialize(params(), t, r), params()) for t, r in pairs]

    one, two, got = updates(*own, total)
    wanted = jax.tree.map(lambda x, y: 0.5 * x - 2.0 * y, one, two)
    # Each update is what is left of a weight of size three after another is taken from it.
    chex.assert_trees_all_close(got, wanted, rtol=1e-7, atol=1e-5)
    assert total["layers"]["q"]["kernel"]["a"].shape[-1] == 4 + 2
    spectral = {"w": adapters.SVFit(2)}
    deltas = [{"w": {"delta": jnp.array([1.0, 2.0])}}, {"w": {"delta": jnp.array([0.0, 1.0])}}]
    np.testing.assert_array_equal(adapters.combine(deltas, spectral, (2.0, 1.0))[0]["w"]["delta"], [2.0, 5.0])


def test_bind_multi_adapter_and_combine_refuse_what_they_can_not_do():
    params = {"w": jnp.ones((4, 5))}
    lora, dora, svfit = {"w": adapters.LoRA(1, 1.0)}, {"w": adapters.DoRA(1, 1.0)}, {"w": adapters.SVFit(1, "log")}
    one, two = (adapters.init(jax.random.key(0), params, rules) for rules in (lora, dora))
    indices = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="trainables: expected at least one"):
        adapters.bind_multi_adapter(params, [], lora, indices)
    with pytest.raises(TypeError, match="indices: expected integers"):
        adapters.bind_multi_adapter(params, [one], lora, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"w: DoRA can't be mixed with LoRA.*got \['LoRA', 'DoRA'\]"):
        adapters.bind_multi_adapter(params, [one, two], [lora, dora], indices)
    flora, conv = {"w": adapters.FLoRA((1, 1))}, {"k": adapters.LoRA(1, 1.0, window=1)}
    three = adapters.init(jax.random.key(0), params, flora)
    with pytest.raises(ValueError, match=r"w: expected LoRA or DoRA.*FLoRA\(.*can't be selected by example"):
        adapters.bind_multi_adapter(params, [one, three], [lora, flora], indices)
    kernels = {"k": jnp.ones((3, 4, 4))}
    four = adapters.init(jax.random.key(0), kernels, conv)
    with pytest.raises(ValueError, match=r"k: expected LoRA or DoRA.*window=1.*can't be selected by example"):
        adapters.bind_multi_adapter(kernels, [four], conv, indices)
    with pytest.raises(ValueError, match="have no weights for"):
        adapters.bind_multi_adapter({"v": params["w"]}, [one], lora, indices)
    with pytest.raises(ValueError, match="settings: expected one for all or 2"):
        adapters.bind_multi_adapter(params, [one, one], [lora], indices)
    with pytest.raises(ValueError, match=r"x: expected \[2, \.\.\.\]"):
        nn.linear(jnp.ones((3, 4)), adapters.bind_multi_adapter(params, [one], lora, indices)["w"])
    with pytest.raises(ValueError, match="none of its weights"):
        adapters.with_adapter_indices(params, indices)
    with pytest.raises(ValueError, match="weights: expected 1"):
        adapters.combine([one], lora, (1.0, 2.0))
    with pytest.raises(ValueError, match="can be added up"):
        adapters.combine([two], dora, (1.0,))
    with pytest.raises(ValueError, match="can be added up"):
        adapters.combine([{"w": {"delta": jnp.zeros(1)}}], svfit, (1.0,))
