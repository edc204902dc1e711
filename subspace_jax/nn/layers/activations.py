"""Activation functions by the names that checkpoints use."""

import math

import jax
import jax.numpy as jnp

from subspace_jax.linalg import working_dtype


def _gelu(x: jax.Array) -> jax.Array:
    """The exact GELU (arXiv 1606.08415), computed by erf in at least float32."""
    wide = x.astype(working_dtype(x))
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": _gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}
