"""The side of subspace_jax in the benchmark of adapters."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with the peer

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import adapters, kernels, nn

wait = jax.block_until_ready


def _open(layers, x, run):
    setting = (adapters.DoRA if run["method"] == "dora" else adapters.LoRA)(run["rank"], 2.0 * run["rank"])
    rules = {f"layer{i}": setting for i in range(len(layers))}
    base = {f"layer{i}": {"kernel": jnp.asarray(layer["w"], run["dtype"])} for i, layer in enumerate(layers)}
    factors = [{name: jnp.asarray(layer[name]) for name in ("a", "b")} for layer in layers]
    trainable = {f"layer{i}": {"kernel": arrays} for i, arrays in enumerate(factors)}
    if run["method"] == "dora":
        for name, arrays in trainable.items():
            w = base[name]["kernel"]
            start = kernels.dora_weight_norm(w, arrays["kernel"]["a"], jnp.zeros_like(arrays["kernel"]["b"]), 2.0)
            arrays["kernel"]["magnitude"] = start.astype(jnp.float32)
    x = jnp.asarray(x, run["dtype"])

    def apply(base, trainable, x):
        bound = adapters.bind(base, trainable, rules)
        for i in range(len(layers)):
            x = nn.linear(x if i == 0 else jnp.tanh(x), bound[f"layer{i}"]["kernel"])
        return x

    return apply, base, trainable, x


def forward(layers, x, run):
    apply, base, trainable, x = _open(layers, x, run)
    apply = jax.jit(apply)
    return lambda: apply(base, trainable, x)


def training(layers, x, run):
    apply, base, trainable, x = _open(layers, x, run)
    tx = optax.adamw(run["learning_rate"], weight_decay=0.0)

    def loss(trainable, base, x):
        return jnp.mean(jnp.square(apply(base, trainable, x).astype(jnp.float32)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, state, base, x):
        value, grads = jax.value_and_grad(loss)(trainable, base, x)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state = tx.init(trainable)

    def call():
        nonlocal trainable, state
        trainable, state, value = step(trainable, state, base, x)
        return value

    return call


def to_numpy(out):
    return np.asarray(out.astype(jnp.float32))


def device_peak():
    """Most bytes that were in use on a GPU; None on a CPU."""
    return None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()["peak_bytes_in_use"]
