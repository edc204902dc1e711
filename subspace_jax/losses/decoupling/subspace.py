"""The subspace of hidden space that tells a domain from the others, from the weights of a probe."""

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import canonical_svd, positive_qr, unit_vectors, working_dtype

MODES = ("target", "rows", "binary")


def dominant_subspace(
    weight: jax.Array,
    target: int,
    k: int | None = None,
    *,
    mode: str = "target",
    center: bool = True,
    energy: float = 0.95,
) -> jax.Array:
    """Returns an orthonormal basis of the directions in which a probe tells a domain from the others.

    "rows" takes the leading right singular vectors of the weights.  "target" begins with the direction of the domain
    against the mean of the others, and goes on with the leading right singular vectors of its differences to each of
    them, outside that direction; the first column is so exactly one against the rest, and for ``k = classes - 1`` the
    span is that of "rows".  "binary" is the one direction of a probe of two classes.  arXiv 2508.12803 takes singular
    vectors of a probe's weights, and says neither which probe nor how many: the modes are a design choice.

    Args:
      weight: Weights of a probe ``[classes, features]``, such as the mean of :func:`posterior`.
      target: The domain.
      k: Number of directions; by default (not traced) the fewest singular vectors with the share ``energy`` of the
        squares of the singular values, for "binary" one.
      mode: "target", "rows" or "binary".
      center: Whether the mean over the classes is subtracted, which the softmax does not see; for "rows" only.
      energy: See ``k``.

    Returns:
      ``[features, k]``, float32 or wider.

    Raises:
      ValueError: A name, ``target`` or ``k`` is out of range, or the weights are not finite (unless traced).
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    if weight.ndim != 2 or weight.shape[0] < 2:
        raise ValueError(f"weight: expected [classes, features] of at least two classes, got {weight.shape}")
    classes, features = weight.shape
    if not 0 <= target < classes:
        raise ValueError(f"target: expected a domain in 0 to {classes - 1}, got {target}")
    if mode == "binary" and classes != 2:
        raise ValueError(f"mode: 'binary' is for a probe of two classes, got {classes}")
    if not isinstance(weight, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(weight))):
        raise ValueError("weight: expected finite weights, got NaN or infinity")
    weight = weight.astype(working_dtype(weight))
    centered = weight - jnp.mean(weight, axis=0, keepdims=True) if center or mode != "rows" else weight
    most = min(classes if mode == "rows" and not center else classes - 1, features)
    k = _from_energy(centered, energy, most) if k is None else k
    if not 1 <= k <= most:
        raise ValueError(f"k: expected 1 to {most} for weights {weight.shape} and mode {mode!r}, got {k}")
    if mode == "rows":
        return canonical_svd(centered)[2][:k].T
    # The target's centred row is (C - 1) / C of its difference to the mean of the others.
    first = unit_vectors(centered[target])
    if k == 1:
        return first[:, None]
    others = np.delete(np.arange(classes), target)
    differences = centered[target][None] - centered[others]
    rest = differences - (differences @ first)[:, None] * first[None]
    basis = jnp.concatenate([first[:, None], canonical_svd(rest)[2][: k - 1].T], axis=1)
    return positive_qr(basis)[0]  # of rounding, singular vectors of a small rest have a part in the first


def average_subspace(old: jax.Array, new: jax.Array, keep: float) -> jax.Array:
    """Returns the leading subspace of ``keep`` times the projector of the old and ``1 - keep`` of that of the new.

    Args:
      old: Orthonormal basis ``[features, k]``, or zeros, which count for nothing.
      new: Orthonormal basis ``[features, k]``.
      keep: In ``[0, 1)``.

    Returns:
      ``[features, k]``.  Nothing of the size ``features x features`` is made.
    """
    stacked = jnp.concatenate([jnp.sqrt(keep) * old, jnp.sqrt(1 - keep) * new], axis=1)
    return canonical_svd(stacked)[0][:, : new.shape[1]]


def _from_energy(weight: jax.Array, energy: float, most: int) -> int:
    if not 0 < energy <= 1:
        raise ValueError(f"energy: expected a share above 0 and at most 1, got {energy}")
    squares = np.square(np.asarray(canonical_svd(weight)[1], np.float64))[:most]
    return 1 + int(np.sum(np.cumsum(squares) < energy * np.sum(squares) * (1 - 1e-9)))
