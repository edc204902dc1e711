"""Overlap of the leading subspaces of updates, and of activations (arXiv 2505.14185)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg
from subspace_jax.interpret.safety_subspaces.params import check_same_trees, path_name
from subspace_jax.interpret.safety_subspaces.projection import Side, check_choice, check_update

PyTree = Any


class MSOTree(NamedTuple):
    """Mode-subspace overlaps of two updates.

    Attributes:
      leaves: Path to result.
      mso: Their mean over the leaves in which both updates are not zero, NaN if there is none.
      random_baseline: The mean over the same leaves.
    """

    leaves: dict[str, linalg.MSOResult]
    mso: jax.Array
    random_baseline: jax.Array


def mso_tree(update_a: PyTree, update_b: PyTree, eta: float | jax.Array, side: Side = "output") -> MSOTree:
    """Mode-subspace overlap of two updates, leaf by leaf.

    A leaf counts as a matrix from all its other axes to the last one, on the side of outputs, or from the first one to
    all others, on the side of inputs; a vector as one column.

    Args:
      update_a: Tree of floating-point arrays, kernels ``[..., in, out]``; other leaves are passed over.
      update_b: The same tree.
      eta: Share of the energy, in (0, 1]; see :func:`subspace_jax.linalg.energy_basis`.
      side: Whose space is compared, "output" or "input".

    Returns:
      The overlaps; NaN with dimension 0 where an update is zero.

    Raises:
      ValueError: The trees differ or have no floating-point leaf, ``eta`` is not in (0, 1], or a leaf is empty or,
        where its values are known, not finite.
    """
    check_choice("side", side, Side)
    check_same_trees(update_a=update_a, update_b=update_b)
    found = {}
    others = jax.tree.leaves(update_b)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(update_a), others, strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            name = path_name(path)
            check_update(f"update_a {name}", a)
            check_update(f"update_b {name}", b)
            found[name] = linalg.mode_subspace_overlap(_matrix(a, side), _matrix(b, side), eta)
    if not found:
        raise ValueError("update_a: expected leaves of floating point, got none")
    mso, baseline = (jnp.stack([getattr(x, name) for x in found.values()]) for name in ("mso", "random_baseline"))
    return MSOTree(found, jnp.nanmean(mso), jnp.nanmean(jnp.where(jnp.isnan(mso), jnp.nan, baseline)))


def activation_overlap(
    acts_a: jax.Array, acts_b: jax.Array, eta: float | jax.Array, center: bool = False
) -> linalg.MSOResult:
    """Mode-subspace overlap of the activations of two sets of prompts.

    Args:
      acts_a: ``[..., prompts, D]``, floating point, such as :func:`last_token` returns; leading axes for layers.
      acts_b: ``[..., other prompts, D]``.
      eta: See :func:`mso_tree`.
      center: Whether each set is centred at its mean.

    Returns:
      The overlap, with the leading axes.

    Raises:
      ValueError: The widths or leading axes differ, or see :func:`mso_tree`.
      TypeError: Activations are not floating point.
    """
    check_update("acts_a", acts_a)
    check_update("acts_b", acts_b)
    if acts_a.ndim < 2 or (*acts_a.shape[:-2], acts_a.shape[-1]) != (*acts_b.shape[:-2], acts_b.shape[-1]):
        raise ValueError(
            f"acts_a, acts_b: expected [..., prompts, D] of one width D, got {acts_a.shape} and {acts_b.shape}"
        )
    acts = [x.astype(linalg.working_dtype(x)) for x in (acts_a, acts_b)]
    if center:
        acts = [x - jnp.mean(x, axis=-2, keepdims=True) for x in acts]
    return linalg.mode_subspace_overlap(acts[0].mT, acts[1].mT, eta)


def last_token(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """Hidden states at the last token of each prompt that is no padding, on whichever side the padding is.

    Args:
      hidden: ``[..., positions, D]``; leading axes of ``mask``, and layers before them if there are.
      mask: ``[prompts, positions]``, nonzero at tokens.

    Returns:
      ``[..., D]``.

    Raises:
      ValueError: Shapes do not match, or, where its values are known, a prompt has no token.
    """
    if mask.ndim < 1 or hidden.ndim <= mask.ndim or hidden.shape[-1 - mask.ndim : -1] != mask.shape:
        raise ValueError(f"mask: expected [prompts, positions] of hidden, got {mask.shape} for hidden {hidden.shape}")
    tokens = mask.astype(bool)
    if not isinstance(mask, jax.core.Tracer) and not np.asarray(tokens).any(axis=-1).all():
        raise ValueError("mask: expected a token in every prompt, got one of padding only")
    last = mask.shape[-1] - 1 - jnp.argmax(tokens[..., ::-1], axis=-1)
    index = jnp.broadcast_to(last, hidden.shape[:-2])[..., None, None]
    return jnp.take_along_axis(hidden, index, axis=-2)[..., 0, :]


def activation_layers(num_states: int) -> range:
    """Indices of the hidden states that the paper compares: from 65 to 90 percent of the depth.

    Args:
      num_states: Number of hidden states, that of the embeddings included.
    """
    return range(int(0.65 * num_states), int(0.9 * num_states))


def _matrix(x: jax.Array, side: Side) -> jax.Array:
    """Returns ``[d, n]`` with columns in the side's space."""
    if x.ndim < 2:
        return x.reshape(-1, 1)
    return x.reshape(-1, x.shape[-1]).T if side == "output" else x.reshape(x.shape[0], -1)
