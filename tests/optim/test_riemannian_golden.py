"""Every optimizer vector of the authors' code and of the oracle, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import losses, nn, optim

from ..variants import rest_slow
from .stored import to_bases, to_rows

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


@functools.partial(jax.jit, static_argnums=0)
def trajectory(update, params, state, grads):
    """All parameters and states after each step."""

    def step(carry, grad):
        params, state = carry
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state)

    return jax.lax.scan(step, (params, state), grads)[1]


CASES = {
    "sgd": {"learning_rate": 0.1, "momentum": None},
    "mom": {"learning_rate": 0.1, "momentum": 0.9},
    "mom_damp": {"learning_rate": 0.05, "momentum": 0.8, "dampening": 0.3},
    "mom_lrf": {"learning_rate": 0.1, "momentum": 0.9, "lr_factor": 2.5},
    "mom_max": {"learning_rate": -0.1, "momentum": 0.9},
}


def check_stored(g, case, **options):
    tx = optim.riemannian_sgd(**options)
    params = to_bases(g["P0"], g["dims"])
    states, grads = tx.init(params), to_bases(g["grads"], g["dims"])
    after, states = trajectory(tx.update, params, states, grads)
    np.testing.assert_allclose(to_rows(after, g["dims"]), g[f"{case}_params"][1:], **TIGHT)
    if options["momentum"] is not None and f"{case}_momentum_buffer" in g:
        np.testing.assert_allclose(to_rows(states.momentum, g["dims"]), g[f"{case}_momentum_buffer"], **TIGHT)


@pytest.mark.parametrize("case", rest_slow(CASES, "mom_damp"))
def test_equal_dimensions_follow_the_authors_code(x64, golden, case):
    check_stored(golden("gcr/rsgd_equal"), case, reorth_every=None, **CASES[case])


@pytest.mark.parametrize("k", rest_slow([1, 2], 1))
def test_small_dimensions_follow_the_authors_code(x64, golden, k):
    check_stored(golden(f"gcr/rsgd_equal_k{k}"), "mom", learning_rate=0.2, momentum=0.9, reorth_every=None)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("reorth_every", [None, 1])
def test_mixed_dimensions_follow_the_authors_code(x64, golden, momentum, reorth_every):
    case = ("sgd" if momentum is None else "mom") + ("_reorth1" if reorth_every else "")
    g = golden("gcr/rsgd_mixed")
    check_stored(g, case, learning_rate=0.15, momentum=momentum, reorth_every=reorth_every)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("reorth", ["noreorth", "reorth1", "reorth5"])
def test_training_on_the_loss_follows_the_corrected_code(x64, golden, reorth, momentum):
    if reorth == "noreorth" and momentum:
        reorth = "reorth5"  # the file holds momentum runs with re-orthonormalisation only
    g = golden("gcr/rsgd_loss_reorth")
    prefix = f"sgd_{reorth}" if momentum is None else f"mom_{reorth}_signfixed"
    every = None if reorth == "noreorth" else int(reorth.removeprefix("reorth"))
    tx = optim.riemannian_sgd(float(g["lr"]), momentum=momentum, reorth_every=every)
    x, y, k = jnp.asarray(g["X"]), jnp.asarray(g["y"]), int(g["dims"][0])

    def loss(params):
        logits = nn.grassmann_logits(x, params[f"k{k}"], float(g["gamma"]))
        return jnp.mean(losses.cross_entropy(logits, y))

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), (params, value)

    params = to_bases(g["P0"], g["dims"])
    (last, _), (path, values) = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=12))(params)
    close = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(np.append(values, loss(last)), g[f"{prefix}_loss"], **close)
    bases = np.concatenate([path[f"k{k}"], last[f"k{k}"][None]])[g["saved_steps"]]
    np.testing.assert_allclose(bases @ bases.swapaxes(-1, -2), g[f"{prefix}_projectors"], **close)
    if momentum is not None:
        np.testing.assert_allclose(to_rows(last, g["dims"]), g[f"{prefix}_params_last"], **close)
        assert abs(values[-1] - g[f"mom_{reorth}_asis_loss"][11]) > 1e-3, "the sign defect must not be reproduced"


def test_euclidean_parameters_follow_the_authors_code(x64, golden):
    g = golden("gcr/sgd_euclidean")
    euclidean = optax.chain(
        optax.add_decayed_weights(float(g["weight_decay"])),
        optax.sgd(float(g["lr"]), momentum=float(g["momentum"])),
    )
    tx = optim.with_geometry(euclidean, optim.riemannian_sgd(float(g["lr"])))
    params = {"kernel": jnp.asarray(g["P0"])}
    after, _ = trajectory(tx.update, params, tx.init(params), {"kernel": jnp.asarray(g["grads"])})
    np.testing.assert_allclose(after["kernel"], g["params"][1:], **TIGHT)


@pytest.mark.parametrize("name", rest_slow(["euclid_buffer", "project", "parallel", "radam"], "radam"))
def test_transports_and_adam_follow_the_oracle(x64, golden, name):
    g = golden("gcr/oracle_optimisers")
    a, s = jnp.asarray(g["A"]), jnp.asarray(g["S0"])
    if name == "radam":
        tx = optim.riemannian_adam(float(g["radam_lr"]), reorth_every=None)
    else:
        transport = name.replace("euclid_buffer", "euclidean")
        tx = optim.riemannian_sgd(float(g["lr"]), float(g["mu"]), transport=transport, reorth_every=None)

    def step(carry, _):
        s, state = carry
        updates, state = tx.update(-a @ s, state, s)
        s = optax.apply_updates(s, updates)
        return (s, state), (s, state)

    _, (path, states) = jax.jit(lambda s: jax.lax.scan(step, (s, tx.init(s)), length=10))(s)
    np.testing.assert_allclose(path, g[f"{name}_params"][1:], **TIGHT)
    if name == "radam":
        np.testing.assert_allclose(states.nu, g["radam_v"], **TIGHT)
