"""The commands over streams: what they write, tables, and what they refuse."""

import json

import jax
import numpy as np
import pytest

from subspace_jax.cli import main as cli
from subspace_jax.continual import report

DATA = {"kind": "permuted", "name": "digits", "tasks": 5, "seed": 0, "order": [], "batch_size": 64}


def finished(folder, method, seed, accuracy, **changes):
    folder.mkdir()
    config = {"task": "subspace_jax.continual.task", "seed": seed, "model": {"method": method}, "data": DATA, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    scores = {"final_accuracy": accuracy, "forgetting": 0.5, "average_accuracy": 0.25, "backward_transfer": -0.5}
    (folder / "result.json").write_text(json.dumps(scores if method != "joint" else {"final_accuracy": accuracy}))
    return str(folder)


def test_continual_scores_prints_means_and_deviations_over_seeds(tmp_path, capsys):
    runs = [finished(tmp_path / f"a{seed}", "gpm", seed, x) for seed, x in ((0, 0.5), (1, 0.75))]
    runs.append(finished(tmp_path / "b", "joint", 0, 0.875))
    assert cli.main(["continual-scores", *runs]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["joint", "1", "0.875", "+-", "0.000", "-", "-", "-"]
    assert second.split()[:5] == ["gpm", "2", "0.625", "+-", "0.177"]
    (gpm,) = report.compare_runs(runs[:2])
    assert (gpm.method, gpm.seeds, gpm.mean["forgetting"]) == ("gpm", (0, 1), 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "subspace_jax.represent.gcr.task"}, "expected a run over a stream of tasks"),
        ({"data": {**DATA, "tasks": 3}}, "expected the stream of the first run, got another tasks, 3 instead of 5"),
        ({"data": {**DATA, "data_dir": "b"}}, "expected the stream of the first run, got another data_dir, 'b'"),
        ({"train": {"epochs": 3}}, "the settings of the first run of 'gpm', got another train.epochs, 3"),
        ({}, "seed 0 of 'gpm' comes twice"),
    ],
)
def test_continual_scores_refuses_runs_that_cannot_be_compared(tmp_path, capsys, changes, message):
    runs = [finished(tmp_path / "a", "gpm", 0, 0.5), finished(tmp_path / "b", "gpm", 0, 0.5, **changes)]
    assert cli.main(["continual-scores", *runs]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "can't be read as JSON"), ("[]", "expected fields by name, got list"), ("{}", "expected final_accuracy")],
)
def test_continual_scores_names_a_result_that_can_not_serve(tmp_path, capsys, text, message):
    folder = finished(tmp_path / "a", "gpm", 0, 0.5)
    (tmp_path / "a" / "result.json").write_text(text)
    assert cli.main(["continual-scores", folder]) == 2
    assert f"result.json: {message}" in capsys.readouterr().err


def test_continual_scores_refuses_a_folder_without_a_run(tmp_path, capsys):
    assert cli.main(["continual-scores", str(tmp_path)]) == 2
    assert "holds no run that has ended" in capsys.readouterr().err


def test_continual_refuses_configs_that_are_of_no_stream(tmp_path, capsys):
    words = ["continual", "--config", "optim/low_rank_regression", "--workdir", str(tmp_path / "run")]
    assert cli.main(words) == 2
    assert "expected a config of a stream" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_continual_writes_accuracies_a_picture_and_scores(tmp_path, capsys):
    folder = tmp_path / "run"
    fields = ("train.steps=2", "data.tasks=2", "model.widths=(32,32)", "model.samples=64")
    words = ["continual", "--config", "continual/permuted_digits", "--workdir", str(folder), "--quiet"]
    assert cli.main([*words, *(f"--config.{field}" for field in fields)]) == 0
    assert "after    task 1  task 2" in capsys.readouterr().out
    with np.load(folder / "accuracy.npz") as found:
        assert found["task"].shape == found["any_task"].shape == (2, 2)
        final = found["task"][-1].mean()
    result = json.loads((folder / "result.json").read_text())
    assert result["final_accuracy"] == pytest.approx(final)
    assert result["violations"] == 0
    assert (folder / "accuracy.png").stat().st_size > 1000
