"""Trees of the golden vectors, and networks of their form."""

import jax
import jax.numpy as jnp

NAMES = ("l1.weight", "l1.bias", "l2.weight", "l2.bias")


def tree(g, prefix):
    """The tree under a prefix, in the layout of the reference: weights ``[out, in]``."""
    return {name: jnp.asarray(g[f"{prefix}/{name}"]) for name in NAMES}


def network(head):
    """A function of parameters and inputs to logits, with a head that is fixed."""

    def apply(params, x):
        hidden = jax.nn.relu(jnp.matmul(x, params["l1.weight"].T) + params["l1.bias"][None])
        return jnp.matmul(jnp.matmul(hidden, params["l2.weight"].T) + params["l2.bias"][None], head)

    return apply


def random_tree(seed, scale=1.0):
    """A tree of float32 with two kernels and a counter."""
    one, two = jax.random.split(jax.random.key(seed))
    return {
        "up": {"kernel": scale * jax.random.normal(one, (4, 6)), "bias": jnp.arange(6, dtype=jnp.float32)},
        "down": {"kernel": scale * jax.random.normal(two, (6, 3))},
        "steps": jnp.asarray(seed),
    }
