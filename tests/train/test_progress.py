import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import train
from subspace_jax.train import hooks, host_schedule, loop, optimizer, progress, summary

from .common import Regression, arrays, data_of, regression, run_of


class Clock:
    """A clock that moves on by a step of seconds each time that a step is counted."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made)
    return made


def carry_out(clock, seconds, *, steps=1000, log_every=20, eval_every=100):
    """Shows a run without carrying it out."""
    shown = progress.Progress(steps, 0, show=True)
    with shown.open():
        for step in range(1, steps + 1):
            shown.step(step, (64, "images"))
            clock.now += seconds
            if step % log_every == 0:
                shown.trained(step, {"loss": 1 / step, "learning_rate": 0.1, "grad_norm": 2.0, "skipped": 0.0})
            if step % eval_every == 0:
                shown.evaluating("eval")
                clock.now += 100.0
                shown.evaluated(step, "eval", {"accuracy": 0.5})


@pytest.mark.parametrize("seconds", [0.01, 1.0, 4.0])
def test_a_run_without_a_terminal_leaves_few_readable_lines(seconds, clock, capsys):
    carry_out(clock, seconds)
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "\r" not in text
    assert 10 < len(lines) < 200
    assert all(re.match(r"step +\d+/1000  (eval: accuracy 0\.5$|loss \d|[\d.]+ images/s)", line) for line in lines)
    assert sum("eval:" in line for line in lines) == 10
    first, last = next(line for line in lines if "loss" in line), lines[-2]
    assert first.startswith("step   20/1000  loss 0.05  lr 0.1  grad norm 2")
    assert last.startswith("step 1000/1000  loss 0.001")
    if seconds == 1.0:
        assert len([line for line in lines if "loss" in line]) == 30  # steps 20, 60 and 100 of each hundred
        # Evaluations are no part of the speed, but of the time left.
        assert {re.search(r"([\d.]+) images/s", line)[1] for line in lines[2:-2] if "loss" in line} == {"64"}
        assert "0:17:12 left" in first


def test_a_line_comes_where_rows_are_rarer_than_half_a_minute(clock, capsys):
    carry_out(clock, 12.0, steps=20, log_every=20, eval_every=20)
    lines = capsys.readouterr().err.splitlines()
    assert [re.match(r"step +(\d+)/20", line)[1] for line in lines] == ["4", "7", "10", "13", "16", "19", "20", "20"]
    assert lines[0].endswith("5.3 images/s  0:03:12 left")


def test_the_bar_shows_the_metrics_and_evaluation_as_a_phase(clock, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress.tqdm, "mininterval", 0, raising=False)
    carry_out(clock, 1.0, steps=20)
    shown = stream.getvalue().split("\r")
    assert any(text.startswith("compilation:   0%") for text in shown)
    carry_out(clock, 1.0, steps=20, log_every=10, eval_every=10)
    shown = stream.getvalue().split("\r")
    assert any(text.startswith("evaluation:  50%") for text in shown)
    assert "loss 0.1  lr 0.1  grad norm 2" in stream.getvalue()
    assert "20/20" in shown[-1]


def test_a_run_shows_what_it_is_and_its_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "plot_curves", lambda *arguments: None)
    task, data = regression()
    run = run_of(task, optax.sgd(0.05), data, num_steps=8, workdir=tmp_path, progress=True, about="more of it")
    train.fit(run)
    shown = capsys.readouterr().err
    for text in (
        "parameters  8 trainable of 8",
        "data        64 examples an epoch: 4 batches of 16",
        "steps       8, 2 epochs",
        "devices     1 x cpu, mesh data=1",
        f"output      {tmp_path}",
        "more of it",
        "step 8/8  loss ",
        "step 8/8  eval: loss ",
    ):
        assert text in shown
    train.fit(run)
    assert "resumes     from step 8" in capsys.readouterr().err


def test_run_summary_counts_frozen_weights_tokens_and_phases(tmp_path):
    class Frozen(Regression):
        frozen = ("mean",)

    rows = {"inputs": np.zeros((64, 32), np.int32), "labels": np.zeros((64, 32), np.int32)}
    task, tokens = Frozen(), data_of(rows, rows)
    phases = (
        train.Phase("first", task, tokens, 4, optax.sgd(0.1)),
        train.Phase("second", task, lambda state: tokens, 4, optax.sgd(0.1)),
    )
    run = train.Run(phases, workdir=tmp_path, mesh=train.make_mesh(), accumulate=2)
    text = summary.run_summary(run)
    assert "8 trainable of 16 (50 %)" in text
    assert "64 rows of 32 tokens an epoch: 4 batches of 16" in text
    assert text.index("phase first") < text.index("phase second") < text.index("made from the state")
    assert "4, 1 epochs, 2 micro-batches each" in text


@pytest.mark.parametrize("schedule", optimizer.SCHEDULES)
def test_host_schedule_is_the_schedule_of_the_optimizer(schedule):
    config = optimizer.default_config()
    config.update({"learning_rate": 0.3, "schedule": schedule, "warmup_steps": 7, "final_scale": 0.1})
    expected = jax.vmap(train.make_schedule(config, 50))(jnp.arange(60))
    found = host_schedule.host_schedule(config, 50)
    np.testing.assert_allclose([found(step) for step in range(60)], expected, rtol=2e-6, atol=1e-8)


@pytest.mark.slow
def test_rows_have_the_learning_rate_of_the_last_update(fit, tmp_path):
    task, rows = Regression(), arrays(64)
    rows["inputs"][5] = np.nan  # one of four steps is skipped, which the optimizer does not count
    phase = train.Phase(
        "train", task, data_of(rows, arrays(16)), 4, optax.sgd(0.05), learning_rate=lambda count: 10.0 * count
    )
    result = train.fit(train.Run((phase,), workdir=tmp_path, log_every=1, progress=False))
    rows = [row for row in result.rows if row["split"] == "train"]
    expected = [10.0 * max(row["step"] - row["skipped"] - 1, 0) for row in rows]
    assert [row["learning_rate"] for row in rows] == expected
    assert expected[-1] == 20.0
    bare = fit(task, optax.sgd(0.05), data_of(arrays(64), arrays(16)), num_steps=2, workdir=tmp_path / "bare")
    assert all("learning_rate" not in row for row in bare.rows)


class FakeWandb:
    """Stands for the package ``wandb``."""

    def __init__(self):
        self.calls = []
        self.id = "abc"

    def init(self, **arguments):
        self.calls.append(("init", arguments))
        return self

    def define_metric(self, name, step_metric):
        self.calls.append(("define", name, step_metric))

    def log(self, values):
        self.calls.append(("log", values))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


@pytest.mark.slow
def test_rows_go_to_weights_and_biases_where_a_project_is_named(fit, tmp_path, monkeypatch):
    task, data = regression()
    fields = {"num_steps": 4, "workdir": tmp_path, "wandb": "mine"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb: expected the package wandb where a project is named; pip install"):
        fit(task, optax.sgd(0.05), data, **fields)
    fake = FakeWandb()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    result = fit(task, optax.sgd(0.05), data, **fields)
    init, sent = fake.calls[0][1], [call[1] for call in fake.calls if call[0] == "log"]
    assert (init["project"], init["id"], init["dir"]) == ("mine", None, str(tmp_path))
    assert [row["step"] for row in result.rows] == [values["step"] for values in sent]
    assert sent[-1].keys() == {"step", "eval/loss"}
    assert fake.calls[-1] == ("finish", 0)
    fit(task, optax.sgd(0.05), data, **{**fields, "num_steps": 6})
    assert [call[1]["id"] for call in fake.calls if call[0] == "init"] == [None, "abc"]
    monkeypatch.setattr(hooks.RowLog, "on_step", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(task, optax.sgd(0.05), data, **{**fields, "num_steps": 8})
    assert fake.calls[-1] == ("finish", 1)
