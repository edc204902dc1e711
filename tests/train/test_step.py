import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from subspace_jax import train

from ..variants import rest_slow
from .common import (
    Regression,
    arrays,
    assert_close,
    assert_same_bits,
    classification,
    make_tx,
    regression,
    take_steps,
    to_numpy,
)


def eight(*values):
    return pytest.param(*values, marks=pytest.mark.eight_devices)


@pytest.fixture(scope="module")
def plain():
    """Four steps with no option set."""
    task, data = classification(head="softmax")
    return take_steps(task, data, optax.sgd(0.1, momentum=0.9), train.make_mesh(1))


@pytest.mark.parametrize(
    "options",
    rest_slow(
        [{"accumulate": 4}, {"remat": "dots"}, {"finite_check": "gradients"}, {"accumulate": 2}, {"remat": "full"}]
    ),
    ids=str,
)
def test_options_of_make_train_step_change_no_step(options, plain):
    task, data = classification(head="softmax")
    state, metrics = take_steps(task, data, optax.sgd(0.1, momentum=0.9), train.make_mesh(1), **options)
    assert_close(state, plain[0], atol=1e-5)
    assert_close(metrics, plain[1], atol=1e-5)


@pytest.mark.slow
def test_bfloat16_activations_keep_the_state_float32_and_the_loss_close():
    task, data = classification()
    _, expected = take_steps(task, data, make_tx(), train.make_mesh(1))
    task, data = classification(dtype="bfloat16")
    state, metrics = take_steps(task, data, make_tx(), train.make_mesh(1))
    floats = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
    # bfloat16 has 8 bits: activations are off by up to 2^-9 = 0.2 %, and the logits are up to gamma = 25.
    losses, expected = ([float(values["loss"]) for values in rows] for rows in (metrics, expected))
    assert losses == pytest.approx(expected, abs=0.05)
    assert losses != expected
    bases = np.asarray(state.params["head"]["bases"])
    np.testing.assert_allclose(bases.swapaxes(-1, -2) @ bases, np.broadcast_to(np.eye(2), (8, 2, 2)), atol=1e-5)


def step_and_state(tx=None, mesh=None, **options):
    task, data = regression()
    tx, mesh = tx or optax.sgd(1e-2, momentum=0.9), mesh or train.make_mesh()
    return train.jit_train_step(task, tx, mesh, **options), train.init_state(task, tx, mesh), data, mesh


def place(batch, mesh):
    return train.to_device(batch, train.batch_sharding(mesh))


@pytest.mark.parametrize(
    ("value", "accumulate", "finite_check"),
    rest_slow(
        itertools.product((np.nan, np.inf), (1, 2), ("state", "gradients")),
        (np.inf, 2, "state"),
        (np.nan, 1, "gradients"),
    ),
)
def test_a_batch_that_is_not_finite_changes_nothing_but_the_counts(value, accumulate, finite_check):
    step, state, data, mesh = step_and_state(accumulate=accumulate, finite_check=finite_check)
    batches = data.train(0)
    state, _ = step(state, place(next(batches), mesh))
    before = to_numpy(state)
    bad = next(batches)
    bad["inputs"][3, 2] = value
    state, metrics = step(state, place(bad, mesh))
    after = to_numpy(state)
    for field in ("params", "variables", "opt_state", "key"):
        assert_same_bits(getattr(after, field), getattr(before, field))
    assert (after.step, after.skipped, int(metrics["skipped"])) == (2, 1, 1)
    state, metrics = step(state, place(next(batches), mesh))
    assert np.isfinite(float(metrics["loss"]))
    assert (int(state.step), int(state.skipped)) == (3, 1)
    assert np.any(np.asarray(state.params["w"]) != after.params["w"])


def test_a_finite_loss_with_a_gradient_that_is_not_finite_is_skipped():
    class Root(Regression):
        def loss(self, params, variables, batch, *, key, step):
            # The root has an infinite slope at 0.
            return jnp.sqrt(jnp.sum(0.0 * params["w"])), (variables, {})

    tx, mesh = optax.sgd(0.1), train.make_mesh(1)
    state = train.init_state(Root(), tx, mesh)
    before = to_numpy(state.params)
    state, metrics = train.jit_train_step(Root(), tx, mesh)(state, arrays(8))
    assert float(metrics["loss"]) == 0
    assert int(state.skipped) == 1
    assert_same_bits(state.params, before)


def spoiling(at, where, value):
    """An optimizer whose update, or whose state alone, has one entry that is not finite at one step."""

    def init(params):
        return {
            "count": jnp.zeros((), jnp.int32),
            "best": jnp.asarray(jnp.inf),
            "memory": optax.tree.zeros_like(params),
        }

    def update(grads, state, params=None):
        def spoilt(x, part):
            return x.at[3].set(jnp.where((state["count"] == at) & (part == where), value, x[3]))

        memory = jax.tree.map(lambda m, g: spoilt(m + g, "state"), state["memory"], grads)
        updates = jax.tree.map(lambda g: spoilt(-0.01 * g, "update"), grads)
        return updates, {"count": state["count"] + 1, "best": state["best"], "memory": memory}

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("sizes", [{"data": 1}, eight({"data": 2, "fsdp": 2, "tensor": 2})], ids=str)
@pytest.mark.parametrize(
    ("where", "value"),
    [("update", np.nan), *(pytest.param(x, np.inf, marks=pytest.mark.slow) for x in ("state", "update"))],
)
def test_an_update_or_an_optimizer_state_that_is_not_finite_is_skipped(where, value, sizes):
    # Loss and gradient are finite; the state holds an infinite best value all along, which is not what is looked for.
    step, state, data, mesh = step_and_state(spoiling(1, where, value), train.make_mesh(**sizes))
    batches = data.train(0)
    state, _ = step(state, place(next(batches), mesh))
    assert int(state.skipped) == 0
    before = to_numpy(state)
    state, metrics = step(state, place(next(batches), mesh))
    after = to_numpy(state)
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert (after.step, after.skipped, int(metrics["skipped"])) == (2, 1, 1)
    for field in ("params", "variables", "opt_state"):
        assert_same_bits(getattr(after, field), getattr(before, field))


def test_variables_that_are_no_longer_finite_are_not_kept():
    class Spoilt(Regression):
        def loss(self, params, variables, batch, *, key, step):
            loss, (found, metrics) = super().loss(params, variables, batch, key=key, step=step)
            return loss, ({**found, "mean": jnp.where(variables["seen"] == 1, jnp.nan, found["mean"])}, metrics)

    tx, mesh = optax.adam(1e-2), train.make_mesh(1)
    step, state = train.jit_train_step(Spoilt(), tx, mesh), train.init_state(Spoilt(), tx, mesh)
    with jax.numpy_dtype_promotion("standard"):
        for expected in (0, 1, 2):  # it stays at the value that spoils it
            state, _ = step(state, arrays(8))
            assert int(state.skipped) == expected
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.variables, state.opt_state)))


@pytest.mark.slow
def test_the_gradient_norm_leaves_out_parameters_with_the_role_probe():
    class Probed(Regression):
        def init(self, key):
            params, variables = super().init(key)
            return {**params, "energy": {"rows": jnp.zeros(3)}}, variables

        def axes(self):
            return {"w": P("embed"), "energy": {"rows": P(None)}}, super().axes()[1]

        def roles(self):
            return {"energy": "probe"}  # of all parameters below

        def loss(self, params, variables, batch, *, key, step):
            loss, rest = super().loss(params, variables, batch, key=key, step=step)
            return loss + jnp.sum(1e3 * params["energy"]["rows"]), rest

    norms = []
    for task in (Regression(), Probed()):
        tx, mesh = optax.sgd(0.0), train.make_mesh(1)
        step, state = train.jit_train_step(task, tx, mesh), train.init_state(task, tx, mesh)
        norms.append(float(step(state, arrays(8))[1]["grad_norm"]))
    assert norms[0] == norms[1]


@pytest.mark.parametrize("sizes", [{"data": 1}, eight({"data": 2, "fsdp": 2, "tensor": 2})], ids=str)
def test_a_step_is_compiled_once(sizes):
    step, state, data, mesh = step_and_state(mesh=train.make_mesh(**sizes))
    batches = data.train(0)
    for _ in range(4):
        state, _ = step(state, place(next(batches), mesh))
    assert step._cache_size() == 1


def test_make_train_step_is_pure_and_traced_under_the_mesh_of_the_context():
    task, data = regression()
    tx = optax.sgd(1e-2)
    step, batch = train.make_train_step(task, tx), next(data.train(0))
    state = train.new_state(task, tx, jax.random.key(0))
    plain, _ = jax.jit(step)(state, batch)
    with train.use_mesh(train.make_mesh(1)):
        placed, _ = jax.jit(step)(state, batch)
    assert_same_bits(placed, plain)


class Pair(Regression):
    """Two factors of one prediction, and a metric that names the step and the entry."""

    def init(self, key):
        return {"a": jnp.full(self.n, 0.1), "b": {"scale": jnp.ones(())}, "c": jnp.ones(2)}, {"seen": jnp.zeros(())}

    def axes(self):
        return {"a": P("embed"), "b": {"scale": P()}, "c": P()}, {"seen": P()}

    def loss(self, params, variables, batch, *, key, step):
        error = jnp.mean(jnp.square(params["b"]["scale"] * batch["inputs"] @ params["a"] - batch["labels"]))
        return error, ({"seen": variables["seen"] + 1}, {"step": step})


def test_transforms_by_entry_update_in_turn_at_the_parameters_as_they_then_stand():
    batch, task = arrays(8), Pair()
    tx = {"a": optax.sgd(0.1), "b": optax.sgd(0.2)}
    state = train.init_state(task, tx, train.make_mesh(1))
    params = to_numpy(state.params)

    def loss(params):
        return task.loss(params, {"seen": jnp.zeros(())}, batch, key=None, step=0)[0]

    expected = {**params, "a": params["a"] - 0.1 * jax.grad(loss)(params)["a"]}
    expected = {**expected, "b": {"scale": params["b"]["scale"] - 0.2 * jax.grad(loss)(expected)["b"]["scale"]}}
    state, metrics = train.jit_train_step(task, tx, train.make_mesh(1))(state, batch)
    assert_close(state.params, expected, atol=1e-6)
    assert state.opt_state.keys() == {"a", "b"}
    assert (float(state.variables["seen"]), int(metrics["step"])) == (2, 0)


def test_an_entry_whose_gradient_is_not_finite_stays_and_later_ones_too():
    class Broken(Pair):
        def loss(self, params, variables, batch, *, key, step):
            loss, (found, _) = super().loss(params, variables, batch, key=key, step=step)
            # The root has an infinite slope at 0.
            return loss + jnp.sqrt(0.0 * params["b"]["scale"]), (found, {})

    task, mesh = Broken(), train.make_mesh(1)
    tx = {entry: optax.sgd(0.1, momentum=0.9) for entry in ("a", "b", "c")}
    step = train.jit_train_step(task, tx, mesh, finite_check="gradients")
    before = to_numpy(train.init_state(task, tx, mesh))
    after = to_numpy(step(train.init_state(task, tx, mesh), arrays(8))[0])
    for entry in ("b", "c"):
        assert_same_bits(after.params[entry], before.params[entry])
        assert_same_bits(after.opt_state[entry], before.opt_state[entry])
    assert (int(after.step), int(after.skipped)) == (1, 1)
    assert np.any(after.params["a"] != before.params["a"])
    assert_same_bits(after.variables, before.variables)


def test_after_update_runs_once_and_what_it_makes_not_finite_is_skipped():
    class Retracted(Regression):
        def after_update(self, params, variables, *, key, step):
            w = params["w"] / jnp.linalg.norm(params["w"])
            return {"w": jnp.where(step == 2, jnp.nan, w)}, {**variables, "seen": variables["seen"] + 100}

    tx, mesh = optax.sgd(0.1), train.make_mesh(1)
    step, state = train.jit_train_step(Retracted(), tx, mesh, accumulate=2), train.init_state(Retracted(), tx, mesh)
    for skipped in (0, 0, 1):
        state, _ = step(state, arrays(8))
        assert np.linalg.norm(state.params["w"]) == pytest.approx(1, abs=1e-6)
        assert int(state.skipped) == skipped
    assert int(state.variables["seen"]) == 2 * 102


def test_accumulation_is_refused_for_a_loss_of_the_whole_batch():
    class Whole(Regression):
        splittable = False

    with pytest.raises(ValueError, match="accumulate: the loss of Whole needs its whole batch, got 2"):
        train.make_train_step(Whole(), optax.sgd(0.1), accumulate=2)


def test_the_state_is_donated():
    step, state, data, mesh = step_and_state()
    new, _ = step(state, place(next(data.train(0)), mesh))
    big = [x for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim]
    assert big
    assert all(x.is_deleted() for x in big)
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_every_step_and_every_micro_batch_has_randomness_of_its_own():
    class Draw(Regression):
        def loss(self, params, variables, batch, *, key, step):
            loss = jnp.sum(jnp.square(params["w"])) + jnp.sum(batch["inputs"]) * 0
            return loss, (variables, {"draw": jax.random.uniform(key)})

    tx, mesh = optax.sgd(0.0), train.make_mesh(1)

    steps = {n: train.jit_train_step(Draw(), tx, mesh, accumulate=n) for n in (1, 4)}

    def draws(seed, accumulate):
        state, step, made = train.init_state(Draw(), tx, mesh, seed=seed), steps[accumulate], []
        for _ in range(3):
            state, metrics = step(state, arrays(8))
            made.append(float(metrics["draw"]))
        return made

    assert draws(0, 1) == draws(0, 1)
    assert len({*draws(0, 1), *draws(1, 1)}) == 6
    state = train.init_state(Draw(), tx, mesh)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 0)
    parts = [float(jax.random.uniform(k)) for k in jax.random.split(key, 4)]
    assert draws(0, 4)[0] == pytest.approx(np.mean(parts), abs=1e-6)


def test_variables_pass_through_every_micro_batch():
    step, state, data, mesh = step_and_state(accumulate=2)
    for batch in (next(data.train(0)), next(data.train(1))):
        state, _ = step(state, place(batch, mesh))
    assert int(state.variables["seen"]) == 4


def test_the_optimizer_is_given_the_loss():
    def update(grads, state, params=None, *, value, **extra_args):
        return grads, value

    watch = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    step, state, data, mesh = step_and_state(optax.chain(watch, optax.sgd(0.1)))
    state, metrics = step(state, place(next(data.train(0)), mesh))
    assert float(state.opt_state[0]) == float(metrics["loss"])


def test_metrics_are_replicated_scalars():
    step, state, data, mesh = step_and_state()
    _, metrics = step(state, place(next(data.train(0)), mesh))
    assert metrics.keys() == {"loss", "error", "grad_norm", "skipped"}
    assert all(value.shape == () and value.sharding.is_fully_replicated for value in metrics.values())


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 1},
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=[pytest.mark.eight_devices, pytest.mark.slow]),
    ],
    ids=str,
)
def test_evaluate_counts_every_example_of_a_set_that_does_not_fill_its_batches_once(sizes):
    task, data = classification()
    mesh, tx = train.make_mesh(**sizes), make_tx()
    state = train.init_state(task, tx, mesh)
    metrics = train.evaluate(task, state, data.evaluate, mesh=mesh)
    rows = [
        (batch["inputs"][batch["mask"] > 0], batch["labels"][batch["mask"] > 0]) for batch in data.evaluate["eval"]()
    ]
    inputs, labels = (np.concatenate(part) for part in zip(*rows, strict=True))
    assert len(labels) == 72
    logits = np.asarray(task.module(to_numpy(state.params), {})(inputs))
    assert metrics["accuracy"] == np.mean(logits.argmax(-1) == labels)  # exact: correct predictions are counted


def test_evaluate_of_nothing_is_refused():
    task, _ = regression()
    mesh = train.make_mesh(1)
    state = train.init_state(task, optax.sgd(0.1), mesh)
    empty = {**arrays(8), "mask": np.zeros(8, np.float32)}
    for batches, message in (([], "gave no batch"), ([empty], "gave no example")):
        with pytest.raises(ValueError, match=message):
            train.evaluate(task, state, {"eval": lambda batches=batches: batches}, mesh=mesh)
