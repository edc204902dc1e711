"""A retraction after the update, a coefficient that grows with the step, and two metrics of a whole set."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import linalg, train
from subspace_jax.train import loop

from . import polysae
from .runs import assert_resumes, assert_survives_kill, fit


@pytest.fixture(scope="module")
def run():
    return polysae.build((60, 60), decoder=False)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_curves", lambda *arguments: None)
        return fit(run, tmp_path_factory.mktemp("whole"), checkpoint_every=40)


def last_row(result, split):
    return [row for row in result.rows if row["split"] == split][-1]


@pytest.mark.slow
def test_polysae_retracts_after_every_update(whole):
    assert linalg.orthonormality_error(whole.state.params["U"]) < 1e-5


def test_polysae_warms_up_the_loss_of_dead_features_by_the_step_of_the_phase(run):
    task = run.phases[0].task
    params, variables = jax.jit(task.init)(jax.random.key(0))
    variables = {**variables, "since_fired": jnp.full(task.m, 9)}
    batch = {"inputs": jnp.asarray(polysae.planted(num=32)["inputs"])}

    @jax.jit
    def aux_of(step):
        return task.loss(params, variables, batch, key=None, step=step)[1][1]["aux"]

    aux = [aux_of(step) for step in (0, 9, 19, 50)]
    np.testing.assert_allclose(np.divide(aux, aux[-1]), [0.05, 0.5, 1, 1], rtol=1e-6)


@pytest.mark.slow
def test_polysae_metrics_of_a_set_are_those_of_all_its_examples(run, whole):
    task = run.phases[1].task
    test = {name: x[5000:] for name, x in polysae.planted().items()}
    params = jax.device_get(whole.state.params)
    z = task.codes(params, test)[1]
    error = test["inputs"] - np.asarray(polysae.poly_decode(params, z, 2))
    explained = 1 - np.sum(error**2) / np.sum((test["inputs"] - test["inputs"].mean(axis=0)) ** 2)
    assert last_row(whole, "variance")["explained"] == pytest.approx(explained, abs=1e-5)
    found = last_row(whole, "distance")
    assert found["examples"] == 1000
    expected = polysae.Wasserstein(task).finish(eval={"codes": z, "labels": test["labels"]})
    assert found["distance"] == pytest.approx(expected["distance"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("decoder_steps", [(300, 600), (1000, 3000)])
def test_polysae_finds_the_planted_pairs_with_a_quadratic_decoder_and_not_with_a_linear_one(decoder_steps, tmp_path):
    result = fit(polysae.build(decoder_steps), tmp_path)
    unexplained = [1 - row["explained"] for row in result.rows if row["split"] == "variance"]
    assert unexplained[0] > 0.1
    assert unexplained[-1] < 0.02
    pairs = list(itertools.combinations(range(polysae.M), 2))
    strengths = polysae.interaction_strength(jax.device_get(result.state.params), pairs)
    assert {pairs[i] for i in np.argsort(-strengths)[:3]} == set(polysae.PLANTED)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(75,), (7, 60, 61, 110)])
def test_polysae_interrupted_in_a_phase_ends_with_the_same_bits(run, whole, steps, tmp_path):
    assert_resumes(run, tmp_path, steps, whole, checkpoint_every=40)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_polysae_on_eight_devices_equals_one_and_resumes(run, tmp_path):
    mesh = train.make_mesh(2, 2, 2)
    sharded = fit(run, tmp_path / "whole", mesh=mesh, checkpoint_every=40)
    assert linalg.orthonormality_error(jnp.asarray(jax.device_get(sharded.state.params["U"]))) < 1e-5
    single = fit(run, tmp_path / "single", mesh=train.make_mesh(devices=jax.devices()[:1]))
    assert last_row(sharded, "variance")["explained"] == pytest.approx(
        last_row(single, "variance")["explained"], abs=0.02
    )
    assert_resumes(run, tmp_path, (75,), sharded, mesh=mesh, checkpoint_every=40)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_polysae_killed_in_the_second_phase_ends_with_the_same_bits(devices, tmp_path):
    assert_survives_kill("polysae", tmp_path, devices, 75)


class GivenDead(polysae.PolySAETask):
    """The golden run, whose dead features are given."""

    def loss(self, params, variables, batch, *, key, step):
        counts = jnp.where(batch["dead"][0], self.dead_after + 1, 0).astype(jnp.int32)
        return super().loss(params, {**variables, "since_fired": counts}, batch, key=key, step=step)


def clip(norm):
    def scale(updates, params=None):
        return jax.tree.map(lambda g: g * jnp.minimum(1, norm / (optax.tree.norm(updates) + 1e-6)), updates)

    return optax.stateless(scale)


def test_polysae_steps_of_the_train_step_are_those_of_the_authors_code(x64, golden):
    g = golden("polysae/train_topk")
    names = {"U": "U_shared"}

    def stored(prefix):
        keys = ("W_enc", "b_enc", "b_dec", "U", "C1", "C2", "C3", "lambda2", "lambda3")
        return {name: jnp.asarray(g[f"{prefix}/{names.get(name, name)}"]) for name in keys}

    task = GivenDead(8, 24, int(g["k"]), tuple(g["ranks"]))
    tx = optax.chain(clip(float(g["clip"])), optax.adam(float(g["lr"])))
    params, zero = stored("init"), jnp.zeros((), jnp.int32)
    variables = {"since_fired": jnp.zeros(24, jnp.int32), "fired": jnp.zeros(24, bool)}
    key = jax.random.key_data(jax.random.key(0))
    state = train.TrainState(zero, zero, params, variables, tx.init(params), key, zero)
    step = jax.jit(train.make_train_step(task, tx))
    for i in range(6):
        dead = np.broadcast_to(g["dead"][i], (len(g["X"][i]), 24))
        state, metrics = step(state, {"inputs": jnp.asarray(g["X"][i]), "dead": jnp.asarray(dead)})
        for name in ("loss", "mse", "aux", "grad_norm"):
            np.testing.assert_allclose(metrics[name], g[name][i], rtol=1e-9, atol=1e-12, err_msg=f"{name} {i}")
        if i in (0, 5):
            chex.assert_trees_all_close(state.params, stored(f"after{i + 1}"), rtol=0, atol=1e-8)
