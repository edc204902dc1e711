"""States in 16 and 8 bits: what they cost, what rounding does, and that training does not notice."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import optim
from subspace_jax.optim import quantized_state as quantized


def gaussian(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_bytes_are_those_of_the_formula():
    params = {"kernel": jnp.zeros((3, 64, 32)), "bias": jnp.zeros(32)}
    options = {"rank": lambda path, shape: 16 if path == "kernel" else None}
    basis, numbers, rows, counters = 4 * 3 * 32 * 16, 2 * (3 * 64 * 16 + 32), 2 * (3 * 64 + 1), 4 * 5
    # A placeholder for the side without a basis; a mark for each of the four inner counters, and in bfloat16 for each
    # of the four moments.
    absent, marks = 4, 4
    for dtype, moments in (("bfloat16", 2 * numbers + 4 * 4), ("int8", numbers + 4 * rows)):
        state = jax.eval_shape(optim.quantize_state(optim.galore(0.1, **options), dtype).init, params)
        assert bytes_of(state) == basis + absent + moments + marks + counters, dtype


@pytest.mark.slow
@pytest.mark.parametrize("dtype", quantized.DTYPES)
def test_rounding_is_right_on_average(dtype):
    """Over 4000 draws the mean is within 5 standard errors of a number that both neighbours are known of."""
    x = jnp.concatenate([jnp.ones((1, 1)), jnp.full((1, 15), 0.3001)], axis=-1)
    keys = jax.random.split(jax.random.key(0), 4000)
    rounded = jax.vmap(lambda key: quantized._dequantize(*quantized._quantize(x, dtype, key)))(keys)[:, 0, 1]
    seen = jnp.unique(rounded)
    assert seen.size == 2
    assert seen[0] < 0.3001 < seen[1]
    assert seen[1] - seen[0] <= (2**-9 if dtype == "bfloat16" else 0.02)
    assert abs(float(jnp.mean(rounded)) - 0.3001) < 5 * float(seen[1] - seen[0]) / 2 / 4000**0.5


def test_eight_bits_keep_signs_the_largest_and_what_is_zero():
    x = jnp.asarray([[0.0, -2.0, 1e-20, 1.0] + 12 * [-1e-3], 16 * [0.0]])
    values, scale = quantized._quantize(x, "int8", jax.random.key(0))
    back = quantized._dequantize(values, scale)
    np.testing.assert_array_equal(jnp.sign(back), jnp.sign(x))
    assert back[0, 1] == -2
    np.testing.assert_array_equal(scale, [[2.0], [0.0]])
    # Neighbours of 1e-3 of 2 are 21 levels of 127 up, a fifth apart.
    np.testing.assert_allclose(back[0, 4:], -1e-3, rtol=0.2)


def test_what_is_not_finite_is_seen():
    x = jnp.full((2, 16), jnp.nan).at[0].set(jnp.inf)
    values, _ = quantized._quantize(x, "bfloat16", jax.random.key(0))
    assert not jnp.any(jnp.isfinite(values))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", quantized.DTYPES)
def test_an_average_of_nothing_decays(dtype):
    """Rounded to the nearest, a bfloat16 times 0.999 never changes."""
    tx = optim.quantize_state(optax.ema(0.999, debias=False), dtype)
    state = tx.init(jnp.zeros((4, 64)))
    step = jax.jit(lambda g, s: tx.update(g, s)[1])
    state = step(jnp.full((4, 64), 1000.0), state)
    for _ in range(500):
        state = step(jnp.zeros((4, 64)), state)
    mean = jnp.mean(quantized._dequantize(state.values.ema, state.scales.ema))
    # The largest of a row of int8 is exact, and the rows here are constant.
    np.testing.assert_allclose(mean, 0.999**500, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", quantized.DTYPES)
def test_a_network_trains_as_with_a_wide_state(dtype):
    x = gaussian((256, 16))
    y = jnp.tanh(x @ gaussian((16, 32), 1)) @ gaussian((32, 8), 2)
    start = {"up": 0.2 * gaussian((16, 64), 3), "down": 0.1 * gaussian((64, 16), 4), "out": 0.2 * gaussian((16, 8), 5)}

    def loss(params):
        return jnp.mean(jnp.square(jnp.tanh(jnp.tanh(x @ params["up"]) @ params["down"]) @ params["out"] - y))

    def end(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=300)
        return loss(params) / loss(start)

    wide = optim.galore(1e-2, rank=8, refresh_every=20, scale=1.0)
    expected, got = (
        jax.jit(end, static_argnums=0)(wide),
        jax.jit(end, static_argnums=0)(optim.quantize_state(wide, dtype)),
    )
    assert expected < 0.3
    assert got < 1.1 * expected


@pytest.mark.slow
def test_rotated_moments_stay_possible():
    tx = optim.quantize_state(optim.galore(0.1, rank=4, refresh_every=1, moments="rotate"), "int8")
    g = gaussian((32, 8))
    update = jax.jit(tx.update)
    _, state = update(g, tx.init(g))
    chex.assert_tree_all_finite(update(g, state)[0])


def test_an_unknown_type_is_named():
    with pytest.raises(ValueError, match=r"dtype: .*'int4'"):
        optim.quantize_state(optax.adam(0.1), "int4")


@pytest.mark.parametrize("dtype", quantized.DTYPES)
@pytest.mark.slow
def test_what_the_inner_transform_keeps_in_16_bits_stays_so(dtype):
    """Adam's moments of bfloat16 parameters, beside those of float32 ones."""
    params = {"half": jnp.ones((4, 32), jnp.bfloat16), "single": jnp.ones((4, 32))}
    tx = optim.quantize_state(optax.adam(0.1), dtype)
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies floats by int32
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(params, state, params)
        expected, _ = jax.jit(optax.adam(0.1).update)(params, optax.adam(0.1).init(params), params)
    kinds = jax.tree.map(lambda x: x.dtype, (state, updates))
    assert jax.tree.map(lambda x: x.dtype, (after, params)) == kinds
    assert state.values[0].mu["half"].dtype == jnp.bfloat16
    assert state.values[0].mu["single"].dtype == dtype
    np.testing.assert_array_equal(np.float32(updates["half"]), np.float32(expected["half"]))
