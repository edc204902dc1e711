"""Masks and coefficients of a merge by a train loop (arXiv 2312.06173)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from subspace_jax import train
from subspace_jax.merge.subspace_fusion.concrete import (
    DEFAULTS,
    ConcreteSettings,
    Fusion,
    MaskMode,
    check_temperature,
    concrete_mask,
    draw_noise,
    initial_lam,
    merge_masked,
    task_entropies,
    used_lam,
)
from subspace_jax.merge.subspace_fusion.core import apply_task_vectors, task_vectors
from subspace_jax.merge.subspace_fusion.data import VIEWS, apply, digit_views, init_params
from subspace_jax.merge.subspace_fusion.evaluate import MergedAccuracy
from subspace_jax.train.fields import check_at_least, check_choice

PyTree = Any
METHODS = ("concrete_task_arithmetic", "concrete_adamerging", "adamerging")
_MODES = ("sample", "mean", "hard")


class Models(NamedTuple):
    """What a merge is made of.

    Attributes:
      base: Parameters.
      finetuned: Parameters fine-tuned for each task.
      extra: What functions of the tasks need beside parameters, such as frozen heads.
    """

    base: PyTree
    finetuned: tuple[PyTree, ...]
    extra: PyTree


class Problem(NamedTuple):
    """What a task merges and how the result is used.

    Attributes:
      models: Returns the models; called at the start and on resume.
      shapes: Shapes of the models, as of ``jax.eval_shape(models)``.
      apply: ``apply(params, extra, t, inputs)`` returns the logits of task ``t``.
      axes: Logical axes of the parameters; by default nothing is sharded.
    """

    models: Callable[[], Models]
    shapes: Models
    apply: Callable[[PyTree, PyTree, int, jax.Array], jax.Array]
    axes: PyTree | None = None


class FusionTask(train.Task):
    """Trains mask logits, coefficients, or both in turn, by the entropy of predictions without labels.

    Batches hold ``inputs [batch, T, ...]``, examples of each task side by side, and for evaluation
    ``labels [batch, T]`` and ``mask [batch]``.  Where both are trained, coefficients start anew each step and take
    every other example, and the mask takes the rest: ``tx`` is then ``{"lam": ..., "logits": ...}``.

    ``variables`` has the base and the task vectors, which no checkpoint holds, and what is fixed: mask logits that
    are not trained, and the key of the mask that is then used.

    Args:
      problem: What is merged.
      trained: "logits", "lam" or both.
      masked: Whether there is a mask.
      layerwise: Whether there is a coefficient for each task and leaf, or for each task.
      mode: The mask of evaluation, and of coefficients that are trained alone: see :func:`concrete_mask`.
      settings: Constants.

    Raises:
      ValueError: Nothing is trained, or logits without a mask, or a constant is out of range.
    """

    frozen = ("base", "taus", "extra")

    def __init__(
        self,
        problem: Problem,
        trained: Sequence[str],
        *,
        masked: bool = True,
        layerwise: bool = True,
        mode: MaskMode = "mean",
        settings: ConcreteSettings = DEFAULTS,
    ):
        if not set(trained) <= {"logits", "lam"} or not trained or ("logits" in trained and not masked):
            raise ValueError(f"trained: expected lam, or logits of a mask, or both, got {tuple(trained)}")
        check_temperature(settings.temperature)
        self._models, self._shapes, self._apply, axes = problem
        self.settings = settings
        self._trained, self._masked, self._layerwise, self._mode = tuple(trained), masked, layerwise, mode
        self._axes = jax.tree.map(lambda x: P(*(None,) * x.ndim), self._shapes.base) if axes is None else axes
        self.num_tasks = len(self._shapes.finetuned)
        # Merged as they are sharded, entry by entry; what they are merged to is gathered.
        self.ungathered = ("logits", "lam", "base", "taus", "extra", "mask_key")

    def init(self, key):
        """Returns logits of 0 and equal coefficients, and variables of zeros."""
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._shapes)
        return self._start(Models(*zeros), key)

    def axes(self):
        """Returns the logical axis names of parameters and variables: everything is sharded as the models are."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        names = {"base": self._axes, "logits": self._axes, "taus": (self._axes,) * self.num_tasks}
        return tuple(
            {
                name: names[name] if name in names else jax.tree.map(lambda x: P(*(None,) * x.ndim), found)
                for name, found in tree.items()
            }
            for tree in shapes
        )

    def load(self, shardings):
        """Returns the start with the models."""
        # Copies: a step donates its state, and the models may be the caller's own arrays.
        return jax.device_put(self._start(self._models(), jax.random.key(0)), shardings, may_alias=False)

    def restore_frozen(self, variables, shardings):
        """Returns base, task vectors and what belongs to them."""
        del variables
        return jax.device_put(self._frozen(self._models()), dict(shardings), may_alias=False)

    def enter(self, state: train.TrainState, at: train.At) -> tuple[PyTree, PyTree, None]:
        """Returns fresh coefficients, with the mask of the phase before and a key for its draw."""
        params = {"lam": initial_lam(state.variables["taus"], self.settings.lam, layerwise=self._layerwise)}
        held = {name: state.variables[name] for name in self.frozen}
        key = jax.random.key_data(at.key)
        return params, {**held, "logits": state.params["logits"], "mask_key": key}, None

    def loss(self, params, variables, batch, *, key, step):
        """Returns the entropy summed over tasks, and that of each as a metric."""
        del step
        fusion, lam = self._fusion(variables), used_lam(self._lam(params, variables), self.settings)
        noise = None
        if "logits" in params:
            noise = draw_noise(key)
        else:
            fusion = fusion._replace(mask=self.mask(params, variables))
        merged = merge_masked(fusion, lam, params.get("logits"), noise, self.settings)
        found = task_entropies(self.apply_fns(variables), self._gathered(merged), self._parts(batch))
        return jnp.sum(found), (variables, {f"entropy_{t}": found[t] for t in range(self.num_tasks)})

    def gradients(self, params, variables, batch, *, key, step, wrt=None):
        """Returns what :meth:`subspace_jax.train.Task.gradients` does; with both trained, each of half of the batch."""
        if wrt is not None and len(self._trained) == 2:
            batch = {name: x[("lam", "logits").index(wrt) :: 2] for name, x in batch.items()}
        return super().gradients(params, variables, batch, key=key, step=step, wrt=wrt)

    def after_update(self, params, variables, *, key, step):
        """Returns coefficients that start anew, where a mask is trained beside them."""
        del key, step
        if len(self._trained) == 2:
            params = {**params, "lam": jax.tree.map(lambda x: jnp.full_like(x, self.settings.lam), params["lam"])}
        return params, variables

    def evaluators(self):
        """Returns "eval": the accuracy of each task by the merged model, and by simple merges."""
        return {"eval": MergedAccuracy(self)}

    def merged(self, params: PyTree, variables: PyTree) -> PyTree:
        """Returns the merged parameters, by the mask of evaluation."""
        fusion, lam = self._fusion(variables), used_lam(self._lam(params, variables), self.settings)
        found = apply_task_vectors(fusion.base, fusion.taus, lam, mask=self.mask(params, variables))
        return self._gathered(found)

    def mask(self, params: PyTree, variables: PyTree) -> PyTree | None:
        """Returns the mask of evaluation, or None without one."""
        if not self._masked:
            return None
        logits = params["logits"] if "logits" in params else variables["logits"]
        return concrete_mask(
            logits, jax.random.wrap_key_data(variables["mask_key"]), self.settings.temperature, self._mode
        )

    def apply_fns(self, variables: PyTree) -> list[Callable]:
        """Returns functions of parameters and inputs to the logits of each task."""
        return [lambda params, x, t=t: self._apply(params, variables["extra"], t, x) for t in range(self.num_tasks)]

    def _start(self, models: Models, key: jax.Array) -> tuple[PyTree, PyTree]:
        variables = self._frozen(models)
        params = {}
        if "lam" in self._trained:
            params["lam"] = initial_lam(variables["taus"], self.settings.lam, layerwise=self._layerwise)
        if self._masked:
            where = params if "logits" in self._trained else variables
            where["logits"] = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), variables["taus"][0])
            variables["mask_key"] = jax.random.key_data(key)
        return params, variables

    def _frozen(self, models: Models) -> dict[str, PyTree]:
        return {
            "base": models.base,
            "taus": task_vectors(models.base, models.finetuned),
            "extra": models.extra,
        }

    def _fusion(self, variables: PyTree) -> Fusion:
        return Fusion(variables["base"], tuple(variables["taus"]))

    def _lam(self, params: PyTree, variables: PyTree) -> PyTree:
        return params["lam"] if "lam" in params else initial_lam(variables["taus"], self.settings.lam, layerwise=False)

    def _gathered(self, merged: PyTree) -> PyTree:
        return train.all_gather_params(merged, self._axes)

    def _parts(self, batch: Mapping[str, jax.Array]) -> list[jax.Array]:
        return [batch["inputs"][:, t] for t in range(self.num_tasks)]


def default_config() -> ConfigDict:
    """Returns the fields of a run on the four views of digits, whose networks ``seed`` draws.

    ``model.method`` is one of :data:`METHODS`.  ``model.adapt_steps`` and ``model.adapt_learning_rate`` are of the
    phase of "concrete_adamerging" in which coefficients are trained with a fixed mask, after the one with
    ``model.lam_learning_rate`` beside the mask.  ``model.mode`` is the mask of evaluation and of that phase.  Other
    fields of ``model``: see :class:`ConcreteSettings` and :class:`FusionTask`.
    """
    config = train.default_config()
    config.task = "subspace_jax.merge.subspace_fusion.task"
    config.train.best = "max:accuracy"
    config.train.steps = 400
    config.data = ConfigDict({"batch_size": 64, "eval_batch_size": 600})
    config.model = ConfigDict(
        {
            "method": "concrete_task_arithmetic",
            "layerwise": True,
            "mode": "mean",
            **ConcreteSettings()._asdict(),
            "lam_learning_rate": 0.1,
            "adapt_steps": 200,
            "adapt_learning_rate": 1e-3,
        }
    )
    config.optim.name = "adam"
    config.optim.schedule = "constant"
    config.optim.learning_rate = 1e-2
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, for :func:`subspace_jax.train.build`.

    Raises:
      ValueError: A field can't serve.
    """
    phases = _phases(config)
    views, sizes = digit_views(config.seed), config.data
    sets = {"inputs": views.inputs, "labels": views.labels}
    return train.Run(
        tuple(
            phase._replace(
                data=train.array_data(
                    sets,
                    batch_size=sizes.batch_size * _halves(phase.task),
                    evaluate={"eval": sets},
                    eval_batch_size=sizes.eval_batch_size,
                )
            )
            for phase in phases
        )
    )


def outline(config: ConfigDict) -> train.Run:
    """Returns the run of a config without examples, for :func:`subspace_jax.planning.plan_run`."""
    sizes, views = config.data, len(VIEWS)

    def examples(phase):
        count = sizes.batch_size * _halves(phase.task)
        batch = {
            "inputs": jax.ShapeDtypeStruct((count, views, 64), np.float32),
            "labels": jax.ShapeDtypeStruct((count, views), np.int32),
        }
        return train.outlined(batch, sizes.eval_batch_size)

    return train.Run(tuple(phase._replace(data=examples(phase)) for phase in _phases(config)))


def _halves(task: FusionTask) -> int:
    """How many batches a step takes."""
    return len(task._trained)


def _phases(config: ConfigDict) -> list[train.Phase]:
    """The phases without data."""
    fields = config.model
    check_choice("model.method", fields.method, METHODS)
    check_choice("model.mode", fields.mode, _MODES)
    for name in ("lam_learning_rate", "adapt_learning_rate"):
        check_at_least(f"model.{name}", fields[name], 0)
    check_at_least("model.adapt_steps", fields.adapt_steps, 1)
    settings = ConcreteSettings(fields.lam, fields.temperature, fields.clamp)
    params = jax.eval_shape(init_params, jax.random.key(0))
    shapes = Models(params, (params,) * len(VIEWS), jax.ShapeDtypeStruct((64, 10), np.float32))

    def models():
        views = digit_views(config.seed)
        return Models(views.base, views.finetuned, views.head)

    def task(*trained, masked=True):
        try:
            return FusionTask(
                Problem(models, shapes, lambda params, head, t, x: apply(params, head, x)),
                trained,
                masked=masked,
                layerwise=fields.layerwise,
                mode=fields.mode,
                settings=settings,
            )
        except ValueError as error:
            raise ValueError(f"model.{error}") from error

    if fields.method == "adamerging":
        return [train.Phase("coefficients", task("lam", masked=False), None)]
    if fields.method == "concrete_task_arithmetic":
        return [train.Phase("mask", task("logits"), None)]
    both = {"lam": optax.adam(fields.lam_learning_rate), "logits": optax.adam(config.optim.learning_rate)}
    adapted = task("lam")
    adam = optax.adam(fields.adapt_learning_rate)
    return [
        train.Phase("mask", task("lam", "logits"), None, tx=both),
        train.Phase("adaptation", adapted, None, fields.adapt_steps, adam, adapted.enter),
    ]
