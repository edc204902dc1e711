"""The inspection of a model's updates, weight by weight."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from subspace_jax import linalg
from subspace_jax.interpret.inspector.changes import Change, Scan
from subspace_jax.interpret.inspector.core import (
    LEADING,
    THRESHOLD,
    TOP,
    Intruders,
    UpdateSpectrum,
    decompose_update,
    decompose_weight,
    intruder_dimensions,
    update_spectrum,
)
from subspace_jax.interpret.inspector.folders import Update, open_base, open_updates
from subspace_jax.interpret.inspector.matrix import Decomposition, as_rows

_LAYER = re.compile(r"^(?P<group>.*?)\.(?P<layer>\d+)\.(?P<kind>.+?)(?:\.weight)?$")


class Directions(NamedTuple):
    """How an update's leading directions lie to the base's leading directions, on one side of a weight.

    Attributes:
      angles: Principal angles in degrees, ascending: of up to 16 directions of each.
      overlap: Mean squared cosine of them.
      random: Its expectation for independent uniform subspaces of these dimensions.
    """

    angles: list[float]
    overlap: float
    random: float


class WeightChange(NamedTuple):
    """What an update did to a weight.

    Attributes:
      weight: Its name in the base.
      group: What is before the number of its layer in the name, such as ``model.layers``; empty outside of layers.
      layer: That number; None outside of layers.
      kind: Its name within a layer.
      shape: Its shape in the file.
      base_norm: Frobenius norm of the base.
      relative_norm: Norm of the update over it; infinite where the base is zero.
      spectrum: None for vectors and for what did not change.
      left: Leading directions of the rows; None without a rank above the floor, or with a zero base.
      right: The same of the columns.
      intruders: None like ``left``.
    """

    weight: str
    group: str
    layer: int | None
    kind: str
    shape: tuple[int, ...]
    base_norm: float
    relative_norm: float
    spectrum: UpdateSpectrum | None = None
    left: Directions | None = None
    right: Directions | None = None
    intruders: Intruders | None = None


class Overlaps(NamedTuple):
    """Overlaps of updates, means over the weights that both changed: arrays ``[updates, updates]``.

    Attributes:
      overlap: Mean squared cosine between the up to 16 leading directions of both, of both sides.
      random: Its expectation for independent uniform subspaces.
      weights: Number of weights.
    """

    overlap: np.ndarray
    random: np.ndarray
    weights: np.ndarray


class Inspection(NamedTuple):
    """An inspection.

    Attributes:
      base: Folder of the base.
      labels: Names of the updates.
      sources: Their folders.
      changes: Of each update, the weights in the order of the base; those that an adapter leaves alone are not there.
      overlaps: None for a single update.
      top: Singular vectors that were looked at for intruders.
      threshold: Cosine below which they are some.
    """

    base: str
    labels: list[str]
    sources: list[str]
    changes: list[list[WeightChange]]
    overlaps: Overlaps | None
    top: int
    threshold: float


def inspect_updates(
    base: str,
    sources: Sequence[str],
    *,
    top: int = TOP,
    threshold: float = THRESHOLD,
    progress: bool = False,
) -> Inspection:
    """Inspects what fine-tunings or adapters change in a model.

    One weight at a time is in memory, and of a large one some of its rows.

    Args:
      base: Folder of the model.
      sources: Folders of tuned models of the same architecture, or of PEFT adapters.
      top: Leading singular vectors of each tuned weight that may be intruder dimensions.
      threshold: Cosine of :func:`intruder_dimensions`.
      progress: Whether to show a progress bar.

    Raises:
      FileNotFoundError: A folder or a file of one is missing.
      ValueError: Folders are of different architectures, an adapter does not fit, weights hold NaN or infinity, or an
        argument is out of range.
    """
    if not sources:
        raise ValueError("sources: expected a tuned folder or an adapter, got none")
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a cosine in (0, 1], got {threshold}")
    tensors = open_base(base)
    updates = open_updates(tensors, list(sources))
    scans = _scan(updates, progress)
    found: list[list[WeightChange]] = [[] for _ in updates]
    pairs = _Pairs(len(updates))
    with _bar(scans, progress, "spectra") as step:
        for name in tensors:
            leading = _one_weight(name, updates, scans, found, (top, threshold), step)
            pairs.add(leading)
    overlaps = pairs.means() if len(updates) > 1 else None
    return Inspection(str(base), [u.label for u in updates], list(sources), found, overlaps, top, threshold)


@contextlib.contextmanager
def _bar(items, progress: bool, what: str) -> Iterator[Callable[[], object]]:
    from tqdm.auto import tqdm

    with tqdm(total=len(items), desc=what, unit="weight", disable=None if progress else True) as bar:
        yield bar.update


def _scan(updates: Sequence[Update], progress: bool) -> dict[tuple[int, str], Scan]:
    """Norms of all changes; raises for NaN before anything that takes long."""
    todo = [(i, name) for i, update in enumerate(updates) for name in update.changes]
    with _bar(todo, progress, "norms") as step:
        scans = {}
        for i, name in todo:
            scans[i, name] = updates[i].changes[name].scan()
            step()
    return scans


def _one_weight(name, updates, scans, found, intruder_options, step) -> dict[int, Decomposition]:
    """Appends what each update did to a weight; returns the leading directions of those that changed it."""
    leading, base, weight = {}, None, None
    for i, update in enumerate(updates):
        change = update.changes.get(name)
        if change is None:
            continue
        scan = scans[i, name]
        relative = scan.norm / scan.base_norm if scan.base_norm else (math.inf if scan.norm else 0.0)
        record = WeightChange(name, *parts_of(name), change.base.shape, scan.base_norm, relative)
        if scan.norm > 0 and 1 not in change.shape:
            if base is None and scan.base_norm > 0:
                base = as_rows(change.base_matrix())
                weight = decompose_weight(base)
            record, leading[i] = _studied(record, change, scan, base, weight, intruder_options)
        found[i].append(record)
        step()
    return {i: d for i, d in leading.items() if d is not None}


def _studied(record: WeightChange, change: Change, scan: Scan, base, weight, intruder_options):
    """Adds spectrum, directions and intruders of a matrix that changed; returns its leading directions too."""
    update = change.delta_matrix()
    if not isinstance(update, Decomposition):
        update = decompose_update(update)
    spectrum = update_spectrum(update, change.shape, norm=scan.norm, noise=scan.noise)
    record = record._replace(spectrum=spectrum)
    if not spectrum.rank:
        return record, None
    leading = update.leading(min(LEADING, spectrum.rank))
    if weight is None:
        return record, leading
    top, threshold = intruder_options
    intruders = intruder_dimensions(base, change.tuned_matrix(), top=top, threshold=threshold, decomposed=weight)
    main = weight.leading(LEADING)
    left, right = _directions(leading.left, main.left), _directions(leading.right, main.right)
    return record._replace(left=left, right=right, intruders=intruders), leading


_angles = jax.jit(linalg.principal_angles)


def _directions(update: np.ndarray, base: np.ndarray) -> Directions:
    angles = np.asarray(_angles(update, base), np.float64)
    wider = max(update.shape[1], base.shape[1])
    return Directions(np.degrees(angles).tolist(), float(np.mean(np.cos(angles) ** 2)), wider / len(update))


class _Pairs:
    """Sums of overlaps over weights."""

    def __init__(self, count: int):
        self._sums = np.zeros((3, count, count))

    def add(self, leading: dict[int, Decomposition]) -> None:
        for i, one in leading.items():
            for j, two in leading.items():
                pairs = ((one.left, two.left), (one.right, two.right))
                # The narrower subspaces of one weight are compared with equal weights of both sides.
                overlap = np.mean([float(np.sum(np.square(a.T @ b))) / min(a.shape[1], b.shape[1]) for a, b in pairs])
                random = np.mean([max(a.shape[1], b.shape[1]) / len(a) for a, b in pairs])
                self._sums[:, i, j] += (overlap, random, 1)

    def means(self) -> Overlaps:
        overlap, random, weights = self._sums
        with np.errstate(invalid="ignore"):
            return Overlaps(overlap / weights, random / weights, weights.astype(int))


def parts_of(name: str) -> tuple[str, int | None, str]:
    """Group, layer and kind of a weight: ``("model.layers", 3, "mlp.up_proj")`` of "model.layers.3.mlp.up_proj.weight".

    The number of the layer is the first in the name.
    """
    match = _LAYER.match(name)
    if match is None:
        return "", None, name.removesuffix(".weight")
    return match["group"], int(match["layer"]), match["kind"]
