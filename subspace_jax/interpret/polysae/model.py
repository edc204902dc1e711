"""The sparse autoencoder as a Flax NNX module."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from subspace_jax.interpret.polysae import core
from subspace_jax.interpret.polysae.settings import PolySAEConfig
from subspace_jax.interpret.polysae.sparsify import SparseCode

_FEATURES_FIRST = ("U", "U1", "U2", "U3", "W_dec")


class PolySAEOutput(NamedTuple):
    """The output of a sparse autoencoder.

    Attributes:
      recon: Reconstructions, ``[B, d]``.
      codes: Codes, ``[B, m]``.
      pre_acts: Pre-activations, ``[B, m]``.
    """

    recon: jax.Array
    codes: jax.Array
    pre_acts: jax.Array


class PolySAE(nnx.Module):
    """A sparse autoencoder with a linear or polynomial decoder (arXiv 2602.01322).

    Args:
      config: The autoencoder.
      params: Parameters, see :func:`init_params`; drawn by ``rngs`` where None.
      rngs: Random number generators; the ``params`` stream is used.

    Raises:
      ValueError: There are neither parameters nor generators.
    """

    def __init__(
        self, config: PolySAEConfig, params: dict[str, jax.Array] | None = None, *, rngs: nnx.Rngs | None = None
    ):
        if params is None and rngs is None:
            raise ValueError("PolySAE: expected params, or rngs to draw them by")
        params = core.init_params(rngs.params(), config) if params is None else params
        self.config = config
        for name, x in params.items():
            setattr(self, name, nnx.Param(x, axes=tuple(axes_of_param(name, x.ndim))))

    def params(self) -> dict[str, jax.Array]:
        """Returns the parameters as arrays."""
        return {name: p.get_value() for name, p in vars(self).items() if isinstance(p, nnx.Param)}

    def encode(self, x: jax.Array, *, threshold: jax.Array | float | None = None) -> jax.Array:
        """Returns codes ``[B, m]`` of activations ``[B, d]``; other arguments: see :meth:`__call__`."""
        return self(x, threshold=threshold).codes

    def decode(self, z: jax.Array) -> jax.Array:
        """Returns the reconstructions ``[B, d]`` of codes ``[B, m]``."""
        return core.reconstruct(self.config, self.params(), z)

    def __call__(self, x: jax.Array, *, threshold: jax.Array | float | None = None) -> PolySAEOutput:
        """Encodes and decodes.

        Args:
          x: Activations, ``[B, d]``.
          threshold: Of BatchTopK, see :class:`SAEState`: examples are encoded each by itself.  Without it, the batch is
            one of training.

        Raises:
          ValueError: ``x`` is not floating point, or of another width.
        """
        config, params = self.config, self.params()
        pre = core.pre_activations(config, params, x)
        if threshold is None:
            z = core.sparse_code(config, params, pre, None)
        else:
            z = core.inference_code(config, params, pre, jnp.asarray(threshold, pre.dtype))
        dense = z.dense(config.d_sae) if isinstance(z, SparseCode) else z
        return PolySAEOutput(core.reconstruct(config, params, z), dense, pre)


def axes_of_param(name: str, ndim: int) -> P:
    """Returns the logical axes of a parameter: features over ``tensor``, and widths over ``fsdp``."""
    if name in _FEATURES_FIRST:
        return P("mlp", "embed")
    if name == "W_enc":
        return P("embed", "mlp")
    return P("mlp") if name in ("b_enc", "log_theta") else P(*(None,) * ndim)
