"""Activations of a language model, computed on the mesh where the autoencoder trains; nothing is kept on disk."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax import interop, nn, train

PyTree = Any

# Times the usual norm of centered activations: a few tokens beside the first of a text have a hundred times that
# (arXiv 2402.17762), and their squared errors would drown all others.
_OUTLIER = 10.0


class ResidualStream:
    """The residual stream after some layers of a causal language model; later layers are neither kept nor run.

    Args:
      model: The model.
      layer: Number of the hidden state: that after so many layers, at least 1.
      folder: Checkpoint folder of the model; None takes random weights, which are then in the checkpoints.
      dtype: Type of the model's weights and activations.
      skip: First positions of each text that do not count: models give the first one a huge norm.

    Raises:
      ValueError: The model has fewer layers, or ``skip`` is below 0.
    """

    def __init__(
        self,
        model: nn.CausalLMConfig,
        layer: int,
        *,
        folder: str | os.PathLike | None = None,
        dtype: DTypeLike = jnp.float32,
        skip: int = 1,
    ):
        if not 1 <= layer <= model.num_layers:
            raise ValueError(f"layer: expected 1 to {model.num_layers}, the layers of the model, got {layer}")
        self.config = nn.first_layers(model, layer)
        if skip < 0:
            raise ValueError(f"skip: expected at least 0 positions, got {skip}")
        self.whole, self.layer, self.folder = model, layer, folder
        self._dtype, self._skip = dtype, skip
        self.axes = nn.param_axes(self.config)
        self._options = nn.LayerOptions(
            on_layer=functools.partial(
                train.all_gather_params, axes=jax.tree.map(lambda names: P(*names[1:]), self.axes["layers"])
            )
        )

    def init(self, key: jax.Array) -> PyTree:
        """Returns random weights."""
        return nn.init_params(key, self.config, self._dtype)

    def load(self, shardings: PyTree) -> PyTree:
        """Returns the weights of the folder on shardings of the layers that are kept."""
        mesh, rules = jax.tree.leaves(shardings)[0].mesh, train.current_rules()

        def place(shapes, axes):
            return train.param_shardings(shapes, axes, mesh, rules)

        params = interop.load_causal_lm(self.folder, shardings=place, dtype=self._dtype)[1]
        cut = functools.partial(nn.first_layer_params, num_layers=self.layer)
        return train.jit_on_mesh(cut, mesh, shardings)(params)

    def __call__(self, params: PyTree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Returns the stream of packed texts.

        Args:
          params: Weights of the layers.
          batch: Rows of :func:`subspace_jax.data.text.pack_rows`; of evaluation with ``mask``.

        Returns:
          Activations ``[rows * length, d]`` float32, and weights ``[rows * length]``: 0 for padding and for the first
          positions of a text.
        """
        stream = nn.causal_lm_apply(
            self.config,
            params,
            batch["inputs"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            with_logits=False,
            options=self._options,
        ).stream
        x = jax.lax.stop_gradient(stream).astype(jnp.float32)
        return x.reshape(-1, x.shape[-1]), self.counted(batch).reshape(-1)

    def counted(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Returns 1 for the positions that count, ``[rows, length]`` float32."""
        real = (batch["segment_ids"] > 0) & (batch["positions"] >= self._skip)
        weights = real.astype(jnp.float32)
        return weights * batch["mask"][:, None] if "mask" in batch else weights


def usual(x: jax.Array) -> jax.Array:
    """Returns which of centered activations ``[B, d]`` are no outliers, ``[B]`` bool.

    Args:
      x: Activations, scaled so that the usual norm is ``sqrt(d)``.
    """
    return jnp.sum(jnp.square(x), axis=1) <= _OUTLIER**2 * x.shape[1]
