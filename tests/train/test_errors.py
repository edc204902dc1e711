"""What is wrong with a run is said before it starts, and before anything is written."""

import re

import jax
import numpy as np
import optax
import pytest

from subspace_jax import train
from subspace_jax.interpret import intrinsic_dimension
from subspace_jax.represent.gcr import task as classify

from .common import Regression, arrays, data_of, regression


def eight(*values):
    return pytest.param(*values, marks=pytest.mark.eight_devices)


GOOD = ["data.name=union_of_subspaces", "data.batch_size=64", "model.features=()", "model.dims=(2,)", "train.steps=2"]


@pytest.fixture(scope="module")
def refusal(tmp_path_factory):
    """Runs the config with more settings, which must fail, and returns the message."""

    def run(*settings, error=ValueError):
        workdir = tmp_path_factory.mktemp("refused") / "run"
        with pytest.raises(error) as refused:
            train.run(train.override(classify.default_config(), [*GOOD, *settings]), workdir, progress=False)
        assert not list(workdir.rglob("*")), "the run wrote something before it was refused"
        return str(refused.value)

    return run


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        eight(["data.batch_size=20"], "batch_size: 20 examples don't divide among 8 devices (data=8, fsdp=1)"),
        eight(["data.batch_size=24", "train.accumulate=2"], "x 2 accumulated micro-batches; take a multiple of 16"),
        eight(["data.eval_batch_size=20"], "eval_batch_size: 20 examples don't divide among 8 devices"),
        (["train.accumulate=0"], "accumulate: expected at least 1 micro-batch, got 0"),
        (["mesh.data=4", "mesh.tensor=4"], "mesh: data=4, fsdp=1, tensor=4 needs 16 devices, there are 1 (cpu)"),
        (["mesh.tensor=3"], "mesh: data=-1, fsdp=1, tensor=3 needs a multiple of 3 devices, there are 1 (cpu)"),
        (["mesh.fsdp=-1"], "mesh: sizes are positive, at most one of them -1"),
        (["mesh.data=0"], "mesh: sizes are positive"),
        (["optim.name=sdg"], "optim.name: expected one of ('sgd', 'adam', 'adamw', 'lamb', 'muon', "),
        (
            ["optim.manifold.name=adam"],
            "optim.manifold.name: expected one of ('riemannian_sgd', 'riemannian_adam'), got 'adam'",
        ),
        (
            ["optim.schedule=root"],
            "optim.schedule: expected one of ('constant', 'linear', 'cosine', 'step'), got 'root'",
        ),
        (["optim.warmup_steps=2"], "optim.warmup_steps: expected 0 to 1 for a run of 2, got 2"),
        (["optim.manifold.kwargs.retraction=expo"], "optim.manifold.kwargs.retraction: expected one of"),
        (["train.remat=some"], "remat: expected one of ['dots', 'full', 'none'], got 'some'"),
        (["train.finite_check=gradient"], "got 'gradient'; did you mean 'gradients'?"),
        (["train.best=max:f1"], "best: evaluation gives ['accuracy', 'loss'], got 'max:f1'"),
        (["train.best=accuracy"], "best: expected 'max:METRIC' or 'min:METRIC'"),
        (["train.steps=-1"], "expected a run of at least 1 step"),
        (["train.steps=0", "train.epochs=0.0"], "expected a run of at least 1 step"),
        (["train.log_every=0"], "train.log_every: expected at least 1 step, got 0"),
        (["train.eval_every=-1"], "expected 0 or a number of steps"),
        (["train.profile_at=-1"], "expected 0 or a number of steps"),
        (["train.keep=0"], "train.keep: expected at least 1 checkpoint, got 0"),
        (["task=no.such.module"], "task: can't import the module 'no.such.module'"),
        (["task="], "task: can't import the module ''"),
        (["task=json"], "task: the module 'json' has no function build(config)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_that_can_not_be_is_refused(settings, message, refusal):
    assert message in refusal(*settings)


def test_a_set_that_is_not_prepared_is_answered_with_how_to_prepare_it(refusal, tmp_path):
    message = refusal("data.name=cifar10", f"data.data_dir={tmp_path}", error=FileNotFoundError)
    assert "the set 'cifar10' is not prepared under" in message
    assert re.search(r"-m subspace_jax\.data\.prepare cifar10 --data_dir ", message)


@pytest.mark.parametrize("below", ["", "run", "run/deeper"])
def test_a_workdir_that_can_not_be_written_is_named(below, tmp_path):
    # Below a regular file, which not even root can make a folder of.
    (tmp_path / "file").touch()
    workdir = tmp_path / "file" / below
    with pytest.raises(OSError, match=f"can't write to the folder {workdir}"):
        train.run(train.override(classify.default_config(), GOOD), workdir, progress=False)


def test_fit_refuses_an_evaluation_set_without_a_batch(fit, tmp_path):
    task, data = regression()
    for sets, message in (({"eval": lambda: []}, "set 'eval' gave no batch"), ({}, "no set 'eval' for 'eval'")):
        with pytest.raises(ValueError, match=rf"data\.evaluate: .*{message}"):
            fit(task, optax.sgd(0.1), data._replace(evaluate=sets), num_steps=1, workdir=tmp_path)


@pytest.mark.eight_devices
def test_fit_refuses_an_evaluation_batch_that_does_not_shard(fit, tmp_path):
    data = data_of(arrays(32), arrays(32), eval_batch_size=12)
    with pytest.raises(ValueError, match="eval_batch_size: 12 examples don't divide among 8 devices"):
        fit(Regression(), optax.sgd(0.1), data, num_steps=1, workdir=tmp_path)


def test_a_mesh_without_the_axes_of_the_rules_is_named(fit, tmp_path):
    task, data = regression()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match=r"rule for 'batch' names mesh axes \['fsdp'\]; the mesh has \['data'\]"):
        fit(task, optax.sgd(0.1), data, num_steps=1, workdir=tmp_path, mesh=mesh)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "num_steps: expected at least 1 in phase 'train', got 0"),
        ({"tx": None}, "tx: expected an optimizer in phase 'train', got none"),
        ({"stop": lambda rows: True}, "stop: it is called between rounds; expected round_steps in phase 'train'"),
        ({"round_steps": -1}, "round_steps: expected at least 0"),
        ({"tx": "adam"}, "tx: expected an Optax transform in phase 'train', got 'adam'"),
        ({"tx": {"v": optax.sgd(0.1)}}, r"tx: expected entries of the parameters \['w'\], got \['v'\]"),
        ({"data": arrays(32)}, "data: expected a DataSpec in phase 'train', got dict"),
        ({"best": "max:f1"}, r"best: evaluation gives \['loss'\], got 'max:f1'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fit_refuses_a_phase_that_can_not_be(fields, message, tmp_path):
    task, data = regression()
    phase = train.Phase("train", task, data, 1, optax.sgd(0.1))._replace(**fields)
    with pytest.raises(ValueError, match=message):
        train.fit(train.Run((phase,), workdir=tmp_path / "run"))
    with pytest.raises(ValueError, match=r"phases: expected names that differ, got \['a', 'a'\]"):
        train.fit(train.Run((phase._replace(name="a"),) * 2, workdir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "returned", "message"),
    [
        ("roles", {"ww": "no_decay"}, "roles: expected paths of parameters, got 'ww'; did you mean 'w'"),
        ("evaluators", {"rank": train.Evaluator}, "evaluators: expected an Evaluator as 'rank', got <class"),
        ("frozen", ("base",), r"frozen: expected entries of the variables \['mean', 'seen'\], got \['base'\]"),
        ("after_update", ({"w": np.zeros(4, np.float32)}, {}), r"after_update: params/w: expected float32\[8\], got"),
        ("loss", (np.float32(0), ({}, {})), "loss: variables: expected PyTreeDef"),
    ],
)
def test_fit_refuses_what_a_task_returns(method, returned, message, fit, tmp_path):
    task, data = regression()
    setattr(task, method, returned if method == "frozen" else lambda *args, **kwargs: returned)
    with pytest.raises(ValueError, match=message):
        fit(task, optax.sgd(0.1), data, num_steps=1, workdir=tmp_path)


@pytest.mark.parametrize(
    ("collected", "finished", "message"),
    [
        (lambda x: x, {"rank": "high"}, "finish of 'rank': expected scalars and arrays of numbers, got rank='high'"),
        (lambda x: x, 0.5, "finish of 'rank': expected a dict of scalars and arrays, got float"),
        (lambda x: x, {"split": 0.5}, r"finish of 'rank': \['split'\] name fields of a row; expected other names"),
        (np.sum, {}, r"collect: expected arrays with 16 examples as first axis, got shapes \[\(\)\]"),
    ],
)
def test_fit_refuses_what_an_evaluator_returns(collected, finished, message, fit, tmp_path):
    class Rank(train.Evaluator):
        reduce = "rows"

        def collect(self, model, batch, *, key):
            return collected(batch["labels"])

        def finish(self, eval):
            return finished

    task, data = regression()
    task.evaluators = lambda: {"rank": Rank()}
    with pytest.raises(ValueError, match=message):
        fit(task, optax.sgd(0.1), data, num_steps=1, workdir=tmp_path, best="")


@pytest.mark.parametrize(
    ("summary", "message"),
    [(None, "summary: expected a dict"), ({"x": np.zeros(2)}, r"summary: expected scalars, got arrays \['x'\]")],
)
def test_fit_refuses_a_summary_that_is_no_dict_of_scalars(summary, message, tmp_path):
    task, data = regression()
    phase = train.Phase("train", task, data, 1, optax.sgd(0.1))
    with pytest.raises(ValueError, match=message):
        train.fit(train.Run((phase,), lambda rows: summary, workdir=tmp_path, progress=False))


def test_a_folder_without_a_run_and_a_run_without_a_checkpoint_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        train.restore(tmp_path)
    train.save_config(train.override(classify.default_config(), GOOD), tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint yet"):
        train.restore(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint yet"):
        train.restore(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint that was evaluated"):
        train.restore(tmp_path, step="best")


def test_make_train_step_refuses_unknown_options_and_no_micro_batch():
    task, _ = regression()
    for options, message in (
        ({"remat": "all"}, "remat: expected one of"),
        ({"finite_check": "loss"}, "finite_check: expected one of"),
        ({"accumulate": 0}, "accumulate: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            train.make_train_step(task, optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("file", "setting", "message"),
    [
        ("adapters/rotated_digits.py", "pretrain.epochs=1000000000", "pretrain.epochs: expected at most 10000"),
        ("adapters/rotated_images.py", "pretrain.learning_rate=1e300", "pretrain.learning_rate: expected a finite"),
        ("adapters/rotated_digits.py", "adapter.method=lara", "adapter.method: expected .*; did you mean 'lora'"),
        ("gcr/imagenet_resnet.py", "data.image.size=-1", "data.image.size: expected a side of 0 to 4096, got -1"),
        ("gcr/imagenet_resnet.py", "data.image.flip=2", "data.image.flip: expected a probability, got 2.0"),
        ("gcr/imagenet_resnet.py", "data.image.on_unreadable=no", "data.image.on_unreadable: expected one of"),
        ("gcr/imagenet_resnet.py", "optim.warmup_steps=-1", "optim.warmup_steps: expected at least 0, got -1"),
        ("gcr/imagenet_resnet.py", "data.batch_size=1000000000", "data.batch_size: expected at most 1048576 examples"),
        ("gcr/imagenet_resnet.py", "train.remat=al", "train.remat: expected one of"),
        ("gcr/imagenet_resnet.py", "train.epochs=-3", "train.epochs: expected a finite number at least 0, got -3.0"),
        ("lm/large.py", "optim.kwargs.side=left", "optim.kwargs.side: unknown argument, expected one of"),
        ("lm/tiny.py", "model.size=tiniy", "model.size: expected one of .*; did you mean 'tiny'"),
    ],
)  # fmt: skip
def test_build_refuses_a_field_before_it_reads_data(configs, file, setting, message):
    # The sets of most of these configs are not there, which would be said of a run that got so far.
    with pytest.raises(ValueError, match=message):
        train.build(train.override(train.load_config(f"{configs}/{file}"), [setting]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("fraction=0", r"intrinsic.fraction: expected a number in \(0, 1\], got 0.0"),
        ("dims=()", "intrinsic.dims: expected dimensions of at least 1, got "),
        ("dims=-5,", "intrinsic.dims: expected dimensions of at least 1, got "),
        ("repeats=0", "intrinsic.repeats: expected at least 1, got 0"),
        ("method=fastfod", "intrinsic.method: expected one of .*; did you mean 'fastfood'"),
        ("full_learning_rate=-1", "intrinsic.full_learning_rate: expected a finite number at least 0"),
    ],
)
def test_measure_config_refuses_its_fields_before_it_reads_data(configs, setting, message, tmp_path):
    config = train.override(train.load_config(f"{configs}/optim/intrinsic_mnist.py"), [f"intrinsic.{setting}"])
    with pytest.raises(ValueError, match=message):
        intrinsic_dimension.measure_config(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("group", "field", "near"), [("mesh", "dat", "data"), ("model", "dimz", "dims")])
def test_an_unknown_field_of_a_config_that_was_read_is_named(group, field, near):
    config = classify.default_config()
    with config.unlocked():
        config[group][field] = 1
    with pytest.raises(ValueError, match=rf"^{group}\.{field}: unknown field; did you mean '{near}'\?$"):
        train.build(config)
