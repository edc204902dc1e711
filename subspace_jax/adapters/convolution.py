"""LoRA and DoRA weights of convolutions."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from subspace_jax import kernels, nn
from subspace_jax.adapters.factors import adapted, block_diagonal, column_norm, drop_features, gain, grouped_matmul
from subspace_jax.adapters.quantized import as_matrix
from subspace_jax.adapters.structured import StructuredWeight, as_dense


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConvLoRAWeight(StructuredWeight):
    """A convolution's kernel ``base + scale * a b``, applied as two convolutions: to the rank, and 1x1 to the outputs.

    Attributes:
      base: Frozen ``[..., *window, in / groups, out]``.
      a: ``[..., *window, in / groups, r]``.
      b: ``[..., r / groups, out]``.
      key: Random key of dropout, ``[...]``; None without.
      scale: The scale.
      window: Number of axes of the window.
      groups: Number of groups of channels.
      dropout: Probability of dropping an input feature of the update, if there is a key.
    """

    base: jax.Array | StructuredWeight
    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    window: int = field(default=2, metadata={"static": True})
    groups: int = field(default=1, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})

    def conv(self, x: jax.Array, *, groups: int, **how) -> jax.Array:
        """Returns :func:`subspace_jax.nn.conv` of ``x`` with the adapted kernel."""
        _check_groups(self, groups)
        update = _update(drop_features(x, self.key, self.dropout), self.a, self.b, groups, how)
        base = nn.conv(x, self.base, groups=groups, **how)
        return base + jnp.asarray(self.scale, x.dtype) * update

    def dense(self) -> jax.Array:
        """Returns the kernel, in the dtype of ``base``."""
        return dense_kernel(self.base, self.a, self.b, self.scale, self.window, self.groups).astype(self.base.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConvDoRAWeight(StructuredWeight):
    """A convolution's kernel ``(base + scale * a b) diag(magnitude / norm)``, applied without forming it.

    Attributes:
      base: Frozen ``[..., *window, in / groups, out]``.
      a: ``[..., *window, in / groups, r]``.
      b: ``[..., r / groups, out]``.
      magnitude: ``[..., out]``.
      key: Random key of dropout, ``[...]``; None without.
      scale: The scale.
      window: Number of axes of the window.
      groups: Number of groups of channels.
      dropout: Probability of dropping an input feature of the update, if there is a key.
      detach_norm: Whether the norm is a constant for derivatives.
    """

    base: jax.Array | StructuredWeight
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array
    key: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    window: int = field(default=2, metadata={"static": True})
    groups: int = field(default=1, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})
    detach_norm: bool = field(default=True, metadata={"static": True})

    @property
    def norm(self) -> jax.Array:
        """Norms of the adapted kernel over window and inputs, ``[..., out]``."""
        return conv_norm(self.base, self.a, self.b, self.scale, self.window, self.groups)

    @property
    def gain(self) -> jax.Array:
        """``magnitude / norm``, ``[..., out]``."""
        return gain(self.magnitude, self.norm, self.detach_norm, self.base.dtype)

    def conv(self, x: jax.Array, *, groups: int, **how) -> jax.Array:
        """Returns :func:`subspace_jax.nn.conv` of ``x`` with the adapted kernel."""
        _check_groups(self, groups)
        y = nn.conv(x, self.base, groups=groups, **how)
        seen = drop_features(x, self.key, self.dropout)
        # As in PEFT, dropout is applied to the correction of the frozen branch too.
        own = y if self.key is None else nn.conv(seen, self.base, groups=groups, **how)
        return y + kernels.dora_compose(own, _update(seen, self.a, self.b, groups, how), self.gain, self.scale)

    def dense(self) -> jax.Array:
        """Returns the kernel, in the dtype of ``base``."""
        direction = dense_kernel(self.base, self.a, self.b, self.scale, self.window, self.groups)
        gains = jnp.expand_dims(self.gain, tuple(range(-2 - self.window, -1)))
        return (direction * gains.astype(direction.dtype)).astype(self.base.dtype)


def dense_kernel(
    w: jax.Array | StructuredWeight, a: jax.Array, b: jax.Array, scale: float, window: int, groups: int
) -> jax.Array:
    """Returns the kernel ``w + scale * a b``, in float32 or better."""
    w = as_dense(w)
    return adapted(as_matrix(w, window), as_matrix(a, window), block_diagonal(b, groups), scale).reshape(w.shape)


def conv_norm(
    w: jax.Array | StructuredWeight, a: jax.Array, b: jax.Array, scale: float, window: int, groups: int
) -> jax.Array:
    """Returns the norms ``[..., out]`` of ``w + scale * a b`` over window and inputs."""
    return column_norm(as_matrix(w, window), as_matrix(a, window), block_diagonal(b, groups), scale)


def _update(x: jax.Array, a: jax.Array, b: jax.Array, groups: int, how: dict) -> jax.Array:
    return grouped_matmul(nn.conv(x, a, groups=groups, **how), b, groups)


def _check_groups(weight: ConvLoRAWeight | ConvDoRAWeight, groups: int) -> None:
    if groups != weight.groups:
        raise ValueError(f"groups: the convolution has {groups}, its adapter was set for {weight.groups}")
