"""LoRA and DoRA on the kernels of convolutions."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from subspace_jax import kernels, nn
from subspace_jax.adapters.factors import adapted, blocks, column_norm, dropped, flat, gain, mix
from subspace_jax.adapters.quantized import Int8Weight, dense_base


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConvLoRAWeight:
    """A convolution's kernel ``base + scale * a b`` that is never formed: two convolutions instead, to the rank and on.

    Attributes:
      base: Frozen ``[..., *window, in / groups, out]``.
      a: ``[..., *window, in / groups, r]``.
      b: ``[..., r / groups, out]``.
      key: Random key, ``[...]``, while training with dropout; None without.
      scale: The scale s.
      window: Number of axes of the window.
      groups: Number of groups of channels.
      dropout: Share of the entries of x that the update doesn't see, if there is a key.
    """

    base: jax.Array | Int8Weight
    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    window: int = field(default=2, metadata={"static": True})
    groups: int = field(default=1, metadata={"static": True})
    dropout: float = field(default=0.0, metadata={"static": True})

    def conv(self, x: jax.Array, *, groups: int, **how) -> jax.Array:
        """Returns what :func:`subspace_jax.nn.conv` does with the adapted kernel."""
        check_groups(self, groups)
        update = through(dropped(x, self.key, self.dropout), self.a, self.b, groups, how)
        base = nn.conv(x, jax.lax.stop_gradient(self.base), groups=groups, **how)
        return base + jnp.asarray(self.scale, x.dtype) * update

    def dense(self) -> jax.Array:
        """Returns the kernel itself, in the dtype of ``base``."""
        return formed(self.base, self.a, self.b, self.scale, self.window, self.groups).astype(self.base.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConvDoRAWeight:
    """A convolution's kernel ``(base + scale * a b) diag(magnitude / norm)`` that is never formed.

    Attributes:
      base: Frozen ``[..., *window, in / groups, out]``.
      a: ``[..., *window, in / groups, r]``.
      b: ``[..., r / groups, out]``.
      magnitude: ``[..., out]``.
      key: Random key, ``[...]``, while training with dropout; None without.
      scale: The scale s.
      window: Number of axes of the window.
      groups: Number of groups of channels.
      dropout: Share of the entries of x that the update doesn't see, if there is a key.
      detach_norm: Whether the norm is a constant for derivatives.
    """

    base: jax.Array | Int8Weight
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
        return conv_norm(jax.lax.stop_gradient(self.base), self.a, self.b, self.scale, self.window, self.groups)

    @property
    def gain(self) -> jax.Array:
        """``magnitude / norm``, ``[..., out]``."""
        return gain(self.magnitude, self.norm, self.detach_norm, self.base.dtype)

    def conv(self, x: jax.Array, *, groups: int, **how) -> jax.Array:
        """Returns what :func:`subspace_jax.nn.conv` does with the adapted kernel."""
        check_groups(self, groups)
        base = jax.lax.stop_gradient(self.base)
        y = nn.conv(x, base, groups=groups, **how)
        seen = dropped(x, self.key, self.dropout)
        # With dropout the correction of the base sees what the update sees, as PEFT has it.
        own = y if self.key is None else nn.conv(seen, base, groups=groups, **how)
        return y + kernels.dora_compose(own, through(seen, self.a, self.b, groups, how), self.gain, self.scale)

    def dense(self) -> jax.Array:
        """Returns the kernel itself, in the dtype of ``base``."""
        direction = formed(self.base, self.a, self.b, self.scale, self.window, self.groups)
        gains = jnp.expand_dims(self.gain, tuple(range(-2 - self.window, -1)))
        return (direction * gains.astype(direction.dtype)).astype(self.base.dtype)


def through(x: jax.Array, a: jax.Array, b: jax.Array, groups: int, how: dict) -> jax.Array:
    """Convolves with ``a``, and mixes the channels with ``b``."""
    return mix(nn.conv(x, a, groups=groups, **how), b, groups)


def formed(w: jax.Array | Int8Weight, a: jax.Array, b: jax.Array, scale: float, window: int, groups: int) -> jax.Array:
    """The kernel ``w + scale * a b``, in float32 or better."""
    w = dense_base(w)
    return adapted(flat(w, window), flat(a, window), blocks(b, groups), scale).reshape(w.shape)


def conv_norm(
    w: jax.Array | Int8Weight, a: jax.Array, b: jax.Array, scale: float, window: int, groups: int
) -> jax.Array:
    """Norms ``[..., out]`` of ``w + scale * a b`` over window and inputs."""
    return column_norm(flat(w, window), flat(a, window), blocks(b, groups), scale)


def check_groups(weight: ConvLoRAWeight | ConvDoRAWeight, groups: int) -> None:
    """Raises unless a convolution has the groups that its adapter was made for."""
    if groups != weight.groups:
        raise ValueError(f"groups: the convolution has {groups}, its adapter was set for {weight.groups}")
