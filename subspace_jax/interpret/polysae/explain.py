"""The report of a trained autoencoder: what it explains, what the model loses, what its features stand for."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from subspace_jax import data, interop, metrics, nn, train
from subspace_jax.data import text
from subspace_jax.interpret.polysae import export, report, run, study

PyTree = Any
_SHOWN, _PAIRS, _SPLICED_ROWS = 100, 20, 16


class _Subject(NamedTuple):
    """What is explained: rows for evaluation, how activations are read from batches of them, and by what parameters."""

    rows: dict[str, np.ndarray]
    read: Any
    params: PyTree
    tokenizer: Any
    whole: PyTree = None  # parameters of the whole model
    start: int = 0  # of vectors, the number of the first one in its file or folder


class LabelledVectors(NamedTuple):
    """Vectors with classes.

    Attributes:
      vectors: ``[items, d]`` float32.
      labels: ``[items]`` integers.
    """

    vectors: np.ndarray
    labels: np.ndarray


def read_labelled_vectors(path: str | os.PathLike) -> LabelledVectors:
    """Reads an ``.npz`` file with vectors and ``labels``; raises as :func:`subspace_jax.data.open_vectors`."""
    vectors = data.open_vectors("vectors", path).read()
    return LabelledVectors(vectors, data.read_labels(path, len(vectors)))


def explain(
    config: ConfigDict,
    state: train.TrainState,
    found: Mapping[str, float],
    out: str | os.PathLike,
    *,
    probe: Any = None,
) -> dict[str, float]:
    """Writes ``report.html`` and ``features.json``, and of a linear decoder ``sae_lens``.

    Args:
      config: Config of the run.
      state: Its last state.
      found: Its last evaluation.
      out: The folder.
      probe: ``texts`` and ``labels``, or of a run on vectors :class:`LabelledVectors`.

    Returns:
      The evaluation with what is measured besides: ``loss_recovered``, cross-entropies, ``probe_f1_K``,
      ``wasserstein1``, and ``correlation`` of interactions with what is active together.
    """
    out, figures = Path(out).expanduser(), dict(found)
    trained, subject = trained_of(config, state), _subject(config, state)
    settings, vectors = trained.config, run.takes_vectors(config)
    seen = study.find_occurrences(trained, subject.read, subject.params, _batches(config, subject.rows))
    if subject.whole is not None:
        step = max(1, len(subject.rows["inputs"]) // _SPLICED_ROWS)
        some = {name: x[::step][:_SPLICED_ROWS] for name, x in subject.rows.items()}
        spliced = study.loss_recovered(trained, subject.read, subject.whole, _batches(config, some), seen.mean)
        figures |= {"loss_recovered": spliced.recovered, "loss_recovered_from_mean": spliced.recovered_from_mean}
        figures |= {f"loss_{name}": getattr(spliced, name) for name in ("clean", "spliced", "zero", "mean")}
    if probe is not None:
        figures |= _probed(config, trained, subject, probe)
    chosen, pairs = study.most_telling(seen, settings.d_sae, _SHOWN), []
    if settings.decoder != "linear" and settings.order > 1 and len(chosen) > 1:
        both, strength, together, figures["correlation"] = study.interactions(trained.params, seen, chosen)
        strongest = np.argsort(-strength, kind="stable")[:_PAIRS]
        pairs = [(*map(int, both[i]), float(strength[i]), float(together[i])) for i in strongest]
    shown = subject.rows
    if vectors:  # of which the page shows the numbers
        count = len(shown["inputs"])
        shown = {"inputs": subject.start + np.arange(count)[:, None], "segment_ids": np.ones((count, 1), np.int32)}
    features = report.describe(seen, shown, chosen, subject.tokenizer)
    where = config.data.source if vectors else f"{config.model.folder or config.model.size}, layer {config.model.layer}"
    source = (config.data.evaluation or config.data.source) if vectors else None
    report.write_page(out, f"Sparse autoencoder of {where}", figures, features, pairs, source)
    if settings.decoder == "linear":
        _export(config, trained, out / "sae_lens")
    return figures


def trained_of(config: ConfigDict, state: train.TrainState) -> study.Trained:
    """Returns the autoencoder of a run's state, on the host."""
    kept = {name: x for name, x in state.variables.items() if name != "model"}
    params, variables = jax.device_get((state.params, kept))
    settings = run.settings_of(config, params["b_dec"].shape[0])
    return study.Trained(settings, params, *(variables[name] for name in ("threshold", "scale", "center")))


def _subject(config: ConfigDict, state: train.TrainState) -> _Subject:
    if run.takes_vectors(config):
        held = run.vector_sets(config)[1]
        return _Subject({"inputs": data.load_arrays(held)["inputs"]}, _vectors_of, {}, _Numbers(), start=held.start)
    rows, tokenizer, folder = run.text_rows(config)[1], run.tokenizer_of(config), config.model.folder
    if not folder:
        stream = run.stream_of(config, run.language_model(config))
        return _Subject(rows, stream, jax.device_get(state.variables["model"]), tokenizer)
    model, whole = interop.load_causal_lm(folder, dtype=config.model.lm_dtype)
    stream = run.stream_of(config, model)
    return _Subject(rows, stream, nn.first_layer_params(whole, config.model.layer), tokenizer, whole)


def _vectors_of(params, batch):
    del params
    return batch["inputs"], batch["mask"]


class _Numbers:
    """Shows the number of an item where a text shows a token."""

    def decode(self, tokens):
        return " ".join(f"item {token}" for token in tokens)


def _batches(config: ConfigDict, rows: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    return data.eval_batches(rows, batch_size=config.data.eval_batch_size)


def _probed(config: ConfigDict, trained: study.Trained, subject: _Subject, probe: Any) -> dict[str, float]:
    """F1 and Wasserstein distances of codes, of texts their means over positions."""
    labels = np.asarray(probe.labels)
    if run.takes_vectors(config):
        rows = {"inputs": np.asarray(probe.vectors, np.float32)}
    else:
        length = config.data.length
        rows = text.pad_rows([text.Completion("", t) for t in probe.texts], subject.tokenizer, length, truncate=True)
    seen = study.find_occurrences(trained, subject.read, subject.params, _batches(config, rows))
    codes = np.zeros((len(labels), trained.config.d_sae), np.float32)
    np.add.at(codes, (seen.rows, seen.features), seen.values)
    if "positions" in rows:
        codes /= np.maximum(np.sum(subject.read.counted(rows), axis=1, keepdims=True), 1)
    f1 = metrics.sparse_probe_f1(codes, labels)
    apart = [float(metrics.mean_wasserstein1(jnp.asarray(codes), jnp.asarray(labels == c))) for c in np.unique(labels)]
    return {**{f"probe_f1_{k}": value for k, value in f1.items()}, "wasserstein1": float(np.mean(apart))}


def _export(config: ConfigDict, trained: study.Trained, folder: Path) -> None:
    about = {}
    if config.model.folder:
        about = {"model_name": Path(config.model.folder).resolve().name}
        about |= {"hook_name": f"blocks.{config.model.layer - 1}.hook_resid_post"}
    export.export_sae_lens(folder, trained, about)
