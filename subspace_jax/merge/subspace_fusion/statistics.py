"""Merging by statistics of each model's data: Fisher (arXiv 2111.09832) and RegMean (arXiv 2212.09849)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.merge.subspace_fusion.core import check_alike, check_models, entries, is_float, mean_of, wide

PyTree = Any
Apply = Callable[[PyTree, Any], jax.Array]
FisherMode = Literal["exact", "batch", "sampled"]
FLOOR = 1e-6  # added to each Fisher value


class GramStats(NamedTuple):
    """Sums over the inputs of a linear layer.

    Attributes:
      total: Sum of ``x x^T``, ``[..., in, in]``.
      count: Number of inputs, a scalar.
    """

    total: jax.Array
    count: jax.Array

    def gram(self, alpha: float = 1.0) -> jax.Array:
        """The mean of ``x x^T``, entries off the diagonal times ``alpha``."""
        mean = self.total / self.count
        eye = jnp.eye(mean.shape[-1], dtype=bool)
        return jnp.where(eye, mean, mean * np.asarray(alpha, mean.dtype))


def fisher_diagonal(
    apply_fn: Apply, params: PyTree, batch: Any, mode: FisherMode = "exact", *, key: jax.Array | None = None
) -> PyTree:
    """The diagonal of the Fisher information of a classifier, on inputs without labels.

    Args:
      apply_fn: Maps parameters and a batch to logits ``[examples, ..., classes]``.
      params: The parameters.
      batch: Inputs with examples along the first axis of each array.
      mode: "exact" is ``mean_b sum_c p_c (d log p_c)^2``, one backward pass for each example and class; "batch" the
        square of the gradient of ``sum_bc sqrt(p_c) log p_c`` with ``sqrt(p_c)`` held fixed, as published code has it,
        one pass, over the number of examples; "sampled" draws a class of each row of logits and squares the gradient
        of the sum of their ``log p``: one pass, and without bias.
      key: Random key of "sampled".

    Returns:
      A tree with the structure of the parameters, None for leaves that are not floating point.  Of several batches,
      the mean weighted by their examples is that of all.

    Raises:
      ValueError: The mode is unknown, or "sampled" comes without a key.
    """
    if mode not in get_args(FisherMode):
        raise ValueError(f"mode: expected one of {list(get_args(FisherMode))}, got {mode!r}")
    if mode == "sampled" and key is None:
        raise ValueError('key: expected a random key for mode "sampled", got None')
    moving = jax.tree.map(lambda x: x if is_float(x) else None, params)

    def log_probs(moving, batch):
        full = jax.tree.map(lambda m, x: x if m is None else m, moving, params, is_leaf=lambda x: x is None)
        logits = apply_fn(full, batch)
        return jax.nn.log_softmax(logits.astype(wide(logits))).reshape(-1, logits.shape[-1])

    examples = jax.tree.leaves(batch)[0].shape[0]
    if mode == "exact":
        return _exact(log_probs, moving, batch, examples)

    def score(moving):
        found = log_probs(moving, batch)
        if mode == "batch":
            return jnp.sum(jnp.sqrt(jax.lax.stop_gradient(jnp.exp(found))) * found)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(found))
        return jnp.sum(jnp.take_along_axis(found, drawn[:, None], axis=1))

    return jax.tree.map(lambda g: jnp.square(g.astype(wide(g))) / examples, jax.grad(score)(moving))


def fisher_merge(models: Sequence[PyTree], fishers: Sequence[PyTree], *, normalize: bool = True) -> PyTree:
    """The mean of models, each parameter weighted by its Fisher information.

    ``theta = sum_t c_t (F_t + 1e-6) theta_t / sum_t c_t (F_t + 1e-6)``.

    Args:
      models: Trees of one structure and the same shapes.
      fishers: Of :func:`fisher_diagonal`, one for each.
      normalize: Whether ``c_t`` is inversely proportional to the norm of ``F_t`` over all parameters, so that none
        dominates by its scale; else it is equal for all.

    Returns:
      Parameters in the dtypes of the first model, computed in float32 or wider.  Leaves that are not floating point are
      those of the first model.

    Raises:
      ValueError: There is no model, numbers of trees, structures or shapes differ, or a value, where it is known, is
        not finite.
    """
    if not models:
        raise ValueError("models: expected at least one, got none")
    check_models(models[0], models)
    if len(fishers) != len(models):
        raise ValueError(f"fishers: expected one for each of {len(models)} models, got {len(fishers)}")
    for i, fisher in enumerate(fishers):
        check_alike("model 0", models[0], f"fisher {i}", fisher)
    squares = [sum(jnp.sum(jnp.square(x.astype(wide(x)))) for x in jax.tree.leaves(tree)) for tree in fishers]
    shares = fisher_shares(jnp.sqrt(jnp.stack(squares)), normalize=normalize)
    weights = [dict(entries(tree)) for tree in fishers]
    others = [dict(entries(tree)) for tree in models]

    def leaf(path, first):
        if not is_float(first):
            return first
        return fisher_mean([tree[path] for tree in others], [tree[path] for tree in weights], shares)

    flat, treedef = jax.tree.flatten(models[0])
    return treedef.unflatten(leaf(path, x) for (path, _), x in zip(entries(models[0]), flat, strict=True))


def fisher_shares(norms: jax.Array, *, normalize: bool) -> jax.Array:
    """The weights ``c_t``, ``[T]``, from the norms of the Fisher information of each model."""
    count = norms.shape[0]
    inverse = 1 / (norms + np.asarray(FLOOR, norms.dtype)) if normalize else jnp.ones_like(norms)
    return inverse / jnp.sum(inverse) / count if normalize else inverse / count


def fisher_mean(leaves: Sequence[jax.Array], fishers: Sequence[jax.Array], shares: jax.Array) -> jax.Array:
    """The weighted mean of leaves of one shape, in the dtype of the first."""
    dtype = wide(leaves[0])
    weights = [shares[t].astype(dtype) * (f.astype(dtype) + FLOOR) for t, f in enumerate(fishers)]
    total = sum(w * x.astype(dtype) for w, x in zip(weights, leaves, strict=True))
    return (total / sum(weights)).astype(leaves[0].dtype)


def regmean_stats(inputs: jax.Array, before: GramStats | None = None) -> GramStats:
    """Sums ``x x^T`` over the inputs of a linear layer.

    Args:
      inputs: ``[..., in]``.
      before: Sums over earlier inputs.

    Returns:
      The sums, in float32 or wider.
    """
    x = inputs.astype(wide(inputs)).reshape(-1, inputs.shape[-1])
    total = jnp.einsum("ni,nj->ij", x, x, precision=jax.lax.Precision.HIGHEST)
    count = jnp.asarray(x.shape[0], x.dtype)
    return GramStats(total, count) if before is None else GramStats(before.total + total, before.count + count)


def regmean_merge(
    models: Sequence[PyTree], stats: Sequence[Mapping[str, GramStats]], *, alpha: float = 1.0, damping: float = 0.0
) -> PyTree:
    """The kernels nearest to those of all models in what linear layers compute; other parameters are averaged.

    ``W = (sum_t G_t)^-1 sum_t G_t W_t`` for ``G_t = X_t^T X_t / n_t``, by a Cholesky factorization.

    Args:
      models: Trees of one structure and the same shapes.
      stats: For each model, path of a kernel ``[..., in, out]``, as in ``"up/kernel"``, to sums over its inputs.
      alpha: What entries of ``G_t`` off the diagonal are multiplied by, in [0, 1].
      damping: Added to the diagonal of ``G_t``, in units of its mean.

    Returns:
      Parameters in the dtypes of the first model, computed in float32 or wider.

    Raises:
      ValueError: There is no model, numbers of trees, structures or shapes differ, a path is no kernel, an argument is
        out of range, or a sum of ``G_t``, where its values are known, is singular.
    """
    if not models:
        raise ValueError("models: expected at least one, got none")
    check_models(models[0], models)
    check_regmean(alpha, damping)
    if len(stats) != len(models):
        raise ValueError(f"stats: expected those of each of {len(models)} models, got {len(stats)}")
    kernels = {path: x for path, x in entries(models[0]) if is_float(x)}
    for i, own in enumerate(stats):
        if own.keys() != stats[0].keys():
            raise ValueError(f"stats: expected the same paths of all models, got {sorted(own)} of model {i}")
        for path, found in own.items():
            width = kernels[path].shape[-2:-1] if path in kernels else ()
            if found.total.shape[-2:] != width * 2:
                raise ValueError(
                    f"stats: expected sums [..., in, in] for kernels [..., in, out], got {found.total.shape} for {path}"
                )

    def leaf(path, *leaves):
        if not is_float(leaves[0]):
            return leaves[0]
        if path not in stats[0]:
            return mean_of(leaves)
        grams = [own[path].gram(alpha) for own in stats]
        return regmean_kernel(leaves, grams, damping=damping, name=path).astype(leaves[0].dtype)

    paths = [path for path, _ in entries(models[0])]
    flat, treedef = zip(*map(jax.tree.flatten, models), strict=True)
    return treedef[0].unflatten(map(leaf, paths, *flat))


def regmean_kernel(
    kernels: Sequence[jax.Array], grams: Sequence[jax.Array], *, damping: float = 0.0, name: str = "kernel"
) -> jax.Array:
    """The kernel ``[..., in, out]`` for Gram matrices ``[..., in, in]``, in float32 or wider: see above."""
    dtype, precision = wide(kernels[0]), jax.lax.Precision.HIGHEST
    kernels = [kernel.astype(dtype) for kernel in kernels]
    mean = sum(kernels) / np.asarray(len(kernels), dtype)
    eye = jnp.eye(mean.shape[-2], dtype=dtype)
    total, right = 0, 0
    for gram, kernel in zip(grams, kernels, strict=True):
        gram = gram.astype(dtype)
        shift = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] * np.asarray(damping / len(eye), dtype)
        gram = gram + shift * jnp.broadcast_to(eye, gram.shape)
        # From the mean: what is solved for is small, and so is its rounding.
        total, right = total + gram, right + jnp.matmul(gram, kernel - mean, precision=precision)
    # In units of each input: some inputs of language models are ten thousand times as large as most.
    squares = jnp.diagonal(total, axis1=-2, axis2=-1)
    scale = jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)[..., None]
    lower = jnp.linalg.cholesky(total * scale * jnp.swapaxes(scale, -1, -2))
    _check_regular(lower, name)
    with jax.default_matmul_precision("highest"):
        half = jax.lax.linalg.triangular_solve(lower, scale * right, left_side=True, lower=True)
        solved = jax.lax.linalg.triangular_solve(lower, half, left_side=True, lower=True, transpose_a=True)
    return mean + scale * solved


def check_regmean(alpha: float, damping: float) -> None:
    """Raises ValueError for settings of RegMean that can't serve."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a factor in [0, 1], got {alpha}")
    if not 0 <= damping < np.inf:
        raise ValueError(f"damping: expected at least 0, got {damping}")


def _exact(log_probs: Callable, moving: PyTree, batch: Any, examples: int) -> PyTree:
    """Sums over examples and, within, over rows and classes, so that one gradient is held at a time."""

    def of_example(total, example):
        found, back = jax.vjp(lambda m: log_probs(m, jax.tree.map(lambda x: x[None], example)), moving)
        shape, size = found.shape, found.size

        def of_class(total, i):
            one = jnp.zeros(size, found.dtype).at[i].set(1).reshape(shape)
            p = jnp.exp(found).reshape(-1)[i]
            return jax.tree.map(
                lambda t, g: t + p.astype(t.dtype) * jnp.square(g.astype(t.dtype)), total, *back(one)
            ), None

        return jax.lax.scan(of_class, total, jnp.arange(size))[0], None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x)), moving)
    total, _ = jax.lax.scan(of_example, zeros, batch)
    return jax.tree.map(lambda x: x / examples, total)


def _check_regular(lower: jax.Array, name: str) -> None:
    """Raises ValueError where a Cholesky factor, if its values are known, is that of a singular matrix."""
    if isinstance(lower, jax.core.Tracer) or not lower.is_fully_addressable:
        return
    pivots = np.square(np.diagonal(np.asarray(lower), axis1=-2, axis2=-1))
    floor = pivots.shape[-1] * np.finfo(pivots.dtype).eps * np.max(pivots, axis=-1, keepdims=True)
    if not np.all(pivots > floor):
        raise ValueError(
            f"{name}: the sum of the Gram matrices is singular, as inputs span too few directions; "
            "pass alpha < 1 or damping > 0"
        )
