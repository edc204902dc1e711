"""CoSO (arXiv 2505.11816) on a stream of three tasks: a phase for each, an accuracy matrix over phases and sets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from subspace_jax import losses, optim, train

TASKS, WIDTH, CLASSES, NUM_TRAIN = 3, 64, 10, 1200


class StreamTask(train.Task):
    """A network of two kernels that all tasks of the stream share, and a head of its own for each.

    ``params["head"]`` is that of the current task; ``variables["heads"]`` holds those of earlier ones.
    """

    def init(self, key):
        keys = jax.random.split(key, 3)
        scale = np.sqrt(2 / WIDTH).astype(np.float32)
        kernels = {f"kernel{i}": scale * jax.random.normal(k, (WIDTH, WIDTH)) for i, k in enumerate(keys[:2])}
        variables = {"heads": jnp.zeros((TASKS, WIDTH, CLASSES)), "task": jnp.zeros((), jnp.int32)}
        return {"kernels": kernels, "head": self._head(keys[2])}, variables

    def _head(self, key):
        return jax.random.normal(key, (WIDTH, CLASSES)) / np.float32(np.sqrt(WIDTH))

    def enter(self, state, at, index):
        """Keeps the head, makes a new one, and adds the directions of the last task to the history."""
        variables = state.variables
        heads = variables["heads"].at[variables["task"]].set(state.params["head"])
        params = {**state.params, "head": self._head(at.key)}
        body = optim.coso_end_task(state.opt_state.inner_states["kernels"], threshold=0.98)
        head = jax.tree.map(jnp.zeros_like, state.opt_state.inner_states["head"])
        opt_state = state.opt_state._replace(inner_states={"kernels": body, "head": head})
        return params, {"heads": heads, "task": jnp.asarray(index, jnp.int32)}, opt_state

    def features(self, params, x):
        for kernel in params["kernels"].values():
            x = jax.nn.relu(x @ kernel)
        return x

    def loss(self, params, variables, batch, *, key, step):
        logits = self.features(params, batch["inputs"]) @ params["head"]
        return jnp.mean(losses.cross_entropy(logits, batch["labels"])), (variables, {})

    def evaluators(self):
        return {"eval": StreamAccuracy(self)}


class StreamAccuracy(train.Evaluator):
    """The accuracy on the set of each task, which is known for each example."""

    sets = tuple(f"task{i}" for i in range(TASKS))
    metrics, last = sets, True

    def __init__(self, task):
        self._task = task

    def prepare(self, params, variables):
        heads = variables["heads"].at[variables["task"]].set(params["head"])
        return params, heads

    def collect(self, model, batch, *, key):
        params, heads = model
        features = self._task.features(params, batch["inputs"])
        logits = jnp.einsum("bf,bfc->bc", features, heads[batch["task"]])
        hits = (jnp.argmax(logits, axis=-1) == batch["labels"]) & (batch["mask"] > 0)
        return {"hits": jnp.sum(hits, dtype=jnp.float32), "count": jnp.sum(batch["mask"])}

    def finish(self, **sets):
        return {name: sums["hits"] / sums["count"] for name, sums in sets.items()}


def accuracy_matrix(rows):
    """``[phases, sets]``: the accuracy on each set at the end of each phase."""
    last = {row["phase"]: row for row in rows if row["split"] == "eval"}
    return np.array([[last[f"task{i}"][f"task{j}"] for j in range(TASKS)] for i in range(TASKS)])


def summary(rows):
    """Final and average accuracy, and forgetting, from the matrix."""
    matrix = accuracy_matrix(rows)
    lost = [matrix[:, j].max() - matrix[-1, j] for j in range(TASKS - 1)]
    seen = [matrix[i, : i + 1].mean() for i in range(TASKS)]
    return {"final": matrix[-1].mean(), "average": np.mean(seen), "forgetting": np.mean(lost)}


def permuted_digits(seed, index):
    """Training and test set of digits whose pixels have another order in every task but the first."""
    digits, rng = load_digits(), np.random.default_rng((seed, index))
    pixels = np.arange(64) if index == 0 else rng.permutation(64)
    order = np.random.default_rng(seed).permutation(len(digits.target))
    examples = {
        "inputs": (digits.data[order][:, pixels] / 16).astype(np.float32),
        "labels": digits.target[order].astype(np.int32),
        "task": np.full(len(digits.target), index, np.int32),
    }
    return [{name: x[part] for name, x in examples.items()} for part in (slice(NUM_TRAIN), slice(NUM_TRAIN, None))]


def build(epochs=5, seed=0):
    """Returns the run, with as many epochs for each task."""
    stream = [permuted_digits(seed, i) for i in range(TASKS)]
    evaluate = {f"task{i}": test for i, (_, test) in enumerate(stream)}
    task = StreamTask()
    tx = optax.partition(
        {"kernels": optim.coso(2e-3, proj_rank=8, sketch_rank=24), "head": optax.adam(5e-3)},
        {"kernels": {"kernel0": "kernels", "kernel1": "kernels"}, "head": "head"},
    )
    phases = []
    for i, (learn, _) in enumerate(stream):
        spec = train.array_data(learn, batch_size=64, evaluate=evaluate, eval_batch_size=200)
        enter = functools.partial(task.enter, index=i) if i else None
        phases.append(train.Phase(f"task{i}", task, spec, epochs * spec.steps_per_epoch, tx, enter))
    return train.Run(tuple(phases), summary, best="", seed=seed)


def without_history(run):
    """The same run, in which nothing protects what earlier tasks use."""

    def forgetful(enter):
        def entered(state, at):
            params, variables, _ = enter(state, at)
            return params, variables, None

        return entered

    return dataclasses.replace(
        run, phases=tuple(p if p.enter is None else p._replace(enter=forgetful(p.enter)) for p in run.phases)
    )
