"""Contrastive losses of pairs of images and texts."""

import jax
import jax.numpy as jnp

from subspace_jax.linalg import unit_vectors, working_dtype
from subspace_jax.losses.classification import cross_entropy


def clip_loss(
    image: jax.Array, text: jax.Array, logit_scale: jax.Array, *, axis_name: str | tuple[str, ...] | None = None
) -> jax.Array:
    """Softmax cross-entropy of each image among the texts and of each text among the images (arXiv 2103.00020).

    Inside ``jax.shard_map`` with the batch sharded over ``axis_name``, features of all devices are gathered, and each
    device computes the scores of its own examples: ``[batch / devices, batch]``.  The loss of the batch is the mean
    over devices.  Outside, the arrays are the full batch, and may be sharded too.

    Args:
      image: ``[batch, features]``, normalized here; zeros stay zeros.
      text: ``[batch, features]``, pair by pair with ``image``.
      logit_scale: ``[]``, the logarithm of the factor of the cosines.
      axis_name: Mesh axis, or axes, that shard the batch.

    Returns:
      Loss of each pair ``[batch]``, the mean of both directions in nats, float32 or wider.

    Raises:
      ValueError: Shapes do not match.
    """
    image, text, scale = _prepare("clip_loss", image, text, logit_scale)
    all_images, all_texts, labels = image, text, jnp.arange(image.shape[0], dtype=jnp.int32)
    if axis_name is not None:
        all_images, all_texts = (jax.lax.all_gather(x, axis_name, tiled=True) for x in (image, text))
        labels = labels + jnp.int32(image.shape[0]) * jax.lax.axis_index(axis_name)
    of_images = cross_entropy(scale * (image @ all_texts.T), labels)
    of_texts = cross_entropy(scale * (text @ all_images.T), labels)
    return (of_images + of_texts) / 2


def siglip_loss(
    image: jax.Array,
    text: jax.Array,
    logit_scale: jax.Array,
    logit_bias: jax.Array,
    *,
    axis_name: str | None = None,
) -> jax.Array:
    """Logistic loss of every image with every text, positive for pairs (arXiv 2303.15343).

    Inside ``jax.shard_map`` with the batch sharded over ``axis_name``, blocks of texts rotate among the devices: a
    device holds the scores of its images with one block at a time, ``[batch / devices, batch / devices]``, in the
    backward pass too (section 3.3 of the paper).  The loss of the batch is the mean over devices.

    Args:
      image: ``[batch, features]``, normalized here; zeros stay zeros.
      text: ``[batch, features]``, pair by pair with ``image``.
      logit_scale: ``[]``, the logarithm of the factor of the cosines.
      logit_bias: ``[]``, added to them.
      axis_name: Mesh axis that shard the batch.

    Returns:
      Loss of each image, summed over texts, ``[batch]`` in nats, float32 or wider; its mean is the paper's loss.

    Raises:
      ValueError: Shapes do not match.
    """
    image, text, scale = _prepare("siglip_loss", image, text, logit_scale)
    bias = jnp.asarray(logit_bias).astype(image.dtype)

    def rows(text: jax.Array, own: bool) -> jax.Array:
        logits = scale * (image @ text.T) + bias
        # -log sigmoid(l) of pairs, -log sigmoid(-l) of all others.
        pairs = jnp.eye(image.shape[0], dtype=bool) if own else jnp.zeros((1, 1), bool)
        return jnp.sum(jax.nn.softplus(jnp.where(pairs, -logits, logits)), axis=1)

    if axis_name is None:
        return rows(text, True)
    devices = jax.lax.axis_size(axis_name)
    around = [(i, (i + 1) % devices) for i in range(devices)]

    def turn(carry, _):
        text, loss = carry
        text = jax.lax.ppermute(text, axis_name, around)
        return (text, loss + jax.checkpoint(rows, static_argnums=1)(text, False)), None

    (_, loss), _ = jax.lax.scan(turn, (text, rows(text, True)), None, length=devices - 1)
    return loss


def _prepare(name: str, image: jax.Array, text: jax.Array, logit_scale: jax.Array) -> tuple[jax.Array, ...]:
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"{name}: expected image and text [batch, features] alike, got {image.shape}, {text.shape}")
    dtype = working_dtype(image)
    image, text = (unit_vectors(x.astype(dtype)) for x in (image, text))
    return image, text, jnp.exp(jnp.asarray(logit_scale).astype(dtype))
