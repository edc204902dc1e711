"""Methods over a stream: what is held still, what is resumed, and the contract of their tasks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import linalg, optim, train
from subspace_jax.continual import class_means, coso, ewc, gpm, report, task, task_lora
from subspace_jax.continual import stream as streams
from subspace_jax.continual.certified import CertificateSettings, CertifiedTask
from tests.train.common import assert_same_bits
from tests.train.task_battery import Interrupted, StopAt, TaskContract

BODY = streams.mlp_body(8, (16, 16))


def labeled(count, seed):
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 3).astype(np.int32)
    centers = np.random.default_rng(9).standard_normal((3, 8))
    inputs = centers[labels] + 0.3 * rng.standard_normal((count, 8))
    return {"inputs": inputs.astype(np.float32), "labels": labels}


def stream_of(num_tasks=3):
    return streams.permuted(labeled(48, 0), labeled(24, 1), num_tasks)


def config_of(method, *settings):
    config = task.default_config()
    config.data.batch_size, config.data.eval_batch_size = 16, 24
    config.model.method, config.model.widths, config.model.samples = method, (16, 16), 32
    config.train.steps, config.train.log_every, config.model.buffer = 4, 2, 20
    if method.startswith("coso"):
        config.optim.name = "coso"
        config.optim.kwargs = {"proj_rank": 2, "sketch_rank": 4, "method": "svd"}
    return train.override(config, settings)


def run_of(method, workdir, *settings, stream=None, **options):
    config = config_of(method, *settings)
    setup = streams.Setup(config, stream or stream_of())
    run = train.Run(task.METHODS[method](setup), lambda rows: task.summary(rows, len(setup.stream)))
    options = {"log_every": 2, "checkpoint_every": 0, "best": "", "progress": False, **options}
    return dataclasses.replace(run, workdir=workdir, **options)


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    monkeypatch.setattr(train.loop, "plot_curves", lambda *arguments: None)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        yield


class Watch(train.Hook):
    """Keeps the state at the ends of tasks, which observers do not see otherwise."""

    def __init__(self, phases):
        self.ends = {}
        self.phases = [self._watched(i, phase) for i, phase in enumerate(phases)]

    def _watched(self, i, phase):
        def enter(state, at):
            if i:
                self.ends[i - 1] = jax.device_get(state)
            entered = phase.enter(state, at)
            self.ends[f"start {i}"] = jax.device_get(entered)
            return entered

        return phase._replace(enter=enter)


def carried_out(method, tmp_path, *settings):
    run = run_of(method, tmp_path, *settings)
    watch = Watch(run.phases)
    result = train.fit(dataclasses.replace(run, phases=tuple(watch.phases)))
    watch.ends[len(run.phases) - 1] = jax.device_get(result.state)
    return result, watch.ends


@pytest.mark.slow
@pytest.mark.parametrize("method", ["coso", "gpm"])
def test_steps_of_coso_and_of_gpm_after_adam_are_orthogonal_to_what_earlier_tasks_left(method, tmp_path):
    result, ends = carried_out(method, tmp_path, "model.threshold=0.9", "model.min_directions=2")
    for t in (1, 2):
        params, variables, _ = ends[f"start {t}"]
        for name, layer in variables["certificate"].layers.items():
            moved = ends[t].params["body"][name] - params["body"][name]
            assert np.sum(layer.owner >= 0) > 0
            np.testing.assert_allclose(layer.history.T @ moved, 0, atol=2e-6)
            assert np.abs(moved).max() > 1e-3
            gram = linalg.gram(jnp.asarray(layer.history), jnp.asarray(layer.history))
            np.testing.assert_allclose(gram, np.diag((layer.owner >= 0).astype(np.float32)), atol=1e-5)
    assert result.summary["violations"] == 0
    shares = [row[f"share_{t}"] for row in result.rows if row["split"] == "train" for t in range(3)]
    assert max(shares) < 1e-9
    drift = [row for row in result.rows if row["split"] == "drift"][-1]
    assert 0 < drift["measured_0"] <= drift["bound_0"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["coso", "gpm", "ewc", "replay", "lora", "class_means", "sequential"])
def test_a_run_that_is_stopped_inside_task_3_ends_with_the_same_bits(method, tmp_path):
    steps = 3 if method == "class_means" else 4
    stop = 2 * steps + 2
    with pytest.raises(Interrupted):
        train.fit(run_of(method, tmp_path / "resumed", checkpoint_every=1), [StopAt(stop)])
    resumed = train.fit(run_of(method, tmp_path / "resumed", checkpoint_every=1))
    whole = train.fit(run_of(method, tmp_path / "whole", checkpoint_every=1))
    assert int(whole.state.step) == 3 * steps
    assert_same_bits(jax.device_get(resumed.state), jax.device_get(whole.state))
    assert resumed.rows == whole.rows


@pytest.mark.slow
def test_a_run_that_resumes_with_another_stream_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        train.fit(run_of("sequential", tmp_path, checkpoint_every=1), [StopAt(5)])
    other = streams.permuted(labeled(48, 2), labeled(24, 1), 3)
    with pytest.raises(ValueError, match="stream: the run began with other tasks"):
        train.fit(run_of("sequential", tmp_path, stream=other, checkpoint_every=1))


@pytest.mark.slow
def test_lora_and_class_means_leave_predictions_of_earlier_tasks_to_the_bit(tmp_path):
    for method in ("lora", "class_means"):
        result, ends = carried_out(method, tmp_path / method)
        assert result.summary["forgetting"] == 0
        if method == "lora":
            last, first = ends[2].params, ends[0].params
            assert all(np.array_equal(last["body"][name], first["body"][name]) for name in last["body"])
            assert np.array_equal(last["heads"][0], first["heads"][0])
            assert not np.array_equal(ends[1].params["a"]["layer00"][1], first["a"]["layer00"][1])
            assert np.array_equal(last["a"]["layer00"][1], ends[1].params["a"]["layer00"][1])


@pytest.mark.slow
def test_heads_of_tasks_that_are_not_trained_keep_their_bits(tmp_path):
    _, ends = carried_out("coso", tmp_path)
    for t in range(3):
        for end in range(t, 3):
            assert np.array_equal(ends[end].params["heads"][t], ends[t].params["heads"][t])


@pytest.mark.slow
def test_ewc_holds_kernels_near_those_of_earlier_tasks_by_its_strength(tmp_path):
    moves = []
    for strength in (0.0, 1e4):
        _, ends = carried_out("ewc", tmp_path / str(strength), f"model.strength={strength}", "train.steps=10")
        moves.append(np.linalg.norm(ends[1].params["body"]["layer01"] - ends[0].params["body"]["layer01"]))
    assert moves[1] < 0.7 * moves[0]


@pytest.mark.slow
def test_joint_training_is_one_phase_and_has_a_final_accuracy_alone(tmp_path):
    result = train.fit(run_of("joint", tmp_path, "train.steps=20"))
    assert result.summary.keys() == {"final_accuracy", "any_task_final_accuracy"}
    assert result.summary["final_accuracy"] > 0.5


@pytest.mark.slow
def test_a_guard_keeps_every_bound_within_the_limit(tmp_path):
    settings = ("model.certificate.guard=scale", "model.certificate.limit=0.02", "optim.learning_rate=0.05")
    result = train.fit(run_of("coso", tmp_path, *settings))
    bounds = [
        row[f"bound_{t}"] for row in result.rows if row["split"] == "drift" for t in range(3) if f"bound_{t}" in row
    ]
    assert bounds
    assert max(bounds) <= 0.02
    assert result.summary["scaled"] + result.summary["refused"] > 0


def test_projection_memory_projects_updates_after_adam_and_grows_at_the_end_of_a_task():
    params = {"kernel": jnp.ones((6, 3)), "bias": jnp.ones(3)}
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), gpm.projection_memory())
    state = tx.init(params)
    x = jnp.zeros((6, 5)).at[0].set(3.0).at[1].set(jnp.arange(5.0))
    x = x.at[2].set(0.05 * jnp.asarray([1.0, -2.0, 1.0, 0.0, 0.0]))
    state = gpm.gpm_end_task(state, {"kernel": x}, 0.9999)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, state, params)
    np.testing.assert_allclose(updates["kernel"][0], 0, atol=1e-6)
    np.testing.assert_allclose(updates["kernel"][2:], -0.1, atol=1e-6)
    np.testing.assert_allclose(updates["bias"], -0.1, atol=1e-6)
    more = gpm.gpm_end_task(state, {"kernel": jnp.zeros((6, 5)).at[3].set(1.0)}, 0.9)
    assert int(more[1].bases["kernel"].dim) > int(state[1].bases["kernel"].dim)


def test_gpm_end_task_refuses_other_states_and_inputs():
    state = gpm.projection_memory().init({"kernel": jnp.ones((4, 3))})
    with pytest.raises(TypeError, match="ProjectionMemoryState"):
        gpm.gpm_end_task(optax.EmptyState(), {}, 0.9)
    with pytest.raises(ValueError, match="inputs: expected those of 1 kernels"):
        gpm.gpm_end_task(state, {}, 0.9)
    with pytest.raises(ValueError, match="threshold"):
        gpm.gpm_end_task(state, {"kernel": jnp.ones((4, 5))}, 1.5)


@pytest.mark.slow
def test_a_full_history_is_refused_at_the_end_of_a_task():
    w = jnp.zeros((6, 5))
    tx = optim.coso(0.1, 2, 3, max_history=1, method="svd")
    _, state = tx.update(jnp.asarray(np.random.default_rng(0).standard_normal((6, 5)), jnp.float32), tx.init(w))
    with pytest.raises(ValueError, match="history: expected at most 1 directions"):
        coso.ended(state, tx.init(w), 1.0)


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("coso", "model.threshold=0.0", "model.threshold"),
        ("coso", "model.min_directions=-1", "model.min_directions"),
        ("coso", "model.certificate.guard=stop", "model.certificate.guard"),
        ("coso", "model.certificate.limit=0.0", "model.certificate.limit"),
        ("gpm", "model.threshold=1.5", "model.threshold"),
        ("gpm", "model.certificate.rank=0", "model.certificate.rank"),
        ("ewc", "model.strength=-1.0", "model.strength"),
        ("lora", "model.rank=0", "model.rank"),
        ("replay", "model.buffer=1", "model.buffer"),
        ("replay", "model.samples=10", "model.samples: expected at least 20 of each task for the buffer, got 10"),
        ("sequential", "model.backbone=vit", "model.backbone"),
    ],
)
def test_fields_that_cannot_serve_are_refused_before_anything_runs(method, setting, message):
    config = config_of(method, setting)
    with pytest.raises(ValueError, match=message):
        task.METHODS[method](streams.Setup(config, stream_of()))


def test_coso_refuses_another_optimizer():
    config = config_of("sequential")
    with pytest.raises(ValueError, match=r"optim\.name: expected 'coso'"):
        coso.phases(streams.Setup(config, stream_of()))


def test_build_refuses_fields_that_cannot_serve():
    for setting in ("model.method=naive", "model.temperature=0.0", "model.widths=(0,)", "model.samples=0"):
        with pytest.raises(ValueError, match=setting.partition("=")[0]):
            task.build(train.override(task.default_config(), [setting]))


def rows_of(matrix):
    rows = []
    for i, line in enumerate(matrix):
        both = {f"{name}_{t}": x for name in ("task", "any_task") for t, x in enumerate(line)}
        rows += [{"phase": str(i), "split": "train"}, {"phase": str(i), "split": "eval", "accuracy": 0.0, **both}]
    return rows


def test_summary_and_matrix_are_those_of_the_last_evaluation_of_each_phase():
    acc = np.array([[0.9, 0.1], [0.7, 0.8]])
    rows = [*rows_of([[0.5, 0.0]]), *rows_of(acc)]
    np.testing.assert_array_equal(streams.accuracy_matrix(rows, 2), acc)
    found = task.summary(rows, 2)
    assert found["final_accuracy"] == pytest.approx(0.75)
    assert found["forgetting"] == pytest.approx(0.2)
    assert report.num_tasks_in(rows) == 2
    assert "0.700   0.800" in report.matrix_text(acc)


class Contract(TaskContract):
    def learner(self):
        raise NotImplementedError

    def make(self):
        stream = stream_of(2)
        probe = {"probe": streams.examples_of([part.test for part in stream.tasks], [0, 1])}
        return self.learner(), streams.task_data(stream, [0], batch_size=16, eval_batch_size=24, sets=probe)


@pytest.mark.slow
class TestLearner(Contract):
    def learner(self):
        return streams.StreamTask(BODY, (3, 3), temperature=3.0)


@pytest.mark.slow
class TestConvNet(Contract):
    def learner(self):
        return streams.StreamTask(streams.convnet_body((2, 2, 2), (8, 8)), (3, 3))

    def make(self):
        stream, parts = stream_of(2), []
        for part in stream.tasks:
            shaped = [{**x, "inputs": x["inputs"].reshape(-1, 2, 2, 2)} for x in (part.train, part.test)]
            parts.append(part._replace(train=shaped[0], test=shaped[1]))
        return self.learner(), streams.task_data(streams.make_stream(parts), [0], batch_size=16, eval_batch_size=24)


@pytest.mark.slow
class TestCertified(Contract):
    def learner(self):
        return CertifiedTask(BODY, (3, 3), {"layer00": 6, "layer01": 6}, CertificateSettings(rank=4))


@pytest.mark.slow
class TestProjectionMemory(Contract):
    tx = optax.partition(
        {"body": optax.chain(optax.sgd(0.01), gpm.projection_memory()), "heads": optax.sgd(0.01)},
        {"body": "body", "heads": "heads"},
    )

    def learner(self):
        return streams.StreamTask(BODY, (3, 3))


@pytest.mark.slow
class TestEWC(Contract):
    def learner(self):
        return ewc.EWCTask(BODY, (3, 3), strength=10.0)


@pytest.mark.slow
class TestLoRA(Contract):
    def learner(self):
        return task_lora.LoRATask(BODY, (3, 3), rank=2)


@pytest.mark.slow
class TestClassMeans(Contract):
    def learner(self):
        return class_means.ClassMeansTask(BODY, (3, 3))
