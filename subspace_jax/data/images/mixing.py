"""Mixup and CutMix of a batch, on the device."""

import math

import jax
import jax.numpy as jnp

__all__ = ["mix_images", "partners"]

# Size of the groups whose halves are swapped: more than the repeats of an image, which are consecutive, and few enough
# that a device holds both halves.
_GROUP = 16


def partners(x: jax.Array) -> jax.Array:
    """Returns for every example the one that :func:`mix_images` mixes it with.

    The halves of groups of 16 consecutive examples are swapped, so that there is no communication where each device
    holds full groups, and pairs don't depend on the number of devices.  Where the batch is no multiple of 16, groups
    have 8, 4 or 2 examples; a batch of odd size is reversed.

    Args:
      x: ``[batch, ...]``: images, or their labels.

    Returns:
      The same shape and dtype; ``partners(partners(x))`` is ``x``.
    """
    half = math.gcd(x.shape[0], _GROUP) // 2
    if not half:
        return x[::-1]
    return x.reshape(-1, 2, half, *x.shape[1:])[:, ::-1].reshape(x.shape)


def mix_images(
    key: jax.Array,
    images: jax.Array,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    switch: float = 0.5,
    probability: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Mixes every image of a batch with another one, see :func:`partners`.

    Mixup (arXiv 1710.09412) averages two images with weight ``lam ~ Beta(mixup, mixup)``; CutMix (arXiv 1905.04899)
    pastes a rectangle of area ``1 - lam``, ``lam ~ Beta(cutmix, cutmix)``, clipped to the image.  One draw holds for
    the (global) batch, as in timm.

    Mixing the loss by the same weight ``w`` equals the loss of mixed targets::

        w * loss(logits, labels) + (1 - w) * loss(logits, partners(labels))

    Args:
      key: Random key, such as the one of a train step.
      images: ``[batch, height, width, channels]``, floating point.
      mixup: Parameter of the Beta distribution of Mixup; 0 for none.
      cutmix: Parameter of the Beta distribution of CutMix; 0 for none.
      switch: Probability of CutMix, where both are on.
      probability: Probability that a batch is mixed.

    Returns:
      Images of the same shape and dtype, and the weight ``w`` of each image itself, a float32 scalar.

    Raises:
      ValueError: A number is out of range, or the images do not have four axes.
    """
    if images.ndim != 4:
        raise ValueError(f"mix_images: expected images [batch, height, width, channels], got {images.shape}")
    if mixup < 0 or cutmix < 0:
        raise ValueError(f"mixup and cutmix: expected at least 0, got {mixup} and {cutmix}")
    for name, value in (("switch", switch), ("probability", probability)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    if not mixup and not cutmix:
        return images, jnp.ones(())
    cutmix_rate = (switch if mixup else 1.0) if cutmix else 0.0
    which, whether, blend, cut, center = jax.random.split(key, 5)
    cuts = jax.random.uniform(which) < cutmix_rate
    mixes = jax.random.uniform(whether) < probability
    blended = jax.random.beta(blend, mixup, mixup) if mixup else jnp.ones(())
    inside = jnp.zeros(images.shape[1:3], bool)
    if cutmix:
        inside = _rectangle(center, 1 - jax.random.beta(cut, cutmix, cutmix), *images.shape[1:3])
    # Weight of the image's own pixels: one number, or 0 and 1 by position.
    own = jnp.where(cuts, jnp.where(inside, 0.0, 1.0), blended)
    own = jnp.where(mixes, own, 1.0)
    other = partners(images).astype(jnp.float32)
    mixed = other + own[None, :, :, None] * (images.astype(jnp.float32) - other)
    return mixed.astype(images.dtype), jnp.mean(own)


def _rectangle(key: jax.Array, area: jax.Array, height: int, width: int) -> jax.Array:
    """Bool ``[height, width]``: the inside of a random rectangle, ``area`` as a fraction of the image's."""
    centers, side = jax.random.uniform(key, (2,)), jnp.sqrt(area)

    def span(center: jax.Array, n: int) -> jax.Array:
        middle, half = jnp.floor(center * n), jnp.floor(side * n) / 2
        i = jnp.arange(n, dtype=jnp.float32)
        return (i >= jnp.floor(middle - half)) & (i < jnp.floor(middle + half))

    return span(centers[0], height)[:, None] & span(centers[1], width)[None, :]
