"""Variables that no step changes and no checkpoint holds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from subspace_jax import train

from .common import run_of

pytestmark = pytest.mark.eight_devices

BASE = np.arange(8, dtype=np.float32)


class Shift(train.Task):
    """Learns how far a frozen vector is from the mean of the inputs."""

    frozen = ("base",)

    def __init__(self):
        self.reads = 0

    def init(self, key):
        return {"shift": jnp.zeros(8)}, {"base": jnp.zeros(8), "seen": jnp.zeros((), jnp.int32)}

    def axes(self):
        return {"shift": P("embed")}, {"base": P("embed"), "seen": P()}

    def load(self, shardings):
        params, variables = jax.jit(lambda: self.init(None), out_shardings=shardings)()
        return params, {**variables, **self.restore_frozen(variables, {"base": shardings[1]["base"]})}

    def restore_frozen(self, variables, shardings):
        self.reads += 1
        assert variables["seen"].shape == ()
        return {"base": jax.device_put(BASE, shardings["base"])}

    def loss(self, params, variables, batch, *, key, step):
        shifted = (variables["base"] + params["shift"])[None]
        error = jnp.mean(jnp.square(batch["inputs"] - jnp.broadcast_to(shifted, batch["inputs"].shape)))
        # What is returned for a frozen entry counts nothing.
        return error, ({"base": variables["base"] + 1, "seen": variables["seen"] + 1}, {})

    def evaluate(self, params, variables, batch, *, key):
        return {
            "loss": jnp.sum(batch["mask"]) * self.loss(params, variables, batch, key=key, step=0)[0],
            "count": jnp.sum(batch["mask"]),
        }


@pytest.fixture
def fit(tmp_path):
    x = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
    made = train.array_data({"inputs": x}, batch_size=8, evaluate={"eval": {"inputs": x}}, eval_batch_size=16)

    def run(folder, num_steps, **options):
        task, options = Shift(), {"mesh": train.make_mesh(2, 4), "checkpoint_every": 2, **options}
        workdir = tmp_path / folder
        result = train.fit(run_of(task, optax.sgd(0.1), made, num_steps=num_steps, workdir=workdir, **options))
        return task, result.state

    return run


@pytest.mark.slow
def test_frozen_variables_stay_and_are_read_again_when_fit_resumes(fit, tmp_path):
    _, whole = fit("whole", 4)
    fit("halves", 2)
    task, again = fit("halves", 4)
    assert task.reads == 1
    np.testing.assert_array_equal(again.variables["base"], BASE)
    assert int(again.variables["seen"]) == 4
    np.testing.assert_array_equal(again.params["shift"], whole.params["shift"])
    assert not whole.variables["base"].sharding.is_fully_replicated
    saved = (tmp_path / "whole" / "checkpoints" / "4" / "state" / "_METADATA").read_text()
    assert "shift" in saved
    assert "base" not in saved


@pytest.mark.slow
def test_frozen_variables_stay_in_accumulated_steps(fit):
    # Every micro-batch takes rows from every device, and means of equal parts are the mean of all.
    (_, one), (_, two) = (
        fit("one", 2),
        fit("two", 2, mesh=train.make_mesh(2, 2, devices=jax.devices()[:4]), accumulate=2),
    )
    np.testing.assert_array_equal(two.variables["base"], BASE)
    np.testing.assert_allclose(two.params["shift"], one.params["shift"], rtol=0, atol=1e-6)
