"""Streams of tasks with experts: what a task leaves alone, what it adds, and that a run resumes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import train
from subspace_jax.continual import igsp
from subspace_jax.continual.igsp import digits, phases, teacher
from subspace_jax.continual.stream import make_stream, split_classes, task_data, teacher_tasks
from tests.train.common import assert_same_bits
from tests.train.task_battery import Interrupted, StopAt, TaskContract

TASKS, STEPS, BATCH = 3, 4, 16
SETTINGS = igsp.ExpertSettings(max_experts=7, rank=2, tau=0.02, relative=False, window=2, tolerance=0.0)
OPTIMIZERS = igsp.Optimizers(*(optax.adam(rate) for rate in (0.05, 0.05, 0.05, 0.02)))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(train.loop, "plot_curves", lambda *arguments: None)
    with jax.numpy_dtype_promotion("standard"):
        yield


def small_run(workdir, **fields):
    """The first teachers with a few steps each."""
    kernels = teacher_tasks(0).kernels[:TASKS]
    task = teacher.TeacherStream(kernels, fields.pop("settings", SETTINGS))
    data = [teacher.teacher_data(w, batch_size=BATCH, seed=t) for t, w in enumerate(kernels)]

    made = igsp.task_phases(task, data, igsp.TaskConfig(STEPS, STEPS, OPTIMIZERS))
    return train.Run(made, workdir=workdir, best="", log_every=STEPS, progress=False, **fields)


@pytest.fixture(scope="module")
def learnt():
    """The task, and parameters and variables at the ends of the phases of two tasks, by steps without a loop."""
    task = teacher.TeacherStream(teacher_tasks(0).kernels[:2], SETTINGS)
    basis = {"kernel": jnp.zeros((1, 32, 14))}
    phase_of = {"identify": phases.identify_optimizer, "tune": phases.tune_optimizer}
    optimizers = {"identify": (OPTIMIZERS,), "tune": (OPTIMIZERS, basis)}
    txs = {name: phase_of[name](*arguments) for name, arguments in optimizers.items()}

    @functools.partial(jax.jit, static_argnums=0)
    def step(name, params, variables, opt_state, batch, i):
        (_, (variables, _)), grads = task.gradients(params, variables, batch, key=jax.random.key(0), step=i)
        updates, opt_state = txs[name].update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        params, variables = task.after_update(params, variables, key=jax.random.key(0), step=i)
        return params, variables, opt_state

    def phase(name, params, variables, opt_state, batches):
        for i in range(STEPS):
            params, variables, opt_state = step(name, params, variables, opt_state, next(batches), np.int32(i))
        return params, variables

    with jax.numpy_dtype_promotion("standard"):
        params, variables = jax.jit(task.init)(jax.random.key(0))
        ends = []
        for t in range(2):
            batches = teacher.teacher_data(teacher_tasks(0).kernels[t], batch_size=BATCH, seed=t).train(0)
            if t:
                variables = {**variables, "past": task.learnt(params, variables)}
            params, variables = task.begun(params, variables, jax.random.key(t), t)
            params, variables = phase("identify", params, variables, txs["identify"].init(params), batches)
            ends.append((params, variables))
            probs = {"kernel": variables["routing"]["before"]["kernel"]}
            params, variables = task.pruned(params, variables, probs, np.zeros((2, 1)))
            of_task = {"kernel": task.basis(variables["past"].pool["kernel"])}
            opt_state = phases.tune_optimizer(OPTIMIZERS, of_task).init(params)
            params, variables = phase("tune", params, variables, opt_state, batches)
            ends.append((params, variables))
    return task, ends


def test_a_later_task_changes_no_historical_expert_no_old_router_and_no_prediction_of_an_earlier_task(learnt):
    task, ends = learnt
    before, after = (task.learnt(*end) for end in ends[1::2])
    kept = np.asarray(before.pool["kernel"].active)
    assert kept.any()
    for name in ("a", "b", "owner"):
        old, new = (np.asarray(getattr(state.pool["kernel"], name))[kept] for state in (before, after))
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(before.routers["kernel"].bias[:, 0], after.routers["kernel"].bias[:, 0])
    np.testing.assert_array_equal(before.masks["kernel"][:, 0], after.masks["kernel"][:, 0])
    assert not np.array_equal(before.pool["kernel"].b, after.pool["kernel"].b)

    @jax.jit
    def outputs(state, x):
        kernel = task.stream_kernels(ends[0][1]["base"], state, jnp.zeros(len(x), jnp.int32))["kernel"]
        return jax.tree.map(lambda stacked: stacked[0], kernel).linear(x)

    x = jax.random.normal(jax.random.key(0), (5, 32))
    assert np.abs(outputs(before, x)).max() > 0.1
    np.testing.assert_array_equal(outputs(before, x), outputs(after, x))


def test_the_second_phase_moves_kept_experts_and_only_outside_the_historical_subspace(learnt):
    task, ends = learnt
    before, start, end = (task.pools(*ends[i])["kernel"] for i in (1, 2, 3))
    kept = np.asarray(igsp.candidate_mask(end))[0]
    assert kept.any()
    moved = np.asarray(end.a - start.a)[0][kept]
    assert np.abs(moved).max() > 1e-2
    basis = task.basis(igsp.freeze_pool(before))[0]
    np.testing.assert_allclose(np.einsum("dq,edr->eqr", basis, moved), 0, atol=1e-6)


def test_the_penalty_is_off_for_the_first_task_and_in_second_phases(learnt):
    _, ends = learnt
    np.testing.assert_allclose([end[1]["penalty"] for end in ends], [0, 0, 0.02, 0])


def test_task_phases_share_two_transforms_and_one_task(tmp_path):
    run = small_run(tmp_path)
    assert len({id(phase.tx) for phase in run.phases}) == 2
    assert len({id(phase.task) for phase in run.phases}) == 1
    assert [phase.name for phase in run.phases[:3]] == ["identify0", "tune0", "identify1"]


def test_begun_refuses_a_full_pool_and_a_task_without_room():
    kernels = teacher_tasks(0).kernels[:2]
    task = teacher.TeacherStream(kernels, SETTINGS._replace(max_experts=3))
    params, variables = jax.eval_shape(task.init, jax.random.key(0))
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, variables))
    pool = blank[1]["past"].pool["kernel"]._replace(active=jnp.asarray([[True, True, False]]))
    full = {**blank[1], "past": blank[1]["past"]._replace(pool={"kernel": pool})}
    with pytest.raises(ValueError, match="pool: is full"):
        task.begun(blank[0], full, jax.random.key(0), 1)
    with pytest.raises(ValueError, match="task: expected 0 to 1, got 2"):
        task.begun(*blank, jax.random.key(0), 2)


def test_task_phases_and_settings_refuse_what_cannot_serve():
    kernels = teacher_tasks(0).kernels[:2]
    task = teacher.TeacherStream(kernels, SETTINGS)
    data = teacher.teacher_data(kernels[0], batch_size=BATCH, seed=0)
    with pytest.raises(ValueError, match="data: expected 1 to 2 tasks, got 3"):
        igsp.task_phases(task, [data] * 3, igsp.TaskConfig(STEPS, STEPS, OPTIMIZERS))
    with pytest.raises(ValueError, match="identify_steps: expected at least 1, got 0"):
        igsp.task_phases(task, [data], igsp.TaskConfig(0, STEPS, OPTIMIZERS))
    with pytest.raises(ValueError, match="candidates: expected at most 1"):
        teacher.TeacherStream(kernels, SETTINGS._replace(max_experts=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["experts.tau=0.0"], "experts.tau: expected a finite number above 0"),
        (["experts.energy=1.5"], "experts.energy: expected a share"),
        (["experts.rank=0"], "experts.rank: expected at least 1"),
        (["stream.tune_steps=0"], "stream.tune_steps: expected at least 1"),
        (["stream.router_rate=-1.0"], "stream.router_rate: expected a finite number at least 0"),
        (["data.batch_size=0"], "data.batch_size: expected at least 1"),
        (["experts.penalty=-0.1"], "experts.penalty: expected a finite number at least 0"),
    ],
)
def test_build_refuses_fields_out_of_range(changes, message):
    config = train.override(teacher.default_config(), changes)
    with pytest.raises(ValueError, match=message):
        teacher.build(config)


@pytest.mark.slow
def test_a_run_that_is_killed_inside_the_third_task_ends_with_the_same_bits_and_forgets_nothing(tmp_path):
    expected = train.fit(small_run(tmp_path / "whole"))
    rows = {row["phase"]: row for row in expected.rows if row["split"] == "errors"}
    for t in range(TASKS):
        assert rows[f"tune{t}"][f"error{t}"] == rows[f"tune{TASKS - 1}"][f"error{t}"]
    tmp_path = tmp_path / "killed"
    with pytest.raises(Interrupted):
        train.fit(small_run(tmp_path, checkpoint_every=1), [StopAt(4 * STEPS + 2)])
    result = train.fit(small_run(tmp_path, checkpoint_every=1))
    assert_same_bits(jax.device_get(result.state.params), jax.device_get(expected.state.params))
    assert_same_bits(jax.device_get(result.state.variables), jax.device_get(expected.state.variables))


@pytest.mark.slow
def test_the_first_phase_ends_when_routing_is_calm(tmp_path):
    settings = SETTINGS._replace(tolerance=1.0, calm_windows=1)
    result = train.fit(small_run(tmp_path, settings=settings))
    assert int(result.state.step) == TASKS * (2 + STEPS)


@pytest.mark.slow
def test_fit_task_learns_tasks_one_at_a_time_and_leaves_earlier_ones_alone(tmp_path):
    kernels = teacher_tasks(0).kernels[:2]
    task = teacher.TeacherStream(kernels, SETTINGS)
    config = igsp.TaskConfig(STEPS, STEPS, OPTIMIZERS, run={"progress": False})
    state = None
    for t, kernel in enumerate(kernels):
        data = teacher.teacher_data(kernel, batch_size=BATCH, seed=t)
        before, state = state, igsp.fit_task(task, state, data, config, workdir=tmp_path / str(t))
        assert int(jnp.sum(state.task_stats.count > 0)) == t + 1
        np.testing.assert_array_equal(state.pool["kernel"].active, state.pool["kernel"].frozen)
    kept = np.asarray(before.pool["kernel"].active)
    np.testing.assert_array_equal(before.pool["kernel"].a[kept], state.pool["kernel"].a[kept])
    np.testing.assert_array_equal(before.pool["kernel"].b[kept], state.pool["kernel"].b[kept])
    with pytest.raises(ValueError, match="state: holds 2 tasks, and there is room for 2"):
        igsp.fit_task(task, state, data, config, workdir=tmp_path / "2")


class BegunStream(digits.RandomFeatureStream):
    """A stream in the first phase of its second task, in whose pool historical experts do something."""

    def init(self, key):
        params, variables = super().init(key)
        for t in range(2):
            params, variables = self.begun(params, variables, key, t)
            params["b"] = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), params["b"])
            variables["past"] = self.learnt(params, variables)
        return params, variables


@pytest.mark.slow
class TestBegunStream(TaskContract):
    def make(self):
        rng = np.random.default_rng(0)
        sets = [
            ({"inputs": rng.standard_normal((n, 6)).astype(np.float32)}, np.arange(n, dtype=np.int32) % 4)
            for n in (64, 32)
        ]
        sets = [({**x, "labels": labels}, labels) for x, labels in sets]
        stream = make_stream(split_classes(*sets, [(0, 1), (2, 3)]).tasks)
        settings = SETTINGS._replace(penalty=0.5, complement=0.1)
        spec = task_data(stream, [1], batch_size=16, sets={"train": stream_train(stream)})
        return BegunStream(stream, 12, 8, settings), spec


def stream_train(stream):
    part = stream.tasks[1].train
    found = [part[i] for i in range(len(part))] if not isinstance(part, dict) else None
    arrays = part if found is None else {name: np.stack([x[name] for x in found]) for name in found[0]}
    return {**arrays, "task": np.ones(len(arrays["inputs"]), np.int32)}
