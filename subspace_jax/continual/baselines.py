"""What everybody compares with: fine-tuning in sequence, all tasks at once, and experience replay."""

import jax.numpy as jnp
import numpy as np

from subspace_jax import train
from subspace_jax.continual.stream import Setup, StreamTask, examples_of
from subspace_jax.train.fields import check_at_least


def sequential(setup: Setup) -> tuple[train.Phase, ...]:
    """Returns a phase for each task, which trains all parameters on that task alone."""
    learner = StreamTask(setup.body, setup.stream.num_classes, temperature=setup.config.model.temperature)
    return tuple(_phase(setup, learner, t, setup.data([t])) for t in range(len(setup.stream)))


def joint(setup: Setup) -> tuple[train.Phase, ...]:
    """Returns one phase that trains on all tasks at once, a ceiling for methods that see one at a time."""
    learner = StreamTask(setup.body, setup.stream.num_classes, temperature=setup.config.model.temperature)
    tasks = list(range(len(setup.stream)))
    spec = setup.data(tasks)

    def enter(state, at):
        del at
        return state.params, {**state.variables, "task": jnp.asarray(tasks[-1], jnp.int32)}, None

    num_steps = setup.num_steps(spec)
    return (train.Phase("joint", learner, spec, num_steps, setup.optimizer(num_steps), enter),)


def replay(setup: Setup) -> tuple[train.Phase, ...]:
    """Returns a phase for each task, where examples of earlier tasks join each batch, as many as of the new one.

    ``model.buffer`` examples are kept in all, equally many of each earlier task, drawn at random (arXiv 1902.10486).
    In the first task the other half of a batch is of that task too.

    Raises:
      ValueError: The buffer holds less than one example of a task.
    """
    learner = StreamTask(setup.body, setup.stream.num_classes, temperature=setup.config.model.temperature)
    check_at_least("model.buffer", setup.config.model.buffer, max(len(setup.stream) - 1, 1))
    return tuple(_phase(setup, learner, t, setup.data([t], replay=_buffer(setup, t))) for t in range(len(setup.stream)))


def _buffer(setup: Setup, task: int):
    if task == 0:
        return examples_of([setup.stream.tasks[0].train], [0])
    each = max(setup.config.model.buffer // task, 1)
    parts = []
    for t in range(task):
        found = setup.samples(t)
        if len(found["labels"]) < each:
            raise ValueError(
                f"model.samples: expected at least {each} of each task for the buffer, got {len(found['labels'])}"
            )
        order = np.random.default_rng((t, 1)).permutation(len(found["labels"]))[:each]
        parts.append({name: x[order] for name, x in found.items() if name != "task"})
    # A buffer that is smaller than a batch is repeated.
    repeats = -(-setup.config.data.batch_size // (each * task))
    return examples_of(parts * repeats, list(range(task)) * repeats)


def _phase(setup: Setup, learner: StreamTask, task: int, spec: train.DataSpec) -> train.Phase:
    return setup.phase(task, learner, spec, setup.optimizer(setup.num_steps(spec)), learner.begin(task))
