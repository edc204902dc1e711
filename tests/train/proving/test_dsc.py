"""Three phases with labels from the host that stop by themselves; see :mod:`tests.train.proving.dsc`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import train
from subspace_jax.train import loop

from . import dsc
from .runs import assert_resumes, assert_survives_kill, fit

STEPS = (20, 200, 20)


@pytest.fixture(scope="module")
def run():
    return dsc.build(STEPS)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_curves", lambda *arguments: None)
        return fit(run, tmp_path_factory.mktemp("whole"), checkpoint_every=60)


def steps_of(result):
    last = {row["phase"]: row["step"] for row in result.rows if row["split"] == "train"}
    return np.diff([0, *last.values()])


@pytest.mark.slow
def test_dsc_finds_orthogonal_subspaces_and_stops_before_its_caps(whole):
    assert whole.metrics["clusters/accuracy"] == 1.0
    _, expression, structured = steps_of(whole)
    assert 50 < expression < STEPS[1]
    # Labels that stay the same end the last phase; those of the first round differ from none.
    assert structured == 6
    rows = [row for row in whole.rows if row["split"] == "train" and row["phase"] == "expression"]
    assert rows[-1]["loss"] < rows[50]["loss"] < rows[0]["loss"]
    assert [row["phase"] for row in whole.rows if row["split"] == "clusters"] == ["expression", "structured"]


@pytest.mark.slow
def test_dsc_rests_the_encoder_in_the_last_phase(whole):
    assert set(whole.state.opt_state) == {"coef"}
    # The moments of C went on from the phase before: one count for both.
    assert whole.state.opt_state["coef"][0].count == sum(steps_of(whole)[1:])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(75,), (5, 20, 21, 33, 90)])
def test_dsc_interrupted_in_a_phase_ends_with_the_same_bits(run, whole, steps, tmp_path):
    assert_resumes(run, tmp_path, steps, whole, checkpoint_every=60)


@pytest.mark.slow
def test_dsc_interrupted_between_rounds_of_labels_ends_with_the_same_bits(run, whole, tmp_path):
    last = int(whole.state.step)
    assert_resumes(run, tmp_path, (last - 5, last - 2), whole, checkpoint_every=2)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_dsc_on_eight_devices_shards_the_coefficients(whole):
    assert whole.metrics["clusters/accuracy"] == 1.0
    assert whole.state.params["coef"].sharding.spec[0] is not None


@pytest.mark.slow
@pytest.mark.eight_devices
def test_dsc_interrupted_on_eight_devices_ends_with_the_same_bits(run, whole, tmp_path):
    assert_resumes(run, tmp_path, (75,), whole, checkpoint_every=60)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_dsc_killed_in_the_second_phase_ends_with_the_same_bits(devices, tmp_path):
    assert_survives_kill("dsc", tmp_path, devices, 75)


def golden_params(g):
    def layers(name, axes):
        return [{"kernel": g[f"{name}{i}_w_{axes}"], "bias": g[f"{name}{i}_b"]} for i in range(2)]

    def first_to_last(layer, order):
        return {"kernel": jnp.asarray(layer["kernel"].transpose(order)), "bias": jnp.asarray(layer["bias"])}

    return {
        "encoder": [first_to_last(x, (2, 3, 1, 0)) for x in layers("enc", "oihw")],
        "decoder": [first_to_last(x, (2, 3, 1, 0)) for x in layers("dec", "iohw")],
    }


def test_dsc_steps_of_the_train_step_are_those_of_the_authors_code(x64, golden):
    g = golden("dsc/steps")
    params, x = golden_params(g), jnp.asarray(g["x_nchw"].transpose(0, 2, 3, 1))
    loss, _ = dsc.Autoencoder().loss(params, {}, {"inputs": x}, key=None, step=None)
    np.testing.assert_allclose(loss, g["loss_recon_sum"], rtol=1e-8)

    task, tx, zero = dsc.SelfExpression(len(x)), optax.adam(1e-3), jnp.zeros((), jnp.int32)
    params = {"autoencoder": params, "coef": jnp.full((24, 24), 1e-8)}
    key = jax.random.key_data(jax.random.key(0))
    state = train.TrainState(zero, zero, params, {}, tx.init(params), key, zero)
    step, losses = jax.jit(train.make_train_step(task, tx)), []
    for _ in range(5):
        state, metrics = step(state, {"inputs": x})
        losses.append(metrics["loss"])
    np.testing.assert_allclose(losses, g["adam_losses"], rtol=1e-8)
    np.testing.assert_allclose(state.params["coef"], g["adam_C_after5"], rtol=0, atol=1e-9)
    kernel = state.params["autoencoder"]["encoder"][0]["kernel"]
    np.testing.assert_allclose(kernel.transpose(3, 2, 0, 1), g["adam_enc0_w_after5"], rtol=0, atol=1e-9)

    variables = {"labels": jnp.asarray(g["lq_rand_labels"]), "repeats": zero}

    def structured(c):
        return dsc.Structured(24).loss({"coef": c}, variables, {}, key=None, step=None)[0] / 10

    loss, grad = jax.value_and_grad(structured)(jnp.asarray(g["C"]))
    np.testing.assert_allclose(loss, g["lq_rand"], rtol=1e-7)
    np.testing.assert_allclose(grad, g["lq_rand_grad_C"], rtol=1e-7)
    np.testing.assert_allclose(dsc.affinity(g["C"], int(g["d_keep"])), g["affinity"], rtol=0, atol=1e-8)
