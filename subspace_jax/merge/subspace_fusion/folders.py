"""Hugging Face folders, merged piece by piece from memory-mapped files."""

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import interop
from subspace_jax.interop.safetensors_io import StoredTensor, check_same_tensors
from subspace_jax.interop.writing import is_checkpoint_file, replacing, weights_writer
from subspace_jax.merge.subspace_fusion import core, statistics, ties
from subspace_jax.merge.subspace_fusion.thresholds import Thresholds
from subspace_jax.train.progress import progress_bar

Rule = Literal["average", "task-arithmetic", "ties", "fisher"]
Tensors = Mapping[str, StoredTensor]
REPORT = "merge.json"
PIECE = 2**22  # entries that are merged at a time
_HEAD = "lm_head.weight"
_OF_THE_MODEL = ("config.json", "preprocessor_config.json")


class MergeSettings(NamedTuple):
    """How folders are merged.

    Attributes:
      rule: The rule.
      lam: Coefficients of task vectors, one for each model; for TIES one number.
      keep: Of :func:`ties_merge`.
      combine: Of :func:`ties_merge`.
      normalize: Of :func:`fisher_merge`.
    """

    rule: Rule = "average"
    lam: tuple[float, ...] = (0.3,)
    keep: float = 0.2
    combine: ties.Combine = "sum"
    normalize: bool = True


class TensorReport(NamedTuple):
    """A merged tensor.

    Attributes:
      shape: Its shape.
      base_norm: Norm of the base.
      products: Inner products of the task vectors, ``[T, T]``.
      conflicts: Share of the entries in which two task vectors have opposite signs.
    """

    shape: tuple[int, ...]
    base_norm: float
    products: np.ndarray
    conflicts: float


class MergeReport(NamedTuple):
    """What was merged.

    Attributes:
      settings: The settings.
      models: The folders of the models.
      tensors: Report of each tensor by name; none without a base.
      thresholds: Of TIES, one for each model.
      folder: The folder that was written.
    """

    settings: MergeSettings
    models: tuple[str, ...]
    tensors: dict[str, TensorReport]
    thresholds: tuple[float, ...]
    folder: pathlib.Path

    def products(self) -> np.ndarray:
        """Inner products of the task vectors over all tensors, ``[T, T]``."""
        return sum((found.products for found in self.tensors.values()), np.zeros((len(self.models),) * 2))

    def conflicts(self) -> float:
        """Share of all entries in which two task vectors have opposite signs."""
        sizes = [math.prod(found.shape) for found in self.tensors.values()]
        return float(np.average([found.conflicts for found in self.tensors.values()], weights=sizes)) if sizes else 0.0


def merge_folders(
    models: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    settings: MergeSettings,
    *,
    base: str | os.PathLike | None = None,
    fishers: Sequence[str | os.PathLike] = (),
    progress: bool = False,
) -> MergeReport:
    """Merges the models of folders into a folder.

    Each rule is one of entries, so that memory holds some million entries of each model and the tensor that is written.
    TIES has its exact thresholds from two counts of all magnitudes before, and the sign of most entries from a third
    pass.  An output embedding that is stored beside an equal input embedding counts once.

    Args:
      models: Hugging Face folders with tensors of the same names and shapes.
      out: Folder for the model, in the dtypes of the base or else of the first model, whose config and tokenizer it
        has, and for ``merge.json``.
      settings: The settings.
      base: Folder of the model that all were fine-tuned from; needed for task arithmetic and TIES.
      fishers: For the rule "fisher", folders with the Fisher information of each model under the same names.
      progress: Whether to show a progress bar.

    Returns:
      The report.

    Raises:
      ValueError: A setting can't serve, the folders have other tensors or shapes, numbers are not finite, or ``out``
        would replace what is read.
      OSError: A file can't be read or written.
    """
    settings = _checked(settings, len(models), base, fishers)
    sources = _opened(models, base, fishers, pathlib.Path(out).expanduser().absolute())
    rounds = 4 if settings.rule == "ties" else 1
    total = rounds * sum(math.prod(sources.first[name].shape) for name in sources.counted)
    with contextlib.closing(progress_bar(total, 0, show=progress)) as bar:
        found = _thresholds(sources, settings, bar.update)
        rule = _rule(settings, found, _norms(sources))
        with replacing(sources.out, is_checkpoint_file) as new:
            reports = _write(new, sources, rule, bar.update)
            report = MergeReport(settings, tuple(map(str, models)), reports if base else {}, found.values, sources.out)
            (new / REPORT).write_text(json.dumps(as_json(report), indent=2) + "\n")
    return report


def as_json(report: MergeReport) -> dict[str, Any]:
    """The report as plain numbers."""
    found = {
        **report.settings._asdict(),
        "models": list(report.models),
        "thresholds": list(report.thresholds),
        "conflicts": report.conflicts(),
        "cosines": cosines(report.products()).tolist() if report.tensors else [],
    }
    tensors = {
        name: {
            "shape": list(one.shape),
            "base_norm": one.base_norm,
            "task_vector_norms": np.sqrt(np.diagonal(one.products)).tolist(),
            "cosines": cosines(one.products).tolist(),
            "conflicts": one.conflicts,
        }
        for name, one in report.tensors.items()
    }
    return found | {"tensors": tensors}


def cosines(products: np.ndarray) -> np.ndarray:
    """Cosines from inner products ``[T, T]``; 0 where a vector is."""
    norms = np.sqrt(np.diagonal(products))
    scale = np.outer(norms, norms)
    return np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)


def _checked(settings: MergeSettings, count: int, base: Any, fishers: Sequence[Any]) -> MergeSettings:
    """The settings with a coefficient for each model."""
    if settings.rule not in get_args(Rule):
        raise ValueError(f"--method: expected one of {', '.join(get_args(Rule))}, got {settings.rule}")
    if not count:
        raise ValueError("--models: expected at least one folder, got none")
    ties.check_ties(settings.keep, settings.combine)
    if settings.rule in ("task-arithmetic", "ties") and not base:
        raise ValueError(f"--base: expected the model that all were fine-tuned from, for --method {settings.rule}")
    expected = 1 if settings.rule == "ties" else count
    if len(settings.lam) not in (1, expected) or not all(map(math.isfinite, settings.lam)):
        some = "a finite number" if expected == 1 else f"a finite number, or {expected}, one for each model"
        raise ValueError(f"--lam: expected {some}, got {' '.join(map(str, settings.lam))}")
    if len(fishers) != (count if settings.rule == "fisher" else 0):
        raise ValueError(f"fishers: expected one for each of {count} models, for the rule fisher alone")
    return settings._replace(lam=settings.lam * (expected // len(settings.lam)))


class _Sources(NamedTuple):
    """What is read.

    Attributes:
      folder: The folder whose config, tokenizer and dtypes the merged model has.
      first: Its tensors.
      group: Tensors of the base, where there is one, and of the models.
      labels: Argument and folder of each, for messages.
      fishers: Tensors of Fisher information.
      counted: Names of the tensors to merge, each weight once.
      copied: Name of a tensor that is the same weight as another one, to the name of that.
      out: The folder to write.
      base: Whether there is a base.
    """

    folder: pathlib.Path
    first: Tensors
    group: list[Tensors]
    labels: list[str]
    fishers: list[Tensors]
    counted: list[str]
    copied: dict[str, str]
    out: pathlib.Path
    base: bool


def _opened(models: Sequence[Any], base: Any, fishers: Sequence[Any], out: pathlib.Path) -> _Sources:
    """Opens all folders, which have to have the same tensors and not to be replaced."""
    named = {"--base": [base] if base else [], "--models": models, "fishers": fishers}
    folders = {flag: [pathlib.Path(folder).expanduser() for folder in found] for flag, found in named.items()}
    stored = {flag: [interop.open_folder(folder) for folder in found] for flag, found in folders.items()}
    flag = "--base" if base else "--models"
    source, first = folders[flag][0], stored[flag][0]
    for flag, found in stored.items():
        for folder, tensors in zip(folders[flag], found, strict=True):
            if flag != "fishers":
                check_same_tensors(flag, folder, tensors, source, first)
            if out.resolve() == folder.resolve():
                raise ValueError(f"--out: expected another folder than that of {flag}, got {folder}")
    group = [*stored["--base"], *stored["--models"]]
    floats = [name for name, tensor in first.items() if _is_float(tensor)]
    copied = _copied_head(group, floats)
    counted = {name: first[name] for name in floats if name not in copied}
    fishers = [{name: x for name, x in own.items() if name in counted} for own in stored["fishers"]]
    for folder, own in zip(folders["fishers"], fishers, strict=True):
        check_same_tensors("fishers", folder, own, source, counted)
    return _Sources(
        folder=source,
        first=first,
        group=group,
        labels=[f"{flag}: {folder}" for flag in ("--base", "--models") for folder in folders[flag]],
        fishers=fishers,
        counted=list(counted),
        copied=copied,
        out=out,
        base=bool(base),
    )


def _write(
    new: pathlib.Path, sources: _Sources, rule: Callable, update: Callable[[int], Any]
) -> dict[str, TensorReport]:
    """Writes the model to a new folder, and returns the reports of its tensors."""
    first, owners, reports = sources.first, sources.copied, {}
    files = {name: sources.folder / name for name in _OF_THE_MODEL if (sources.folder / name).is_file()}
    interop.write_side_files(new, {**files, **interop.side_files(sources.folder)})
    with weights_writer(new, {name: (tensor.shape, tensor.dtype) for name, tensor in first.items()}) as put:
        for name in sources.counted:
            merged, reports[name] = _merged(sources, name, rule, update)
            for other in (name, *(copy for copy, owner in owners.items() if owner == name)):
                put(other, merged)
        for name in first.keys() - reports.keys() - owners.keys():
            put(name, np.asarray(first[name].read()))
    return reports


def _is_float(tensor: StoredTensor) -> bool:
    return jnp.issubdtype(tensor.dtype, jnp.floating) and 0 not in tensor.shape


def _copied_head(group: Sequence[Tensors], floats: Sequence[str]) -> dict[str, str]:
    """The output embedding, where every folder has it equal to the input one, to the name of that."""
    if _HEAD not in floats:
        return {}
    alike = [name for name in floats if name != _HEAD and group[0][name].shape == group[0][_HEAD].shape]
    same = [name for name in alike if all(tensors[name].equals(tensors[_HEAD]) for tensors in group)]
    return {_HEAD: same[0]} if same else {}


def _pieces(tensors: Sequence[StoredTensor]) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Parts of tensors of one shape as vectors; the last one is padded with zeros, to few lengths."""
    flat = [np.asarray(tensor.read()).reshape(-1) for tensor in tensors]
    size = flat[0].size
    for start in range(0, size, PIECE):
        where = slice(start, min(start + PIECE, size))
        length = where.stop - where.start
        padded = min(PIECE, 1 << max(10, (length - 1).bit_length()))
        yield where, [np.pad(x[where], (0, padded - length)) for x in flat]


def _thresholds(sources: _Sources, settings: MergeSettings, update: Callable[[int], Any]) -> Thresholds:
    """What TIES has to know of all tensors, by three passes; nothing for other rules."""
    group, names = sources.group, sources.counted
    found = Thresholds(len(group) - 1)
    if settings.rule != "ties":
        return found
    count = sum(math.prod(group[0][name].shape) for name in names)
    rank = ties.rank_of_threshold(count, settings.keep)
    for look in (found.count_high, found.count_low, found.count_signs):
        for name in names:
            for where, (start, *ends) in _pieces([tensors[name] for tensors in group]):
                length = where.stop - where.start
                taus = np.asarray(_differences(start, ends))[:, :length]
                _check_finite(np.isfinite(taus).all(axis=1), sources.labels[1:], name)
                look(taus)
                update(length)
        found.narrow(rank)
    return found


@jax.jit
def _differences(start: jax.Array, ends: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack([end.astype(core.wide(start)) - start.astype(core.wide(start)) for end in ends]).astype(np.float32)


def _norms(sources: _Sources) -> np.ndarray:
    """The norm of each Fisher information over all parameters."""

    def square(tensor: StoredTensor) -> float:
        flat = np.asarray(tensor.read()).reshape(-1)
        return sum(float(np.sum(flat[i : i + PIECE].astype(np.float64) ** 2)) for i in range(0, flat.size, PIECE))

    return np.sqrt([sum(square(tensors[name]) for name in sources.counted) for tensors in sources.fishers])


def _rule(settings: MergeSettings, found: Thresholds, norms: np.ndarray) -> Callable:
    """The rule as a jitted function of pieces of all models and of Fisher information, after those of a base."""
    rule, combine = settings.rule, settings.combine
    if rule == "fisher":
        shares = statistics.fisher_shares(jnp.asarray(norms, jnp.float32), normalize=settings.normalize)
        return functools.partial(_piece, _by_fisher, shares)
    if rule == "average":
        return functools.partial(_piece, _by_mean, ())
    lam = jnp.asarray(settings.lam, jnp.float32)
    if rule == "task-arithmetic":
        return functools.partial(_piece, _by_sum, lam)
    lows, majority = jnp.asarray(found.values, jnp.float32), jnp.asarray(found.majority, jnp.int32)
    return functools.partial(_piece, _by_ties[combine], (lam[0], lows, majority))


@functools.partial(jax.jit, static_argnums=0)
def _piece(combine, constants, start, ends, fishers):
    """Merged entries, inner products of task vectors, the square of the base, opposite signs, and what is finite."""
    dtype = core.wide(start)
    merged = combine(constants, start.astype(dtype), [end.astype(dtype) for end in ends], fishers)
    finite = [jnp.all(jnp.isfinite(x)) for x in (start, *ends)]
    taus = jnp.stack([(end.astype(dtype) - start.astype(dtype)).astype(np.float32) for end in ends])
    products = jnp.einsum("in,jn->ij", taus, taus, precision=jax.lax.Precision.HIGHEST)
    opposite = jnp.sum(jnp.any(taus > 0, axis=0) & jnp.any(taus < 0, axis=0), dtype=jnp.int32)
    square = jnp.sum(jnp.square(start.astype(np.float32)))
    return merged.astype(start.dtype), products, square, opposite, jnp.stack(finite)


def _by_mean(constants, start, ends, fishers):
    return core.mean_of(ends)


def _by_sum(lam, start, ends, fishers):
    return start + core.weighted_sum([end - start for end in ends], lam)


def _by_fisher(shares, start, ends, fishers):
    return statistics.fisher_mean(ends, fishers, shares)


def _by_signs(combine, constants, start, ends, fishers):
    lam, lows, majority = constants
    # In float32, in which the thresholds were found.
    taus = [(end - start).astype(np.float32) for end in ends]
    kept = [ties.trim(tau, lows[t]) for t, tau in enumerate(taus)]
    return start + (lam * ties.combined(kept, majority, combine)).astype(start.dtype)


_by_ties = {name: functools.partial(_by_signs, name) for name in get_args(ties.Combine)}


def _merged(
    sources: _Sources, name: str, rule: Callable, update: Callable[[int], Any]
) -> tuple[np.ndarray, TensorReport]:
    """A merged tensor and its report."""
    first, count = sources.first[name], len(sources.group) - sources.base
    made = np.empty(math.prod(first.shape), first.dtype)
    products, square, opposite = np.zeros((count, count)), 0.0, 0
    for where, read in _pieces([tensors[name] for tensors in (*sources.group, *sources.fishers)]):
        ends, fishers = read[sources.base : sources.base + count], read[sources.base + count :]
        merged, *found, finite = rule(read[0], ends, fishers)
        _check_finite(np.asarray(finite)[1 - sources.base :], sources.labels, name)
        made[where] = np.asarray(merged)[: where.stop - where.start]
        products += np.asarray(found[0], np.float64)
        square, opposite = square + float(found[1]), opposite + int(found[2])
        update(where.stop - where.start)
    report = TensorReport(tuple(first.shape), square**0.5, products, opposite / made.size)
    return made.reshape(first.shape), report


def _check_finite(finite: np.ndarray, labels: Sequence[str], name: str) -> None:
    """Raises ValueError where a tensor holds what is no number."""
    if not finite.all():
        raise ValueError(f"{labels[int(np.argmin(finite))]}: {name}: expected finite numbers, got others")
