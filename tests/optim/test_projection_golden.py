"""Transforms of projected gradients against the reference code of their papers, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import optim
from subspace_jax.optim import _adam
from subspace_jax.optim.projected._scaled_gradient import scale_gradients
from subspace_jax.optim.projected.apollo import apollo_step
from subspace_jax.optim.projected.options import SIDES

from ..variants import rest_slow

# The golden files are reproduced to 4e-13 by an independent version; their specification asks for these.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)


def run(tx, start, grads):
    """Parameters and states after each step."""

    def step(carry, g):
        w, state = carry
        updates, state = tx.update(g, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), (w, state)

    start = jnp.asarray(start)
    return jax.lax.scan(step, (start, tx.init(start)), jnp.asarray(grads))[1]


@pytest.mark.parametrize(("side", "shape"), rest_slow(itertools.product(SIDES, ["tall", "wide"]), ("std", "tall")))
def test_galore_takes_the_steps_of_the_reference(x64, golden, shape, side):
    data = golden("coso/galore_adamw")
    case = {k.removeprefix(f"{shape}_{side}_"): v for k, v in data.items() if k.startswith(f"{shape}_{side}_")}
    tx = optim.galore(
        float(data["lr"]),
        int(data["rank"]),
        side=side,
        refresh_every=int(data["update_proj_gap"]),
        method="svd",
        scale=float(data["scale"]),
        eps=float(data["eps"]),
        weight_decay=float(case["weight_decay"]),
        staggered=False,
    )
    path, states = run(tx, case["W0"], case["grads"])
    last = jax.tree.map(lambda x: x[-1], states[0])
    assert_close(path, case["params"])
    assert_close(last.inner.mu, case["exp_avg"])
    assert_close(last.inner.nu, case["exp_avg_sq"])
    if side == "full":
        assert_close(last.bases.left, case["left"])
        assert_close(last.bases.right.T, case["right"])
    else:
        assert_close(last.bases.right.T if last.bases.left is None else last.bases.left, case["proj"])


@pytest.mark.parametrize("shape", rest_slow(["tall", "wide"], "wide"))
def test_galore_with_adafactor_inside_takes_the_steps_of_the_reference(x64, golden, shape):
    data = golden("coso/galore_adafactor")
    adafactor = optax.chain(
        optax.scale_by_factored_rms(
            min_dim_size_to_factor=1,
            epsilon=float(data["eps0"]),
            # Optax's own is computed in float32.
            decay_rate_fn=lambda step, _: 1 - (step + 1.0) ** float(data["decay_rate"]),
        ),
        optax.clip_by_block_rms(float(data["clip_threshold"])),
    )
    tx = optim.galore(
        float(data["lr"]), int(data["rank"]), method="svd", scale=float(data["scale"]), inner=adafactor, staggered=False
    )
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies float64 by int32
        path, _ = run(tx, data[f"{shape}_W0"], data[f"{shape}_grads"])
    assert_close(path, data[f"{shape}_params"])


@pytest.mark.parametrize("shape", rest_slow(["tall", "wide"], "tall"))
def test_fira_takes_the_steps_of_the_reference(x64, golden, shape):
    data = golden("coso/fira_adamw")
    tx = optim.fira(
        float(data["lr"]),
        int(data["rank"]),
        refresh_every=int(data["update_proj_gap"]),
        method="svd",
        scale=float(data["alpha"]),
        eps=float(data["eps"]),
        staggered=False,
    )
    path, states = run(tx, data[f"{shape}_W0"], data[f"{shape}_grads"])
    assert_close(path, data[f"{shape}_params"])
    assert_close(states[0].norm, data[f"{shape}_residual_norm"])


@pytest.mark.parametrize(
    ("case", "shape"),
    rest_slow(
        itertools.product(["channel", "tensor", "tensorfront", "channelnonl"], ["tall", "wide"]),
        ("channel", "tall"),
        ("tensorfront", "wide"),
    ),
)
def test_apollo_takes_the_steps_of_the_reference(x64, golden, shape, case):
    """With the projections of the reference, whose random numbers are not ours."""
    data = golden("coso/apollo_adamw")
    stored = jnp.asarray(data[f"{shape}_{case}_R"])
    adam = 0.9, 0.999, float(data["eps"])
    limiter = case != "channelnonl"
    step = apollo_step(
        lambda plan, g, step, _: g @ stored[step].T if shape == "tall" else stored[step].T @ g,
        refresh_every=1,
        scaling="tensor" if case.startswith("tensor") else "channel",
        scale=16.0 if case.startswith("tensor") else 1.0,
        scale_front=case == "tensorfront",
        limiter=limiter,
        adam=adam,
    )
    rank, options = 1 if case.startswith("tensor") else int(data["rank"]), optim.ProjectionOptions(refresh_every=1)
    scaled = scale_gradients(step, rank, options, adam, with_bases=False, limiter=limiter)
    tx = optax.chain(scaled, _adam.descend(float(data["lr"]), 0.0))
    path, _ = run(tx, data[f"{shape}_{case}_W0"], data[f"{shape}_{case}_grads"])
    assert_close(path, data[f"{shape}_{case}_params"])


@pytest.mark.parametrize(
    ("case", "side"),
    rest_slow(itertools.product(["gap1", "gap3_decay"], ["input", "output"]), ("gap3_decay", "input")),
)
def test_coso_takes_the_steps_of_the_reference_over_three_tasks(x64, golden, case, side):
    """The reference projects from the left; the output side of transposed kernels is the same."""
    data = golden("coso/coso_adamw")
    case = {k.removeprefix(f"{case}_"): v for k, v in data.items() if k.startswith(f"{case}_")}
    turn = (lambda x: x) if side == "input" else (lambda x: np.swapaxes(x, -1, -2))
    tx = optim.coso(
        float(case["lr"]),
        int(data["proj_rank"]),
        int(data["rank"]),
        refresh_every=int(case["update_gap"]),
        decay=float(case["db_decay"]),
        side=side,
        eps=float(case["eps"]),
        weight_decay=float(case["weight_decay"]),
        method="svd",
    )
    w = jnp.asarray(turn(case["W0"]))
    state, step = tx.init(w), jax.jit(tx.update)
    for task, grads in enumerate(case["grads"]):
        for t, g in enumerate(grads):
            updates, state = step(jnp.asarray(turn(g)), state, w)
            w = optax.apply_updates(w, updates)
            assert_close(turn(w), case["params"][task, t])
            assert_close(state.proj, case["projector"][task, t])
            assert_close(state.sketch @ state.sketch.T, case["sketch_gram"][task, t])
            assert_close(state.sigma, case["sketch_sigma"][task, t])
        state = jax.jit(optim.coso_end_task)(state, float(case["threshold"]))
        if task < 2:
            assert int(state.history_dim) == case["history_dim"][task]
            assert_close(state.history @ state.history.T, case["history_projector"][task])


@pytest.mark.slow
def test_gradient_projection_memory_grows_as_in_the_reference(x64, golden):
    data, memory = golden("coso/gpm"), [None, None]
    # The file has two thresholds, one for each layer, the same in every task.
    for task in range(4):
        for layer in range(2):
            acts = jnp.asarray(data[f"t{task}_l{layer}_act"])
            memory[layer] = optim.gpm_update(memory[layer], acts, float(data["threshold"][layer]))
            assert int(memory[layer].dim) == data[f"t{task}_l{layer}_dim"]
            assert_close(memory[layer].basis @ memory[layer].basis.T, data[f"t{task}_l{layer}_proj"])


@pytest.mark.parametrize(
    ("tracker", "shape"), rest_slow(itertools.product(["adamw", "sgd"], ["tall", "wide"]), ("adamw", "wide"))
)
def test_online_subspace_descent_takes_the_steps_of_the_reference(x64, golden, shape, tracker):
    data = golden("coso/online_subspace_descent")
    case = f"{shape}_continuous" + ("_sgd" if tracker == "sgd" else "")
    tx = optim.online_subspace_descent(
        float(data["lr"]),
        int(data["rank"]),
        refresh_every=int(data["update_proj_gap"]),
        scale=float(data["scale"]),
        tracker=tracker,
        eps=float(data["eps"]),
    )
    path, states = run(tx, data[f"{case}_W0"], data[f"{case}_grads"])
    assert_close(states.bases.right.mT if shape == "tall" else states.bases.left, data[f"{case}_P"])
    assert_close(path, data[f"{case}_params"])
