"""Six linear teachers whose right sharing is known: which of them need an expert of their own, and which do not.

The teachers are sums of three matrices of rank 2, see :func:`subspace_jax.continual.stream.teacher_tasks`; a
reconstruction of iGSP from its
abstract (arXiv 2605.19301) should add experts for tasks that bring a new matrix, and none for mixtures of old ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from subspace_jax import nn, train
from subspace_jax.continual.igsp.config import expert_settings, stream_config, task_config
from subspace_jax.continual.igsp.phases import Experts, Usage, task_phases
from subspace_jax.continual.igsp.state import ExpertSettings, Site
from subspace_jax.continual.igsp.stream import ExpertStream
from subspace_jax.continual.stream import teacher_tasks
from subspace_jax.train.fields import check_at_least

NEW = (0, 1, 4)  # the tasks that bring a matrix
RANK = 2


class TeacherStream(ExpertStream):
    """A single kernel of zeros with experts, which learns one linear map after another.

    Batches hold ``x [batch, 32]`` and ``y [batch, 16]``.  ``variables["base"]`` has the kernel and the teachers.
    """

    def __init__(self, teachers: np.ndarray, settings: ExpertSettings):
        tasks, d_in, d_out = teachers.shape
        super().__init__({"kernel": Site(1, d_in, d_out, routed=False)}, settings, tasks, 1)
        self._teachers = teachers

    def init_base(self, key):
        """Returns a kernel of zeros and the teachers."""
        return {"kernel": jnp.zeros((1, *self._teachers.shape[1:])), "teachers": jnp.asarray(self._teachers)}

    def base_kernels(self, base):
        """Returns the kernel of zeros."""
        return {"kernel": base["kernel"]}

    def objective(self, base, kernels, task, batch):
        """Returns the mean squared error over all entries."""
        y = nn.linear(batch["x"], jax.tree.map(lambda x: x[0], kernels["kernel"]))
        return jnp.mean(jnp.square(y - batch["y"])), {}

    def features(self, base, batch):
        """Returns zeros: inputs do not tell which task they are of."""
        return jnp.zeros((batch["x"].shape[0], 1))

    def evaluators(self):
        """Returns the routing, the number of experts, and the errors of all teachers so far."""
        return {"usage": Usage(self), "experts": Experts(), "errors": Errors(self)}


class Errors(train.Evaluator):
    """The relative errors ``||W - W_t||_F^2 / ||W_t||_F^2``, given the task, of all tasks so far."""

    sets, last = (), True

    def __init__(self, task: TeacherStream):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns the errors ``[6]``, and the outputs that earlier tasks give now."""
        params, variables = model
        state, teachers = self._task.learnt(params, variables), variables["base"]["teachers"]
        tasks, d_in, _ = teachers.shape
        basis = jnp.eye(d_in)

        def learnt(task):
            of_task = jnp.full(d_in, task, jnp.int32)
            kernels = self._task.stream_kernels(variables["base"], state, of_task)
            return nn.linear(basis, jax.tree.map(lambda x: x[0], kernels["kernel"]))

        kernels = jnp.stack([learnt(t) for t in range(tasks)])
        errors, norms = (jnp.sum(jnp.square(x), axis=(1, 2)) for x in (kernels - teachers, teachers))
        return {"errors": errors / norms, "task": variables["task"]}

    def finish(self, result):
        """Returns the error of each task so far."""
        return {f"error{t}": error for t, error in enumerate(result["errors"][: int(result["task"]) + 1])}


def teacher_data(teacher: np.ndarray, *, batch_size: int, seed: int) -> train.DataSpec:
    """Returns examples of a teacher ``[32, 16]``, drawn anew in each step; the set "train" is one batch of them."""
    shapes = {
        "x": jax.ShapeDtypeStruct((batch_size, teacher.shape[0]), np.float32),
        "y": jax.ShapeDtypeStruct((batch_size, teacher.shape[1]), np.float32),
    }
    first, last = _own_rows(batch_size)

    def batch(*seeds: int) -> dict[str, np.ndarray]:
        x = np.random.default_rng(seeds).standard_normal((batch_size, len(teacher))).astype(np.float32)[first:last]
        return {"x": x, "y": x @ teacher}

    def passes():
        return [{**batch(seed, 0), "mask": np.ones(last - first, np.float32)}]

    return train.DataSpec(shapes, lambda run_seed: _Drawn(lambda i: batch(run_seed, seed, i + 1)), {"train": passes}, 1)


def _own_rows(batch_size: int) -> tuple[int, int]:
    size = batch_size // jax.process_count()
    return jax.process_index() * size, (jax.process_index() + 1) * size


class _Drawn:
    """Draws one batch after the other; its position is the number of batches."""

    def __init__(self, draw: Callable[[int], Mapping[str, np.ndarray]]):
        self._draw, self._index = draw, 0

    def __iter__(self) -> "_Drawn":
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        self._index += 1
        return self._draw(self._index - 1)

    def get_state(self) -> dict[str, int]:
        return {"next_index": self._index}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._index = state["next_index"]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the largest error at the end, the forgetting, and the experts that tasks added; see :func:`build`."""
    last = {row["phase"]: row for row in rows if row["split"] == "errors" and row["phase"].startswith("tune")}
    errors = [last[f"tune{t}"] for t in range(len(last))]
    final = [errors[-1][f"error{t}"] for t in range(len(errors))]
    worse = [final[t] - own[f"error{t}"] for t, own in enumerate(errors)]
    kept = {row["phase"]: row["candidates"] for row in rows if row["split"] == "experts"}
    added = [int(kept[f"tune{t}"]) for t in range(len(errors))]
    return {
        "largest_error": max(final),
        "forgetting": max(worse),
        "fewest_added_where_new": min(added[t] for t in NEW if t < len(added)),
        "most_added_where_not": max((n for t, n in enumerate(added) if t not in NEW), default=0),
        **{f"added{t}": n for t, n in enumerate(added)},
    }


def default_config() -> ConfigDict:
    """Returns the fields of a run, see :func:`stream_config`; ``data.batch_size`` examples are drawn in each step."""
    config = stream_config()
    config.task = "subspace_jax.continual.igsp.teacher"
    config.optim.learning_rate = 1e-2
    config.experts.update(
        {"max_experts": 14, "rank": RANK, "tau": 0.1, "relative": False, "prune_historical": False, "tolerance": 0.0}
    )
    config.stream.update({"identify_steps": 400, "tune_steps": 400, "router_rate": 5.0, "kept_router_rate": 2.0})
    config.train.update({"log_every": 100, "eval_every": 400, "checkpoint_every": 400})
    config.data = ConfigDict({"batch_size": 64})
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, for :func:`subspace_jax.train.build`: two phases for each of the six teachers.

    Its summary has the largest relative error of any teacher at the end, how much worse an earlier one became
    (``forgetting``), and the experts that tasks added: the fewest of those that bring a new matrix, and the most of the
    others.

    Raises:
      ValueError: A number is out of range.
    """
    check_at_least("data.batch_size", config.data.batch_size, 1)
    teachers = teacher_tasks(config.seed, rank=RANK).kernels
    task = TeacherStream(teachers, expert_settings(config))
    data = [teacher_data(w, batch_size=config.data.batch_size, seed=t) for t, w in enumerate(teachers)]
    return train.Run(task_phases(task, data, task_config(config)), summary)
