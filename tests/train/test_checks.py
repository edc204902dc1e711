"""What a user's own task, evaluator or hook gets wrong is said with its name, what came and what was expected."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from subspace_jax import train
from subspace_jax.represent.gcr import task as classify
from subspace_jax.train import checks, experiment

from .common import Regression, arrays, regression


def check(task):
    _, data = regression()
    checks.check_tasks(train.Run((train.Phase("own", task, data, 1, optax.sgd(0.1)),)))


def task_with(**methods):
    """A task called Own with some methods of its own."""
    return type("Own", (Regression,), methods)()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"init": lambda self, key: {"w": key}}, r"Own\.init: expected \(params, variables\), got a dict of \['w'\]"),
        ({"init": lambda self, key: None}, r"Own\.init: expected \(params, variables\), got NoneType"),
        ({"init": lambda self: None}, r"Own\.init: expected the parameters \(key\), got \(\)"),
        ({"axes": lambda self: {"w": P()}}, r"Own\.axes: expected \(axes of params, axes of variables\), got a dict"),
        (
            {"axes": lambda self: ({"w": P("embed")}, {"mean": P()})},
            r"Own\.axes: .* each array of variables, \['mean', 'seen'\], got \['mean'\]",
        ),
        ({"axes": lambda self: ({}, {})}, r"Own\.axes: .* each array of params, \['w'\], got \[\]"),
        ({"roles": lambda self: ["w"]}, r"Own\.roles: expected a dict of path to role, got list"),
        ({"roles": lambda self: {"w": "grassman"}}, r"Own\.roles\['w'\]: expected one of .*; did you mean 'grassmann'"),
        ({"evaluators": lambda self: []}, r"Own\.evaluators: expected a dict of evaluators by name, got list"),
        (
            {"loss": lambda self, params, variables, batch, key: None},
            r"Own\.loss: expected the parameters \(params, variables, batch, \*, key, step\)",
        ),
        (
            {"after_update": lambda self, params: params},
            r"Own\.after_update: expected the parameters \(params, variables, \*, key, step\), got \(params\)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_check_tasks_names_the_method_that_takes_or_returns_something_else(methods, message):
    with pytest.raises(ValueError, match=message):
        check(task_with(**methods))


def test_check_tasks_refuses_a_class():
    with pytest.raises(ValueError, match=r"task: expected an instance of a Task .* 'own', got the class Regression"):
        check(Regression)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"finish": lambda self, test: {}}, r"Own\.finish: expected the parameters \(\*, eval\), got \(test\)"),
        (
            {"finish": lambda self, eval: {}, "sets": ()},
            r"Own\.finish: expected the parameters \(\*, result\), got \(eval\)",
        ),
        (
            {"collect": lambda self, model, batch: batch},
            r"Own\.collect: expected the parameters \(model, batch, \*",
        ),
    ],
)
def test_check_tasks_names_the_method_of_an_evaluator_that_takes_something_else(fields, message):
    evaluator = type("Own", (train.Evaluator,), fields)()
    with pytest.raises(ValueError, match=message):
        check(task_with(evaluators=lambda self: {"eval": evaluator}))


LOSS = r"Own\.loss: expected \(loss, \(variables, metrics\)\), got "


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss, variables, metrics: loss, r"float32\[\]"),
        (lambda loss, variables, metrics: (loss, metrics), r"\(float32\[\], a dict of \['error'\]\)"),
        (
            lambda loss, variables, metrics: (loss, variables, metrics),
            r"\(float32\[\], a dict of \['mean', 'seen'\], a dict of \['error'\]\)",
        ),
        (lambda loss, variables, metrics: (loss, (variables, None)), r"\(float32\[\], \(a dict of .*, NoneType\)\)"),
    ],
)
def test_gradients_of_a_task_name_what_its_loss_returned(returned, message):
    def loss(self, *args, **kwargs):
        value, (variables, metrics) = Regression.loss(self, *args, **kwargs)
        return returned(value, variables, metrics)

    task, batch = task_with(loss=loss), dict(regression()[1].batch)

    def gradients(key, batch):
        return task.gradients(*task.init(key), batch, key=key, step=0)

    with pytest.raises(ValueError, match=LOSS + message):
        jax.eval_shape(gradients, jax.random.key(0), batch)


def test_a_task_without_a_method_that_is_called_names_it():
    class Bare(train.Task):
        """Nothing."""

    for call, message in (
        (lambda task: task.init(None), r"Bare has no init\(key\)"),
        (lambda task: task.loss(None, None, None, key=None, step=0), r"Bare has no loss\(params, variables"),
        (lambda task: task.evaluate(None, None, None, key=None), r"Bare has no evaluate\(params, variables"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call(Bare())


@pytest.mark.parametrize(
    ("sums", "message"), [(None, "got NoneType"), ({"loss": 0.0}, r"got a dict of \['loss'\]")], ids=["none", "loss"]
)
def test_fit_refuses_sums_of_evaluate_without_count(sums, message, fit, tmp_path):
    task = task_with(evaluate=lambda self, params, variables, batch, *, key: sums)
    with pytest.raises(ValueError, match=rf"Own\.evaluate: expected sums with 'count', {message}"):
        fit(task, optax.sgd(0.1), regression()[1], num_steps=1, workdir=tmp_path)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ([train.Hook], "hooks: expected instances of Hook, got the class Hook"),
        (train.Hook(), "hooks: expected a sequence of Hook objects, got Hook"),
        ([print], "hooks: expected instances of Hook, got builtin_function_or_method"),
        (
            [type("Own", (train.Hook,), {"on_step": lambda self, step: None})()],
            r"Own\.on_step: expected the parameters \(step, metrics, batch\), got \(step\)",
        ),
    ],
    ids=["class", "single", "function", "parameters"],
)
def test_fit_refuses_what_is_no_hook_before_it_writes(hooks, message, fit, tmp_path):
    task, data = regression()
    with pytest.raises(ValueError, match=message):
        fit(task, optax.sgd(0.1), data, num_steps=1, workdir=tmp_path / "run", hooks=hooks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_set": {}}, "train_set: expected a dict of arrays .*, got a dict of"),
        ({"train_set": np.zeros((4, 2))}, r"train_set: expected a dict of arrays .*, got float64\[4, 2\]"),
        (
            {"train_set": {"inputs": np.zeros(4), "labels": np.zeros(3)}},
            "train_set: expected the same number of",
        ),
        ({"evaluate": arrays(8)}, r"evaluate\['inputs'\]: expected a dict of arrays .*, got float32\[8, 8\]"),
        ({"evaluate": None}, "evaluate: expected a dict of sets by name, got NoneType"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
    ],
)
def test_array_data_names_the_argument_that_can_not_serve(arguments, message):
    with pytest.raises(ValueError, match=message):
        train.array_data(**{"train_set": arrays(8), "batch_size": 4, "evaluate": {"eval": arrays(8)}, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": {}}, "examples: expected a dict of arrays .*, got a dict of"),
        ({"examples": {"inputs": np.zeros((0, 2))}}, "examples: expected .*, at least one, .*, got {'inputs': 0}"),
        ({"multiple_of": 0}, "multiple_of: expected an integer of at least 1, got 0"),
        ({"multiple_of": 2.0}, "multiple_of: expected an integer of at least 1, got 2.0"),
        ({"evaluate": {"eval": arrays(8)}}, r"evaluate\['eval'\]: expected a function .*, got a dict of \['inputs', "),
    ],
)
def test_whole_set_data_names_the_argument_that_can_not_serve(arguments, message):
    with pytest.raises(ValueError, match=message):
        train.whole_set_data(**{"examples": arrays(8), **arguments})


def test_build_refuses_what_is_no_run(monkeypatch):
    monkeypatch.setattr(classify, "build", lambda config: ())
    with pytest.raises(ValueError, match=r"task: expected a Run from build\(config\) of 'subspace_jax.*', got \(\)"):
        train.build(classify.default_config())


@pytest.mark.parametrize(("steps", "expected"), [(4, [4, 2, 4]), (0, [6, 2, 8])])
def test_train_steps_bounds_every_phase_and_epochs_those_without_steps_of_their_own(steps, expected):
    task, data = regression()
    config = train.default_config()
    config.train.steps, config.train.epochs = steps, 2.0
    phases = tuple(train.Phase(str(own), task, data, own, optax.sgd(0.1)) for own in (6, 2, 0))
    run = experiment.complete_run(train.Run(phases), config)
    assert [phase.num_steps for phase in run.phases] == expected


class Failing(train.Hook):
    """Raises in one of its methods."""

    def __init__(self, event):
        setattr(self, event, failing)


def failing(*args):
    raise KeyError("accuracy")


@pytest.mark.parametrize(
    ("own", "notes"),
    [
        ({"stop": failing}, ["in stop", "in phase 'own'"]),
        ({"refresh": failing}, ["in refresh", "in phase 'own'"]),
        ({"data": failing}, ["in data", "in phase 'own'"]),
        ({"enter": failing}, ["in enter of phase 'own'"]),
        ({"summary": failing}, ["in Run.summary"]),
        ({"hook": "on_start"}, ["in Failing.on_start"]),
        ({"hook": "on_step"}, ["in Failing.on_step", "in phase 'own'"]),
        ({"hook": "on_row"}, ["in Failing.on_row", "in phase 'own'"]),
        ({"hook": "on_close"}, ["in Failing.on_close"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_function_of_the_user_raises_has_a_note_of_function_and_phase(own, notes, tmp_path):
    task, data = regression()
    fields = {name: value for name, value in own.items() if name in train.Phase._fields}
    phase = train.Phase("own", task, data, 4, optax.sgd(0.1), round_steps=2)._replace(**fields)
    hooks = [Failing(own["hook"])] if "hook" in own else []
    run = train.Run((phase,), own.get("summary"), workdir=tmp_path, progress=False)
    with pytest.raises(KeyError, match="accuracy") as raised:
        train.fit(run, hooks)
    assert [note for note in raised.value.__notes__ if note.startswith("in ")] == notes


@pytest.mark.parametrize(
    ("method", "found", "message"),
    [
        ("after_update", lambda self, params, variables, **_: params, r"\(params, variables\), got a dict of"),
        ("load", lambda self, shardings: {"w": 0.0}, r"\(params, variables\), got a dict of \['w'\]"),
        ("gradients", lambda self, *args, **_: 0.0, r"\(\(loss, \(variables, metrics\)\), grads\), got float"),
    ],
    ids=["after_update", "load", "gradients"],
)
def test_make_train_step_names_the_method_that_returns_no_pair(method, found, message):
    task, tx, mesh = task_with(**{method: found}), optax.sgd(0.1), train.make_mesh(1)

    def first_step():
        state = train.init_state(task, tx, mesh)
        return train.jit_train_step(task, tx, mesh)(state, next(regression()[1].train(0)))

    with pytest.raises(ValueError, match=rf"Own\.{method}: expected {message}"):
        first_step()
