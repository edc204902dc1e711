"""Mixtures of the images of a batch, on the device: Mixup and CutMix."""

import jax
import jax.numpy as jnp

__all__ = ["mix_images"]


def mix_images(
    key: jax.Array,
    images: jax.Array,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    switch: float = 0.5,
    probability: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Mixes every image of a batch with its counterpart from the other end.

    Mixup (arXiv 1710.09412) averages whole images with weight ``lam ~ Beta(mixup, mixup)``; CutMix (arXiv 1905.04899)
    pastes a rectangle of area ``1 - lam``, ``lam ~ Beta(cutmix, cutmix)``, as far as it lies inside.  One choice holds
    for the whole batch, as in timm, also where the batch is split over devices.

    The loss is mixed by the same weight ``w``, which equals the loss of mixed targets and needs no array of them::

        w * loss(logits, labels) + (1 - w) * loss(logits, labels[::-1])

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
    other = images[::-1].astype(jnp.float32)
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
