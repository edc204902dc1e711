"""Metric learning by dynamic subspace learners: the task, its config and its run (arXiv 2206.09068)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from subspace_jax import data, linalg, losses, train
from subspace_jax.represent.dynamic_subspace_learners import core
from subspace_jax.represent.dynamic_subspace_learners.data import (
    check_classes,
    class_balanced_batches,
    shape_texture,
)
from subspace_jax.represent.dynamic_subspace_learners.evaluate import Clusters, Learners, Retrieval
from subspace_jax.represent.dynamic_subspace_learners.model import (
    Embedded,
    NetworkConfig,
    SubspaceLearners,
    make_learners,
)
from subspace_jax.train.fields import check_at_least, check_choice, check_share

SETS = ("digits", "shape_texture")
NUM_SHAPES = (1600, 400)  # training and test images of "shape_texture"


class Schedule(NamedTuple):
    """When learners are split and examples are clustered; epochs are rounds of a phase.

    Attributes:
      epoch_steps: Steps of an epoch, the ``round_steps`` of the phase.
      dynamic: Whether learners are split; else those of the start stay.
      patience: Epochs without a better validation NMI after which the newest learner is split.
      recluster_epochs: Epochs between two clusterings.
      finetune_epoch: Epoch from which all learners learn together, from all examples, and none is split.
      reset_moments: Whether the optimizer's moments of rewritten neurons are set to zero; the authors' code keeps them.
      validation: The set whose NMI counts.
    """

    epoch_steps: int
    dynamic: bool = True
    patience: int = 10
    recluster_epochs: int = 2
    finetune_epoch: int = 250
    reset_moments: bool = True
    validation: str = "eval"


class SubspaceLearnersTask(train.Task):
    """Metric learning by subspace learners, each in charge of a cluster of examples.

    Batches hold ``inputs [batch, ...]``, ``labels [batch]`` and ``cluster [batch]``, the learner that they train; those
    of evaluation ``inputs``, ``labels`` and ``mask``, those of the set "train" also ``index``.

    ``variables`` are those of the network (``model``), the cluster of each training example (``assignment``), whether
    all learners learn together (``finetune``), and what is known of the epochs: ``scores`` and ``plateau``.
    :meth:`refresh` changes them between epochs; all numbers of learners share one program.

    Args:
      make: Builds the network from a key.
      num_examples: Number of training examples.
      schedule: When learners and clusters change.
      margin: Arguments of :func:`subspace_jax.losses.margin_loss`, ``per_class`` among them.
      attributes: Fields of the set "train" with which its clusters are compared.
    """

    splittable = False

    def __init__(
        self,
        make: Callable[[jax.Array], SubspaceLearners],
        num_examples: int,
        schedule: Schedule,
        margin: Mapping[str, float | int],
        attributes: tuple[str, ...] = ("labels",),
    ):
        self._make, self._num_examples, self._schedule = make, num_examples, schedule
        self._margin, self._attributes = dict(margin), attributes
        self._graph, self._axes = train.split_module(make)
        embedding = nnx.eval_shape(make, jax.random.key(0)).embedding
        self._num_neurons, self._max_learners = embedding.kernel.get_value().shape[1], embedding.max_learners

    def init(self, key):
        """Returns fresh parameters and variables; all examples are in cluster 0."""
        params, of_model = train.module_arrays(self._make(key))
        return params, {
            "model": of_model,
            "assignment": jnp.zeros(self._num_examples, jnp.int32),
            "finetune": jnp.zeros((), bool),
            "scores": core.init_scores(self._num_neurons),
            "plateau": core.init_plateau(),
        }

    def axes(self):
        """Returns the logical axis names of parameters and variables."""
        own = {name: x for name, x in super().axes()[1].items() if name != "model"}
        return self._axes[0], {"model": self._axes[1], **own}

    def embed(self, params, variables, inputs: jax.Array, key: jax.Array | None = None) -> Embedded:
        """Returns embeddings, features and attention maps of inputs ``[batch, ...]``; a key turns on dropout."""
        return nnx.merge(self._graph, params, variables["model"])(inputs, key)

    def features(self, params, variables, inputs: jax.Array) -> jax.Array:
        """Returns the embeddings ``[batch, neurons]``."""
        return self.embed(params, variables, inputs).embedding

    def _loss_of(self, params, variables, probe, *, batch, key):
        """Returns the loss and ``(activations, metrics)``; ``probe``, zeros, is added to the activations."""
        a = self.embed(params, variables, batch["inputs"], key).embedding
        learner_id = variables["model"]["embedding"]["learner_id"]
        member = variables["finetune"] | (learner_id[None] == batch["cluster"][:, None])
        m = linalg.unit_vectors(jnp.where(member, a + probe, 0))
        loss, terms = losses.margin_loss(m, batch["labels"], **self._margin)
        count = jnp.max(learner_id).astype(jnp.float32) + 1
        num_pairs = m.shape[0] * (self._margin["per_class"] - 1)
        return loss, (a, {"active": terms.active.astype(jnp.float32) / num_pairs, "learners": count})

    def _probe(self, batch):
        return jnp.zeros((batch["labels"].shape[0], self._num_neurons), jnp.float32)

    def loss(self, params, variables, batch, *, key, step):
        """Returns the margin loss of the batch, and as metrics the share of active pairs and the learners."""
        loss, (_, metrics) = self._loss_of(params, variables, self._probe(batch), batch=batch, key=key)
        return loss, (variables, metrics)

    def gradients(self, params, variables, batch, *, key, step, wrt=None):
        """Returns the loss and its gradient, and adds the activations times theirs to the scores of neurons."""

        def f(params, variables, probe):
            return self._loss_of(params, variables, probe, batch=batch, key=key)

        def of_part(part, probe):
            whole = part if wrt is None else {**params, wrt: part}
            return train.gathered(self, f)(whole, variables, probe)

        part = params if wrt is None else params[wrt]
        grad = jax.value_and_grad(of_part, argnums=(0, 1), has_aux=True)
        (loss, (a, metrics)), (grads, g) = grad(part, self._probe(batch))
        scores = core.score_update(variables["scores"], a, g)
        return (loss, ({**variables, "scores": scores}, metrics)), grads

    def evaluators(self):
        """Returns retrieval on each set, the clusters of the training set at the end, and the learners."""
        names = dict.fromkeys(("eval", self._schedule.validation))
        return {
            **{name: Retrieval(self, name) for name in names},
            "clusters": Clusters(self, self._attributes),
            "learners": Learners(),
        }

    def refresh(self, state: train.TrainState, at: train.At) -> train.TrainState:
        """Splits the newest learner where it is time to, and clusters the examples; for ``Phase.refresh``.

        Args:
          state: The state after an epoch, or before the first.
          at: What host code is given; its rows have the NMI of the validation set.
        """
        schedule = self._schedule
        epochs = (int(state.step) - int(state.phase_start)) // schedule.epoch_steps  # that have ended
        did_split = False
        if epochs:
            nmi = [row["nmi"] for row in at.rows if row["split"] == schedule.validation][-1]
            plateau = core.plateau_update(state.variables["plateau"], nmi, epochs - 1)
            due = schedule.dynamic and epochs <= schedule.finetune_epoch
            if due and bool(core.plateau_reached(plateau, epochs - 1, schedule.patience)):
                state, did_split = self._split(state, at)
                plateau = plateau._replace(explore=plateau.explore & (not did_split))
            fresh = {"plateau": plateau, "scores": core.init_scores(self._num_neurons)}
            state = dataclasses.replace(state, variables={**state.variables, **fresh})
        if epochs >= schedule.finetune_epoch:
            return dataclasses.replace(state, variables={**state.variables, "finetune": jnp.ones((), bool)})
        num_learners = int(jnp.max(state.variables["model"]["embedding"]["learner_id"])) + 1
        if num_learners > 1 and (did_split or epochs % schedule.recluster_epochs == 0):
            features, before = at.evaluate("clusters")["features"], state.variables["assignment"]
            key = jax.random.key_data(jax.random.fold_in(at.key, 0))
            found = at.host(functools.partial(_recluster, num_clusters=num_learners), key, features, before)
            state = dataclasses.replace(state, variables={**state.variables, "assignment": found})
        return state

    def _split(self, state, at):
        """Returns the state after the newest learner was split, and whether it was."""
        embedding, of_model = state.params["embedding"], state.variables["model"]
        before = of_model["embedding"]["learner_id"]
        key, scores = jax.random.key_data(jax.random.fold_in(at.key, 1)), state.variables["scores"]
        split = functools.partial(_split, max_learners=self._max_learners)
        found = core.Split(*at.host(split, key, embedding, before, scores))
        if not found.did_split:
            return state, False
        of_model = {**of_model, "embedding": {**of_model["embedding"], "learner_id": found.learner_id}}
        opt_state = state.opt_state
        if self._schedule.reset_moments:
            opt_state = core.reset_moments(opt_state, "embedding", core.last_learner(before))
        return dataclasses.replace(
            state,
            params={**state.params, "embedding": found.params},
            variables={**state.variables, "model": of_model},
            opt_state=opt_state,
        ), True


@functools.partial(jax.jit, static_argnames="max_learners")
def _split_arrays(key, params, learner_id, sums, *, max_learners):
    scores = core.neuron_scores(core.ScoreState(*sums), core.last_learner(learner_id))
    return core.split_learner(jax.random.wrap_key_data(key), params, learner_id, scores, max_learners)


def _split(key, params, learner_id, sums, *, max_learners):
    """Host code: the fields of a :class:`core.Split` in NumPy."""
    return tuple(jax.device_get(_split_arrays(key, params, learner_id, sums, max_learners=max_learners)))


@functools.partial(jax.jit, static_argnames="num_clusters")
def _clusters(key, features, before, *, num_clusters):
    return core.recluster(jax.random.wrap_key_data(key), features, num_clusters, before)


def _recluster(key, features, before, *, num_clusters):
    """Host code: the new cluster of each example in NumPy."""
    return np.asarray(_clusters(key, features, before, num_clusters=num_clusters))


def default_config() -> ConfigDict:
    """Returns the fields of a run.

    ``data.name`` is "digits" or "shape_texture", images drawn from ``seed``, see
    :func:`subspace_jax.represent.dynamic_subspace_learners.shape_texture`.  A share ``data.validation`` of the training
    set is held out for the rule that splits learners; 0 stands for the evaluation set, as in the authors' code.
    ``model`` has the fields of :class:`NetworkConfig`, ``learners`` those of :class:`Schedule`, and ``margin`` the
    arguments of :func:`subspace_jax.losses.margin_loss`.  Without ``learners.dynamic`` the ``model.learners`` stay as
    they are: divide and conquer with slices of one size.
    """
    config = train.default_config()
    config.task = "subspace_jax.represent.dynamic_subspace_learners.task"
    config.train.epochs = 300.0
    config.train.best = "max:validation/nmi"
    config.optim.update({"name": "adam", "learning_rate": 1e-5, "schedule": "constant"})
    config.optim.kwargs = {"weight_decay": 1e-4}
    config.data = ConfigDict(
        {"name": "digits", "batch_size": 32, "per_class": 8, "eval_batch_size": 256, "validation": 0.15}
    )
    config.model = ConfigDict(dict(NetworkConfig()._asdict()))
    config.margin = ConfigDict({"beta": 1.2, "margin": 0.2, "cutoff": 0.5})
    config.learners = ConfigDict(
        {"dynamic": True, "patience": 10, "recluster_epochs": 2, "finetune_epoch": 250, "reset_moments": True}
    )
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, for :func:`subspace_jax.train.build`.

    Args:
      config: With the fields of :func:`default_config`.

    Returns:
      A run of one phase whose rounds are epochs.

    Raises:
      ValueError: A name is unknown, or a number is out of range.
    """
    sets, attributes = _sets(config)
    task, steps = _task(config, sets["train"], attributes)
    batch, passes = _batch(config, sets["train"]), _passes(config, sets)

    def of_state(state):
        assignment = np.asarray(state.variables["assignment"])
        batches = functools.partial(
            class_balanced_batches,
            sets["train"],
            np.zeros_like(assignment) if state.variables["finetune"] else assignment,
            batch_size=config.data.batch_size,
            per_class=config.data.per_class,
        )
        return train.DataSpec(batch, lambda seed: batches(seed=seed), passes, steps)

    return _run(config, task, steps, of_state)


def outline(config: ConfigDict) -> train.Run:
    """Returns the run of a config with shapes for data, for :func:`subspace_jax.planning.plan_run`.

    Args:
      config: As for :func:`build`.

    Raises:
      ValueError: A name is unknown, or a number is out of range.
    """
    sets, attributes = _sets(config)
    task, steps = _task(config, sets["train"], attributes)
    shapes = train.outlined(_batch(config, sets["train"]), config.data.eval_batch_size, sets=tuple(sets))
    return _run(config, task, steps, shapes)


def _run(config, task, steps, examples):
    num_steps = round(config.train.epochs * steps)
    phase = train.Phase("train", task, examples, num_steps, round_steps=steps, refresh=task.refresh)
    return train.Run((phase,))


def _sets(config: ConfigDict) -> tuple[dict[str, dict[str, np.ndarray]], tuple[str, ...]]:
    """Returns the sets by name, and the fields with which clusters of the training set are compared."""
    name, share = config.data.name, config.data.validation
    check_choice("data.name", name, SETS)
    check_share("data.validation", share)
    if name == "digits":
        whole, test = (data.load_arrays(data.image_source("digits", split)) for split in ("train", "test"))
        attributes = ("labels",)
    else:
        whole, test = (shape_texture(2 * config.seed + i, n) for i, n in enumerate(NUM_SHAPES))
        attributes = ("labels", "shape", "texture")
    kept = len(whole["labels"]) - round(share * len(whole["labels"]))
    train_set, held_out = ({key: x[part] for key, x in whole.items()} for part in (slice(kept), slice(kept, None)))
    train_set["index"] = np.arange(kept, dtype=np.int32)
    return {"train": train_set, "eval": test, "validation": held_out if share else test}, attributes


def _batch(config: ConfigDict, train_set: Mapping[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    batch_size = config.data.batch_size
    return {**train.batch_shapes(train_set, batch_size), "cluster": jax.ShapeDtypeStruct((batch_size,), jnp.int32)}


def _passes(config, sets):
    return {name: data.eval_passes(rows, config.data.eval_batch_size) for name, rows in sets.items()}


def _task(
    config: ConfigDict, train_set: Mapping[str, np.ndarray], attributes: tuple[str, ...]
) -> tuple[SubspaceLearnersTask, int]:
    """Returns the task, and the steps of an epoch."""
    sizes = config.data
    check_classes(train_set, sizes.batch_size, sizes.per_class)
    for name in ("patience", "recluster_epochs", "finetune_epoch"):
        check_at_least(f"learners.{name}", config.learners[name], 1)
    check_at_least("margin.cutoff", config.margin.cutoff, 0.0, above=True)
    num_examples = len(train_set["labels"])
    steps = data.steps_per_epoch(num_examples, sizes.batch_size)
    if not steps:
        raise ValueError(f"data.batch_size: expected at most the {num_examples} examples, got {sizes.batch_size}")
    make = functools.partial(
        make_learners, input_shape=train_set["inputs"].shape[1:], config=NetworkConfig(**config.model)
    )
    schedule = Schedule(steps, validation="validation", **config.learners)
    margin = {**config.margin, "per_class": sizes.per_class}
    return SubspaceLearnersTask(make, num_examples, schedule, margin, attributes), steps
