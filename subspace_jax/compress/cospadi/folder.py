"""A folder of a language model compressed, unit by unit; a run that was stopped goes on at the unit that it was at."""

import concurrent.futures
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from subspace_jax import data, interop, train
from subspace_jax.adapters.structured import as_dense, is_structured
from subspace_jax.compress.cospadi.kernels import Compressed, Learning, compress_kernels
from subspace_jax.compress.cospadi.plan import Unit, kernel_shape, plan_units
from subspace_jax.train.kernel_grams import gram_groups, grams_of_model
from subspace_jax.train.lock import locked

PyTree = Any


class CompressSettings(NamedTuple):
    """What is done to a model.

    Attributes:
      method: One of :data:`METHODS`.
      ratio: Share of the storage of each kernel that is removed.
      rules: Other ratios by regular expression, see :func:`plan_units`.
      share: Consecutive layers that share a dictionary or basis.
      learning: How CoSpaDi learns.
      batch_size: Rows of a batch of calibration text.
    """

    method: str = "cospadi"
    ratio: float = 0.2
    rules: Mapping[str, float] = {}
    share: int = 1
    learning: Learning = Learning()
    batch_size: int = 8


class CompressReport(NamedTuple):
    """What was written.

    Attributes:
      errors: Relative output error on the calibration text, by path of the kernel, ``[layers]`` each.
      dense_bytes: Bytes of the compressed kernels as bfloat16 before.
      kernel_bytes: Their bytes now.
      total_bytes: Bytes of all weights of the folder.
    """

    errors: dict[str, list[float]]
    dense_bytes: int
    kernel_bytes: int
    total_bytes: int


def compress_folder(
    model: str | os.PathLike,
    out: str | os.PathLike,
    rows: Mapping[str, np.ndarray],
    settings: CompressSettings,
    *,
    dense: bool = False,
    progress: bool = True,
) -> CompressReport:
    """Compresses the kernels of a model's layers by the text that it is calibrated on, and writes a folder.

    Gram matrices are of the original model, of as many layers at a time as 2 GiB hold; the calibration text is read
    once for each such group.  Each unit is a file in ``out/unfinished`` until all are there.

    Args:
      model: Hugging Face folder, or GGUF file.
      out: New or empty folder, or one whose ``unfinished`` is of the same settings and is taken up.
      rows: Rows of :func:`subspace_jax.data.text.pack_rows`, for calibration.
      settings: What is done.
      dense: Whether to write a Hugging Face folder with dense kernels instead of the compressed ones.
      progress: Whether there are progress bars.

    Raises:
      ValueError: The model is compressed already, a setting is wrong, the text is shorter than a batch, or the
        unfinished folder is of other settings.
      FileNotFoundError: The model is not there.
      FileExistsError: ``out`` holds something else.
    """
    out = Path(out)
    if interop.is_compressed(model):
        raise ValueError(f"{model}: is compressed already; expected a Hugging Face folder or a GGUF file")
    config = interop.read_config(model)
    units = plan_units(config, settings.method, settings.ratio, settings.rules, settings.share)
    if len(rows["inputs"]) < settings.batch_size:
        raise ValueError(
            f"rows: expected a batch of calibration text, {settings.batch_size} rows, got {len(rows['inputs'])}"
        )
    if out.is_dir() and not (out / "unfinished").exists() and any(file.name != "run.lock" for file in out.iterdir()):
        raise FileExistsError(f"{out}: exists and is not empty")
    mesh = train.make_mesh()
    train.check_batch_size(settings.batch_size, mesh, name="batch_size")
    record = {
        "model": str(Path(model).resolve()),
        "text": hashlib.sha256(np.ascontiguousarray(rows["inputs"])).hexdigest(),
        **_as_json(settings),
    }
    with locked(train.writable_folder(out)):
        work = _unfinished(out, record)
        _, params = interop.load_causal_lm(
            model, shardings=lambda shapes, axes: train.param_shardings(shapes, axes, mesh)
        )
        left = [unit for unit in units if not (work / f"{unit.name}.npz").exists()]
        with tqdm(
            total=len(units),
            initial=len(units) - len(left),
            desc=settings.method,
            unit="kernel",
            disable=None if progress else True,
        ) as bar:
            for group in gram_groups(left, lambda unit: unit.inputs, lambda unit: kernel_shape(config, unit.path)[0]):
                batches = data.eval_batches(rows, batch_size=settings.batch_size)
                names = list(dict.fromkeys(name for unit in group for name in unit.inputs))
                total = -(-len(rows["inputs"]) // settings.batch_size)
                sums = grams_of_model(config, params, names, batches, mesh, total=total, progress=progress)
                _compress_group(group, params, sums, settings, work, bar)
        report = _assemble(out, model, (config, params), units, settings, dense)
        shutil.rmtree(work)
    return report


def _compress_group(group: Sequence[Unit], params: PyTree, sums: Mapping, settings: CompressSettings, work: Path, bar):
    """Compresses units and writes their files; the host factors the matrices of one while the device codes another."""

    def one(unit: Unit) -> None:
        ws = [_kernel(params, unit.path, layer) for layer in unit.layers]
        found = compress_kernels(
            ws, [sums[name] for name in unit.inputs], unit.ratio, settings.method, settings.learning
        )
        _save_unit(work / f"{unit.name}.npz", found)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        running = [pool.submit(one, unit) for unit in group]
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _kernel(params: PyTree, path: str, layer: int) -> np.ndarray:
    tree = params["layers"]
    for key in (*path.split("/"), "kernel"):
        tree = tree[key]
    return np.asarray(tree[layer], np.float32)


def _as_json(settings: CompressSettings) -> dict[str, Any]:
    return {**settings._asdict(), "rules": dict(settings.rules), "learning": settings.learning._asdict()}


def _unfinished(out: Path, record: Mapping[str, Any]) -> Path:
    """Returns the folder of finished units, of this run or of an earlier one with the same settings."""
    work, told = out / "unfinished", json.dumps(record, indent=2, sort_keys=True)
    file = work / "settings.json"
    if file.exists():
        if file.read_text() != told:
            raise ValueError(f"{out}: an unfinished run of other settings, see {file}; the same ones resume it")
        return work
    work.mkdir(exist_ok=True)
    with train.replacing(file) as partial:
        partial.write_text(told)
    return work


def _save_unit(file: Path, found: Compressed) -> None:
    arrays = {"errors": np.array(found.errors)}
    for i, kernel in enumerate(found.kernels):
        arrays |= {f"kind{i}": np.array(kernel.kind), f"second{i}": kernel.second.view(np.int16)}
        if i == 0 or not _same(kernel.first, found.kernels[0].first):
            arrays[f"first{i}"] = kernel.first.view(np.int16)
    with train.replacing(file) as partial:
        np.savez(partial, **arrays)


def _same(x: np.ndarray, y: np.ndarray) -> bool:
    return x.shape == y.shape and bool((x.view(np.int16) == y.view(np.int16)).all())


def _load_unit(file: Path, modules: Sequence[str]) -> Compressed:
    bf16, kernels = jax.numpy.bfloat16, []
    with np.load(file) as arrays:
        for i in range(len(modules)):
            kind, second = str(arrays[f"kind{i}"]), arrays[f"second{i}"]
            shared = f"first{i}" not in arrays
            first = kernels[0].first if shared else arrays[f"first{i}"].view(bf16)
            second = second if kind == "sparse" else second.view(bf16)
            kernels.append(interop.CompressedKernel(kind, first, second, modules[0] if shared else ""))
        return Compressed(kernels, arrays["errors"].tolist())


def _assemble(out: Path, model, loaded: tuple, units, settings: CompressSettings, dense: bool) -> CompressReport:
    """Writes the folder from the files of its units."""
    (config, params), work = loaded, out / "unfinished"
    kernels, errors, before, after = {}, {}, 0, 0
    for unit in units:
        modules = [interop.kernel_place(config, layer, unit.path) for layer in unit.layers]
        found = _load_unit(work / f"{unit.name}.npz", modules)
        kernels |= dict(zip(modules, found.kernels, strict=True))
        errors.setdefault(unit.path, []).extend(found.errors)
        before += 2 * math.prod(kernel_shape(config, unit.path)) * len(modules)
        after += sum(x.second.nbytes + (0 if x.shared_with else x.first.nbytes) for x in found.kernels)
    about = {name: value for name, value in _as_json(settings).items() if name != "batch_size"}
    made, beside = work / "compressed", interop.side_files(model)
    total = interop.save_compressed(made, config, params, kernels, about, side_files=beside)
    if dense:
        _, full = interop.load_causal_lm(made)
        made, full = work / "dense", jax.tree.map(as_dense, full, is_leaf=is_structured)
        interop.save_causal_lm(made, config, full, overwrite=True, side_files=beside)
        total = sum(file.stat().st_size for file in made.glob("*.safetensors"))
    for file in sorted(made.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(out / file.name)
    return CompressReport(errors, before, after, total)
