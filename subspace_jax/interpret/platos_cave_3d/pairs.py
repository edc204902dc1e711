"""Pairs on disk: one pass over two files for the moments of anchors and a few held-out pairs."""

import functools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import train
from subspace_jax.linalg import PairMoments, merge_pair_moments, pair_moments

MOST_QUERIES = 500
MOST_SAMPLED = 1000
BLOCK_BYTES = 2**25
# Every so-manieth anchor is held out to choose the ridge.
_HELD_PART = 5
_FIT, _HELD, _QUERY = 1, 2, 3


class Rows(Protocol):
    """A matrix that is read in blocks of rows."""

    shape: tuple[int, int]

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Returns the rows in order, ``[rows, n]`` float32 at a time and fewer at the end."""


class Pairs(NamedTuple):
    """What an alignment needs to know of pairs.

    Attributes:
      fit: Moments of four fifths of the anchors.
      held: Moments of the others, by which the ridge is chosen.
      xq: Queries, which are no anchors, ``[items, p]``.
      yq: ``[items, q]``.
      xs: A sample of the anchors, ``[sampled, p]``.
      ys: ``[sampled, q]``.
    """

    fit: PairMoments
    held: PairMoments
    xq: np.ndarray
    yq: np.ndarray
    xs: np.ndarray
    ys: np.ndarray

    @property
    def anchors(self) -> int:
        """Number of anchors."""
        return int(self.fit.count + self.held.count)


def read_pairs(x: Rows, y: Rows, anchors: int | None = None, *, seed: int = 0, progress: bool = False) -> Pairs:
    """Draws anchors and queries, and reads both files once, in blocks of 32 MB that are sharded over all devices.

    Args:
      x: Features in the first space, such as ``open_vectors`` of the package gives.
      y: Features of the same items in the same order.
      anchors: Number of anchors; all pairs but the queries by default.  A fifth of the pairs are queries, 500 at most.
      seed: Seed of the draw.
      progress: Whether to show a progress bar.

    Raises:
      ValueError: The numbers of items differ, there are fewer than 20 or too few for the anchors, or a feature is not
        finite.
    """
    from tqdm.auto import tqdm

    count = x.shape[0]
    if y.shape[0] != count:
        raise ValueError(f"x, y: expected features of the same items, got {count} and {y.shape[0]}")
    if count < 20:
        raise ValueError(f"x, y: expected at least 20 items, got {count}")
    queries = min(MOST_QUERIES, count // 5)
    anchors = count - queries if anchors is None else anchors
    if not _HELD_PART <= anchors <= count - queries:
        most = f"{count - queries}, {queries} of {count} items being queries"
        raise ValueError(f"anchors: expected {_HELD_PART} to {most}; got {anchors}")
    roles = _roles(count, queries, anchors, seed)
    sampled = np.flatnonzero(np.isin(roles, (_FIT, _HELD)))[:: -(-anchors // MOST_SAMPLED)]
    chosen = {"q": roles == _QUERY, "s": np.isin(np.arange(count), sampled)}
    mesh = train.make_mesh()
    rows = max(1, BLOCK_BYTES // (4 * max(x.shape[1], y.shape[1])))
    rows = -(-min(count, rows) // mesh.size) * mesh.size
    place = functools.partial(jax.device_put, device=jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names)))
    moments = [_nothing(x.shape[1], y.shape[1])] * 2
    kept = {(name, side): [] for name in chosen for side in "xy"}
    start = 0
    with tqdm(total=count, unit="pair", unit_scale=True, disable=None if progress else True) as bar:
        for block in zip(x.blocks(rows), y.blocks(rows), strict=True):
            stop = start + len(block[0])
            for name, flags in chosen.items():
                for side, values in zip("xy", block, strict=True):
                    kept[name, side].append(values[flags[start:stop]])
            padding = rows - (stop - start)
            padded = (place(np.pad(values, ((0, padding), (0, 0)))) for values in block)
            of_block = place(np.pad(roles[start:stop], (0, padding)))
            moments = _add(moments, *padded, of_block)
            bar.update(stop - start)
            start = stop
    arrays = {f"{side}{name}": np.concatenate(parts) for (name, side), parts in kept.items()}
    return Pairs(*moments, **arrays)


def _roles(count, queries, anchors, seed):
    """Returns what each pair is for, ``[count]`` int8."""
    order = np.random.default_rng(seed).permutation(count)
    roles = np.zeros(count, np.int8)
    roles[order[:queries]] = _QUERY
    own = order[queries : queries + anchors]
    roles[own] = _FIT
    roles[own[::_HELD_PART]] = _HELD
    return roles


def _nothing(p, q):
    shapes = ((p,), (q,), (p, p), (p, q), (q, q))
    return PairMoments(jnp.zeros((), jnp.int32), *(jnp.zeros(shape, jnp.float32) for shape in shapes))


@jax.jit
def _add(moments, x, y, roles):
    return [
        merge_pair_moments(one, pair_moments(x, y, roles == role))
        for one, role in zip(moments, (_FIT, _HELD), strict=True)
    ]
