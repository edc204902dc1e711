"""Adapters of one model, merged into one LoRA or DoRA."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg
from subspace_jax.adapters import AdapterConfig, DoRA, LoRA
from subspace_jax.adapters.api import Rules, bases_of, settings_of
from subspace_jax.adapters.config import Arrays, LowRankUpdate
from subspace_jax.adapters.quantized import as_matrix
from subspace_jax.adapters.rules import adapters_of, insert
from subspace_jax.merge.core_space import MergedUpdate, merge_core, merge_dense

PyTree = Any
Method = Literal["linear", "ties"]


class Adapter(NamedTuple):
    """An adapter of a model.

    Attributes:
      trainable: Its arrays.
      settings: Their rules, see :func:`subspace_jax.adapters.bind`.
      frozen: The frozen tree of :func:`subspace_jax.adapters.prepare`, or a dict of its parts by path, where a config
        keeps more there than the weight, as SVFit does.
      name: Its name in errors; its number by default.
    """

    trainable: PyTree
    settings: Rules
    frozen: PyTree | None = None
    name: str = ""


class AdapterMerge(NamedTuple):
    """How adapters are merged.

    Attributes:
      method: "linear", the weighted sum of the updates; or "ties", which trims each update and elects signs first, on
        dense matrices, one weight of one layer at a time.  Its threshold is that of the matrix, and not of the model.
      rank: Largest rank of the result; the sum of the ranks by default.  Only "ties" and ``plain`` use a larger one.
      keep: Share of the entries of an update that "ties" keeps.
      plain: Whether the result is LoRA even where an adapter is DoRA, whose update is not of low rank: then it is an
        approximation.
    """

    method: Method = "linear"
    rank: int | None = None
    keep: float = 0.2
    plain: bool = False


class Loss(NamedTuple):
    """What the merged update of a weight lacks, as NumPy arrays.

    Attributes:
      size: ``[...]``, Frobenius norm of the exact update.
      spectrum: ``[..., k]``, see :class:`subspace_jax.merge.core_space.MergedUpdate`.
      lost: ``[...]``, Frobenius norm of the difference.
    """

    size: np.ndarray
    spectrum: np.ndarray
    lost: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """The relative error ``[...]``; 0 where the update is 0."""
        return np.divide(self.lost, self.size, out=np.zeros_like(self.lost), where=self.size > 0)


class MergedAdapter(NamedTuple):
    """A merged adapter.

    Attributes:
      trainable: Its arrays, float32 (float64 if any array is).
      settings: A rule for each weight, all LoRA or all DoRA of scale 1.
      losses: Of each weight what was lost.
    """

    trainable: PyTree
    settings: Rules
    losses: Mapping[str, Loss]


class _Part(NamedTuple):
    """The adapter of one weight: its number, config, frozen part and arrays, and the shapes of its update."""

    number: int
    config: AdapterConfig
    base: Any
    arrays: Arrays
    shapes: LowRankUpdate


def merge_adapters(
    params: PyTree,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    how: AdapterMerge | None = None,
    *,
    key: jax.Array | None = None,
    progress: Callable[[int], Any] = lambda matrices: None,
) -> MergedAdapter:
    """Merges adapters of one model into one adapter whose update of every weight is the sum of theirs, weighted.

    LoRA, DoRA, FLoRA and SVFit of any ranks and scales, on any weights: an adapter that leaves a weight alone adds
    nothing to it.  The sum is computed in the core space of the factors, see
    :func:`subspace_jax.merge.core_space.merge_core`, exactly where the rank is the sum of their ranks, otherwise as the
    best approximation.  The result is LoRA, or DoRA where an adapter is DoRA: a sum of DoRA is DoRA.

    Each array of the result is computed by a program of its own; not under ``jax.jit``.

    Args:
      params: The model's parameters; their shapes suffice unless an adapter is DoRA.
      adapters: The adapters, at least one.
      weights: A number for each, of any sign; ``1 / len(adapters)`` gives the update of the averaged models.
      how: Method, rank and kind; a linear merge of the sum of the ranks by default.
      key: Random key of the sketches of "ties" and ``plain``, ``jax.random.key(0)`` by default.
      progress: Called with the number of matrices that were merged since the last call.

    Returns:
      The merged adapter, and what was lost.

    Raises:
      ValueError: There is no adapter, weights do not fit, a setting is out of range, an adapter is of another model,
        has no low-rank update, belongs to a changed weight, or is not finite; or gains of DoRA cancel.
      TypeError: An adapter is DoRA, and ``params`` are shapes.
    """
    how = AdapterMerge() if how is None else how
    check_merge(how, len(adapters), weights)
    at, parts = bases_of(params), _parts_of(params, adapters)
    doras = any(part.shapes.gain is not None for own in parts.values() for part in own)
    if doras and (shapes := [path for path in parts if isinstance(at[path], jax.ShapeDtypeStruct)]):
        raise TypeError(f"params: DoRA needs the weights, not only their shapes, at {shapes[:5]}")
    kind = DoRA if doras and how.method == "linear" and not how.plain else LoRA
    key = jax.random.key(0) if key is None else key
    trainable: dict = {}
    settings, losses = {}, {}
    for i, (path, own) in enumerate(parts.items()):
        weight = at[path]
        settings[path], made = _merge_weight(weight, own, weights, how, kind, jax.random.fold_in(key, i), progress)
        if not bool(_all_finite(made)):
            raise ValueError(f"{path}: the merged update is not finite; the weighted gains of a DoRA column cancel")
        kernel = (*weight.shape[:-1], made.a.shape[-1])
        arrays = {"a": made.a.reshape(kernel), "b": made.b, "magnitude": made.magnitude}
        insert(trainable, path, {name: x for name, x in arrays.items() if x is not None})
        losses[path] = Loss(*(np.asarray(x) for x in (made.size, made.spectrum, made.lost)))
    return MergedAdapter(trainable, {re.compile(re.escape(p)): c for p, c in settings.items()}, losses)


def reads_weights(shapes: PyTree, adapters: Sequence[Adapter]) -> bool:
    """Whether :func:`merge_adapters` reads the weights; raises what it would raise about the adapters.

    Args:
      shapes: Shapes of the model's parameters.
      adapters: The adapters.
    """
    return any(part.shapes.gain is not None for own in _parts_of(shapes, adapters).values() for part in own)


def check_merge(how: AdapterMerge, count: int, weights: Sequence[float]) -> None:
    """Raises ValueError for settings or weights that can't serve so many adapters."""
    if count < 1:
        raise ValueError("adapters: expected at least one, got none")
    if len(weights) != count:
        raise ValueError(f"weights: expected {count}, one for each adapter, got {len(weights)}")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights: expected finite numbers, got {list(weights)}")
    if how.method not in get_args(Method):
        raise ValueError(f"method: expected one of {list(get_args(Method))}, got {how.method!r}")
    if how.rank is not None and (not isinstance(how.rank, int) or how.rank < 1):
        raise ValueError(f"rank: expected an integer of at least 1, got {how.rank!r}")
    if not 0 < how.keep <= 1:
        raise ValueError(f"keep: expected a share in (0, 1], got {how.keep!r}")


def _parts_of(params: PyTree, adapters: Sequence[Adapter]) -> dict[str, list[_Part]]:
    """The adapters of each weight, in the order of the weights; raises where some can't be merged."""
    at = bases_of(params)
    parts: dict[str, list[_Part]] = {path: [] for path in at}
    lost, strange, wrong = [], [], []
    for number, adapter in enumerate(adapters):
        frozen = {} if adapter.frozen is None else bases_of(adapter.frozen)
        chosen = settings_of(adapter.trainable, adapter.settings)
        for path, arrays in adapters_of(adapter.trainable).items():
            what, config = f"{adapter.name or f'adapter {number}'}: {path}", chosen[path]
            if path not in at:
                lost.append(what)
            elif config.trains_weight or config.changes_base:
                strange.append(f"{what}: {config}")
            else:
                base = frozen.get(path, at[path])
                shapes = _shapes_of(what, config, base, arrays)
                if not _fits(shapes, at[path].shape):
                    wrong.append(f"{what}: factors {shapes.a.shape} and {shapes.b.shape}, weight {at[path].shape}")
                parts[path].append(_Part(number, config, base, arrays, shapes))
    if lost or wrong:
        raise ValueError(
            f"adapters: expected those of this model; it has no weights for {lost[:8]}, and shapes differ: {wrong[:8]}"
        )
    if strange:
        raise ValueError(
            f"adapters: expected low-rank updates of the model's own weights; {strange[:8]} train whole parameters or "
            "start from changed weights: merge them into models, and then the models"
        )
    return {path: own for path, own in parts.items() if own}


def _shapes_of(what: str, config: AdapterConfig, base: Any, arrays: Arrays) -> LowRankUpdate:
    try:
        if not bool(_all_finite(dict(arrays))):
            raise ValueError("expected finite numbers, got NaN or infinity")
        return jax.eval_shape(config.low_rank_update, base, arrays)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{what}: {error}") from error


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _fits(shapes: LowRankUpdate, weight: tuple[int, ...]) -> bool:
    """Whether the factors of an update are those of a weight ``[..., *window, in, out]``."""
    lead, rows, out = shapes.a.shape[:-2], shapes.a.shape[-2], shapes.b.shape[-1]
    return (*lead, rows, out) == (*weight[: len(lead)], math.prod(weight[len(lead) : -1]), weight[-1])


def _merge_weight(weight, parts, weights, how, kind, key, progress) -> tuple[LoRA, MergedUpdate]:
    """Returns the config of the merged adapter of a weight, and its update."""
    configs = tuple(part.config for part in parts)
    bases = [None if isinstance(part.base, jax.ShapeDtypeStruct) else part.base for part in parts]
    a, b, _ = parts[0].shapes
    lead, shape = a.shape[:-2], (a.shape[-2], b.shape[-1])
    gains = any(part.shapes.gain is not None for part in parts)
    in_core = how.method == "linear" and (kind is DoRA or not gains)
    ranks = sum(np.broadcast_to(part.config.update_rank(part.arrays), lead) for part in parts)
    if not in_core and how.rank is not None:
        ranks = np.where(ranks > 0, how.rank, 0)  # a matrix that is not of low rank
    limits = np.minimum(ranks, min(*shape, how.rank or max(shape))).astype(np.int32)
    dtype = linalg.working_dtype(*jax.tree.leaves([part.shapes for part in parts]))
    own = jnp.asarray([weights[part.number] for part in parts], dtype)
    updates, rank = _updates(configs, bases, [part.arrays for part in parts]), int(limits.max())
    window = len(weight.shape) - len(lead) - 2
    matrix = as_matrix(weight, window) if gains or kind is DoRA else None
    if in_core:
        made = _merge_core(updates, own, jnp.asarray(limits), rank, matrix)
        progress(limits.size)
    else:
        keep = how.keep if how.method == "ties" else None
        made = []
        for i, (one, limit, base) in enumerate(_layers(updates, limits, matrix)):
            made.append(merge_dense(jax.random.fold_in(key, i), one, own, limit, rank, base=base, keep=keep))
            progress(1)
        made = jax.tree.map(lambda *xs: jnp.stack(xs).reshape(*lead, *xs[0].shape), *made)
    alpha = float(rank)
    if np.any(limits < rank):
        rank, alpha = tuple(map(int, limits)), tuple(map(float, np.maximum(limits, 1)))
    return kind(rank, alpha, window=window), made


@functools.partial(jax.jit, static_argnums=0)
def _updates(configs, bases, arrays) -> list[LowRankUpdate]:
    """The updates of a weight, of one working dtype."""
    updates = [config.low_rank_update(*own) for config, *own in zip(configs, bases, arrays, strict=True)]
    dtype = linalg.working_dtype(*jax.tree.leaves(updates))
    return jax.tree.map(lambda x: x.astype(dtype), updates)


# Apart from the configs, so that weights of one shape share a program.
_merge_core = jax.jit(merge_core, static_argnames="rank")


def _layers(updates: list[LowRankUpdate], limits: np.ndarray, base: Any) -> Iterator[tuple]:
    """The updates, the rank and the weight of each of stacked weights."""
    for index in np.ndindex(limits.shape):
        own, w = jax.tree.map(lambda x, index=index: x[index], (updates, base))
        yield own, jnp.asarray(limits[index]), w
