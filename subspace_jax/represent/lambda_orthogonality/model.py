"""The maps as Flax NNX modules."""

import jax
import jax.numpy as jnp
from flax import nnx

from subspace_jax import linalg
from subspace_jax.represent.lambda_orthogonality.core import Affine, CompatParams


class AffineAdapter(nnx.Module):
    """A trainable affine map that starts as the identity, or as its first columns or rows.

    Args:
      in_features: Width of the vectors.
      features: Width of what they are mapped to.
    """

    def __init__(self, in_features: int, features: int):
        self.kernel = nnx.Param(jnp.eye(in_features, features), axes=("embed", None))
        self.bias = nnx.Param(jnp.zeros(features), axes=(None,))

    def affine(self) -> Affine:
        """Returns the map as arrays."""
        return Affine(self.kernel.get_value(), self.bias.get_value())

    def __call__(self, h: jax.Array) -> jax.Array:
        """Maps ``[..., in_features]`` to ``[..., features]``."""
        return self.affine()(h)


class OrthogonalAdapter(nnx.Module):
    """A trainable rotation with a bias, by :func:`subspace_jax.linalg.orthogonal_from_skew`; starts as the identity.

    Args:
      features: Width of the vectors, old and new.
      method: "expm" or "cayley".
    """

    def __init__(self, features: int, method: str = "expm"):
        self.skew = nnx.Param(jnp.zeros((features, features)), axes=("embed", None))
        self.bias = nnx.Param(jnp.zeros(features), axes=(None,))
        self.method = method

    def affine(self) -> Affine:
        """Returns the map as arrays."""
        return Affine(linalg.orthogonal_from_skew(self.skew.get_value(), self.method), self.bias.get_value())

    def __call__(self, h: jax.Array) -> jax.Array:
        """Maps ``[..., features]`` to ``[..., features]``."""
        return self.affine()(h)


class CompatAdapters(nnx.Module):
    """Both maps between two models.

    Args:
      old_features: Width of the old vectors.
      new_features: Width of the new vectors.
      strict: Whether the backward map is a rotation, which needs equal widths.

    Raises:
      ValueError: The map is to be a rotation, and the widths differ.
    """

    def __init__(self, old_features: int, new_features: int, *, strict: bool = False):
        if strict and old_features != new_features:
            raise ValueError(
                f"strict: a rotation needs vectors of one width, got {old_features} old and {new_features} new"
            )
        self.backward = OrthogonalAdapter(new_features) if strict else AffineAdapter(new_features, old_features)
        self.forward = AffineAdapter(old_features, new_features)

    def params(self) -> CompatParams:
        """Returns the maps as arrays."""
        return CompatParams(self.backward.affine(), self.forward.affine())
