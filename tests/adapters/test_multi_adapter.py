"""Several adapters on one model, and sums of adapters."""

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


@pytest.mark.parametrize("rules", [LORA, DORA], ids=["LoRA", "DoRA"])
def test_each_row_of_a_batch_has_its_own_adapter(rules):
    trainables, tokens = trained(rules), jnp.arange(12, dtype=jnp.int32).reshape(4, 3)
    bound = adapters.bind_many(params(), trainables, rules, jnp.array([1, -1, 0, 1]))
    got = model(bound, tokens)
    for i, rows in ((0, [2]), (1, [0, 3])):
        expected = model(adapters.merge(params(), trainables[i], rules[i]), tokens)[np.array(rows)]
        # Three layers of products in float32.
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(got[np.array(rows)], expected, rtol=1e-5, atol=1e-5 * scale)
    plain = model(params(), tokens)
    np.testing.assert_allclose(got[1], plain[1], rtol=1e-6, atol=1e-6 * float(jnp.abs(plain).max()))
    assert float(jnp.abs(got - plain)[np.array([0, 2, 3])].max(axis=(1, 2)).min()) > 1e-2
    again = model(adapters.with_rows(bound, jnp.array([-1, 1, 0, 2])), tokens)
    np.testing.assert_array_equal(again[2], got[2])
    assert np.all(np.isnan(again[3]))


def test_one_product_serves_the_batch_and_rows_do_not_unroll():
    rules = {"w": adapters.LoRA(2, 2.0)}
    params = {"w": jnp.ones((6, 5))}
    own = [adapters.init(jax.random.key(i), params, rules) for i in range(3)]

    def run(rows, x):
        return nn.linear(x, adapters.bind_many(params, own, rules, rows)["w"])

    for batch in (2, 16):
        jaxpr = jax.make_jaxpr(run)(jnp.zeros(batch, jnp.int32), jnp.ones((batch, 3, 6)))
        assert str(jaxpr).count("dot_general") == 3


def test_sums_of_adapters_are_sums_of_their_updates():
    own = trained(LORA)
    total, rules = adapters.combine(own, LORA, (0.5, -2.0))

    @jax.jit
    def updates(*trees):
        pairs = zip(trees, (*LORA, rules), strict=True)
        return [jax.tree.map(jnp.subtract, adapters.materialize(params(), t, r), params()) for t, r in pairs]

    one, two, got = updates(*own, total)
    wanted = jax.tree.map(lambda x, y: 0.5 * x - 2.0 * y, one, two)
    # Each update is what is left of a weight of size three after another is taken from it.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, wanted)
    assert total["layers"]["q"]["kernel"]["a"].shape[-1] == 4 + 2
    spectral = {"w": adapters.SVFit(2)}
    deltas = [{"w": {"delta": jnp.array([1.0, 2.0])}}, {"w": {"delta": jnp.array([0.0, 1.0])}}]
    np.testing.assert_array_equal(adapters.combine(deltas, spectral, (2.0, 1.0))[0]["w"]["delta"], [2.0, 5.0])


def test_what_can_not_be_served_or_added_is_refused():
    params = {"w": jnp.ones((4, 5))}
    lora, dora, svfit = {"w": adapters.LoRA(1, 1.0)}, {"w": adapters.DoRA(1, 1.0)}, {"w": adapters.SVFit(1, "log")}
    one, two = (adapters.init(jax.random.key(0), params, rules) for rules in (lora, dora))
    rows = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="trainables: expected at least one"):
        adapters.bind_many(params, [], lora, rows)
    with pytest.raises(TypeError, match="rows: expected integers"):
        adapters.bind_many(params, [one], lora, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"w: expected LoRA.*DoRA can't be mixed with LoRA.*got \['LoRA', 'DoRA'\]"):
        adapters.bind_many(params, [one, two], [lora, dora], rows)
    flora, conv = {"w": adapters.FLoRA((1, 1))}, {"k": adapters.LoRA(1, 1.0, window=1)}
    three = adapters.init(jax.random.key(0), params, flora)
    with pytest.raises(ValueError, match=r"w: .*FLoRA can't be chosen by row; got \['LoRA', 'FLoRA'\]"):
        adapters.bind_many(params, [one, three], [lora, flora], rows)
    kernels = {"k": jnp.ones((3, 4, 4))}
    four = adapters.init(jax.random.key(0), kernels, conv)
    with pytest.raises(ValueError, match=r"k: .*convolutions can't be chosen by row, as numbers \[0\] are"):
        adapters.bind_many(kernels, [four], conv, rows)
    with pytest.raises(ValueError, match="have no weights for"):
        adapters.bind_many({"v": params["w"]}, [one], lora, rows)
    with pytest.raises(ValueError, match="settings: expected one for all or 2"):
        adapters.bind_many(params, [one, one], [lora], rows)
    with pytest.raises(ValueError, match=r"x: expected \[2, \.\.\.\]"):
        nn.linear(jnp.ones((3, 4)), adapters.bind_many(params, [one], lora, rows)["w"])
    with pytest.raises(ValueError, match="none of its weights"):
        adapters.with_rows(params, rows)
    with pytest.raises(ValueError, match="weights: expected 1"):
        adapters.combine([one], lora, (1.0, 2.0))
    with pytest.raises(ValueError, match="can be added up"):
        adapters.combine([two], dora, (1.0,))
    with pytest.raises(ValueError, match="can be added up"):
        adapters.combine([{"w": {"delta": jnp.zeros(1)}}], svfit, (1.0,))
