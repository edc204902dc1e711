"""The side of subspace_jax in the benchmark of language models."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with the peer

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import interop, language, nn, train

wait = jax.block_until_ready


def write(folder, layers, width, heads, vocab, length):
    """Writes random weights of a GPT-2; returns the number of parameters and the FLOPs per token."""
    config = nn.CausalLMConfig.gpt2(vocab, width, layers, heads)
    interop.save_causal_lm(folder, config, nn.init_params(jax.random.key(0), config))
    params = nn.count_params(config)
    # Two for each weight of a matmul (the table of positions is none), and the two matmuls of attention, without
    # subtracting the masked half, as is customary.
    return params, 2 * (params - config.max_length * width) + 4 * layers * width * length


def _open(folder):
    # On one device unstacked layers avoid copies out of the stacks.
    config, params = interop.load_causal_lm(folder)
    return config, nn.unstack_layers(params)


def forward(folder, tokens, run):
    config, params = _open(folder)
    inputs = jnp.asarray(tokens[:, :-1])
    apply = jax.jit(lambda params, tokens: nn.causal_lm_apply(config, params, tokens, dtype=run["dtype"]).logits)
    return lambda: apply(params, inputs)


def training(folder, tokens, run):
    mesh = train.make_mesh(devices=jax.devices()[:1])
    options = {"folder": folder, "dtype": run["dtype"], "stacked": False}
    task = language.CausalLMTask(interop.read_config(folder), **options)
    tx = optax.adamw(run["learning_rate"], weight_decay=run["weight_decay"])
    state, step = train.init_state(task, tx, mesh), train.jit_train_step(task, tx, mesh)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    rows = {
        "inputs": inputs,
        "labels": labels,
        "weights": np.ones(inputs.shape, np.float32),
        "segment_ids": np.ones(inputs.shape, np.int32),
        "positions": np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape),
    }
    batch = train.to_device(rows, train.batch_sharding(mesh))

    def call():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return call


def generation(folder, tokens, run):
    config, params = _open(folder)
    prompts, options = jnp.asarray(tokens[:, : run["prompt"]]), {"dtype": run["dtype"], "eos_tokens": ()}
    return lambda: nn.generate(config, params, prompts, max_new_tokens=run["new"], **options).tokens


def to_numpy(out):
    return np.asarray(out.astype(jnp.float32))


def device_peak():
    """Most bytes that were in use on a GPU; None on a CPU."""
    return None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()["peak_bytes_in_use"]
