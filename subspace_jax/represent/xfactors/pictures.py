"""Pictures of a trained model: factors swapped between images, and images with a given value of a factor."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from subspace_jax import train
from subspace_jax.represent.xfactors.core import Codes
from subspace_jax.represent.xfactors.data import FactorImages
from subspace_jax.represent.xfactors.model import swap_factor
from subspace_jax.represent.xfactors.task import XFactorsTask, images_of

REST = "rest"  # the name of the residual code among the factors
_MOST_COLUMNS = 8
_GAP = 0.12


class Trained(NamedTuple):
    """A trained model with its pictures.

    Attributes:
      task: The task.
      arrays: Its parameters and variables.
      found: All pictures, and names of factors and values.
      train_set: ``inputs`` and ``factors`` that it was trained on.
      test_set: Those held out.
    """

    task: XFactorsTask
    arrays: tuple[Any, Any]
    found: FactorImages
    train_set: Mapping[str, np.ndarray]
    test_set: Mapping[str, np.ndarray]

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the labelled factors, in the order of their blocks."""
        return tuple(self.found.names[k] for k in self.task.targets)

    def codes(self, inputs: np.ndarray) -> Codes:
        """Returns the codes of images ``[batch, height, width, channels]``."""
        return jax.jit(self.task.codes)(*self.arrays, inputs)

    def swapped(self, source: Codes, reference: Codes, factor: str) -> np.ndarray:
        """Returns images of ``source`` with a labelled factor of ``reference``, or with its residual code for "rest".

        Raises:
          ValueError: The factor is not labelled.
        """
        if factor not in (*self.targets, REST):
            raise ValueError(f"factor: expected one of {(*self.targets, REST)}, got {factor!r}")
        k = None if factor == REST else self.targets.index(factor)

        def decoded(arrays, source, reference):
            return swap_factor(self.task.module(*arrays), source, reference, k)

        return np.asarray(jax.jit(decoded)(self.arrays, source, reference))


def open_trained(workdir: str | Path, *, step: int | Literal["best"] | None = None) -> Trained:
    """Reads a run of an :class:`XFactorsTask` back; raises as :func:`subspace_jax.train.restore`.

    Args:
      workdir: Folder of the run.
      step: See there.

    Raises:
      ValueError: The run is of another task.
    """
    restored = train.restore(workdir, step=step)
    task = restored.phase.task
    if not isinstance(task, XFactorsTask):
        raise ValueError(f"workdir: expected a run of XFactors, {workdir} is one of {type(task).__name__}")
    arrays = jax.device_get((restored.state.params, restored.state.variables))
    return Trained(task, arrays, *images_of(restored.run.config))


def draw_swaps(
    trained: Trained, output: str | Path, *, factors: Sequence[str] = (), rows: int = 5, columns: int = 6, seed: int = 0
) -> None:
    """Draws held-out images with each factor of others: a panel for each factor, a PNG.

    The images that are changed stand on the left of a panel, those that the factor is taken from on top.

    Args:
      trained: The model.
      output: The PNG to write.
      factors: Labelled factors, or "rest" for what is not labelled; all of them by default.
      rows: Images to change.
      columns: Images to take the factor from.
      seed: Seed of their choice.

    Raises:
      ValueError: A factor is unknown, or there are not as many images.
    """
    factors = factors or (*trained.targets, *([REST] if trained.task.layout.residual_dim else []))
    images = _drawn(trained, rows, columns, seed)
    codes = trained.codes(images)
    pairs = [np.repeat(np.arange(rows), columns), np.tile(np.arange(rows, rows + columns), rows)]
    source, reference = (jax.tree.map(lambda x, at=at: x[at], codes) for at in pairs)
    panels = {}
    for factor in factors:
        decoded = trained.swapped(source, reference, factor).reshape(rows, columns, *images.shape[1:])
        title = "all that is not labelled, of the top row" if factor == REST else f"{factor} of the top row"
        panels[title] = (images[:rows], list(images[rows:]), decoded)
    _draw(panels, output)


def draw_generated(
    trained: Trained,
    output: str | Path,
    *,
    chosen: Mapping[str, Sequence[str]] | None = None,
    rows: int = 5,
    seed: int = 0,
) -> None:
    """Draws held-out images with given values of a factor, whose codes are drawn from those of training images.

    The images that are changed stand on the left; each column has one value.

    Args:
      trained: The model.
      output: The PNG to write.
      chosen: Labelled factor to names of its values; by default up to eight of each labelled factor.
      rows: Images to change.
      seed: Seed of all choices.

    Raises:
      ValueError: A factor or a value is unknown, or no training image has it.
    """
    found, rng = trained.found, np.random.default_rng((seed, 1))
    images = _drawn(trained, rows, 0, seed)
    source = trained.codes(images)
    values = {name: _some_values(found, name, rng) for name in trained.targets}
    if chosen:
        values = {name: [_value(trained, name, value) for value in some] for name, some in chosen.items()}
    panels = {}
    for name, of_factor in values.items():
        column = trained.train_set["factors"][:, found.names.index(name)]
        decoded, titles = [], []
        for value in of_factor:
            titles.append(found.values[found.names.index(name)][value])
            rows_with = np.flatnonzero(column == value)
            if not rows_with.size:
                raise ValueError(f"{name}: no training image has the value {titles[-1]!r}")
            reference = trained.codes(trained.train_set["inputs"][rng.choice(rows_with, rows)])
            decoded.append(trained.swapped(source, reference, name))
        panels[name] = (images, titles, np.stack(decoded, axis=1))
    _draw(panels, output)


def _drawn(trained: Trained, rows: int, columns: int, seed: int) -> np.ndarray:
    images = trained.test_set["inputs"]
    if rows < 1:
        raise ValueError(f"rows: expected at least 1, got {rows}")
    count = rows + columns
    if count > len(images):
        raise ValueError(f"rows, columns: expected at most the {len(images)} images that are held out, got {count}")
    return images[np.random.default_rng((seed, 0)).choice(len(images), count, replace=False)]


def _some_values(found: FactorImages, name: str, rng: np.random.Generator) -> list[int]:
    count = len(found.values[found.names.index(name)])
    return sorted(rng.choice(count, min(count, _MOST_COLUMNS), replace=False).tolist())


def _value(trained: Trained, name: str, value: str) -> int:
    if name not in trained.targets:
        raise ValueError(f"factor: expected one of {trained.targets}, got {name!r}")
    known = trained.found.values[trained.found.names.index(name)]
    if value not in known:
        raise ValueError(f"{name}: expected one of {known}, got {value!r}")
    return known.index(value)


def _draw(panels: Mapping[str, tuple[np.ndarray, list, np.ndarray]], output: str | Path) -> None:
    """Draws panels side by side: left images, titles or images on top, and the cells between."""
    from matplotlib.figure import Figure

    sizes = [(len(left), len(top)) for left, top, _ in panels.values()]
    width = sum(columns + 1.6 for _, columns in sizes) * 0.62
    figure = Figure(figsize=(max(width, 2.5), (max(rows for rows, _ in sizes) + 2.3) * 0.62), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[columns + 1.3 for _, columns in sizes])[0]
    for axis, (title, (left, top, cells)) in zip(axes, panels.items(), strict=True):
        axis.set_title(title, fontsize=9)
        for row, image in enumerate(left):
            _show(axis, image, -1 - _GAP * 2, row)
        for column, head in enumerate(top):
            if isinstance(head, str):
                axis.text(column + 0.45, -0.15, head, rotation=30, fontsize=7, ha="left", va="bottom")
            else:
                _show(axis, head, column, -1 - _GAP * 2)
            for row in range(len(left)):
                _show(axis, cells[row, column], column, row)
        axis.set(xlim=(-1.4, len(top) + 0.1), ylim=(len(left) + 0.1, -1.4), aspect="equal")
        axis.axis("off")
    with train.replacing(output) as partial:
        figure.savefig(partial, dpi=130)


def _show(axis: Any, image: np.ndarray, x: float, y: float) -> None:
    shown = np.clip(image[..., 0] if image.shape[-1] == 1 else image, 0, 1)
    inner = 1 - _GAP / 2
    axis.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=(x, x + inner, y + inner, y), interpolation="nearest")
