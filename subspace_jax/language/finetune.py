"""Runs that train a causal language model, as configs describe them."""

import functools
import logging
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from subspace_jax import adapters, data, interop, nn, train
from subspace_jax.adapters.structured import is_structured
from subspace_jax.data import text
from subspace_jax.language.adapted import AdaptedLMTask, default_targets
from subspace_jax.language.causal_lm import CausalLMTask
from subspace_jax.language.decoupled import DecoupledLMTask, decoupled, domains_of
from subspace_jax.language.texts import texts_of
from subspace_jax.train.fields import check_choice, nearest
from subspace_jax.train.optimizer import uses_probes

log = logging.getLogger(__name__)

PyTree = Any

DTYPES = ("float32", "bfloat16", "float16")
REMATS = ("none", "dots", "full")
SIZES = {
    "tiny": nn.CausalLMConfig.tiny,
    "gpt2": nn.CausalLMConfig.gpt2,
    "gpt2-medium": functools.partial(nn.CausalLMConfig.gpt2, hidden_size=1024, num_layers=24, num_heads=16),
    "llama3-8b": functools.partial(nn.CausalLMConfig.llama3, "8b"),
    "llama3-70b": functools.partial(nn.CausalLMConfig.llama3, "70b"),
    "mistral-7b": functools.partial(nn.CausalLMConfig.mistral, "7b"),
    "qwen2-7b": functools.partial(nn.CausalLMConfig.qwen2, "7b"),
    "qwen3-8b": functools.partial(nn.CausalLMConfig.qwen3, "8b"),
    "gemma2-9b": functools.partial(nn.CausalLMConfig.gemma2, "9b"),
    "gemma3-1b": functools.partial(nn.CausalLMConfig.gemma3, "1b"),
}


def default_config() -> ConfigDict:
    """Returns the fields of a run.

    ``model.folder`` is a Hugging Face folder or a GGUF file to start from; without one, ``model.size`` names an
    architecture that starts from random numbers.  ``model.stacked`` false keeps layers apart, which is faster on a CPU
    and takes longer to compile.  ``model.tokenizer`` is "bytes", a file or a folder; empty, it is that of
    ``model.folder``, or bytes.
    ``data.source`` is "docstrings", "summaries" or "dialects" (what is installed here, see
    :func:`subspace_jax.data.text.docstrings`, :func:`subspace_jax.data.text.function_summaries` and
    :func:`subspace_jax.data.text.dialects`), a ``.jsonl``,
    ``.parquet`` or text file, or a TFDS set; see :func:`subspace_jax.language.texts_of` for the other fields of
    ``data`` that say what its texts are.  ``data.eval_rows`` of the packed rows for evaluation are taken, evenly
    spaced; 0 takes all.
    ``adapter`` is of :func:`subspace_jax.train.default_adapter`; where it is empty, all parameters train.  With
    ``optim.name`` "adaprelora" and ``optim.kwargs.stats`` "full" a step also finds the energies of the whole weights'
    gradients, see :func:`subspace_jax.adapters.add_gradient_probes`; over micro-batches they are averaged.
    ``decoupling`` is of :func:`subspace_jax.train.default_decoupling`: with a ``target``, hidden states are decoupled
    from it (arXiv 2508.12803), and every row has a field ``domain``.  ``decoupling.layers`` are those of
    :class:`DecoupledLMTask`.
    """
    config = train.default_config()
    config.task = "subspace_jax.language.finetune"
    config.data = ConfigDict(
        {
            "source": "docstrings",
            "evaluation": "",
            "holdout": 0.0,
            "holdout_seed": 0,
            "data_dir": "",
            "train_split": "train",
            "eval_split": "validation",
            "prompt": "",
            "completion": "",
            "chat_template": "",
            "date": "2026-01-01",
            "length": 256,
            "truncation": "split",
            "batch_size": 16,
            "eval_batch_size": 16,
            "eval_rows": 0,
        }
    )
    config.model = ConfigDict(
        {
            "folder": "",
            "size": "tiny",
            "tokenizer": "",
            "dtype": "float32",
            "remat": "none",
            "stacked": True,
            "loss_chunk": 0,
        }
    )
    config.adapter = train.default_adapter()
    config.decoupling = train.default_decoupling()
    config.decoupling.layers = (-1,)
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Makes the run of a config, as :func:`subspace_jax.train.build` asks for it.

    Raises:
      ValueError: A name is unknown, sizes don't fit together, or a file is malformed (file and line are named).
      FileNotFoundError: A file or set is not there.
    """
    model, tokenizer = _sized_model(config)
    sizes = config.data
    texts = [texts_of(config, split, tokenizer) for split in ("train", "eval")]
    domains = domains_of(texts[0]) if config.decoupling.target else ()
    task = inner = _task(config, model, config.model.folder or None)
    if domains:
        task = decoupled(inner, config, domains)
    packing = {"truncation": sizes.truncation, "domains": domains}
    rows = [text.pack_rows(examples, tokenizer, sizes.length, **packing) for examples in texts]
    rows[1] = _evenly_spaced(rows[1], sizes.eval_rows)
    batches = functools.partial(data.train_batches, rows[0], batch_size=sizes.batch_size)
    batches(seed=config.seed)  # what is wrong with batch size or seed shows now
    examples = train.DataSpec(
        batch=train.batch_shapes(rows[0], sizes.batch_size),
        train=lambda seed: batches(seed=seed),
        evaluate={"eval": data.eval_passes(rows[1], sizes.eval_batch_size)},
        steps_per_epoch=data.steps_per_epoch(len(rows[0]["inputs"]), sizes.batch_size),
    )
    about = ""
    if isinstance(inner, AdaptedLMTask):
        shapes = adapters.drop_gradient_probes(inner.shapes)
        table = adapters.describe(nn.param_shapes(model), shapes, inner.settings)
        about = f"  adapters\n{textwrap.indent(table, '    ')}"
    return train.Run((train.Phase("train", task, examples),), about=about)


def _evenly_spaced(rows: dict[str, np.ndarray], wanted: int) -> dict[str, np.ndarray]:
    if wanted < 0:
        raise ValueError(f"data.eval_rows: expected at least 0, got {wanted}")
    count = len(rows["inputs"])
    if wanted in range(1, count):
        return {name: column[np.arange(wanted) * count // wanted] for name, column in rows.items()}
    return rows


def outline(config: ConfigDict) -> train.Run:
    """Returns the run of a config without its texts, for :func:`subspace_jax.planning.plan_run`.

    Args:
      config: As for :func:`build`; of a folder only its config and tokenizer are read.

    Raises:
      ValueError: A name is unknown, or sizes don't fit together.
      FileNotFoundError: A folder is not there.
    """
    model, _ = _sized_model(config)
    shape = (config.data.batch_size, config.data.length)
    names = ("inputs", "labels", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    # Adapters are planned for a frozen model that comes from a folder, also where none is named yet.
    task = _task(config, model, config.model.folder or (config.adapter.method and "unread") or None)
    if target := config.decoupling.target:
        # The names of the others are in the texts; their number hardly counts.
        task = decoupled(task, config, (target, f"not {target}"))
        batch["domains"] = jax.ShapeDtypeStruct(shape, jnp.int32)
    return train.Run((train.Phase("train", task, train.outlined(batch, config.data.eval_batch_size)),))


def _sized_model(config: ConfigDict) -> tuple[nn.CausalLMConfig, text.Tokenizer]:
    """The model and its tokenizer, once the length of a sequence is checked."""
    model, tokenizer = model_of(config)
    length, shards = config.data.length, config.mesh.sequence
    if not 1 <= length <= model.max_length:
        raise ValueError(f"data.length: {length} positions in a sequence, the model has {model.max_length}")
    if shards > 0 and length % shards:
        raise ValueError(f"data.length: {length} positions don't divide among mesh.sequence={shards}")
    return model, tokenizer


def _task(config: ConfigDict, model: nn.CausalLMConfig, folder: str | None) -> CausalLMTask | AdaptedLMTask:
    fields = config.model
    if fields.loss_chunk < 0:
        raise ValueError(f"model.loss_chunk: expected at least 0, got {fields.loss_chunk}")
    check_choice("model.dtype", fields.dtype, DTYPES)
    check_choice("model.remat", fields.remat, REMATS)
    options = {"dtype": fields.dtype, "remat": fields.remat, "loss_chunk": fields.loss_chunk}
    options["folder"] = folder
    settings = _settings(config, model)
    if not settings and folder and interop.is_compressed(folder):
        raise ValueError(f"adapter.method: expected adapters, as {folder} is compressed and its kernels don't train")
    if not settings:
        return CausalLMTask(model, stacked=fields.stacked, **options)
    if not fields.stacked:
        raise ValueError(
            f"model.stacked: false is for a model that trains all parameters, got adapter.method "
            f"{config.adapter.method!r}"
        )
    options |= {"base_dtype": config.adapter.base_dtype, "seed": config.seed}
    options["probes"] = uses_probes(config.optim)
    return AdaptedLMTask(model, settings, **options)


def _settings(config: ConfigDict, model: nn.CausalLMConfig) -> dict[str, Any]:
    return train.adapter_settings(config.adapter, default_targets(config.adapter.method, model), model)


def model_of(config: ConfigDict) -> tuple[nn.CausalLMConfig, text.Tokenizer]:
    """Returns the model that a config asks for, and its tokenizer.

    Raises:
      ValueError: The size is unknown, or the tokenizer has tokens that the model has no row for.
      FileNotFoundError: The folder or the tokenizer is not there.
    """
    folder, size = config.model.folder, config.model.size
    where = config.model.tokenizer or folder or "bytes"
    if folder:
        model = interop.read_config(folder)  # before the tokenizer, for it may be no model at all
        tokenizer = _tokenizer(where)
    elif size in SIZES:
        tokenizer = _tokenizer(where)
        ends = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        tokens = {"bos_token": tokenizer.bos_id, "eos_tokens": ends, "pad_token": tokenizer.pad_id}
        # An architecture keeps its own number of rows; the smallest one is made to measure.
        model = SIZES[size](**({"vocab_size": tokenizer.vocab_size} if size == "tiny" else {}), **tokens)
    else:
        raise ValueError(f"model.size: expected one of {sorted(SIZES)}, got {size!r}{nearest(size, SIZES)}")
    text.check_vocabulary(tokenizer, model.vocab_size)
    return model, tokenizer


def _tokenizer(where: str) -> text.Tokenizer:
    return interop.gguf.tokenizer(where) if interop.gguf.is_gguf(where) else text.load_tokenizer(where)


def export(
    workdir: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    merged: bool = False,
    step: int | Literal["best"] | None = None,
    overwrite: bool = True,
    trust_remote_code: bool = False,
) -> int:
    """Writes a checkpoint of a run for Hugging Face libraries.

    A run without adapters, or with ``merged``, becomes a folder of the model, float32 (or in ``adapter.base_dtype``),
    with the files of its tokenizer and of the model that it began from (see :func:`subspace_jax.interop.side_files`); a
    run with adapters a folder that PEFT reads, with those of the tokenizer.

    Args:
      workdir: Folder of the run.
      folder: Where to write.
      merged: Whether adapters are baked into the weights.
      step: Step of the checkpoint, or "best"; the latest by default.
      overwrite: Whether the folder may be there; what it held is replaced once the new one is whole.
      trust_remote_code: See :func:`subspace_jax.train.restore`.

    Returns:
      The step of the checkpoint.

    Raises:
      FileNotFoundError: There is no run or no checkpoint.
      FileExistsError: The folder is there, without ``overwrite``.
      ValueError: PEFT has no counterpart of the adapters.
      OSError: Writing failed.
    """
    if not overwrite:
        _check_new(folder)
    run, phase, state, _ = train.restore(workdir, step=step, trust_remote_code=trust_remote_code)
    task, model = phase.task, run.config.model
    task = task.task if isinstance(task, DecoupledLMTask) else task
    if isinstance(task, AdaptedLMTask) and not merged:
        shapes, params = (adapters.drop_gradient_probes(tree) for tree in (task.shapes, state.params))
        fields = interop.peft_fields(task.config, shapes, task.settings, base_model=model.folder)
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(run.mesh, P()))(params)
        if jax.process_index() == 0:
            interop.save_peft_adapter(folder, task.config, whole, task.settings, fields=fields)
            interop.write_side_files(folder, _side_files(run.config, adapter=True))
        return int(state.step)
    params = task.merged(state.params, state.variables) if isinstance(task, AdaptedLMTask) else state.params
    interop.save_causal_lm(folder, task.config, params, overwrite=True, side_files=_side_files(run.config))
    return int(state.step)


def _side_files(config: ConfigDict, *, adapter: bool = False) -> dict[str, Path | str]:
    """The files to copy beside exported weights, with the chat template that the texts were rendered by."""
    found = interop.side_files(config.model.folder, config.model.tokenizer, adapter=adapter)
    if (template := config.data.chat_template) and Path(template).is_file():
        found["chat_template.jinja"] = Path(template)
    elif template:
        log.warning("data.chat_template: no file %s, which is therefore not written beside the weights", template)
    return found


def is_peft(config: ConfigDict) -> bool:
    """Whether a run trains adapters that PEFT has a counterpart of."""
    model, _ = model_of(config)
    settings = _settings(config, model)
    if not settings:
        return False
    shapes = functools.partial(adapters.prepare, settings=settings)
    _, trainable = jax.eval_shape(shapes, jax.random.key(0), nn.param_shapes(model))
    try:
        interop.peft_fields(model, trainable, settings)
    except ValueError:
        return False
    return True


def load_adapted(
    folder: str | os.PathLike, adapter: str | os.PathLike | None = None, *, shardings: PyTree | Callable | None = None
) -> tuple[nn.CausalLMConfig, PyTree]:
    """Reads a checkpoint folder, and bakes the adapter of a PEFT folder into it.

    An adapter that PEFT gives to the embedding or to the head of a tied model alone unties the model, as it does in
    PEFT: the config that is returned then says so.

    Args:
      folder: Hugging Face folder of the model, or its GGUF file.
      adapter: PEFT folder, LoRA or DoRA; none by default.
      shardings: See :func:`subspace_jax.interop.load_causal_lm`.

    Returns:
      The config, and the parameters in the types of the folder's files.

    Raises:
      ValueError: A folder can't be read, or the adapter is of another model.
      FileNotFoundError: A folder or a file is not there.
    """
    # The small one first: what is wrong with it shows before the large one is read.
    found = None if adapter is None else interop.load_peft_adapter(adapter, interop.read_config(folder), untie=True)
    config, params = interop.load_causal_lm(folder, shardings=shardings)
    if found is None:
        return config, params
    if config.tied and not found.config.tied:
        config, params = nn.untie_causal_lm(config, params)
    for path, copy in found.copies.items():
        _check_copy(path, copy, params)
    merged = adapters.merge(params, found.trainable, found.settings)

    def placed(x, w):
        # A compressed kernel becomes dense where an adapter is baked into it.
        if is_structured(w):
            return x if is_structured(x) else x.astype(w.dtype)
        # What trains as a whole is float32 in an adapter's folder.
        return jax.device_put(x.astype(w.dtype), w.sharding)

    return config, jax.tree.map(placed, merged, params, is_leaf=is_structured)


def _check_copy(path: str, copy: interop.StoredTensor, params: PyTree) -> None:
    """Raises where an adapter brings a table along that is not the model's, but for the rounding of its type."""
    for part in path.split("/"):
        params = params[part]
    own = params if path.endswith("/embedding") else params.T
    stored = jnp.asarray(copy.read(), jnp.float32)
    if stored.shape != own.shape or not jnp.max(jnp.abs(stored - own)) <= 0.01 * jnp.max(jnp.abs(own)):
        raise ValueError(
            f"{copy.file}: {copy.name}: differs from the model's {path}, and PEFT takes it in its place; expected the "
            "adapter's own model, with that table"
        )


def merge_adapter(folder: str | os.PathLike, adapter: str | os.PathLike, out: str | os.PathLike) -> None:
    """Bakes a PEFT adapter into a model and writes a plain Hugging Face folder, with all files beside the weights.

    Args:
      folder: Hugging Face folder of the model, or its GGUF file.
      adapter: PEFT folder, LoRA or DoRA.
      out: Where to write; not there yet, or empty.

    Raises:
      ValueError: A folder can't be read, or the adapter is of another model.
      FileNotFoundError: A folder or a file is not there.
      FileExistsError: ``out`` is there and not empty.
      OSError: Writing failed.
    """
    _check_new(out)
    mesh = train.make_mesh(data=1, fsdp=jax.device_count())
    config, params = load_adapted(
        folder, adapter, shardings=lambda shapes, axes: train.param_shardings(shapes, axes, mesh)
    )
    beside = interop.side_files(folder)
    if (template := Path(adapter) / "chat_template.jinja").is_file():
        beside["chat_template.jinja"] = template  # by which the adapter was trained
    interop.save_causal_lm(out, config, params, side_files=beside)


def _check_new(folder: str | os.PathLike) -> None:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not empty")
