import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_jax import nn


def test_rope_frequencies_are_a_geometric_series():
    np.testing.assert_allclose(nn.rope_frequencies(nn.Rope(theta=10000.0), 8), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_rope_frequencies_of_linear_are_divided():
    plain, linear = (nn.rope_frequencies(rope, 16) for rope in (nn.Rope(), nn.Rope(kind="linear", factor=4.0)))
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)


def test_rope_frequencies_of_llama3_keep_high_and_divide_low_ones():
    rope = nn.Rope(theta=1000.0, kind="llama3", factor=8.0, original_length=64)
    frequency, plain = nn.rope_frequencies(rope, 32), nn.rope_frequencies(nn.Rope(theta=1000.0), 32)
    wavelength = 2 * np.pi / plain.astype(np.float64)
    fast, slow = wavelength < 64 / 4, wavelength > 64 / 1
    assert fast.any()
    assert slow.any()
    between = ~(fast | slow)
    assert between.any()
    np.testing.assert_allclose(frequency[fast], plain[fast], rtol=1e-6)
    np.testing.assert_allclose(frequency[slow], plain[slow] / 8, rtol=1e-6)
    share = (64 / wavelength[between] - 1) / (4 - 1)
    np.testing.assert_allclose(frequency[between], (1 - share) * plain[between] / 8 + share * plain[between], rtol=1e-5)


def test_apply_rope_rotates_halves_instead_of_neighbors():
    x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
    turned = nn.apply_rope(x, nn.rope_tables(nn.Rope(), 4, jnp.array([[1]])))
    np.testing.assert_allclose(turned[0, 0, 0], [np.cos(1.0), 0.0, np.sin(1.0), 0.0], rtol=1e-6)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 200), st.integers(0, 50), st.integers(0, 50))
def test_apply_rope_gives_scores_of_relative_positions(seed, shift, i, j):
    query, key = jax.random.normal(jax.random.key(seed), (2, 1, 1, 1, 16))

    def turn(x, position):
        return nn.apply_rope(x, nn.rope_tables(nn.Rope(), 16, jnp.array([[position]])))

    near, far = (jnp.vdot(turn(query, i + s), turn(key, j + s)) for s in (0, shift))
    np.testing.assert_allclose(near, far, atol=2e-4)
    np.testing.assert_allclose(jnp.linalg.norm(turn(query, i)), jnp.linalg.norm(query), rtol=1e-5)


def test_apply_rope_rotates_bfloat16_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    tables = nn.rope_tables(nn.Rope(), 8, jnp.arange(3)[None])
    rounded = nn.apply_rope(x.astype(jnp.bfloat16), tables)
    assert rounded.dtype == jnp.bfloat16
    exact = nn.apply_rope(x.astype(jnp.bfloat16).astype(jnp.float32), tables)
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "longrope"}, "kind 'longrope' is not supported"),
        ({"theta": 0.0}, "theta and factor are positive"),
        ({"kind": "llama3", "low_freq_factor": 4.0}, "low_freq_factor < high_freq_factor"),
    ],
)
def test_rope_refuses_invalid_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        nn.Rope(**fields)


def test_rope_frequencies_refuse_odd_heads():
    with pytest.raises(ValueError, match="even number, got 7"):
        nn.rope_frequencies(nn.Rope(), 7)
