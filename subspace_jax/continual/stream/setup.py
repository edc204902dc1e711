"""What the phases of every method are made of: data, optimizers and lengths, from a config."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optax
from ml_collections import ConfigDict

from subspace_jax import data, train
from subspace_jax.continual.stream.batches import examples_of, task_data
from subspace_jax.continual.stream.body import Body, convnet_body, mlp_body
from subspace_jax.continual.stream.tasks import Examples, Stream
from subspace_jax.train.fields import check_choice

BACKBONES = ("mlp", "convnet")


class Setup:
    """A stream and the config of a run over it.

    Args:
      config: Reads ``data`` (see :func:`subspace_jax.continual.stream.default_data`), ``optim``, ``train`` and of
        ``model``: ``backbone`` "mlp" or "convnet", its ``widths``, and ``head_learning_rate``.
      stream: The stream.

    Raises:
      ValueError: A field can't serve.
    """

    def __init__(self, config: ConfigDict, stream: Stream):
        check_choice("model.backbone", config.model.backbone, BACKBONES)
        self.config, self.stream = config, stream

    @functools.cached_property
    def body(self) -> Body:
        """The network below the heads."""
        widths, shape = tuple(self.config.model.widths), self.stream.shape
        if self.config.model.backbone == "mlp":
            return mlp_body(int(np.prod(shape)), widths)
        return convnet_body(shape, widths)

    def data(
        self,
        tasks: Sequence[int],
        *,
        replay: Examples | None = None,
        sets: Mapping[str, Examples] | None = None,
    ) -> train.DataSpec:
        """Returns the data of a phase, see :func:`task_data`."""
        sizes = self.config.data
        return task_data(
            self.stream,
            tasks,
            batch_size=sizes.batch_size,
            eval_batch_size=sizes.eval_batch_size,
            replay=replay,
            sets=sets,
        )

    def phase(self, task: int, learner: train.Task, spec: train.DataSpec, tx: Any, enter: Any) -> train.Phase:
        """Returns the phase of a task."""
        name = f"{task + 1} of {len(self.stream)}: {self.stream.tasks[task].name}"
        return train.Phase(name, learner, spec, self.num_steps(spec), tx, enter)

    def num_steps(self, spec: train.DataSpec) -> int:
        """Returns the steps of a task: ``train.steps``, or ``train.epochs`` of its data."""
        settings = self.config.train
        return settings.steps or max(round(settings.epochs * spec.steps_per_epoch), 1)

    def optimizer(self, num_steps: int, **others: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns an optimizer of body and heads: the same object for the same number of steps.

        Args:
          num_steps: Steps of a task.
          **others: Transforms of other entries of the parameters, or of these instead.
        """
        return self._optimizer(num_steps, tuple(sorted(others.items())))

    @functools.cache  # noqa: B019 - a setup lives as long as its run
    def _optimizer(self, num_steps, others):
        entries = {"body": self.body_optimizer(num_steps), "heads": optax.adam(self.config.model.head_learning_rate)}
        entries |= dict(others)
        return optax.partition(entries, {name: name for name in entries})

    @functools.cache  # noqa: B019
    def body_optimizer(self, num_steps: int) -> optax.GradientTransformation:
        """Returns the optimizer that ``optim`` describes."""
        return train.make_optimizer(self.config.optim, num_steps)

    @functools.cache  # noqa: B019
    def samples(self, task: int) -> Mapping[str, np.ndarray]:
        """Returns ``model.samples`` training examples of a task, drawn by its position."""
        part = examples_of([self.stream.tasks[task].train], [task])
        size = len(part["inputs"]) if isinstance(part, Mapping) else len(part)
        order = np.sort(np.random.default_rng(task).permutation(size)[: self.config.model.samples])
        if isinstance(part, Mapping):
            return {name: x[order] for name, x in part.items()}
        return data.load_arrays([part[int(i)] for i in order])
