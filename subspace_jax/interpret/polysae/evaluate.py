"""What an autoencoder explains of a set, and how strengths of interactions relate to what is active together."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from subspace_jax import metrics, train
from subspace_jax.interpret.polysae import core
from subspace_jax.interpret.polysae.decoder import Params, interaction_strength
from subspace_jax.interpret.polysae.settings import PolySAEConfig
from subspace_jax.interpret.polysae.shards import Shards, total
from subspace_jax.interpret.polysae.sparsify import SparseCode

if TYPE_CHECKING:
    from subspace_jax.interpret.polysae.task import PolySAETask


class Reconstruction(train.Evaluator):
    """Explained variance, squared error, L0 and the share of features that no example of the set fires.

    Args:
      task: The task.
    """

    metrics = ("explained_variance", "mse", "l0", "dead")

    def __init__(self, task: "PolySAETask"):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns sums over the positions that count."""
        del key
        task = self._task

        def sums(params, variables, batch):
            x, weights = task.activations(variables, batch)
            names = task.feature_names()
            out = {"error": P(), "x": P(), "x2": P(), "l0": P(), "count": P(), "fired": P(names)}
            args = (x, weights, variables["threshold"])
            return task.on_shards(_sums, params, args, (P("batch"), P("batch"), P()), out)

        return train.gathered(task, sums)(*model, batch)

    def finish(self, eval):
        """Returns the ratios of the sums."""
        count = float(eval["count"])
        if not count:
            raise ValueError("evaluate: no position of the set counts")
        error, spread = float(eval["error"]), float(np.sum(eval["x2"]) - np.sum(np.square(eval["x"])) / count)
        return {
            "explained_variance": 1 - error / spread if spread > 0 else 0.0,
            "mse": error / count,
            "l0": float(eval["l0"]) / count,
            "dead": float(np.mean(eval["fired"] == 0)),
        }


def _sums(config: PolySAEConfig, params: Params, shards: Shards, x, weights, threshold):
    pre = core.pre_activations(config, params, x)
    z = core.inference_code(config, params, pre, threshold, shards)
    error = core.reconstruct(config, params, z, shards) - x
    w = weights[:, None]
    features = pre.shape[1]
    if isinstance(z, SparseCode):
        l0 = jnp.sum((z.values > 0) * w)
        local = z.indices - core.first_feature(features, shards.features)
        there = (z.values > 0) & (w > 0) & (local >= 0) & (local < features)
        places = jnp.where(there, local, features).reshape(-1)
        fired = jnp.zeros(features, x.dtype).at[places].add(1.0, mode="drop")
    else:
        active = (z > 0) * w
        l0, fired = total(jnp.sum(active), shards.features), jnp.sum(active, axis=0)
    sums = {"error": jnp.sum(jnp.square(error) * w), "x": jnp.sum(x * w, axis=0), "x2": jnp.sum(x**2 * w, axis=0)}
    sums |= {"l0": l0, "count": jnp.sum(weights), "fired": fired}
    return {name: total(value, shards.batch) for name, value in sums.items()}


def strength_and_cooccurrence(params: Params, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compares interaction strengths with how often two features are active together.

    Args:
      params: Parameters of a polynomial decoder, of order 2 or more.
      z: Codes, ``[examples, m]``.

    Returns:
      Strengths ``[m, m]``, counts ``[m, m]``, and the Pearson correlation of the two over pairs ``i < j``; NaN where
      one of them is constant.
    """
    strength, counts = interaction_strength(params), metrics.cooccurrence(z)
    pairs = np.triu_indices(len(strength), 1)
    return strength, counts, jnp.corrcoef(strength[pairs], counts[pairs])[0, 1]


def encode(
    config: PolySAEConfig, params: Params, x: jax.Array, threshold: jax.Array, scale: jax.Array, center: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns dense codes ``[B, m]`` and reconstructions ``[B, d]`` of activations as they are.

    Args:
      config: The autoencoder.
      params: Its parameters, trained on ``scale x - center``.
      x: Activations, ``[B, d]`` float32.
      threshold: That of :class:`SAEState`.
      scale: The scale, a scalar.
      center: ``[d]``.
    """
    pre = core.pre_activations(config, params, x * scale - center[None])
    z = core.inference_code(config, params, pre, threshold)
    dense = z.dense(config.d_sae) if isinstance(z, SparseCode) else z
    return dense, (core.reconstruct(config, params, z) + center[None]) / scale
