"""Adapters on disk, of PEFT and of runs, merged into one folder that PEFT reads."""

import functools
import json
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from subspace_jax import adapters, interop, nn, train
from subspace_jax.adapters.api import bases_of, settings_of
from subspace_jax.adapters.rules import adapters_of
from subspace_jax.interop.peft.config import CONFIG, read_fields
from subspace_jax.merge.adapter_report import REPORT, AdapterReport, as_json, draw
from subspace_jax.merge.adapters import Adapter, AdapterMerge, check_merge, merge_adapters, reads_weights
from subspace_jax.train.progress import progress_bar

PyTree = Any
log = logging.getLogger(__name__)

_TABLE = "embed/embedding"


class _Source(NamedTuple):
    """An adapter on disk.

    Attributes:
      name: The folder as it was given.
      base: Name or folder of its model; "" where it says nothing.
      peft: Its PEFT folder, None for a run whose adapter PEFT has no counterpart of.
      adapter: The adapter of such a run.
    """

    name: str
    base: str
    peft: pathlib.Path | None
    adapter: Adapter | None = None


def merge_adapter_folders(
    sources: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    weights: Sequence[float] | None = None,
    how: AdapterMerge | None = None,
    *,
    base: str | os.PathLike | None = None,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> AdapterReport:
    """Merges adapters of one language model into a folder that PEFT reads, see :func:`merge_adapters`.

    Memory holds the adapters in float32 and, where one is DoRA or comes from a run without a PEFT folder, the model.

    Args:
      sources: PEFT folders, LoRA or DoRA; and folders of runs: of SVFit or FLoRA, for example, whose latest checkpoint
        is read.
      out: Folder to write, new or empty: the adapter, the files of the model's tokenizer, ``merge_report.json`` and
        ``merge_report.png``.
      weights: A number for each; ``1 / len(sources)`` by default, the average.
      how: See :func:`merge_adapters`.
      base: Hugging Face folder or GGUF file of the model; by default the one that the adapters name, if it is there.
      progress: Whether to show a progress bar.
      trust_remote_code: See :func:`subspace_jax.train.restore`.

    Returns:
      The report.

    Raises:
      ValueError: The adapters name different models and ``base`` none, an adapter can't be read or does not fit the
        model, or :func:`merge_adapters` would raise.
      FileNotFoundError: A folder is not there, or holds no adapter.
      FileExistsError: ``out`` is there and not empty.
      OSError: Writing failed.
    """
    out, how = pathlib.Path(out).expanduser(), AdapterMerge() if how is None else how
    weights = [1 / max(len(sources), 1)] * len(sources) if weights is None else list(weights)
    check_merge(how, len(sources), weights)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not empty")
    found = [_source(source, trust_remote_code) for source in sources]
    folder = _base_of(found, base)
    config, own = _adapters(found, folder)
    params = _params(config, folder, own)
    shapes = bases_of(nn.param_shapes(config))
    paths = {path for one in own for path in adapters_of(one.trainable)}
    matrices = sum(shapes[path].shape[0] if path.startswith("layers/") else 1 for path in paths)
    with progress_bar(matrices, 0, show=progress) as bar:
        merged = merge_adapters(params, own, weights, how, progress=bar.update)
    interop.save_peft_adapter(out, config, merged.trainable, merged.settings, base_model=folder)
    interop.write_side_files(out, interop.side_files(folder, adapter=True))
    report = AdapterReport(tuple(source.name for source in found), tuple(weights), how, folder, merged)
    with train.replacing(out / REPORT) as partial:
        partial.write_text(json.dumps(as_json(report), indent=2) + "\n")
    draw(report, out)
    return report


def _source(source: str | os.PathLike, trust_remote_code: bool) -> _Source:
    folder = pathlib.Path(source).expanduser()
    for peft in (folder, folder / "adapter"):
        if (peft / CONFIG).is_file():
            return _Source(str(source), read_fields(peft).get("base_model_name_or_path") or "", peft)
    if not (folder / "checkpoints").is_dir():
        raise FileNotFoundError(f"{source}: expected the folder of a PEFT adapter or of a run, found no {CONFIG}")
    run, phase, state, _ = train.restore(folder, trust_remote_code=trust_remote_code)
    task = getattr(phase.task, "task", phase.task)  # within that of a run with a second objective
    if not getattr(task, "settings", None):
        raise ValueError(f"{source}: a run without adapters")
    own, variables = adapters.drop_gradient_probes(state.params), state.variables
    frozen = {}
    for path, config in settings_of(own, task.settings).items():
        if not config.keeps_base and not config.changes_base:
            parts = functools.reduce(lambda tree, part: tree[part], path.split("/"), variables["start"])
            frozen[path] = config.attach_start(None, parts)
    return _Source(str(source), run.config.model.folder, None, Adapter(own, task.settings, frozen, str(source)))


def _base_of(sources: Sequence[_Source], base: str | os.PathLike | None) -> str:
    """The folder of the model."""
    named = {source.name: source.base for source in sources if source.base}
    known = {os.path.abspath(name) if os.path.exists(name) else name for name in named.values()}
    told = ", ".join(f"{name}: {own}" for name, own in named.items())
    if base is not None:
        if len(known) > 1:
            log.warning("The adapters name different models, and are taken to be of %s: %s", base, told)
        return str(base)
    if len(known) > 1:
        raise ValueError(f"--adapters: expected those of one model, which --base may name; they name {told}")
    if not known or not os.path.exists(name := next(iter(named.values()))):
        raise ValueError(f"--base: expected the folder of the model, as the adapters name none that is here ({told})")
    return name


def _adapters(sources: Sequence[_Source], base: str) -> tuple[nn.CausalLMConfig, list[Adapter]]:
    """Reads the adapters; the model is untied where PEFT unties it for one of them."""
    config = interop.read_config(base)
    found = [source.peft and interop.load_peft_adapter(source.peft, config, untie=True) for source in sources]
    if config.tied and any(own and not own.config.tied for own in found):
        config = config.replace(tied=False)
        found = [source.peft and interop.load_peft_adapter(source.peft, config) for source in sources]
    each = [
        source.adapter if own is None else Adapter(own.trainable, own.settings, None, source.name)
        for source, own in zip(sources, found, strict=True)
    ]
    if config.tied and (tied := [own.name for own in each if _TABLE in adapters_of(own.trainable)]):
        raise ValueError(f"{tied}: adapt the embedding of a tied model, which PEFT can't hold; merge them into models")
    return config, each


def _params(config: nn.CausalLMConfig, base: str, own: Sequence[Adapter]) -> PyTree:
    """The weights of the model where an adapter scales them, otherwise their shapes."""
    shapes = nn.param_shapes(config)
    if not reads_weights(shapes, own):
        return shapes
    mesh = train.make_mesh(data=1, fsdp=jax.device_count())
    stored, params = interop.load_causal_lm(base, shardings=lambda s, axes: train.param_shardings(s, axes, mesh))
    return params if config.tied == stored.tied else nn.untie_causal_lm(stored, params)[1]
