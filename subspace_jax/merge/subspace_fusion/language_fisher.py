"""The diagonal Fisher information of causal language models on text, written as folders."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from subspace_jax import data, interop, nn, train
from subspace_jax.merge.subspace_fusion.language_text import MergeText, rows_of_models
from subspace_jax.train.progress import progress_bar

PyTree = Any


def write_fishers(
    models: Sequence[str | os.PathLike], out: str | os.PathLike, texts: MergeText, *, progress: bool = False
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
      ValueError: See :func:`rows_of_models`.
      OSError: A file can't be read or written.
    """
    mesh = train.make_mesh()
    rows = rows_of_models(models, texts, mesh)
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


def _step(config: nn.CausalLMConfig, params: PyTree, mesh: Mesh) -> Callable:
    """Returns a jitted function that adds the squared gradient of a batch."""
    task = DrawnTokens(config)

    def add(total, params, batch, key):
        _, gradients = task.gradients(params, {}, batch, key=key, step=jnp.zeros((), jnp.int32))
        return jax.tree.map(lambda t, g: t + jnp.square(g), total, gradients)

    return train.jit_on_mesh(add, mesh, jax.tree.map(lambda x: x.sharding, params), donate_argnums=0)


def _diagonal(
    step: Callable, params: PyTree, rows: dict[str, np.ndarray], texts: MergeText, mesh: Mesh, progress: bool
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
