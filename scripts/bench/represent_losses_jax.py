"""The side of subspace_jax in the benchmark of losses over pairs of a batch."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU is shared with the peer

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import losses
from subspace_jax.represent import hydra

wait = jax.block_until_ready


def infonce(run):
    """Each positive against the negatives alone, with an open gate: that of ``multi_positive_infonce``, in blocks."""
    config = hydra.HydraLoss(block_size=run["block_size"])

    def loss(z, k, labels):
        params = {"log_scale": -jnp.log(jnp.float32(run["temperature"]))}
        return hydra.hydra_loss(params, z, k, jnp.ones_like(z), hydra.PairLabels(labels, labels, labels), config)[0]

    return loss


def contrastive(run):
    """Every positive among all keys (SupCon)."""

    def loss(z, k, labels):
        options = {"block_size": run["block_size"]}
        return losses.supervised_contrastive(z, k, labels, labels, run["temperature"], **options)

    return loss


def margin(run):
    """Margins of sampled pairs; the keys are not used."""

    def loss(z, k, labels):
        return losses.margin_loss(z, labels, run["per_class"], block_size=run["block_size"])[0]

    return loss


LOSSES = {"infonce": infonce, "contrastive": contrastive, "margin": margin}


def step(name, arrays, run):
    """Returns a call that computes a loss and its gradients by anchors and keys."""
    function = jax.jit(jax.value_and_grad(LOSSES[name](run), argnums=(0, 1)))
    arrays = tuple(map(jnp.asarray, arrays))
    return lambda: function(*arrays)


def to_numpy(out):
    """The loss, and the gradients as one array."""
    value, grads = out
    return float(value), np.concatenate([np.asarray(x) for x in grads])


def device_peak():
    """Most bytes that were in use on a GPU; None on a CPU."""
    return None if jax.default_backend() == "cpu" else jax.devices()[0].memory_stats()["peak_bytes_in_use"]
