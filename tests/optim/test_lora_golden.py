"""Optimizers of low-rank factors against independent versions and against the authors' code, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import optim
from subspace_jax.optim.lora._factors import Factors
from subspace_jax.optim.lora.adaprelora import factor_step, preconditioner
from subspace_jax.optim.lora.lora_pro import gauge, nearest

from ..variants import rest_slow

# What the specification asks for; entries near zero are rounded like the largest ones.
RTOL, ATOL = 1e-9, 1e-12


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=RTOL, atol=ATOL)


def pair(big_a, big_b):
    """Factors ``A [r, in]`` and ``B [out, r]`` of the files as ours."""
    return {"a": jnp.asarray(big_a).T, "b": jnp.asarray(big_b).T}


def gradients(factors, g, scale):
    """Gradients of the factors at a gradient ``[out, in]`` of the weight."""
    return {"a": scale * g.T @ factors["b"].T, "b": scale * factors["a"].T @ g.T}


def run(tx, start, grads, scale=1.0, energies=False):
    """Factors and states after each step."""

    def step(carry, g):
        factors, state = carry
        extra = {"energies": {"": (jnp.sum(g**2, axis=0), jnp.sum(g**2, axis=1))}} if energies else {}
        updates, state = tx.update(gradients(factors, g, scale), state, factors, **extra)
        factors = optax.apply_updates(factors, updates)
        return (factors, state), (factors, state)

    return jax.lax.scan(step, (start, tx.init(start)), grads)[1]


def assert_path(got, data, case):
    assert_close(got["a"].mT, data[f"{case}_A"][1:])
    assert_close(got["b"].mT, data[f"{case}_B"][1:])


def tall(data, prefix, scale):
    a, b, g = data[f"{prefix}_A"].T, data[f"{prefix}_B"], data[f"{prefix}_G"]
    return Factors(*map(jnp.asarray, (a, b, scale * g.T @ b, scale * g @ a)), jnp.asarray(scale), None)


@pytest.mark.slow
def test_the_factor_solve_is_that_of_the_oracle(x64, golden):
    data = golden("adaprelora/adaprelora")
    f = tall(data, "solve", float(data["solve_scale"]))
    weights, _ = preconditioner(jnp.asarray(data["solve_R"]), jnp.asarray(data["solve_L"]), 0.0)
    da, db = factor_step(f, *weights, 0.0, 0.0)
    assert_close(da.T, data["solve_dA"])
    assert_close(db, data["solve_dB"])
    assert_close(f.scale * (f.b @ da.T + db @ f.a.T), data["solve_J"])


@pytest.mark.parametrize(
    ("stats", "cases"),
    [
        ("full", ("full_b0", "full_rand")),
        ("sum", ("surr_b0", "surr_rand_mom")),
        ("projected", ("proj_b0", "proj_rand")),
    ],
)
def test_adaprelora_takes_the_steps_of_the_oracle(x64, golden, stats, cases):
    data = golden("adaprelora/adaprelora")

    # All numbers traced, so that both cases are compiled once.
    @jax.jit
    def path_of(start, grads, hyper):
        lr, wd, b1, b2, d_rel, d_abs, s, e_rel = hyper
        options = {"damping_rel": d_rel, "damping_abs": d_abs, "eps_rel": e_rel, "weight_decay": wd}
        tx = optim.adaprelora(lr, scale=s, stats=stats, b1=b1, b2=b2, **options)
        return run(tx, start, grads, s, energies=stats == "full")

    for case in cases:
        start = pair(data[f"{case}_A"][0], data[f"{case}_B"][0])
        path, states = path_of(start, data[f"{case}_G"], data[f"{case}_hyper"])
        assert_path(path, data, case)
        assert_close(states[0].energy["a"], data[f"{case}_R"])
        assert_close(states[0].energy["b"], data[f"{case}_L"])


def rite(**options):
    return optim.lora_rite(0.01, b1=0.9, b2=0.95, clip_norm=None, **options)


SCALED_ADAMW = {"reg": 1e-4, "gauss_seidel": True}
BOTH = ("rand", "zero")
PEERS = {
    "scaled_gd": (lambda: optim.scaled_gd_lora(0.05, reg=1e-4, weight_decay=0.01), BOTH),
    "scaled_adamw": (
        lambda: optim.scaled_adamw_lora(0.01, b1=0.7, b2=0.8, weight_decay=0.01, bias_correction=False, **SCALED_ADAMW),
        BOTH,
    ),
    "scaled_adamw_bc": (lambda: optim.scaled_adamw_lora(0.01, **SCALED_ADAMW), BOTH),
    "rite_default": (lambda: optim.lora_rite(0.01), BOTH),
    "rite_noclip": (lambda: rite(weight_decay=0.1), BOTH),
    "rite_escape": (lambda: rite(escape=True), BOTH),
    # As in the files, balanced from the random start only.
    "rite_cap_balance": (lambda: rite(update_cap=0.5, balance=True), ("rand",)),
    "rite_cap_balance, from zero": (lambda: rite(update_cap=0.5), ("zero",)),
}


@pytest.mark.parametrize("peer", rest_slow(PEERS, "scaled_gd", "rite_default"))
def test_peers_take_the_steps_of_their_authors(x64, golden, peer):
    data = golden("adaprelora/peers_reference")
    make, starts = PEERS[peer]
    path_of = jax.jit(lambda start, grads: run(make(), start, grads)[0])
    for start in starts:
        case = f"{peer.split(',')[0]}_{start}"
        assert_path(path_of(pair(data[f"{case}_A"][0], data[f"{case}_B"][0]), data["G"]), data, case)


def test_lora_pro_is_that_of_the_oracle(x64, golden):
    data = golden("adaprelora/peers_oracle")
    s = float(data["pro_scale"])
    f = tall(data, "pro", s)
    start = {"a": f.a, "b": f.b.T}
    tx = optim.scale_by_lora_pro(optim.LoRAProOptions(delta=0.0), scale=s, method="sgd")
    updates, _ = tx.update({"a": f.grad_a, "b": f.grad_b.T}, tx.init(start), start)
    assert_close(updates["a"].T, data["pro_dA"])
    assert_close(updates["b"].T, data["pro_dB"])
    assert_close(gauge(f, nearest(f, 0.0)[0]), data["pro_X"])
