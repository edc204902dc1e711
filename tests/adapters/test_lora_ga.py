"""Starts of LoRA from the gradient and from the weight, against an independent version in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters

close = lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)  # noqa: E731


def test_lora_ga_begins_as_the_oracle_and_changes_nothing(x64, golden):
    data = golden("adaprelora/peers_oracle")
    w, g = jnp.asarray(data["ga_W"].T), jnp.asarray(data["ga_G"].T)
    scale = float(data["ga_scale"])
    a, b, kernel = adapters.lora_ga_init(w, g, int(data["ga_rank"]), scale, float(data["ga_gamma"]))
    # Signs of singular vectors are free, hence the Gram matrices.
    close(b.T @ b, data["ga_BAgram_B"])
    close(a @ a.T, data["ga_gram_A"])
    close(kernel + scale * a @ b, w)


def test_a_sketch_finds_the_same_start_where_the_gradient_is_of_low_rank():
    keys = jax.random.split(jax.random.key(0), 3)
    g = jax.random.normal(keys[0], (20, 4)) @ jax.random.normal(keys[1], (4, 16))
    exact, sketch = (adapters.lora_ga_init(g, g, 2, 1.0, key=key) for key in (None, keys[2]))
    for x, y in zip(exact, sketch, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)


def test_pissa_begins_as_the_oracle(x64, golden):
    data = golden("adaprelora/peers_oracle")
    rank, scale = int(data["pissa_rank"]), float(data["pissa_scale"])
    setting = adapters.LoRA(rank, scale * rank, init="pissa")
    base, trainable = adapters.prepare(
        jax.random.key(0), {"kernel": jnp.asarray(data["pissa_W"].T)}, {"kernel": setting}
    )
    a, b = (trainable["kernel"][name] for name in "ab")
    close(base["kernel"].T, data["pissa_Wres"])
    close((a @ b).T, data["pissa_BA"])
    close(a.T @ a, data["pissa_gramA"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 3}, "rank: expected 1 to 2, half of the shorter side"),
        ({"rank": 0}, "rank: expected 1 to 2"),
        ({"scale": 0.0}, "scale: expected a positive number"),
        ({"gamma": -1.0}, "gamma: expected a positive number"),
        ({"grad": jnp.ones((6, 6))}, r"grad: expected the shape .*\(6, 4\), got \(6, 6\)"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"kernel": jnp.ones((6, 4)), "grad": jnp.ones((6, 4)), "rank": 1, "scale": 1.0, "gamma": 16.0}
    with pytest.raises(ValueError, match=message):
        adapters.lora_ga_init(**(good | change))
