"""Several adapters on one model, and sums of adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, nn

from . import cases

LORA = (
    {"attn/*": adapters.LoRA(4, 8.0)},
    {
        "qkv": adapters.LoRA(2, 1.0, rslora=True),
        "embed": adapters.LoRA(3, 3.0),
        "mlp/*": adapters.LoRA((1, 0, 2, 1), 2.0),
    },
)
DORA = ({"qkv": adapters.DoRA(4, 8.0), "embed": adapters.DoRA(3, 2.0)},) * 2


def trained(rules):
    own = enumerate(rules)
    return [cases.moved(adapters.init(jax.random.key(i), cases.params(), r), seed=i + 5) for i, r in own]


@pytest.mark.parametrize("rules", [LORA, DORA], ids=["LoRA", "DoRA"])
def test_each_row_of_a_batch_has_its_own_adapter(rules):
    trainables = trained(rules)
    bound = adapters.bind_many(cases.params(), trainables, rules, jnp.array([1, -1, 0, 1]))
    got = cases.logits(bound, cases.tokens(4, 8))
    for i, row in ((0, [2]), (1, [0, 3])):
        one = adapters.bind(cases.params(), trainables[i], rules[i])
        expected = cases.logits(one, cases.tokens(4, 8))[np.array(row)]
        # Four layers of products in float32.
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(got[np.array(row)], expected, rtol=1e-5, atol=1e-5 * scale)
    plain = cases.logits(cases.params(), cases.tokens(4, 8))
    np.testing.assert_array_equal(got[1], plain[1])
    assert float(jnp.abs(got - plain)[np.array([0, 2, 3])].min(axis=0).max()) > 1e-2
    again = cases.logits(adapters.with_rows(bound, jnp.array([-1, 1, 0, 2])), cases.tokens(4, 8))
    np.testing.assert_array_equal(again[0], plain[0])
    np.testing.assert_allclose(again[2], got[2], rtol=1e-5, atol=1e-5 * float(jnp.abs(plain).max()))
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
    first, second = (
        {"attn/*": adapters.LoRA(4, 8.0), "up": adapters.LoRA(2, 2.0, rslora=True)},
        {"qkv": adapters.LoRA((2, 1, 3, 0), (1.0, 2.0, 1.0, 1.0))},
    )
    own = trained((first, second))
    total, rules = adapters.combine(own, (first, second), (0.5, -2.0))
    got = adapters.materialize(cases.params(), total, rules)
    one, two = (adapters.materialize(cases.params(), t, r) for t, r in zip(own, (first, second), strict=True))

    def expected(w, x, y):
        return w + 0.5 * (x - w) - 2.0 * (y - w)

    wanted = jax.tree.map(expected, cases.params(), one, two)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), got, wanted)
    assert total["layers"]["attn"]["qkv"]["kernel"]["a"].shape[-1] == 4 + 3
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
    with pytest.raises(ValueError, match="expected LoRA, or DoRA in every adapter"):
        adapters.bind_many(params, [one, two], [lora, dora], rows)
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
