"""Mixtures of the images of a batch, on the device: Mixup and CutMix."""

import math

import jax
import jax.numpy as jnp

__all__ = ["mix_images", "partners"]

# Rows whose halves change places.  More than the repeats of an image in a batch, which lie in a row, and few enough
# that each device has its partners among its own rows.
_GROUP = 16


def partners(x: jax.Array) -> jax.Array:
    """Puts in the place of every row that with which :func:`mix_images` mixes it.

    That is the row 8 places on or back in the same group of 16, so that nothing travels where each device holds whole
    groups, and the pairs are the same on any number of devices.  Where a batch is no multiple of 16, groups are of 8, 4
    or 2 rows; an odd one is reversed.

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

    Mixup (arXiv 1710.09412) averages whole images with weight ``lam ~ Beta(mixup, mixup)``; CutMix (arXiv 1905.04899)
    pastes a rectangle of area ``1 - lam``, ``lam ~ Beta(cutmix, cutmix)``, as far as it lies inside.  One choice holds
    for the whole batch, as in timm, also where the batch is split over devices.

    The loss is mixed by the same weight ``w``, which equals the loss of mixed targets and needs no array of them::

        w * loss(logits, labels) + (1 - w) * loss(logits, partners(labels))

    Args:
      key: Random key, such as the one of a train step.
      images: ``[batch, height, width, channels]``, floating point.
      mixup: Parameter of the Beta distribution; 0 for no Mixup.
      cutmix: Likewise of CutMix.
      switch: Share of the batches that CutMix takes, where both are on.
      probability: Share of the batches that are mixed at all.

    Returns:
      Images of the same shape and dtype, and the share of its own pixels in each, a float32 scalar.

    Raises:
      ValueError: A number is out of range, or the images have another number of axes.
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
    share = (switch if mixup else 1.0) if cutmix else 0.0
    which, whether, blend, cut, place = jax.random.split(key, 5)
    cuts = jax.random.uniform(which) < share
    mixes = jax.random.uniform(whether) < probability
    blended = jax.random.beta(blend, mixup, mixup) if mixup else jnp.ones(())
    inside = jnp.zeros(images.shape[1:3], bool)
    if cutmix:
        inside = _rectangle(place, 1 - jax.random.beta(cut, cutmix, cutmix), *images.shape[1:3])
    # Weight of the image's own pixels: one number, or 0 and 1 by place.
    own = jnp.where(cuts, jnp.where(inside, 0.0, 1.0), blended)
    own = jnp.where(mixes, own, 1.0)
    other = partners(images).astype(jnp.float32)
    mixed = other + own[None, :, :, None] * (images.astype(jnp.float32) - other)
    return mixed.astype(images.dtype), jnp.mean(own)


def _rectangle(key: jax.Array, area: jax.Array, height: int, width: int) -> jax.Array:
    """Bool ``[height, width]``: inside a rectangle of that share, centred anywhere, as far as the image reaches."""
    centres, side = jax.random.uniform(key, (2,)), jnp.sqrt(area)

    def span(centre: jax.Array, n: int) -> jax.Array:
        middle, half = jnp.floor(centre * n), jnp.floor(side * n) / 2
        i = jnp.arange(n, dtype=jnp.float32)
        return (i >= jnp.floor(middle - half)) & (i < jnp.floor(middle + half))

    return span(centres[0], height)[:, None] & span(centres[1], width)[None, :]
