"""Causal language modelling as a task of the train loop."""

import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax import interop, nn, train

PyTree = Any
Batch = dict[str, jax.Array]


class CausalLMTask(train.Task):
    """Next-token prediction as a :class:`subspace_jax.train.Task`; all parameters train.

    Batches are those of :mod:`subspace_jax.data.text`.  Parameters are float32; stacked layers are gathered one by one
    over the mesh axes that shard the batch, within the scan over them.  On a mesh that shards positions activations are
    sharded along the sequence, and attention gathers keys and values; see
    :func:`subspace_jax.nn.sequence_attention`.

    Args:
      config: The model.
      folder: Checkpoint folder to start from; None starts from random parameters.
      dtype: Type of the activations.
      remat: What is kept of a layer for the backward pass: "none", "dots" or "full".
      axes: Logical axes of the parameters, where some of them are structured; those of the config by default.
      stacked: Whether layers are stacks that a loop runs over, or a tuple; see :func:`subspace_jax.nn.unstack_layers`.
        The latter is for one device: on many, all layers would be gathered at once.
      loss_chunk: Positions whose logits ``[batch, loss_chunk, vocab]`` are in memory at a time; 0 for all.
    """

    def __init__(
        self,
        config: nn.CausalLMConfig,
        *,
        folder: str | os.PathLike | None = None,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        axes: PyTree | None = None,
        stacked: bool = True,
        loss_chunk: int = 0,
    ):
        self.config = config
        self._folder, self._dtype, self._loss_chunk = folder, dtype, loss_chunk
        self._axes = nn.param_axes(config) if axes is None else axes
        self._hooks: dict[str, Any] = {"remat": remat}
        layer = jax.tree.map(lambda names: P(*names[1:]), self._axes["layers"])
        if stacked:
            self._arranged = lambda params: params
            self._hooks["on_layer"] = functools.partial(train.all_gather_params, axes=layer)
        else:
            self._arranged = nn.unstack_layers
            self._axes = {**self._axes, "layers": (layer,) * config.num_layers}

    def load(self, shardings):
        """Returns the parameters of the folder, where there is one."""
        if self._folder is None:
            return None
        mesh, rules = jax.tree.leaves(shardings)[0].mesh, train.current_rules()

        def stacks(shapes, axes):  # a folder is read into stacks, whatever they are arranged to then
            return train.param_shardings(shapes, axes, mesh, rules)

        params = self._arranged(interop.load_causal_lm(self._folder, shardings=stacks, dtype=jnp.float32)[1])
        return jax.device_put(params, shardings[0]), {}

    def init(self, key):
        """Returns fresh parameters, and no variables."""
        return self._arranged(nn.init_params(key, self.config)), {}

    def axes(self):
        """Returns the logical axis names of parameters and variables."""
        return self._axes, {}

    def loss(self, params, variables, batch, *, key, step):
        """Returns the mean negative log-likelihood over the weighted tokens of the batch, and their accuracy.

        Micro-batches of an accumulated step count alike, whatever their numbers of such tokens.
        """
        del step
        loss, metrics, _ = self.loss_and_states(params, variables, batch, key=key)
        return loss, (variables, metrics)

    def loss_and_states(self, params, variables, batch, *, key=None, layers=()):
        """Returns loss and metrics of :meth:`loss`, and the hidden states of ``layers``.

        These are of :func:`subspace_jax.nn.causal_lm_apply`, ``[layers, batch, length, d]``; None for no layers.
        """
        del variables, key
        nll, hits, hidden = self._scored(params, batch, layers)
        count = jnp.maximum(jnp.sum(batch["weights"]), 1)
        loss, accuracy = (jnp.sum(x * batch["weights"]) / count for x in (nll, hits))
        return loss, {"accuracy": accuracy}, hidden

    def evaluate(self, params, variables, batch, *, key):
        """Returns sums over the weighted tokens of the examples, and the number of such tokens."""
        del variables, key
        nll, hits = self.nll(params, batch)
        weights = batch["weights"] * batch["mask"][:, None]
        return {"loss": jnp.sum(nll * weights), "accuracy": jnp.sum(hits * weights), "count": jnp.sum(weights)}

    def nll(self, params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Negative log-likelihood of each label in nats, and whether no token is likelier, ``[batch, length]``."""
        return self._scored(params, batch)[:2]

    def _scored(self, params: PyTree, batch: Batch, layers: Sequence[int] = ()) -> tuple[jax.Array, ...]:
        hooks, shards = dict(self._hooks), 1
        if sequence := train.mesh_axes("sequence"):
            mesh = train.current_mesh()
            shards = math.prod(mesh.shape[axis] for axis in sequence)
            axes = {"batch_axes": train.mesh_axes("batch"), "head_axes": train.mesh_axes("heads")}
            hooks |= {"on_stream": _shard, "attend_with": nn.sequence_attention(mesh, sequence, **axes)}
        out = nn.causal_lm_apply(
            self.config,
            params,
            _shard(batch["inputs"]),
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            with_logits=False,
            dtype=self._dtype,
            capture_hidden=bool(layers),
            options=nn.LayerOptions(**hooks),
        )
        scores = token_nll(self.config, params, out.final, _shard(batch["labels"]), self._loss_chunk, shards)
        return *scores, (jnp.stack([out.hidden[i] for i in layers]) if layers else None)


def _shard(x: jax.Array) -> jax.Array:
    """Shards activations along examples and positions, where positions are sharded at all."""
    return train.constrain(x, ("batch", "sequence")) if train.mesh_axes("sequence") else x


def score_rows(task: CausalLMTask, params: PyTree, batches: Iterable[Mapping], mesh: Mesh) -> tuple[float, float]:
    """Sums the negative log-likelihood over one pass, in nats, and counts its tokens.

    Args:
      task: The task.
      params: Its parameters.
      batches: Batches with a ``mask``, such as :func:`subspace_jax.data.eval_batches` gives.
      mesh: The mesh on which the parameters live.
    """
    whole = NamedSharding(mesh, P())
    score = train.jit_on_mesh(
        lambda params, batch: task.evaluate(params, {}, batch, key=jax.random.key(0)), mesh, whole
    )
    rows = train.batch_sharding(mesh)
    sums = [score(params, train.to_device(batch, rows)) for batch in batches]
    return tuple(sum(float(s[name]) for s in sums) for name in ("loss", "count"))


def option_scores(
    task: CausalLMTask, params: PyTree, batches: Iterable[Mapping], mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Scores each row of one pass by itself, for questions that are answered by the likeliest option.

    Args:
      task: The task.
      params: Its parameters.
      batches: Batches of :func:`subspace_jax.data.text.choice_rows`, with a ``mask``.
      mesh: The mesh on which the parameters live.

    Returns:
      Negative log-likelihood in nats and number of tokens of each real row, ``[rows]``; see
      :func:`subspace_jax.metrics.choice_accuracy`.
    """

    def score(params, batch):
        nll, _ = task.nll(params, batch)
        return jnp.sum(nll * batch["weights"], axis=1), jnp.sum(batch["weights"], axis=1)

    score = train.jit_on_mesh(score, mesh, NamedSharding(mesh, P()))
    rows = train.batch_sharding(mesh)
    found = [
        [np.asarray(x)[batch["mask"] > 0] for x in score(params, train.to_device(batch, rows))] for batch in batches
    ]
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def token_nll(
    config: nn.CausalLMConfig, params: PyTree, final: jax.Array, labels: jax.Array, chunk: int = 0, shares: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Scores tokens a few places at a time, so that the scores of all are never there.

    Args:
      config: The model.
      params: Its parameters.
      final: ``[batch, length, d]``, from :func:`subspace_jax.nn.causal_lm_apply`.
      labels: ``[batch, length]`` integers.
      chunk: Places at a time; 0, or what does not divide the length, for all.
      shares: Equal parts of the length from each of which as many places are taken at a time: where it is split over
        devices, each works on its own.  All places at once where it does not divide ``chunk``.

    Returns:
      Negative log-likelihoods and hits, ``[batch, length]`` float32.
    """

    def score(final, labels):
        logits = nn.causal_lm_logits(config, params, final, jnp.float32)
        # By comparison: the gradient of a gather is a scatter into zeros of the size of the scores.
        is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        picked = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
        hits = picked == jnp.max(logits, axis=-1)  # XLA's argmax on a CPU is not vectorised
        return jax.nn.logsumexp(logits, axis=-1) - picked, hits.astype(jnp.float32)

    batch, length = labels.shape
    if not chunk or length <= chunk or length % chunk or chunk % shares:
        if shares == 1:
            # As one axis of rows: the table's gradient sums over them, and for a sum over two axes XLA first turns
            # the gradient of the scores, which are large.
            rows = score(final.reshape(-1, final.shape[-1]), labels.reshape(-1))
            return jax.tree.map(lambda x: x.reshape(batch, length), rows)
        return score(final, labels)
    parts = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(batch, shares, length // chunk, chunk // shares, *x.shape[2:]), 2, 0),
        (final, labels),
    )
    # The backward pass makes the scores again.
    _, scored = jax.lax.scan(lambda _, part: (None, jax.checkpoint(score)(*part)), None, parts)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(batch, length), scored)
