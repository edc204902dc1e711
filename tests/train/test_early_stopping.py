import math

import optax
import pytest

from subspace_jax import train
from subspace_jax.train import loop
from subspace_jax.train.early_stopping import stopped_early

from .common import Interrupted, assert_same_bits, breaking, regression, run_of


def rows_of(*values, split="eval", name="loss", phase="train"):
    return [{"phase": phase, "step": 4 * i, "split": split, name: value} for i, value in enumerate(values, 1)]


def run_with(patience, best="min:loss", **fields):
    task, data = regression()
    return run_of(task, optax.sgd(0.0), data, num_steps=40, patience=patience, best=best, **fields)


@pytest.mark.parametrize(
    ("best", "rows", "step"),
    [
        ("min:loss", rows_of(3.0, 2.0, 2.0, 2.5), 8),  # an equal value is no better one
        ("min:loss", rows_of(3.0, 2.0, 2.5), None),
        ("min:loss", rows_of(3.0, 2.0, 2.5, 1.0, 1.5), None),
        ("max:loss", rows_of(1.0, 3.0, 2.0, 2.0), 8),
        ("min:loss", rows_of(math.nan, 2.0, math.nan, math.nan), 8),
        ("min:loss", rows_of(2.0, 2.0, 2.0, split="train"), None),
        ("min:loss", rows_of(2.0, 2.0, 2.0, phase="before"), None),
        ("min:other/loss", rows_of(2.0, 2.0, 2.0, split="other"), 4),
        ("", rows_of(2.0, 2.0, 2.0), None),
    ],
)
def test_stopped_early_counts_evaluations_without_a_better_value(best, rows, step):
    run = run_with(2, best)
    stopped = stopped_early(run, run.phases[0], rows)
    assert (stopped and stopped.step) == step
    assert stopped_early(run_with(0, best), run.phases[0], rows) is None


@pytest.fixture
def fit(monkeypatch):
    monkeypatch.setattr(loop, "plot_curves", lambda *arguments: None)
    return train.fit


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that stops early: its folder and result.  Its parameters rest; the mean that evaluation subtracts moves."""
    workdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_curves", lambda *arguments: None)
        return workdir, train.fit(run_with(2, workdir=workdir))


def test_a_run_stops_early_saves_and_is_over_when_it_is_started_again(fit, whole, caplog):
    workdir, result = whole
    losses = [row["loss"] for row in result.rows if row["split"] == "eval"]
    best = losses.index(min(losses))
    assert (int(result.state.step), len(losses)) == (4 * (best + 3), best + 3)
    assert len(losses) < 10
    written = (workdir / "metrics.jsonl").read_text()
    with caplog.at_level("INFO", "subspace_jax"):
        again = fit(run_with(2, workdir=workdir))
    assert f"the best loss is {min(losses):.4g} at step {4 * (best + 1)}" in caplog.text
    assert_same_bits(again.state, result.state)
    assert (again.rows, again.metrics) == (result.rows, result.metrics)
    assert (workdir / "metrics.jsonl").read_text() == written


def test_a_run_that_may_stop_early_keeps_its_best_state_whatever_steps_are_saved(fit, tmp_path):
    result = fit(run_with(2, workdir=tmp_path, checkpoint_every=1000))
    losses = {row["step"]: row["loss"] for row in result.rows if row["split"] == "eval"}
    saved = train.Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert saved.best_step() == min(losses, key=losses.get) < int(result.state.step)


@pytest.mark.slow
def test_an_interrupted_run_stops_early_at_the_same_step_with_the_same_bits(fit, whole, tmp_path):
    workdir, expected = whole
    task, data = regression()
    fields = {"num_steps": 40, "patience": 2, "workdir": tmp_path}
    with pytest.raises(Interrupted):
        fit(run_of(task, optax.sgd(0.0), breaking(data, int(expected.state.step) - 1), **fields))
    result = fit(run_of(task, optax.sgd(0.0), data, **fields))
    assert_same_bits(result.state, expected.state)
    assert result.rows == expected.rows
    assert (tmp_path / "metrics.jsonl").read_text() == (workdir / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patience": -1}, "patience: expected at least 0, got -1"),
        ({"patience": 2, "best": ""}, "patience: expected a metric best, such as 'min:loss'"),
    ],
)
def test_fit_refuses_a_patience_without_a_metric(fit, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(run_with(**fields, workdir=tmp_path))
