"""Hugging Face folders, merged piece by piece from memory-mapped files."""

import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import interop
from subspace_jax.interop.safetensors_io import StoredTensor, check_same_tensors
from subspace_jax.interop.writing import is_checkpoint_file, replacing, weights_writer
from subspace_jax.merge.subspace_fusion import core, statistics, ties
from subspace_jax.merge.subspace_fusion.report import MergeReport, TensorReport, as_json
from subspace_jax.merge.subspace_fusion.settings import MergeSettings, checked
from subspace_jax.merge.subspace_fusion.thresholds import Thresholds
from subspace_jax.train.progress import progress_bar

Tensors = Mapping[str, StoredTensor]
REPORT = "merge.json"
PIECE = 2**22  # entries that are merged at a time
_HEAD = "lm_head.weight"
_OF_THE_MODEL = ("config.json", "preprocessor_config.json")


class KernelGrams(NamedTuple):
    """Gram matrices of the inputs of the kernels of several models.

    Attributes:
      folders: For each model a folder with ``X^T X / n [in, in]`` under the name of each kernel.
      outputs_first: Whether kernels are stored ``[out, in]``, as PyTorch does, and not ``[in, out]``.
    """

    folders: tuple[str | os.PathLike, ...] = ()
    outputs_first: bool = True


def check_folders(
    models: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    settings: MergeSettings,
    *,
    base: str | os.PathLike | None = None,
) -> None:
    """Raises what :func:`merge_folders` would of settings and folders, from the headers of their files alone."""
    checked(settings, len(models), base=bool(base))
    _opened(models, base, (), KernelGrams(), _absolute(out))


def merge_folders(
    models: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    settings: MergeSettings,
    *,
    base: str | os.PathLike | None = None,
    fishers: Sequence[str | os.PathLike] = (),
    grams: KernelGrams | None = None,
    progress: bool = False,
) -> MergeReport:
    """Merges the models of folders into a folder.

    Each rule is one of entries, so that memory holds some million entries of each model and the tensor that is written;
    "regmean" also holds a kernel and its Gram matrix of each model.
    TIES has its exact thresholds from two counts of all magnitudes before, and the sign of most entries from a third
    pass.  An output embedding that is stored beside an equal input embedding counts once.

    Args:
      models: Hugging Face folders with tensors of the same names and shapes.
      out: New or empty folder for the model, in the dtypes of the base or else of the first model, whose config and
        tokenizer it has, and for ``merge.json``.
      settings: The settings.
      base: Folder of the model that all were fine-tuned from; needed for task arithmetic and TIES.
      fishers: For the rule "fisher", folders with the Fisher information of each model under the same names.
      grams: For the rule "regmean"; tensors that have none are averaged.
      progress: Whether to show a progress bar.

    Returns:
      The report.

    Raises:
      ValueError: A setting can't serve, the folders have other tensors or shapes, numbers are not finite, or ``out``
        would replace what is read; or a sum of Gram matrices is singular.
      OSError: ``out`` is not empty, or a file can't be read or written.
    """
    settings = checked(settings, len(models), base=bool(base))
    grams = KernelGrams() if grams is None else grams
    for name, rule, found in (("fishers", "fisher", fishers), ("grams", "regmean", grams.folders)):
        if len(found) != (len(models) if settings.rule == rule else 0):
            raise ValueError(f"{name}: expected one for each of {len(models)} models, for the rule {rule} alone")
    sources = _opened(models, base, fishers, grams, _absolute(out))
    rounds = 4 if settings.rule == "ties" else 1
    total = rounds * sum(math.prod(sources.first[name].shape) for name in sources.counted)
    with contextlib.closing(progress_bar(total, 0, show=progress)) as bar:
        found = _thresholds(sources, settings, bar.update)
        rule = _rule(settings, found, _norms(sources))
        with replacing(sources.out, is_checkpoint_file) as new:
            reports = _write(new, sources, settings, rule, bar.update)
            report = MergeReport(settings, tuple(map(str, models)), reports if base else {}, found.values, sources.out)
            (new / REPORT).write_text(json.dumps(as_json(report), indent=2) + "\n")
    return report


class _Sources(NamedTuple):
    """What is read.

    Attributes:
      folder: The folder whose config, tokenizer and dtypes the merged model has.
      first: Its tensors.
      group: Tensors of the base, where there is one, and of the models.
      labels: Argument and folder of each, for messages.
      fishers: Tensors of Fisher information.
      grams: Gram matrices by the name of the kernel.
      gram_labels: Their folders, for messages.
      outputs_first: See :class:`KernelGrams`.
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
    grams: list[Tensors]
    gram_labels: list[str]
    outputs_first: bool
    counted: list[str]
    copied: dict[str, str]
    out: pathlib.Path
    base: bool


def _absolute(out: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(out).expanduser().absolute()


def _opened(
    models: Sequence[Any], base: Any, fishers: Sequence[Any], grams: KernelGrams, out: pathlib.Path
) -> _Sources:
    """Opens all folders, which have to have the same tensors and not to be replaced."""
    named = {"--base": [base] if base else [], "--models": models, "fishers": fishers}
    folders = {flag: [pathlib.Path(folder).expanduser() for folder in found] for flag, found in named.items()}
    for folder in (*folders["--base"], *folders["--models"]):
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder}: is an adapter; merge it into its model by `subspace-jax merge` first, or adapters alone by "
                "`subspace-jax merge-adapters`"
            )
    stored = {flag: [interop.open_folder(folder) for folder in found] for flag, found in folders.items()}
    flag = "--base" if base else "--models"
    source, first = folders[flag][0], stored[flag][0]
    for flag, found in stored.items():
        for folder, tensors in zip(folders[flag], found, strict=True):
            if flag != "fishers":
                check_same_tensors(flag, folder, tensors, source, first)
            if out.resolve() == folder.resolve():
                raise ValueError(f"--out: expected another folder than that of {flag}, got {folder}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not {'empty' if out.is_dir() else 'a folder'}")
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
        grams=_grams_of(grams, counted),
        gram_labels=[f"grams: {folder}" for folder in grams.folders],
        outputs_first=grams.outputs_first,
        counted=list(counted),
        copied=copied,
        out=out,
        base=bool(base),
    )


def _grams_of(grams: KernelGrams, counted: Tensors) -> list[Tensors]:
    """Opens the Gram matrices of all models, which have to be those of the same kernels."""
    stored = [interop.open_folder(folder) for folder in grams.folders]
    for folder, found in zip(grams.folders, stored, strict=True):
        for name, gram in found.items():
            shape = counted[name].shape if name in counted else ()
            if len(shape) != 2 or gram.shape != (shape[grams.outputs_first],) * 2:
                raise ValueError(
                    f"grams: {folder}: {name}: expected [in, in] of a kernel, got {gram.shape} for {shape}"
                )
        check_same_tensors("grams", folder, found, grams.folders[0], stored[0])
    return stored


def _write(
    new: pathlib.Path, sources: _Sources, settings: MergeSettings, rule: Callable, update: Callable[[int], Any]
) -> dict[str, TensorReport]:
    """Writes the model to a new folder, and returns the reports of its tensors."""
    first, owners, reports = sources.first, sources.copied, {}
    files = {name: sources.folder / name for name in _OF_THE_MODEL if (sources.folder / name).is_file()}
    interop.write_side_files(new, {**files, **interop.side_files(sources.folder)})
    with weights_writer(new, {name: (tensor.shape, tensor.dtype) for name, tensor in first.items()}) as put:
        for name in sources.counted:
            merged, reports[name] = _merged(sources, name, rule, update)
            if sources.grams and name in sources.grams[0]:
                merged = _regressed(sources, settings, name)
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
    if rule in ("average", "regmean"):
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


def _regressed(sources: _Sources, settings: MergeSettings, name: str) -> np.ndarray:
    """A kernel by RegMean."""
    kernels = [jnp.asarray(tensors[name].read()) for tensors in sources.group[sources.base :]]
    kernels = [x.astype(core.wide(x)).T if sources.outputs_first else x.astype(core.wide(x)) for x in kernels]
    one = np.ones((), kernels[0].dtype)
    stats = [statistics.GramStats(jnp.asarray(own[name].read()).astype(one.dtype), one) for own in sources.grams]
    _check_finite(np.array([np.isfinite(found.total).all() for found in stats]), sources.gram_labels, name)
    grams = [found.gram(settings.alpha) for found in stats]
    made = np.asarray(statistics.regmean_kernel(kernels, grams, damping=settings.damping, name=name))
    return (made.T if sources.outputs_first else made).astype(sources.first[name].dtype)
