import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import data, optim, train
from subspace_jax.cli.main import main
from subspace_jax.interpret import intrinsic_dimension
from subspace_jax.interpret.intrinsic_dimension.fully_connected import FullyConnectedTask
from tests.train.common import (
    Interrupted,
    Regression,
    assert_close,
    assert_same_bits,
    breaking,
    data_of,
    regression,
    run_of,
    take_steps,
)


@pytest.fixture(autouse=True)
def no_pictures_of_runs(monkeypatch):
    monkeypatch.setattr(train.loop, "plot_curves", lambda *arguments: None)


@pytest.fixture
def problem():
    made = data.union_of_subspaces(0, 4, 8, subspace_dim=2, num_train=64, num_test=40)
    return FullyConnectedTask((8, 8, 4), l2=1e-3), data_of(made.train, made.test, 32)


def measure(problem, workdir, dims=(5,), **options):
    task, own = problem
    fields = {"num_steps": 6, "workdir": workdir, "log_every": 50, "checkpoint_every": 0}
    measurement = intrinsic_dimension.Measurement(**{"baseline": 0.5, **options})
    return intrinsic_dimension.measure_intrinsic_dimension(
        run_of(task, optax.sgd(0.3), own, **fields), dims, measurement
    )


@pytest.mark.slow
@pytest.mark.eight_devices
def test_a_task_in_a_subspace_takes_the_same_steps_on_every_mesh():
    task, own = regression()
    inner = intrinsic_dimension.SubspaceTask(task, 3)
    whole, split = (
        take_steps(inner, own, optax.sgd(0.1, momentum=0.9), train.make_mesh(**sizes, devices=jax.devices()[:n]))[0]
        for n, sizes in ((1, {"data": 1}), (8, {"data": 2, "fsdp": 4}))
    )
    assert split.variables["subspace"].start["w"].sharding.spec == jax.sharding.PartitionSpec("fsdp")
    assert whole.params["theta"].shape == (3,)
    assert jnp.all(whole.params["theta"] != 0)
    assert whole.variables["task"]["seen"] == 4
    assert_close(split.params, whole.params, atol=1e-5)
    assert_close(split.variables, whole.variables, atol=1e-5)


def test_a_subspace_task_starts_from_what_its_task_loads():
    start = {"w": jnp.arange(8.0)}

    class Loaded(Regression):
        def load(self, shardings):
            return jax.device_put((start, self.init(jax.random.key(0))[1]), shardings)

    state = train.init_state(intrinsic_dimension.SubspaceTask(Loaded(), 3), optax.sgd(0.1), train.make_mesh())
    np.testing.assert_array_equal(state.variables["subspace"].start["w"], start["w"])
    assert (
        intrinsic_dimension.SubspaceTask(regression()[0], 3).load(
            (None, {"subspace": state.variables["subspace"], "task": None})
        )
        is None
    )


@pytest.mark.slow
def test_a_killed_measurement_goes_on(problem, tmp_path):
    task, own = problem
    with pytest.raises(Interrupted):
        measure((task, breaking(own, 4)), tmp_path / "killed")
    assert not measure_rows(tmp_path / "killed")
    with (tmp_path / "killed" / "table.jsonl").open("a") as file:
        file.write('{"dim": 5, "se')  # as a process leaves it that dies while it writes
    resumed = measure(problem, tmp_path / "killed")
    whole = measure(problem, tmp_path / "whole")
    assert resumed == whole
    assert measure_rows(tmp_path / "killed") == list(whole.rows)
    solutions = [dict(np.load(tmp_path / name / "solutions" / "d5_seed0.npz")) for name in ("killed", "whole")]
    assert_same_bits(*solutions)
    # Nothing is left to do: no batch is asked for.
    again = measure((task, breaking(own, 0)), tmp_path / "killed", search="bisect")
    assert again == whole
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {"table.jsonl", "curve.png", "solutions", "runs"}
    assert not list((tmp_path / "killed" / "runs").rglob("checkpoints"))
    with pytest.raises(ValueError, match=r"is of a measurement with .*'fastfood'.*'sparse'"):
        measure(problem, tmp_path / "killed", method="sparse")
    # The numbers and the key are the solution.
    kept = {name: x.item() if x.dtype.kind in "Ub" else jnp.asarray(x) for name, x in solutions[0].items()}
    assert optim.decompress(kept, task.init(jax.random.key(0))[0])["layer0"]["kernel"].shape == (8, 8)


@pytest.mark.parametrize(
    ("line", "content"),
    [(1, '{"setting'), (1, "null"), (2, "garbage"), (2, '{"dim": 5, "seed": 0, "score": null}'), (2, '{"dim": 5}')],
)
def test_a_table_with_a_line_that_is_no_row_is_refused_and_left_alone(line, content, problem, tmp_path):
    table = tmp_path / "table.jsonl"
    lines = ['{"settings": {}}', '{"dim": 5, "seed": 0, "score": 0.5}', '{"dim": 6, "seed": 0, "score": 0.5}']
    lines[line - 1] = content
    table.write_text("".join(f"{text}\n" for text in lines))
    before = table.read_text()
    with pytest.raises(ValueError, match=rf"workdir: {table}:{line}: expected"):
        measure(problem, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"table.jsonl": before}


def measure_rows(workdir):
    return [json.loads(line) for line in (workdir / "table.jsonl").read_text().splitlines()][1:]


@pytest.mark.parametrize(
    ("error", "options"),
    [
        ("search: expected one of", {"search": "golden"}),
        ("repeats: expected at least 1", {"repeats": 0}),
        ("dims: expected at least one dimension", {"dims": ()}),
        ("dim: expected an integer from 1 to 108", {"dims": (5, 109)}),
        ("baseline: expected a positive score, got -1.0", {"baseline": -1.0}),
        ("best: evaluation gives", {"metric": "f1"}),
    ],
)
def test_what_can_not_serve_is_refused_before_a_run(problem, tmp_path, error, options):
    with pytest.raises(ValueError, match=error):
        measure(problem, tmp_path, **options)


def test_the_command_measures_what_a_config_says(configs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    common = ["--quiet", "--workdir", str(tmp_path / "run"), "--config.train.steps=2", "--config.intrinsic.repeats=1"]
    command = ["intrinsic-dimension", "--config", f"{configs}/optim/intrinsic_digits.py", *common]
    command += ["--config.intrinsic.baseline=0.99", "--config.intrinsic.dims=30,"]
    with jax.numpy_dtype_promotion("standard"):
        assert main(command) == 0
    printed = capsys.readouterr().out
    assert "baseline 0.9900 with 4810 parameters" in printed
    assert "d_int90 not reached" in printed
    assert main([*command, "--config.optim.learning_rate=0.2"]) == 2
    assert "optim.learning_rate: 0.1 -> 0.2" in capsys.readouterr().err
    other = ["intrinsic-dimension", "--config", f"{configs}/gcr/digits.py", "--workdir", str(tmp_path / "other")]
    assert main(other) == 2
    assert "expected the fields of intrinsic_dimension" in capsys.readouterr().err


def test_configs_of_the_measurement_can_be_read(configs):
    for name in ("digits:said", "mnist"):
        file, _, variant = name.partition(":")
        config = train.load_config(f"{configs}/optim/intrinsic_{file}.py" + (f":{variant}" if variant else ""))
        assert config.task == "subspace_jax.interpret.intrinsic_dimension.fully_connected"


@pytest.mark.slow
def test_digits_have_an_intrinsic_dimension_of_100_to_170(configs, tmp_path):
    config = train.load_config(f"{configs}/optim/intrinsic_digits.py")
    with jax.numpy_dtype_promotion("standard"):
        result = intrinsic_dimension.measure_config(config, tmp_path, progress=False)
    means = {dim: np.mean([row["score"] for row in result.rows if row["dim"] == dim]) for dim in (20, 200)}
    assert 100 <= result.dim <= 170
    assert means[200] >= 0.9
    assert means[20] <= 0.6
