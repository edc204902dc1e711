import dataclasses
import json
import pathlib
import re
import subprocess
import sys
from importlib.metadata import version

import jax
import pytest

from subspace_jax.cli.main import main
from subspace_jax.represent.gcr import task as classify

SHORT = [
    "--config.train.steps=6",
    "--config.train.log_every=3",
    "--config.train.eval_every=3",
    "--config.train.checkpoint_every=3",
    "--config.data.batch_size=64",
]


@pytest.fixture
def train(configs):
    """Runs ``train`` on the synthetic set for a few steps."""

    def run(workdir, *arguments):
        config = f"{configs}/gcr/synthetic.py:k2"
        return main(["train", "--quiet", "--config", config, "--workdir", str(workdir), *SHORT, *arguments])

    return run


def test_train_says_where_everything_is(train, tmp_path, capsys):
    assert train(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "accuracy 0." in printed
    assert str(tmp_path / "run") in printed
    assert printed.splitlines()[-1] == f"Next: subspace-jax eval --workdir {tmp_path}/run --best"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoints", "config.json", "curves.png", "metrics.jsonl", "result.json", "tensorboard"} <= names
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "eval"] == [3, 6]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result == {name: rows[-1][name] for name in ("accuracy", "loss")}


def test_train_off_a_terminal_shows_the_run_in_lines(configs, tmp_path, caplog):
    assert (
        main(["train", "--config", f"{configs}/gcr/synthetic.py:k2", "--workdir", str(tmp_path / "run"), *SHORT]) == 0
    )
    block, *rows = [record.message for record in caplog.records if record.name == "subspace_jax.train.progress"]
    assert re.search(r"Run\n  task        represent\.gcr\n  parameters  [\d,]+ trainable of", block)
    assert block.endswith(f"output      {tmp_path}/run")
    heads = [re.match(r"step (\d)/6  (eval: |loss )", line).groups() for line in rows]
    assert heads == [("3", "loss "), ("3", "eval: "), ("6", "loss "), ("6", "eval: ")]


def test_train_prints_the_config_and_writes_nothing(train, tmp_path, capsys):
    assert train(tmp_path / "run", "--print-config", "--seed", "5") == 0
    config = json.loads(capsys.readouterr().out)
    assert (config["seed"], config["train"]["steps"], config["task"]) == (5, 6, classify.__name__)
    assert not (tmp_path / "run").exists()


def test_train_dry_run_shows_config_run_and_memory_and_writes_nothing(configs, tmp_path, capsys, monkeypatch):
    command = ["train", "--config", f"{configs}/gcr/synthetic.py:k2", *SHORT, "--dry-run"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*command, "--workdir", str(tmp_path / "run"), "--seed", "7"]) == 0
    shown = capsys.readouterr().out
    config, rest = shown.removeprefix("Config\n").split("\n\nRun\n")
    assert json.loads(config)["seed"] == 7
    for text in (
        " trainable of ",
        f"output      {tmp_path}/run",
        "Memory per chip",
        "temporaries",
        "compiled for the CPU",
    ):
        assert text in rest
    assert "libtpu, which is not installed" in rest
    assert not (tmp_path / "run").exists()
    assert main([*command, "--config.optim.name=adagrad"]) == 2


def test_train_names_a_missing_workdir(configs, capsys):
    assert main(["train", "--config", f"{configs}/gcr/synthetic.py:k2"]) == 2
    assert "--workdir: expected a folder for the run's files" in capsys.readouterr().err


def test_help_lists_every_command_in_a_group_and_the_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "\n  others\n" not in shown
    for command in (*COMMANDS.split(), "intrinsic-dimension", "plan", "info", "fetch"):
        assert re.search(rf"\n    {command} +\w.*\n +subspace-jax {command}", shown)
    assert re.search(r"\n +75  stopped by SIGTERM", shown)


def test_a_misspelled_command_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fintune", "--config", "lm/smollm2:lora"])
    assert "no command 'fintune'; did you mean finetune?" in capsys.readouterr().err


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"subspace-jax {version('subspace-jax')} (jax {version('jax')})\n"


def test_train_resumes_where_it_stopped(train, tmp_path, caplog):
    assert train(tmp_path) == 0
    assert train(tmp_path, "--config.train.steps=9") == 0
    assert "Going on from step 6" in caplog.text
    assert "train.steps: 6 -> 9" in caplog.text


@pytest.mark.slow
def test_eval_reads_the_latest_a_named_and_the_best_checkpoint(train, tmp_path, capsys):
    assert train(tmp_path, "--config.train.keep=3") == 0
    capsys.readouterr()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["accuracy"] for row in rows if row["split"] == "eval"}
    best = max(scores, key=scores.get)
    for arguments, step in (([], 6), (["--step", "3"], 3), (["--best"], best)):
        assert main(["eval", "--workdir", str(tmp_path), *arguments]) == 0
        assert capsys.readouterr().out.startswith(f"step {step}: accuracy {scores[step]:.4f}")


@pytest.mark.slow
@pytest.mark.eight_devices
def test_train_on_a_mesh_reaches_the_same_numbers(train, tmp_path):
    meshes = {"single": ["data=1"], "sharded": ["data=2", "fsdp=2", "tensor=2"]}
    losses = {}
    for name, sizes in meshes.items():
        assert train(tmp_path / name, *(f"--config.mesh.{size}" for size in sizes)) == 0
        last = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        losses[name] = last["loss"]
    assert losses["single"] == pytest.approx(losses["sharded"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_eval_takes_another_mesh_than_the_run_had(train, tmp_path, capsys):
    assert train(tmp_path, "--config.mesh.data=2", "--config.mesh.tensor=2") == 0
    printed = [capsys.readouterr().out]
    for sizes in ([], ["--config.mesh.data=1", "--config.mesh.tensor=1"]):
        assert main(["eval", "--workdir", str(tmp_path), *sizes]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[1] == printed[2]


@pytest.mark.eight_devices
def test_info_shows_versions_devices_and_mesh(capsys):
    assert main(["info", "--fsdp", "2", "--tensor", "4"]) == 0
    printed = capsys.readouterr().out
    assert f"jax {jax.__version__}" in printed
    assert "devices: 8 x cpu" in printed
    assert "mesh: data=1, fsdp=2, tensor=4" in printed


COMMANDS = (
    "methods configs train eval pretrain finetune merge export generate perplexity accuracy features probe transfer"
)


@pytest.mark.parametrize(
    "command", [[], *([name] for name in (*COMMANDS.split(), "intrinsic-dimension", "plan", "info"))]
)
def test_help_of_each_command_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert f"subspace-jax {' '.join(command)}".strip() in capsys.readouterr().out.split("examples:")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optim.learning_rat=0.1"], "unknown field; did you mean optim.learning_rate?"),
        (["--config.optim.learning_rate=fast"], "--config.optim.learning_rate: expected float such as 0.1, got 'fast'"),
        (["--config.optim=3"], "it is a group; set one of"),
        (["--config.mesh.tensor=16"], "mesh: data=-1, fsdp=1, tensor=16 needs a multiple of 16 devices, there are 1"),
        (["--config.train.best=most"], "best: expected 'max:METRIC'"),
        (["--config.train.best=max:f1"], "best: evaluation gives ['accuracy', 'loss'], got 'max:f1'"),
        (["--config.optim.name=adagrad"], "optim.name: expected one of"),
        (["--config.task=no.such.module"], "task: can't import the module 'no.such.module'"),
        (
            ["--config.optim.kwargs.momentum=-1"],
            "optim.kwargs.momentum: expected a number at least 0 and below 1, got -1",
        ),
        (["--config.optim.warmup_steps=6"], "optim.warmup_steps: expected 0 to 5 for a run of 6, got 6"),
        (["--config.train.steps=1000000000000"], "train.steps: expected at most 2147483647, got 1000000000000"),
        (["--config.train.best=max:acuracy"], "got 'max:acuracy'; did you mean 'accuracy'?"),
        (["--config.model.backbone=resnet50e"], "got 'resnet50e'; did you mean 'resnet50"),
        (["--config.model.features=1000000000,"], "model: parameters, variables and optimizer state take"),
        (["--config.data.eval_batch_size=1000000"], "eval_batch_size: expected at most"),
        (["--config.data.image.size=1000000000"], "data.image.size: expected a side of 0 to 4096, got 1000000000"),
    ],
)
def test_train_refuses_bad_settings_before_anything_is_written(train, tmp_path, capsys, arguments, message):
    assert train(tmp_path / "run", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.eight_devices
@pytest.mark.parametrize("field", ["batch_size", "eval_batch_size"])
def test_train_refuses_batches_that_do_not_divide_over_the_devices(train, tmp_path, capsys, field):
    assert train(tmp_path / "run", f"--config.data.{field}=60") == 2
    assert re.search(f"{field}: 60 .* 8 devices", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_train_names_configs_close_to_a_missing_one(configs, tmp_path, capsys):
    assert main(["train", "--config", f"{configs}/gcr/digit.py", "--workdir", str(tmp_path)]) == 2
    assert "digits.py" in capsys.readouterr().err


def test_methods_and_configs_end_with_status_1_and_a_near_name_where_nothing_matches(capsys):
    for query, message in (
        (["methods", "grasmann"], "no method matches 'grasmann'; did you mean gcr?"),
        (["methods", "xyzzy"], "no method matches 'xyzzy'; there are gcr, "),
        (["configs", "digitz"], "no config matches 'digitz'; did you mean gcr/digits"),
    ):
        assert main(query) == 1
        assert message in capsys.readouterr().err
    assert main(["methods"]) == 0
    assert capsys.readouterr().out.count("\n") < 60


def test_train_names_an_unwritable_workdir(train, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "run") == 2
    assert f"can't write to the folder {tmp_path / 'file' / 'run'}" in capsys.readouterr().err


@pytest.mark.slow
def test_train_says_which_function_of_which_phase_failed(train, tmp_path, monkeypatch, capsys):
    def stop(rows):
        raise ValueError("no such metric")

    build = classify.build

    def build_with_stop(config):
        run = build(config)
        return dataclasses.replace(run, phases=(run.phases[0]._replace(round_steps=2, stop=stop),))

    monkeypatch.setattr(classify, "build", build_with_stop)
    assert train(tmp_path) == 2
    assert "subspace-jax train: no such metric (in stop, in phase 'train')\n" in capsys.readouterr().err


@pytest.mark.parametrize("workdir", ["", ".", "./"])
def test_train_refuses_the_current_folder_as_workdir(train, workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train(workdir) == 2
    assert "--workdir: expected a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_commands_refuse_empty_paths(capsys, tmp_path):
    for command in (
        ["eval", "--workdir", ""],
        ["train", "--config", "", "--workdir", str(tmp_path / "run")],
        ["generate", "--model", "", "--prompt", "a"],
        ["generate", "--model", str(tmp_path), "--adapter", "", "--prompt", "a"],
        ["merge", "--model", str(tmp_path), "--adapter", str(tmp_path), "--out", ""],
    ):
        assert main(command) == 2
        assert "got an empty path" in capsys.readouterr().err


def test_plan_names_the_nearest_axis_and_topology(configs, capsys):
    config = ["plan", "--config", f"{configs}/gcr/digits.py"]
    for more, message in [
        (["--topology", "v5e:2x4", "--mesh", "fsdb=8"], "got 'fsdb'; did you mean 'fsdp'?"),
        (["--topology", "v5f:2x4"], "no chip 'v5f' in 'v5f:2x4'; did you mean 'v5"),
        (["--topology", "v5e:4x5"], "has no slice '4x5'; did you mean '4x"),
        (["--topology", "h100:100000000000"], "has no slice '100000000000'"),
    ]:
        assert main([*config, *more]) == 2
        assert message in capsys.readouterr().err


def test_eval_refuses_a_folder_without_a_run(tmp_path, capsys):
    assert main(["eval", "--workdir", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_train_refuses_a_field_without_equals_sign(train, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path, "--config.seed", "3")
    assert "set by --config.FIELD=VALUE" in capsys.readouterr().err


def test_main_runs_as_a_module():
    command = [sys.executable, "-m", "subspace_jax.cli.main", "methods", "grass"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("gcr (represent)")


@pytest.mark.parametrize("command", [["pretrain"], ["finetune", "--model", "x"]])
def test_pretrain_and_finetune_refuse_a_config_of_another_task(command, tmp_path, capsys):
    config = pathlib.Path(__file__).parents[2] / "configs" / "gcr" / "digits.py"
    assert main([*command, "--config", f"{config}:k8", "--workdir", str(tmp_path / "run")]) == 2
    assert f"--config {config}:k8: expected a config of a language model" in capsys.readouterr().err
