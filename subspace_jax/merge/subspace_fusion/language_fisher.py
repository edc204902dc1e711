"""The diagonal Fisher information of causal language models on text, written as folders."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from subspace_jax import data, interop, nn, train
from subspace_jax.data import text
from subspace_jax.train.progress import progress_bar

PyTree = Any


class FisherText(NamedTuple):
    """The text on which models are measured.

    Attributes:
      files: ``.jsonl``, ``.parquet`` or plain-text files, or "docstrings": one for all models, or one for each.
      batches: Most batches.
      batch_size: Examples of a batch.
      length: Tokens of an example.
      seed: Seed of the choice of examples and of the drawn tokens.
    """

    files: tuple[str, ...]
    batches: int = 16
    batch_size: int = 4
    length: int = 256
    seed: int = 0


def write_fishers(
    models: Sequence[str | os.PathLike], out: str | os.PathLike, texts: FisherText, *, progress: bool = False
) -> list[pathlib.Path]:
    """Measures the diagonal Fisher information of each model, and writes it in float32 as a folder like the model's.

    At every position a token is drawn from the model's prediction, and the gradient of the sum of their log-likelihoods
    over a batch is squared: without bias, as such gradients of different positions are uncorrelated.

    Args:
      models: Hugging Face folders of causal language models.
      out: Folder for the folders "0", "1" ...
      texts: The text.
      progress: Whether to show a progress bar for each model.

    Returns:
      The folders.

    Raises:
      ValueError: A model is not supported, a number is below 1, numbers of files and models differ, or a text has fewer
        examples than a batch.
      OSError: A file can't be read or written.
    """
    if len(texts.files) not in (1, len(models)):
        raise ValueError(f"--data: expected a text for all models, or one for each of {len(models)}, got {texts.files}")
    for name in ("batches", "batch_size", "length"):
        if getattr(texts, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(texts, name)}")
    mesh = train.make_mesh()
    train.check_batch_size(texts.batch_size, mesh, name="--batch-size")
    files = texts.files * (len(models) // len(texts.files))
    rows = [_rows(folder, file, texts) for folder, file in zip(models, files, strict=True)]
    written, steps = [], {}
    for i, folder in enumerate(models):
        config, params = interop.load_causal_lm(
            folder, shardings=lambda shapes, axes: train.param_shardings(shapes, axes, mesh), dtype=jnp.float32
        )
        if config not in steps:
            steps = {config: _step(config, params, mesh)}
        fisher = _diagonal(steps[config], params, rows[i], texts, mesh, progress)
        del params
        written.append(pathlib.Path(out) / str(i))
        interop.save_causal_lm(written[-1], config, fisher)
    return written


class DrawnTokens(train.Task):
    """The negative log-likelihood of tokens that the model draws itself, summed over a batch.

    Args:
      config: The model.
    """

    def __init__(self, config: nn.CausalLMConfig):
        self.config, self._axes = config, nn.param_axes(config)

    def axes(self):
        """Returns the logical axis names of the parameters; there are no variables."""
        return self._axes, {}

    def loss(self, params, variables, batch, *, key, step):
        """Returns the sum over all positions that are not padding."""
        del step
        layer = jax.tree.map(lambda names: P(*names[1:]), self._axes["layers"])
        out = nn.causal_lm_apply(
            self.config,
            params,
            batch["inputs"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            with_logits=False,
            options=nn.LayerOptions(remat="dots", on_layer=lambda tree: train.all_gather_params(tree, layer)),
        )
        logits = nn.causal_lm_logits(self.config, params, out.final, jnp.float32)
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        picked = jnp.sum(jnp.where(jax.nn.one_hot(drawn, logits.shape[-1], dtype=bool), logits, 0), axis=-1)
        nll = jax.nn.logsumexp(logits, axis=-1) - picked
        return jnp.sum(nll * (batch["weights"] * batch["mask"][:, None])), (variables, {})


def _rows(folder: str | os.PathLike, file: str, texts: FisherText) -> dict[str, np.ndarray]:
    """Chosen examples of a text as tokens of a model."""
    config = interop.read_config(folder)
    tokenizer = text.load_tokenizer(folder if (pathlib.Path(folder) / "tokenizer.json").is_file() else "bytes")
    text.check_vocabulary(tokenizer, config.vocab_size)
    if file == "docstrings":
        examples = [text.Completion("", one) for one in text.docstrings(split="train")]
    else:
        examples = text.read_texts(file)
        if not isinstance(examples[0], text.Completion):
            raise ValueError(f"--data: {file} holds conversations; expected texts, or prompts with completions")
    rows = text.pack_rows(examples, tokenizer, min(texts.length, config.max_length))
    count = len(rows["inputs"])
    if count < texts.batch_size:
        raise ValueError(f"--data: {file}: expected at least a batch of {texts.batch_size} examples, got {count}")
    chosen = np.random.default_rng(texts.seed).permutation(count)[: texts.batches * texts.batch_size]
    return {name: x[chosen] for name, x in rows.items()}


def _step(config: nn.CausalLMConfig, params: PyTree, mesh: Mesh) -> Callable:
    """Returns a jitted function that adds the squared gradient of a batch."""
    task = DrawnTokens(config)

    def add(total, params, batch, key):
        _, gradients = task.gradients(params, {}, batch, key=key, step=jnp.zeros((), jnp.int32))
        return jax.tree.map(lambda t, g: t + jnp.square(g), total, gradients)

    return train.jit_on_mesh(add, mesh, jax.tree.map(lambda x: x.sharding, params), donate_argnums=0)


def _diagonal(
    step: Callable, params: PyTree, rows: dict[str, np.ndarray], texts: FisherText, mesh: Mesh, progress: bool
) -> PyTree:
    """The mean over examples of rows, batch by batch."""
    sharding, total = train.batch_sharding(mesh), jax.tree.map(jnp.zeros_like, params)
    batches = list(data.eval_batches(rows, batch_size=texts.batch_size))
    with contextlib.closing(progress_bar(len(batches), 0, show=progress)) as bar:
        for i, batch in enumerate(batches):
            key = jax.random.fold_in(jax.random.key(texts.seed), i)
            total = jax.block_until_ready(step(total, params, train.to_device(batch, sharding), key))
            bar.update()
    count = len(rows["inputs"])
    return jax.tree.map(lambda x: x / count, total)
