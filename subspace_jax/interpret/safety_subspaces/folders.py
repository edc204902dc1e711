"""Hugging Face folders, projected tensor by tensor from memory-mapped files."""

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import interop, train
from subspace_jax.interop.safetensors_io import check_same_tensors
from subspace_jax.interop.writing import is_checkpoint_file, replacing, weights_writer
from subspace_jax.interpret.safety_subspaces.params import (
    LeafModes,
    LeafSums,
    ProjectionMetrics,
    leaf_modes,
    metrics_of,
)
from subspace_jax.interpret.safety_subspaces.projection import (
    Basis,
    Method,
    Side,
    check_choice,
    columns,
    directions,
    from_columns,
    num_directions,
    part,
)
from subspace_jax.train.progress import progress_bar

REPORT = "report.json"
# Fractions that are measured in any case: points of a curve.
CURVE = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
_OF_THE_MODEL = ("config.json", "preprocessor_config.json")


class FolderSettings(NamedTuple):
    """What is projected and how.

    Attributes:
      fracs: Fractions of the directions at which a model is written.
      method: "same", "orth" or "opp".
      basis: "top", or a control, "random" or "random_k".
      side: Whose space the directions are of, where matrices are ``[out, in]``, as PyTorch stores linear layers.
      seed: Seed of the controls.
    """

    fracs: tuple[float, ...] = ()
    method: Method = "same"
    basis: Basis = "top"
    side: Side = "output"
    seed: int = 0


class WeightReport(NamedTuple):
    """A weight.

    Attributes:
      shape: Its shape.
      update_energy: Squared norm of the fine-tuning update.
      directions: How many directions the reference update has, up to rounding.
      reference_norm: Norm of the reference update over that of the aligned weight.
      update_norm: The same of the fine-tuning update.
      cosine: Of both updates.
      energies: Share of the squared update in the directions, at each fraction of the report.
      random: The same as expected of random directions.
    """

    shape: tuple[int, ...]
    update_energy: float
    directions: int
    reference_norm: float
    update_norm: float
    cosine: float
    energies: tuple[float, ...]
    random: tuple[float, ...]


class FolderReport(NamedTuple):
    """What was measured.

    Attributes:
      settings: The settings.
      fracs: Fractions that were measured, ascending: those of the curve and of the settings.
      metrics: Metrics at each fraction, of plain numbers.
      random: Energy in random directions that is expected at each fraction.
      weights: Report of each weight by name.
      written: Folders of models, by fraction.
    """

    settings: FolderSettings
    fracs: tuple[float, ...]
    metrics: tuple[ProjectionMetrics, ...]
    random: tuple[float, ...]
    weights: dict[str, WeightReport]
    written: dict[float, pathlib.Path]


def project_folders(
    base: str | os.PathLike,
    aligned: str | os.PathLike,
    tuned: str | os.PathLike,
    out: str | os.PathLike,
    settings: FolderSettings,
    *,
    progress: bool = False,
) -> FolderReport:
    """Projects the update from ``aligned`` to ``tuned`` on the directions of that from ``base`` to ``aligned``.

    One SVD of a weight serves all fractions.  Beside the files, memory holds some copies of the largest weight.

    Args:
      base: Hugging Face folder of the base model.
      aligned: That of the aligned one, with the same tensors.
      tuned: That of the model fine-tuned from it.
      out: Folder for ``report.json`` and, for each fraction of the settings, a folder ``METHOD_FRACTION`` with a model:
        the files of ``tuned`` with other weights, in its dtypes.
      settings: The settings.
      progress: Whether to show a progress bar.

    Returns:
      The report.

    Raises:
      ValueError: The folders have other tensors or shapes, there is no update, numbers are not finite, a setting is
        unknown, or ``out`` would replace what is read.
      OSError: A file can't be read or written.
    """
    check_choice("method", settings.method, Method)
    check_choice("basis", settings.basis, Basis)
    check_choice("side", settings.side, Side)
    for frac in settings.fracs:
        num_directions(frac, 1)
    if len({f"{frac:g}" for frac in settings.fracs}) < len(settings.fracs):
        raise ValueError(f"--frac: expected fractions that differ in six digits, got {settings.fracs}")
    folders = {"base": pathlib.Path(base), "aligned": pathlib.Path(aligned), "tuned": pathlib.Path(tuned)}
    stored = {name: interop.open_folder(folder) for name, folder in folders.items()}
    _check_tensors(folders, stored)
    out = train.writable_folder(out)
    targets = {frac: out / f"{settings.method}_{frac:g}" for frac in settings.fracs}
    for name, folder in folders.items():
        if folder.expanduser().resolve() in {out.resolve(), *(target.resolve() for target in targets.values())}:
            raise ValueError(f"--out: expected another folder than that of --{name}, got {folder}")
    fracs = tuple(sorted({*CURVE, *settings.fracs}))
    weights: dict[str, WeightReport] = {}
    sums: list[dict[str, LeafSums]] = [{} for _ in fracs]
    expected = np.zeros(len(fracs))
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in stored["tuned"].items()}
    with contextlib.ExitStack() as stack:
        puts = {frac: _writer(stack, target, folders["tuned"], shapes) for frac, target in targets.items()}
        bar = stack.enter_context(contextlib.closing(progress_bar(len(shapes), 0, show=progress)))
        for i, (name, last) in enumerate(stored["tuned"].items()):
            if jnp.issubdtype(last.dtype, jnp.floating) and 0 not in last.shape:
                tensors = {which: stored[which][name] for which in folders}
                leaf = _decomposed(tensors, i, settings)
                _check_finite(leaf.sums, folders, name)
                weights[name], found = _measured(leaf, last.shape, fracs)
                for own, of_weight in zip(sums, found, strict=True):
                    own[f"{module_of(name)}/{name}"] = of_weight
                expected += float(found[0].uu) * np.array(weights[name].random)
                for frac, put in puts.items():
                    put(name, np.asarray(_written(leaf, frac, settings, last)))
                del leaf  # or the next weight would be decomposed beside it
            else:
                for put in puts.values():
                    put(name, np.asarray(last.read()))
            bar.update()
    metrics = tuple(_numbers(metrics_of(of_frac, settings.method)) for of_frac in sums)
    total = sum(float(of_weight.uu) for of_weight in sums[0].values())
    report = FolderReport(settings, fracs, metrics, tuple(map(float, expected / total)), weights, targets)
    with train.replacing(out / REPORT) as partial:
        partial.write_text(json.dumps(_as_json(report, folders), indent=2) + "\n")
    return report


@functools.partial(jax.jit, static_argnames=("basis", "side"))
def _modes_of(base, aligned, tuned, key, *, basis, side):
    before, start, end = (columns(x, side) for x in (base, aligned, tuned))
    u, v = end - start, start - before
    return leaf_modes(aligned, u, v, directions(v, basis, key))


@functools.partial(jax.jit, static_argnames=("k", "method", "side"))
def _moved(leaf, *, k, method, side):
    moved = part(leaf.u, leaf.modes.q[:, :k], leaf.modes.coefficients[:k], method)
    moved = from_columns(moved, leaf.aligned.shape, side)
    return leaf.aligned.astype(moved.dtype) + moved


def _side(settings: FolderSettings) -> Side:
    """The side for matrices ``[in, out]``, of what is stored as ``[out, in]``."""
    return "input" if settings.side == "output" else "output"


def _decomposed(tensors: Mapping[str, interop.StoredTensor], number: int, settings: FolderSettings) -> LeafModes:
    arrays = (jnp.asarray(np.asarray(tensor.read())) for tensor in tensors.values())
    key = jax.random.fold_in(jax.random.key(settings.seed), number)
    return _modes_of(*arrays, key, basis=settings.basis, side=_side(settings))


def _written(leaf: LeafModes, frac: float, settings: FolderSettings, stored: interop.StoredTensor) -> np.ndarray:
    k = num_directions(frac, leaf.modes.q.shape[1])
    made = np.asarray(_moved(leaf, k=k, method=settings.method, side=_side(settings)))
    return made.astype(stored.dtype)


def _measured(
    leaf: LeafModes, shape: tuple[int, ...], fracs: Sequence[float]
) -> tuple[WeightReport, tuple[LeafSums, ...]]:
    """Returns the report of a weight, and its sums at each fraction."""
    d, available = leaf.modes.q.shape
    counts = [num_directions(frac, available) for frac in fracs]
    energies, there = np.asarray(leaf.modes.energies), np.asarray(jnp.any(leaf.modes.q != 0, axis=0))
    sums = tuple(leaf.sums._replace(parallel=jnp.asarray(energies[k - 1])) for k in counts)
    uu, vv, uv, norm = (float(x) for x in (*leaf.sums[:3], jnp.linalg.norm(leaf.aligned.astype(jnp.float32))))
    report = WeightReport(
        shape=tuple(shape),
        update_energy=uu,
        directions=int(there.sum()),
        reference_norm=vv**0.5 / norm if norm else float("inf") if vv else 0.0,
        update_norm=uu**0.5 / norm if norm else float("inf") if uu else 0.0,
        cosine=uv / (uu * vv) ** 0.5 if uu * vv else 0.0,
        energies=tuple(float(energies[k - 1]) / uu if uu else 0.0 for k in counts),
        random=tuple(k / d for k in counts),
    )
    return report, sums


def _writer(
    stack: contextlib.ExitStack, target: pathlib.Path, tuned: pathlib.Path, shapes: Mapping[str, Any]
) -> Callable[[str, np.ndarray], None]:
    """Opens the folder of a model within a stack of contexts, with the files of the tuned one beside the weights."""
    new = stack.enter_context(replacing(target, is_checkpoint_file))
    files = {name: tuned / name for name in _OF_THE_MODEL if (tuned / name).is_file()}
    interop.write_side_files(new, {**files, **interop.side_files(tuned)})
    return stack.enter_context(weights_writer(new, shapes))


def _check_tensors(
    folders: Mapping[str, pathlib.Path], stored: Mapping[str, Mapping[str, interop.StoredTensor]]
) -> None:
    """Raises unless all folders have the same tensors, and the weights differ from one to the next."""
    tuned = stored["tuned"]
    for name in ("base", "aligned"):
        check_same_tensors(f"--{name}", folders[name], stored[name], folders["tuned"], tuned)
    floats = [name for name, tensor in tuned.items() if jnp.issubdtype(tensor.dtype, jnp.floating)]
    for one, two in (("base", "aligned"), ("aligned", "tuned")):
        if all(stored[one][name].equals(stored[two][name]) for name in floats):
            raise ValueError(f"--{one}, --{two}: expected weights that differ, got equal ones in both")


def _check_finite(sums: LeafSums, folders: Mapping[str, pathlib.Path], name: str) -> None:
    """Raises ValueError where a tensor holds what is no number, as sums of squares then are none."""
    before, after = (bool(np.isfinite(x)) for x in (sums.vv, sums.uu))
    if not (before and after):
        which = "tuned" if before else "base" if after else "aligned"
        raise ValueError(f"--{which}: {folders[which]}: {name}: expected finite numbers, got others")


def module_of(name: str) -> str:
    """The layer of a tensor, as in "model.layers.3"; of other tensors all but the last part of their name."""
    parts = name.split(".")
    numbers = [i for i, text in enumerate(parts) if text.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1] or parts)


def _numbers(metrics: ProjectionMetrics) -> ProjectionMetrics:
    return jax.tree.map(float, jax.device_get(metrics))


def _as_json(report: FolderReport, folders: Mapping[str, pathlib.Path]) -> dict[str, Any]:
    return {
        **{name: os.fspath(folder) for name, folder in folders.items()},
        **report.settings._asdict(),
        "measured_fracs": report.fracs,
        "metrics": [metrics._asdict() for metrics in report.metrics],
        "random_energy": report.random,
        "weights": {name: weight._asdict() for name, weight in report.weights.items()},
        "written": {f"{frac:g}": folder.name for frac, folder in report.written.items()},
    }
