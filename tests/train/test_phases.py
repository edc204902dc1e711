"""Runs of several phases: what is handed on, and the order of host code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import train
from subspace_jax.train import loop

from .common import Interrupted, Regression, arrays, assert_same_bits, regression, run_of

SGD = optax.sgd(0.05, momentum=0.9)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(loop, "plot_curves", lambda *arguments: None)


class StopAt(train.Hook):
    """Ends a run after a step, and remembers what it saw."""

    def __init__(self, step=None):
        self._step, self.calls = step, []

    def on_start(self, run, step, skipped):
        self.calls.append(("start", step))

    def on_step(self, step, metrics, batch):
        if step == self._step:
            raise Interrupted

    def on_row(self, row):
        self.calls.append((row["phase"], row["step"], row["split"]))

    def on_end(self, result):
        self.calls.append(("end", int(result.state.step)))

    def on_close(self):
        self.calls.append("close")


def three_phases(workdir, seen=None):
    """A phase that hands on its best state, one of rounds that stops by itself, and one that moves one entry."""
    task, data = regression()

    def enter(state, at):
        return {"w": 2 * state.params["w"]}, state.variables, None

    def refresh(state, at):
        size = at.host(lambda w: float(np.abs(w).sum()), state.params["w"])
        if seen is not None:
            seen.append((int(state.step), len(at.rows), at.evaluate("eval")["loss"], size))
        return dataclasses.replace(state, params={"w": state.params["w"] + jax.random.normal(at.key, (8,))})

    def stop(rows):
        assert {row["phase"] for row in rows} == {"rounds"}
        return sum(row["split"] == "eval" for row in rows) >= 3

    phases = (
        train.Phase("first", task, data, 6, SGD, best="max:loss"),
        train.Phase("rounds", task, lambda state: data, 12, SGD, enter, 3, refresh, stop),
        train.Phase("entry", task, data, 3, {"w": SGD}),
    )
    fields = dataclasses.asdict(run_of(task, SGD, data, num_steps=1, workdir=workdir, eval_every=2, best="min:loss"))
    fields = {name: fields[name] for name in ("workdir", "log_every", "eval_every", "checkpoint_every", "progress")}
    return train.Run(phases, lambda rows: {"evaluations": sum(row["split"] == "eval" for row in rows)}, **fields)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    seen, hook = [], StopAt()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_curves", lambda *arguments: None)
        return train.fit(three_phases(tmp_path_factory.mktemp("run"), seen), [hook]), seen, hook


def test_fit_carries_out_phases_in_order_and_hooks_see_their_rows(uninterrupted):
    result, seen, hook = uninterrupted
    phases = list(dict.fromkeys(row["phase"] for row in result.rows))
    assert phases == ["first", "rounds", "entry"]
    assert result.summary == {"evaluations": sum(row["split"] == "eval" for row in result.rows)}
    # Rounds of 3 steps: refreshed before the first, and between rounds until the rows say stop.
    assert [step for step, *_ in seen][:2] == [6, 9]
    assert hook.calls[0] == ("start", 0)
    assert hook.calls[-2:] == [("end", int(result.state.step)), "close"]
    rows = [(row["phase"], row["step"], row["split"]) for row in result.rows]
    assert hook.calls[1:-2] == rows
    assert result.metrics.keys() == {"loss"}


def test_fit_saves_the_state_at_which_a_phase_stops(tmp_path):
    task, data = regression()
    phase = train.Phase("rounds", task, data, 9, SGD, round_steps=2, stop=lambda rows: rows[-1]["step"] >= 4)
    run = train.Run((phase,), workdir=tmp_path, progress=False)
    result, again = train.fit(run), train.fit(run)
    assert int(result.state.step) == 4
    assert_same_bits(again.state, result.state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"refresh": lambda state, at: state.params}, "phase 'train': refresh: expected a TrainState, got dict"),
        ({"enter": lambda state, at: (state.params, {})}, r"phase 'train': enter: expected \(params, .*, got 2 values"),
    ],
)
def test_fit_refuses_what_host_code_returns(fields, message, tmp_path):
    task, data = regression()
    with pytest.raises(ValueError, match=message):
        train.fit(train.Run((train.Phase("train", task, data, 1, SGD, **fields),), workdir=tmp_path, progress=False))


@pytest.mark.parametrize(
    "at", [8, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14))]
)
def test_a_run_interrupted_in_any_phase_resumes_to_the_same_bits_and_rows(at, uninterrupted, tmp_path):
    expected, *_ = uninterrupted
    if at >= int(expected.state.step):
        pytest.skip("the run is shorter")
    with pytest.raises(Interrupted):
        train.fit(three_phases(tmp_path), [StopAt(at)])
    result = train.fit(three_phases(tmp_path))
    assert_same_bits(result.state, expected.state)
    assert result.rows == expected.rows
    assert result.metrics == expected.metrics
    assert len(train.read_metrics(tmp_path / "metrics.jsonl")) == len(expected.rows)


@pytest.mark.slow
def test_a_phase_hands_on_its_best_evaluated_state(tmp_path):
    task, data = regression()
    found = {}

    def enter(state, at):
        found["loss"], found["steps"] = at.evaluate("eval")["loss"], int(state.step)
        return state.params, state.variables, None

    phases = (
        train.Phase("first", task, data, 6, SGD, best="max:loss"),  # which is the first, as the loss falls
        train.Phase("second", task, data, 1, SGD, enter),
    )
    result = train.fit(train.Run(phases, workdir=tmp_path, eval_every=2, progress=False))
    losses = [row["loss"] for row in result.rows if (row["phase"], row["split"]) == ("first", "eval")]
    assert found == {"loss": max(losses), "steps": 6}


def test_enter_is_refused_where_its_shapes_are_not_those_of_init(tmp_path):
    task, data = regression()
    phases = [train.Phase(name, task, data, 1, SGD) for name in "ab"]
    phases[1] = phases[1]._replace(enter=lambda state, at: ({"w": jnp.zeros(3)}, state.variables, None))
    message = r"phase 'b': enter: params/w: expected float32\[8\], got float32\[3\]"
    with pytest.raises(ValueError, match=message):
        train.fit(train.Run(tuple(phases), workdir=tmp_path, progress=False))


class Scores(train.Evaluator):
    """The rank of predictions over a set, which is no mean of batches."""

    reduce, metrics = "rows", ("median",)

    def __init__(self, last=False):
        self.last = last

    def prepare(self, params, variables):
        return 2 * params["w"]

    def collect(self, model, batch, *, key):
        return {"score": batch["inputs"] @ model, "noise": jax.random.normal(key, batch["mask"].shape)}

    def finish(self, eval):
        return {"median": np.median(eval["score"]), "scores": eval["score"], "noise": eval["noise"]}


class Scored(Regression):
    def evaluators(self):
        return {**super().evaluators(), "scores": Scores(), "late": Scores(last=True)}


def test_an_evaluator_of_rows_gets_the_examples_without_padding(tmp_path):
    data = train.array_data(arrays(64), batch_size=16, evaluate={"eval": arrays(40, seed=1)})
    result = train.fit(run_of(Scored(), SGD, data, num_steps=5, workdir=tmp_path, best="max:scores/median"))
    rows = [(row["step"], row["split"]) for row in result.rows if row["split"] != "train"]
    assert rows == [(4, "eval"), (4, "scores"), (5, "eval"), (5, "scores"), (5, "late")]
    assert result.metrics.keys() == {"loss", "scores/median", "late/median"}
    found = train.evaluate(Scored(), result.state, data.evaluate, mesh=train.make_mesh(1), name="scores")
    expected = 2 * arrays(40, seed=1)["inputs"] @ np.asarray(result.state.params["w"])
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-5)
    assert len(set(found["noise"].tolist())) == 40
    assert found["median"] == pytest.approx(np.median(expected), rel=1e-5)


def test_whole_set_data_gives_the_padded_set_each_step():
    data = train.whole_set_data(arrays(5), multiple_of=4)
    batches = data.train(0)
    first = next(batches)
    assert {name: x.shape for name, x in first.items()} == {name: x.shape for name, x in data.batch.items()}
    np.testing.assert_array_equal(first["mask"], [1] * 5 + [0] * 3)
    assert next(batches)["inputs"] is first["inputs"]
    assert batches.get_state() == {"next_index": 2}
