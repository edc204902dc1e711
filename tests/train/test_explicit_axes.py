"""Steps on a mesh with Explicit axes do what they do on one with Auto axes, and their arrays say how they are split."""

import jax
import optax
import pytest
from jax.sharding import AxisType

from subspace_jax import optim, train

from .common import Interrupted, assert_same_bits, breaking, classification, make_tx, take_steps

pytestmark = pytest.mark.eight_devices

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def on_both(run):
    """The states of a run on Auto and on Explicit axes."""
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        auto, explicit = (run(train.make_mesh(**SIZES, axis_type=mode)) for mode in (AxisType.Auto, AxisType.Explicit))
    return auto, explicit


def assert_typed_by_their_sharding(state, shardings):
    for x, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert x.sharding.mesh.axis_types == (AxisType.Explicit,) * 3
        assert x.sharding.is_equivalent_to(wanted, x.ndim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "tx", "options"),
    [
        ("grassmann", make_tx(grassmann="riemannian_sgd"), {}),
        ("grassmann", make_tx(grassmann="riemannian_adam"), {"accumulate": 2, "remat": "full"}),
        ("softmax", optim.galore(1e-2, 4, refresh_every=2), {}),
    ],
    ids=["riemannian_sgd", "riemannian_adam-accumulated", "galore"],
)
def test_steps_on_explicit_axes_give_the_bits_of_auto_axes(head, tx, options):
    task, data = classification(features=(32,), head=head)
    (auto, expected), (explicit, metrics) = on_both(lambda mesh: take_steps(task, data, tx, mesh, **options))
    assert_same_bits(explicit, auto)
    assert metrics == expected
    mesh = train.make_mesh(**SIZES, axis_type=AxisType.Explicit)
    assert_typed_by_their_sharding(explicit, train.state_shardings(task, tx, mesh)[1])


def test_a_run_on_explicit_axes_saves_evaluates_and_goes_on_as_one_on_auto_axes(fit, tmp_path):
    task, data = classification(features=())

    def run(mesh):
        options = {"num_steps": 8, "workdir": tmp_path / str(mesh.axis_types[0]), "mesh": mesh}
        with pytest.raises(Interrupted):
            fit(task, make_tx(num_steps=8), breaking(data, 5), **options)
        return fit(task, make_tx(num_steps=8), data, **options)

    auto, explicit = on_both(run)
    assert_same_bits(explicit.state, auto.state)
    assert explicit.metrics == auto.metrics


@pytest.mark.slow
def test_a_step_on_explicit_axes_serves_a_jitted_caller_under_set_mesh():
    # As those write it who work with Explicit axes throughout.
    task, data = classification(features=())
    mesh = train.make_mesh(**SIZES, axis_type=AxisType.Explicit)
    step, tx = None, optax.sgd(0.1)
    with jax.set_mesh(mesh):
        step = train.jit_train_step(task, tx, mesh)
        batch = train.to_device(next(data.train(0)), train.batch_sharding(mesh))
        state, metrics = jax.jit(step)(train.init_state(task, tx, mesh), batch)
    auto = train.make_mesh(**SIZES)
    wanted, _ = take_steps(task, data, tx, auto, num_steps=1)
    assert_same_bits(state, wanted)
    assert float(metrics["loss"]) > 0
