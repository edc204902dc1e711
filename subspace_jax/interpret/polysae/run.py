"""Runs that train a sparse autoencoder, as configs describe them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from subspace_jax import data, interop, nn, train
from subspace_jax.data import text
from subspace_jax.interpret.polysae.activations import ResidualStream
from subspace_jax.interpret.polysae.settings import PolySAEConfig
from subspace_jax.interpret.polysae.task import PolySAETask
from subspace_jax.train.fields import check_at_least, check_choice

FIELDS = ("inputs", "segment_ids", "positions")
_OWN = (
    "folder",
    "size",
    "tokenizer",
    "layer",
    "skip",
    "scale",
    "lm_dtype",
)  # fields of ``model`` that are not the autoencoder's
_MEASURED = 4096


def default_config() -> ConfigDict:
    """Returns the fields of a run.

    ``model.folder`` is the language model, a Hugging Face folder or a GGUF file, and ``model.layer`` the number of the
    hidden state to explain, that after so many layers; the first ``model.skip`` positions of each text do not count.
    Without a folder, ``data.source`` holds vectors.  ``model.scale`` multiplies activations; 0 makes the norm of
    centered ones ``sqrt(d)`` on average.  ``model.size`` "tiny" is a random language model, for trials.
    ``model.tokenizer`` is "bytes", a file or a folder; empty, it is that of ``model.folder``, or bytes.
    ``model.d_in`` is found, and needed for plans without a model alone; ``model.widths`` (0,) are those of the authors.
    Other fields of ``model``: see :class:`PolySAEConfig`.

    ``data.source`` is "docstrings" (of the standard library), a file of texts, or vectors: an ``.npy`` file or a folder
    of them.  ``data.evaluation`` is a second one for evaluation; without one the share ``data.holdout`` of the first is
    held out: of texts by a hash, of vectors the last ones.  ``data.batch_size`` counts rows of ``data.length`` tokens,
    or vectors.  Of the rows for evaluation ``data.eval_rows`` are taken, evenly spaced; 0 takes all.
    """
    config = train.default_config()
    config.task = "subspace_jax.interpret.polysae.run"
    config.train.best = "max:explained_variance"
    config.data = ConfigDict(
        {
            "source": "docstrings",
            "evaluation": "",
            "holdout": 0.05,
            "length": 128,
            "batch_size": 8,
            "eval_batch_size": 8,
            "eval_rows": 0,
        }
    )
    fields = dataclasses.asdict(PolySAEConfig(1, 1, 1, (1, 1, 1)))
    fields |= {"d_in": 0, "d_sae": 4096, "k": 32.0, "ranks": (64, 64, 64), "widths": (0,)}
    own = {"folder": "", "size": "", "tokenizer": "", "layer": 1, "skip": 1, "scale": 0.0, "lm_dtype": "float32"}
    config.model = ConfigDict({**own, **fields})
    config.optim.name = "adam"
    config.optim.learning_rate = 3e-4
    config.optim.schedule = "constant"
    config.optim.clip_norm = 1.0
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, for :func:`subspace_jax.train.build`.

    Raises:
      ValueError: A field can't serve, or data are malformed.
      FileNotFoundError: A file or folder is not there.
    """
    sizes, fields = config.data, config.model
    model = language_model(config)
    if model is None:
        sets = vector_sets(config)
        sample = np.stack([example["inputs"] for example in sets[0].__getitems__(range(min(len(sets[0]), _MEASURED)))])
        settings = settings_of(config, sample.shape[1])
        task = PolySAETask(settings, scale=fields.scale, sample={"inputs": sample}, seed=config.seed)
    else:
        rows = text_rows(config)
        sets = [{name: part[name] for name in FIELDS} for part in rows]
        sample = {name: x[: sizes.batch_size] for name, x in sets[0].items()}
        task = _task(config, model, sample)
    if not len(sets[1] if model is None else sets[1]["inputs"]):
        raise ValueError("data.holdout: expected a share that leaves something for evaluation, got none")
    return train.Run((train.Phase("train", task, _data(config, *sets)),))


def outline(config: ConfigDict) -> train.Run:
    """Returns the run of a config without its data, for :func:`subspace_jax.planning.plan_run`.

    Without a language model, ``model.d_in`` is the width of the vectors.
    """
    sizes = config.data
    if (model := language_model(config)) is None:
        check_at_least("model.d_in", config.model.d_in, 1)
        task = PolySAETask(settings_of(config, config.model.d_in), scale=config.model.scale or 1.0)
        batch = {"inputs": jax.ShapeDtypeStruct((sizes.batch_size, config.model.d_in), jnp.float32)}
    else:
        batch = {name: jax.ShapeDtypeStruct((sizes.batch_size, sizes.length), jnp.int32) for name in FIELDS}
        zeros = {name: np.zeros(x.shape, x.dtype) for name, x in batch.items()}
        task = _task(config, model, zeros)
    return train.Run((train.Phase("train", task, train.outlined(batch, sizes.eval_batch_size)),))


def settings_of(config: ConfigDict, d_in: int) -> PolySAEConfig:
    """Returns the autoencoder of a config for activations of a width.

    Raises:
      ValueError: A field is out of range, or ``model.d_in`` is another width.
    """
    fields = {name: value for name, value in config.model.items() if name not in _OWN}
    if fields["d_in"] not in (0, d_in):
        raise ValueError(f"model.d_in: expected {d_in}, the width of the activations, or 0; got {fields['d_in']}")
    fields |= {"d_in": d_in, "ranks": tuple(fields["ranks"])}
    fields["widths"] = None if not any(fields["widths"]) else tuple(fields["widths"])
    try:
        return PolySAEConfig(**fields)
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def stream_of(config: ConfigDict, model: nn.CausalLMConfig) -> ResidualStream:
    """Returns where the activations of a run on texts come from."""
    fields = config.model
    try:
        return ResidualStream(
            model, fields.layer, folder=fields.folder or None, dtype=fields.lm_dtype, skip=fields.skip
        )
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def text_rows(config: ConfigDict) -> list[dict[str, np.ndarray]]:
    """Returns the packed rows of both sets, of :func:`subspace_jax.data.text.pack_rows`."""
    sizes, tokenizer = config.data, tokenizer_of(config)
    if sizes.source == "docstrings" and not sizes.evaluation:
        texts = [[text.Completion("", t) for t in text.docstrings(split=s)] for s in ("train", "validation")]
    else:
        texts = [_read_texts("source", sizes.source)]
        if sizes.evaluation:
            texts.append(_read_texts("evaluation", sizes.evaluation))
        else:
            try:
                texts = list(text.hold_out(texts[0], sizes.holdout))
            except ValueError as error:
                raise ValueError(f"data.{error}") from error
    rows = [text.pack_rows(examples, tokenizer, sizes.length) for examples in texts]
    check_at_least("data.eval_rows", sizes.eval_rows, 0)
    count = len(rows[1]["inputs"])
    if sizes.eval_rows in range(1, count):
        rows[1] = {name: x[np.arange(sizes.eval_rows) * count // sizes.eval_rows] for name, x in rows[1].items()}
    return rows


def vector_sets(config: ConfigDict) -> list[data.VectorShards]:
    """Returns the vectors of both sets."""
    sizes = config.data
    whole = data.VectorShards(sizes.source, name="data.source")
    if sizes.evaluation:
        return [whole, data.VectorShards(sizes.evaluation, name="data.evaluation")]
    if not 0 < sizes.holdout < 1:
        raise ValueError(f"data.holdout: expected a share between 0 and 1, got {sizes.holdout}")
    kept = len(whole) - max(1, round(sizes.holdout * len(whole)))
    if not kept:
        raise ValueError(
            f"data.source: {sizes.source}: expected vectors besides those held out, got {len(whole)} in all"
        )
    return [data.VectorShards(sizes.source, name="data.source", start=a, stop=b) for a, b in ((0, kept), (kept, None))]


def tokenizer_of(config: ConfigDict) -> Any:
    """Returns ``model.tokenizer``, or the tokenizer of the language model; bytes for a random one."""
    where = config.model.tokenizer or config.model.folder or "bytes"
    return interop.gguf.tokenizer(where) if interop.gguf.is_gguf(where) else text.load_tokenizer(where)


def takes_vectors(config: ConfigDict) -> bool:
    """Whether a run is on vectors instead of a language model."""
    return not (config.model.folder or config.model.size)


def _read_texts(field: str, source: str) -> list[text.Completion]:
    if source == "docstrings":
        return [text.Completion("", t) for t in text.docstrings()]
    if not Path(source).expanduser().is_file():
        raise FileNotFoundError(f"data.{field}: expected 'docstrings' or a file of texts, there is no {source}")
    texts = text.read_texts(source)
    if not isinstance(texts[0], text.Completion):
        raise ValueError(f"data.{field}: {source}: expected texts, got conversations")
    return texts


def language_model(config: ConfigDict) -> nn.CausalLMConfig | None:
    """Returns the language model of a config, None where there are vectors; raises ValueError for what can't serve."""
    fields = config.model
    if takes_vectors(config):
        return None
    if fields.folder:
        model = interop.read_config(fields.folder)
        text.check_vocabulary(tokenizer_of(config), model.vocab_size)
    else:
        check_choice("model.size", fields.size, ("tiny",))
        model = nn.CausalLMConfig.tiny(vocab_size=tokenizer_of(config).vocab_size)
    check_choice("model.lm_dtype", fields.lm_dtype, ("float32", "bfloat16"))
    if not 1 <= config.data.length <= model.max_length:
        raise ValueError(f"data.length: {config.data.length} positions in a row, the model has {model.max_length}")
    return model


def _task(config: ConfigDict, model: nn.CausalLMConfig, sample: dict[str, np.ndarray]) -> PolySAETask:
    fields = config.model
    stream = stream_of(config, model)
    settings = settings_of(config, model.hidden_size)
    return PolySAETask(settings, stream=stream, scale=fields.scale, sample=sample, seed=config.seed)


def _data(config: ConfigDict, train_set: Any, eval_set: Any) -> train.DataSpec:
    sizes = config.data
    if isinstance(train_set, dict):
        return train.array_data(
            train_set,
            batch_size=sizes.batch_size,
            evaluate={"eval": eval_set},
            eval_batch_size=sizes.eval_batch_size,
        )
    data.train_batches(train_set, batch_size=sizes.batch_size, seed=0)  # what is wrong with the batch size shows now
    return train.DataSpec(
        batch={"inputs": jax.ShapeDtypeStruct((sizes.batch_size, train_set.width), np.float32)},
        train=lambda seed: data.train_batches(train_set, batch_size=sizes.batch_size, seed=seed),
        evaluate={"eval": data.eval_passes(eval_set, sizes.eval_batch_size)},
        steps_per_epoch=data.steps_per_epoch(len(train_set), sizes.batch_size),
    )
