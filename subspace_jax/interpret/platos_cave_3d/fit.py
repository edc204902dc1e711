"""The alignment that ``subspace-jax align`` fits, measures and writes."""

import functools
import json
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import interop, train
from subspace_jax.interpret.platos_cave_3d.core import (
    AffineMap,
    CCASubspace,
    affine_of_moments,
    apply_affine,
    project_moments,
    project_x,
    project_y,
    subspace_of_moments,
)
from subspace_jax.interpret.platos_cave_3d.evaluate import (
    METHODS,
    RETRIEVAL_KS,
    axis_correlations,
    match_accuracy,
    retrieval_at_k,
    scores_by,
)
from subspace_jax.interpret.platos_cave_3d.pairs import Pairs
from subspace_jax.linalg import PairMoments, merge_pair_moments, pair_moments

MAPS, RECORD = "maps.safetensors", "align.json"
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_CURVE_KS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Maps(NamedTuple):
    """Maps of new items to the space in which they compare by cosines.

    Attributes:
      subspace: Projections of both spaces.
      translation: The map of projected ``y`` to projected ``x``.
    """

    subspace: CCASubspace
    translation: AffineMap

    def of_x(self, x: jax.Array) -> jax.Array:
        """Maps features of the first space, ``[items, p]`` to ``[items, k]``."""
        return project_x(self.subspace, x)

    def of_y(self, y: jax.Array) -> jax.Array:
        """Maps features of the second space, ``[items, q]`` to ``[items, k]``."""
        return apply_affine(self.translation, project_y(self.subspace, y))


class Found(NamedTuple):
    """What queries find.

    Attributes:
      method: The method of the curve.
      k: Directions of the subspace.
      reg: The ridge, as a share of the largest eigenvalue.
      anchors: Number of anchors.
      widths: Widths of both spaces.
      queries: Number of queries.
      subspace: For each method, matching, then retrieval at 1, 5 and 10, in the subspace.
      full: The same on the features.
      curve: For each number of directions, the same by ``method``.
      rho: Correlations of the projected anchors along each direction, ``k`` numbers, which a ridge does not shrink.
      held_out_rho: Correlations of the queries along the same directions.
    """

    method: str
    k: int
    reg: float
    anchors: int
    widths: tuple[int, int]
    queries: int
    subspace: dict[str, tuple[float, ...]]
    full: dict[str, tuple[float, ...]]
    curve: dict[int, tuple[float, ...]]
    rho: tuple[float, ...]
    held_out_rho: tuple[float, ...]

    @property
    def chance(self) -> tuple[float, ...]:
        """Matching and retrieval of random scores."""
        return tuple(min(1.0, k / self.queries) for k in (1, *RETRIEVAL_KS))


def fit_maps(
    pairs: Pairs,
    k: int = 50,
    method: str = "affine",
    *,
    reg: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Maps, Found]:
    """Fits maps to the anchors of pairs, and measures on their queries how well items are found.

    Args:
      pairs: The pairs, from :func:`read_pairs`.
      k: Directions of the subspace.
      method: Method of the curve over ``k``, see :func:`align`.
      reg: Ridge, as a share of the largest eigenvalue of each covariance; by default that of :data:`RIDGES` with the
        highest mean correlation along the ``k`` directions on a fifth of the anchors, which the fit leaves out.
      seed: Seed of the order in which equal scores are matched.
      progress: Whether to show a progress bar.

    Raises:
      ValueError: ``k`` exceeds a width, or there are not more anchors to fit to; the method is unknown; ``reg`` is
        negative, or 0 and a covariance is singular.
    """
    from tqdm.auto import tqdm

    widths = pairs.fit.xy.shape
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if not 1 <= k <= min(widths):
        raise ValueError(
            f"k: expected 1 to {min(widths)}, the smaller of the widths {widths[0]} and {widths[1]}, got {k}"
        )
    if int(pairs.fit.count) <= k:
        raise ValueError(f"anchors: expected more than {k * 5 // 4 + 1} for {k} directions, got {pairs.anchors}")
    _check_spread(pairs, reg)
    moments = merge_pair_moments(pairs.fit, pairs.held)
    # On one device from here on: the moments of a shard are those of all.
    moments, fit, held = jax.device_put(jax.device_get((moments, pairs.fit, pairs.held)))
    most = min(*widths, pairs.anchors - 1)
    ks = sorted({k, most, *(j for j in _CURVE_KS if j < most)})
    bar = tqdm(total=len(ks) + 2 * len(METHODS), unit="score", disable=None if progress else True)
    if reg is None:
        reg = RIDGES[int(jnp.argmax(_held_out(fit, held, k=k)))]
    whole = _subspace(moments, k=most, reg=reg)
    queries, sample = (jnp.asarray(pairs.xq), jnp.asarray(pairs.yq)), (jnp.asarray(pairs.xs), jnp.asarray(pairs.ys))
    key = jax.random.key(seed)
    bar.update()

    def measured(scores):
        found = _measured(scores, key)
        bar.update()
        return found

    def in_subspace(name, k):
        return measured(_in_subspace(whole, moments, queries, sample, k, method=name))

    curve = {j: in_subspace(method, j) for j in ks}
    subspace = {name: curve[k] if name == method else in_subspace(name, k) for name in METHODS}
    full = {name: measured(_on_features(moments, queries, sample, method=name)) for name in METHODS}
    bar.close()
    sub = whole.leading(k)
    projected = project_moments(moments, sub)
    held_out = axis_correlations(pair_moments(project_x(sub, queries[0]), project_y(sub, queries[1])))
    maps = Maps(sub, affine_of_moments(projected))
    found = Found(
        method=method,
        k=k,
        reg=reg,
        anchors=pairs.anchors,
        widths=widths,
        queries=len(pairs.xq),
        subspace=subspace,
        full=full,
        curve=curve,
        rho=tuple(map(float, axis_correlations(projected))),
        held_out_rho=tuple(map(float, held_out)),
    )
    return maps, found


def save_maps(folder: str | os.PathLike, maps: Maps, found: Found) -> None:
    """Writes maps as safetensors, and what they are and find in JSON beside them.

    Raises:
      OSError: The folder can't be written.
    """
    folder = train.writable_folder(folder)
    named = {f: getattr(maps.subspace, f) for f in CCASubspace._fields} | maps.translation._asdict()
    arrays = {name: np.asarray(x, np.float32) for name, x in named.items()}
    with train.replacing(folder / MAPS) as partial:
        shapes = {name: (x.shape, x.dtype) for name, x in arrays.items()}
        interop.write_safetensors(partial, shapes, arrays.values())
    with train.replacing(folder / RECORD) as partial:
        partial.write_text(json.dumps(found._asdict() | {"chance": found.chance}, indent=2) + "\n")


def load_maps(folder: str | os.PathLike) -> Maps:
    """Reads what :func:`save_maps` wrote.

    Raises:
      FileNotFoundError: The folder holds no maps.
      ValueError: The file is damaged.
    """
    path = pathlib.Path(folder).expanduser() / MAPS
    if not path.is_file():
        raise FileNotFoundError(f"map: {path.parent}: expected {MAPS}, which `align --x --y` writes")
    stored, _ = interop.read_header(path)
    try:
        arrays = {
            name: jnp.asarray(np.array(stored[name].read())) for name in (*CCASubspace._fields, *AffineMap._fields)
        }
    except (ValueError, KeyError) as error:
        raise ValueError(f"map: {path}: damaged, or of another version: {error!r}") from error
    sub = CCASubspace(**{name: arrays[name] for name in CCASubspace._fields})
    return Maps(sub, AffineMap(arrays["R"], arrays["b"]))


def _check_spread(pairs, reg):
    """Raises where a side does not vary, or has a constant feature and there is no ridge."""
    for name, scatter in (("x", pairs.fit.xx), ("y", pairs.fit.yy)):
        constant = np.flatnonzero(np.asarray(jnp.diagonal(scatter)) == 0)
        if len(constant) == len(scatter):
            raise ValueError(f"{name}: all features are constant over the anchors")
        if reg == 0 and len(constant):
            raise ValueError(
                f"{name}: feature {constant[0]} is constant over the anchors; drop it, or give reg above 0"
            )
    if reg == 0 and pairs.anchors <= max(pairs.fit.xy.shape):
        raise ValueError(f"reg: expected more than 0, as {pairs.anchors} anchors are no more than the features")


_subspace = jax.jit(subspace_of_moments, static_argnames=("k", "reg"))


@functools.partial(jax.jit, static_argnames="k")
def _held_out(fit, held, *, k):
    """Mean correlation of held-out anchors along the directions of the others, for each ridge."""

    def of_ridge(reg):
        correlations = axis_correlations(project_moments(held, subspace_of_moments(fit, k, reg)))
        # A direction that is dropped, as there are fewer of them, counts as 0.
        return jnp.mean(jnp.where(jnp.isfinite(correlations), correlations, 0))

    return jax.lax.map(of_ridge, jnp.asarray(RIDGES, jnp.float32))


@functools.partial(jax.jit, static_argnames="method")
def _in_subspace(whole: CCASubspace, moments: PairMoments, queries, sample, k, *, method):
    """Scores in the first ``k`` directions; the others are set to 0, so that one program serves all ``k``."""
    some = (jnp.arange(whole.rho.shape[0]) < k)[None]
    sub = whole._replace(wx=jnp.where(some, whole.wx, 0), wy=jnp.where(some, whole.wy, 0))
    queries, sample = ((project_x(sub, x), project_y(sub, y)) for x, y in (queries, sample))
    return scores_by(method, project_moments(moments, sub), *queries, sample)


@functools.partial(jax.jit, static_argnames="method")
def _on_features(moments, queries, sample, *, method):
    return scores_by(method, moments, *queries, sample)


@jax.jit
def _matching_and_retrieval(scores, key):
    return jnp.concatenate([match_accuracy(scores, key)[None], retrieval_at_k(scores, RETRIEVAL_KS)])


def _measured(scores, key):
    """Matching, then retrieval at 1, 5 and 10."""
    # What a method can't compare, such as a projection to 0, is like nothing.
    return tuple(map(float, _matching_and_retrieval(jnp.nan_to_num(scores, nan=-1.0), key)))
