"""Small tasks, runs and comparisons that the tests of training share."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from subspace_jax import data, represent, train
from subspace_jax.train import optimizer


class Regression(train.Task):
    """Least squares with everything that a run has to carry: noise from the key, and a running mean as a variable."""

    def __init__(self, n=8):
        self.n = n

    def init(self, key):
        return {"w": jax.random.normal(key, (self.n,))}, {"mean": jnp.zeros(self.n), "seen": jnp.zeros((), jnp.int32)}

    def axes(self):
        return {"w": P("embed")}, {"mean": P("embed"), "seen": P()}

    def loss(self, params, variables, batch, *, key, step):
        x = batch["inputs"] + 0.1 * jax.random.normal(key, batch["inputs"].shape)
        error = jnp.mean(jnp.square(x @ params["w"] - batch["labels"]))
        mean = 0.9 * variables["mean"] + 0.1 * jnp.mean(x, axis=0)
        return error, ({"mean": mean, "seen": variables["seen"] + 1}, {"error": jnp.sqrt(error)})

    def evaluate(self, params, variables, batch, *, key):
        centred = batch["inputs"] - jnp.broadcast_to(variables["mean"], batch["inputs"].shape)
        squares = jnp.square(centred @ params["w"] - batch["labels"])
        return {"loss": jnp.sum(batch["mask"] * squares), "count": jnp.sum(batch["mask"])}


def arrays(rows, n=8, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, n)).astype(np.float32)
    return {"inputs": x, "labels": (x @ rng.standard_normal(n)).astype(np.float32)}


def data_of(train_set, eval_set, batch_size=16, eval_batch_size=0):
    return train.array_data(
        train_set, batch_size=batch_size, evaluate={"eval": eval_set}, eval_batch_size=eval_batch_size
    )


def run_of(task, tx, data, *, num_steps, **fields):
    """A run of one phase, often due."""
    fields = {"log_every": 2, "eval_every": 4, "checkpoint_every": 3, "progress": False, **fields}
    return train.Run((train.Phase("train", task, data, num_steps, tx),), **fields)


def regression():
    """A task and its data, 4 batches of 16 rows an epoch; the evaluation set does not fill its last batch."""
    return Regression(), data_of(arrays(64), arrays(40, seed=1))


def classification(num_classes=8, n=16, dims=2, features=(16,), head="grassmann", dtype="float32", batch_size=32):
    """Class subspaces on a small multilayer perceptron."""
    made = data.union_of_subspaces(0, num_classes, n, subspace_dim=2, num_train=128, num_test=72)
    make = functools.partial(
        represent.make_classifier,
        input_shape=(n,),
        num_classes=num_classes,
        features=features,
        head=head,
        dims=dims,
        dtype=dtype,
    )
    return represent.ClassifierTask(make), data_of(made.train, made.test, batch_size)


def make_tx(num_steps=20, grassmann="riemannian_sgd", **settings):
    config = optimizer.default_config()
    config.update(settings)
    config.manifold.name = grassmann
    return train.make_optimizer(config, num_steps, {"head/bases": "grassmann"})


def take_steps(task, data, tx, mesh, num_steps=4, seed=0, **options):
    """Returns the state and the metrics of every step."""
    state = train.init_state(task, tx, mesh, seed=seed)
    step = train.jit_train_step(task, tx, mesh, **options)
    batches, metrics = data.train(seed), []
    for _ in range(num_steps):
        state, values = step(state, train.to_device(next(batches), train.batch_sharding(mesh)))
        metrics.append(jax.device_get(values))
    return state, metrics


def assert_close(actual, expected, atol):
    """Compares within ``atol``, relative to values above 1."""
    scaled = [
        jax.tree.map(lambda x, y: x / np.maximum(1.0, np.abs(y)), tree, expected)
        for tree in map(to_numpy, (actual, expected))
    ]
    chex.assert_trees_all_close(*scaled, rtol=0, atol=atol)


def to_numpy(tree):
    """A copy on the host, which survives the donation of a state."""
    return jax.tree.map(np.array, tree)


def assert_same_bits(actual, expected):
    chex.assert_trees_all_equal_dtypes(actual, expected)
    chex.assert_trees_all_equal(
        *(jax.tree.map(lambda x: np.asarray(x).reshape(-1).view(np.uint8), tree) for tree in (actual, expected))
    )


class Interrupted(Exception):
    """What stops a run in these tests."""


class Breaking:
    """An iterator that raises instead of giving the batch of one number."""

    def __init__(self, batches, at):
        self._batches, self._at = batches, at

    def __next__(self):
        if self._batches.get_state()["next_index"] == self._at:
            raise Interrupted
        return next(self._batches)

    def get_state(self):
        return self._batches.get_state()

    def set_state(self, state):
        self._batches.set_state(state)


def breaking(data, at):
    """The same data, whose iterator raises at step ``at + 1``."""
    return data._replace(train=lambda seed: Breaking(data.train(seed), at))
