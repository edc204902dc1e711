"""The contract of every task: a class of tests that a method's tests inherit.

class TestMyTask(TaskContract):
    def make(self):
        return task, data
"""

import functools

import chex
import jax
import numpy as np
import optax
import pytest

from subspace_jax import train

from .common import Interrupted, assert_same_bits


class StopAt(train.Hook):
    """Ends a run after a step, as an interruption does."""

    def __init__(self, step):
        self._step = step

    def on_step(self, step, metrics, batch):
        if step == self._step:
            raise Interrupted


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def one_device():
    return train.make_mesh(devices=jax.devices()[:1])


class TaskContract:
    """Tests of a task; subclass it, give it ``make``, and where the defaults do not fit, the attributes.

    Attributes:
      tx: The optimizer; gradient descent by default, whose updates are as exact as the gradients.
      atol: How far parameters may lie apart that are the same but for the order of sums.
      deterministic: Whether the loss uses no key, so that micro-batches give the gradient of their batch.
    """

    tx = optax.sgd(0.01)
    atol = 1e-5
    deterministic = True

    def make(self):
        """Returns the task and its data, a :class:`subspace_jax.train.DataSpec`."""
        raise NotImplementedError

    @pytest.fixture(scope="class", autouse=True)
    def promotion(self):
        with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
            yield

    @pytest.fixture(scope="class")
    def problem(self):
        return self.make()

    def take_steps(self, problem, mesh, num_steps=2, **options):
        task, data = problem
        state = train.init_state(task, self.tx, mesh)
        step = train.jit_train_step(task, self.tx, mesh, **options)
        batches = data.train(0)
        for _ in range(num_steps):
            state, metrics = step(state, train.to_device(next(batches), train.batch_sharding(mesh)))
        assert step._cache_size() == 1, "the second step was compiled anew"
        return state, jax.device_get(metrics)

    @pytest.fixture(scope="class")
    def single(self, problem):
        return self.take_steps(problem, one_device())

    def test_init_on_shapes_matches_axes_and_roles(self, problem):
        task, _ = problem
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        for arrays, names in zip(shapes, task.axes(), strict=True):
            jax.tree.map(lambda x, spec: chex.assert_scalar_non_negative(x.ndim - len(spec)), arrays, names)
        assert set(task.roles()) <= by_path(shapes[0]).keys()
        assert set(task.roles().values()) <= {"grassmann", "stiefel", "no_decay", "probe"}
        assert set(task.frozen) <= set(shapes[1])

    def test_a_step_is_finite_and_keeps_shapes_and_dtypes(self, problem, single):
        task, _ = problem
        state, metrics = single
        expected, _ = train.state_shardings(task, self.tx, one_device())
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
        assert metrics["skipped"] == 0
        for name, value in metrics.items():
            assert np.shape(value) == (), name
            assert np.isfinite(value), name

    def test_micro_batches_give_the_step_of_their_batch(self, problem, single):
        task, _ = problem
        if not task.splittable:
            with pytest.raises(ValueError, match="accumulate: "):
                train.make_train_step(task, self.tx, accumulate=2)
            return
        state, metrics = self.take_steps(problem, one_device(), accumulate=2)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, single[0])
        if self.deterministic:
            # A probe's gradient is a sum of squares, which is no mean over micro-batches.
            probes = {path for path, role in task.roles().items() if role == "probe"}
            got, expected = (by_path(jax.device_get(s.params)) for s in (state, single[0]))
            assert probes <= got.keys()
            for path in got.keys() - probes:
                np.testing.assert_allclose(got[path], expected[path], rtol=self.atol, atol=self.atol, err_msg=path)
            assert metrics["loss"] == pytest.approx(single[1]["loss"], rel=1e-4)

    def test_evaluation_in_batches_is_that_of_the_whole_set(self, problem, single):
        task, data = problem

        def joined(make):
            batches = list(make())
            return [{name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}]

        whole = {name: functools.partial(joined, make) for name, make in data.evaluate.items()}
        for name, evaluator in task.evaluators().items():
            if evaluator.sets:
                got, expected = (
                    train.evaluate(task, single[0], sets, mesh=one_device(), name=name)
                    for sets in (data.evaluate, whole)
                )
                chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-6)

    def test_a_run_that_is_interrupted_ends_with_the_same_bits(self, problem, tmp_path, monkeypatch):
        monkeypatch.setattr(train.loop, "plot_curves", lambda *arguments: None)
        task, data = problem
        phase = train.Phase("train", task, data, 4, self.tx)

        def fit(name, *hooks):
            options = {"log_every": 1, "eval_every": 2, "checkpoint_every": 2, "best": "", "progress": False}
            return train.fit(train.Run((phase,), workdir=tmp_path / name, **options), hooks)

        with pytest.raises(Interrupted):
            fit("interrupted", StopAt(3))
        resumed, whole = fit("interrupted"), fit("whole")
        assert int(whole.state.step) == 4
        assert_same_bits(jax.device_get(resumed.state), jax.device_get(whole.state))
        assert resumed.rows == whole.rows

    @pytest.mark.eight_devices
    def test_a_sharded_step_is_that_of_one_device(self, problem, single):
        state, metrics = self.take_steps(problem, train.make_mesh(2, 2, 2))
        got, expected = jax.device_get(((state.params, state.variables), (single[0].params, single[0].variables)))
        chex.assert_trees_all_close(got, expected, rtol=self.atol, atol=self.atol)
        assert metrics["loss"] == pytest.approx(single[1]["loss"], rel=1e-4)
