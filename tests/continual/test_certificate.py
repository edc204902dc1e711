"""Certificates: bounds that hold, shares, and the guard."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg
from subspace_jax.continual import certificate as certificates
from subspace_jax.continual.stream import layer_inputs, mlp_body

BODY = mlp_body(6, (8, 5))
TASKS, COLUMNS = 3, 2


def kernels_of(seed):
    rng = np.random.default_rng(seed)
    shapes = {"layer00": (6, 8), "layer01": (8, 5)}
    return {name: jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0]), jnp.float32) for name, s in shapes.items()}


def inputs_of(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((20, 6)), jnp.float32)


def outputs(kernels, x):
    found = []

    def linear(name, x, kernel):
        found.append(jnp.matmul(x, kernel))
        return found[-1]

    features = BODY.apply(kernels, x, linear)
    return [*found, features]


def histories(kernels, columns):
    """The first unit vectors as histories."""
    return {
        name: jnp.eye(len(w))[:, : TASKS * COLUMNS] * (jnp.arange(TASKS * COLUMNS) < columns).astype(jnp.float32)[None]
        for name, w in kernels.items()
    }


@jax.jit
def after(certificate, kernels, x, task):
    moments = certificates.input_moments(layer_inputs(BODY, kernels, x))
    features = BODY.apply(kernels, x, lambda name, h, w: jnp.matmul(h, w))
    norm = jnp.sqrt(jnp.mean(jnp.sum(features**2, axis=-1)))
    ended = certificates.Ended(task, moments, norm, histories(kernels, COLUMNS * (task + 1)))
    return certificates.end_task(certificate, kernels, ended)


bounds = jax.jit(lambda certificate, kernels: certificates.output_bounds(certificate, kernels, BODY.gains))
norm_bound = jax.jit(certificates.spectral_norm_bound)
shares = jax.jit(certificates.update_shares)
steps = {
    guard: jax.jit(functools.partial(certificates.certify, gains=BODY.gains, guard=guard, limit=0.05))
    for guard in certificates.GUARDS
}


@pytest.fixture(scope="module")
def stream():
    """The certificate after two tasks, and the kernels at the end of each."""
    first, second = kernels_of(0), kernels_of(1)
    second = {name: first[name] + 0.2 * second[name] for name in first}
    sizes = dict.fromkeys(first, TASKS * COLUMNS)
    found = certificates.init_certificate(first, sizes, TASKS, rank=6)
    found = after(after(found, first, inputs_of(0), jnp.int32(0)), second, inputs_of(1), jnp.int32(1))
    return found, (first, second)


@pytest.mark.parametrize("size", [0.0, 1e-3, 0.1, 3.0])
def test_output_bounds_are_above_what_outputs_of_ended_tasks_change(stream, size):
    certificate, ends = stream
    for seed in range(4):
        now = {name: w + size * kernels_of(10 + seed)[name] for name, w in ends[1].items()}
        found = np.asarray(bounds(certificate, now))
        for t, end in enumerate(ends):
            x = inputs_of(t)
            for layer, (new, old) in enumerate(zip(outputs(now, x), outputs(end, x), strict=True)):
                change = float(jnp.sqrt(jnp.mean(jnp.sum((new - old) ** 2, axis=-1))))
                assert change <= found[t, layer]
        assert not found[2].any()


def test_output_bounds_of_a_first_layer_are_tight_where_the_factor_is_complete():
    first = kernels_of(0)
    found = certificates.init_certificate(first, dict.fromkeys(first, TASKS * COLUMNS), TASKS, rank=6)
    found = after(found, first, inputs_of(0), jnp.int32(0))
    moved = {name: w.at[:COLUMNS].set(0) for name, w in kernels_of(3).items()}  # nothing inside the history
    now = {name: first[name] + 0.1 * moved[name] for name in first}
    change = jnp.sqrt(
        jnp.mean(jnp.sum((outputs(now, inputs_of(0))[0] - outputs(first, inputs_of(0))[0]) ** 2, axis=-1))
    )
    np.testing.assert_allclose(bounds(found, now)[0, 0], change, rtol=2e-3)


def test_spectral_norm_bound_is_above_the_norm_and_near_it():
    for seed in range(5):
        x = np.random.default_rng(seed).standard_normal((9, 5)).astype(np.float32) * 10.0 ** (seed - 2)
        got, norm = float(norm_bound(jnp.asarray(x))), np.linalg.norm(x, 2)
        assert norm * (1 - 1e-5) <= got <= norm * 5 ** (1 / 64) * (1 + 1e-4)
    assert norm_bound(jnp.zeros((9, 5))) < 1e-10


def test_update_shares_tell_the_task_whose_columns_an_update_is_in(stream):
    certificate, (first, _) = stream
    inside = {name: jnp.zeros_like(w).at[COLUMNS].set(1.0) for name, w in first.items()}
    np.testing.assert_allclose(shares(certificate, inside), [0, 1, 0], atol=1e-6)
    half = {name: w.at[-1].set(1.0) for name, w in inside.items()}
    np.testing.assert_allclose(shares(certificate, half), [0, 0.5, 0], atol=1e-6)
    outside = {
        name: w - linalg.times(certificate.layers[name].history, linalg.gram(certificate.layers[name].history, w))
        for name, w in kernels_of(4).items()
    }
    np.testing.assert_allclose(shares(certificate, outside), np.zeros(3), atol=1e-6)


def test_a_guard_that_is_off_or_content_takes_a_step_to_the_bit(stream):
    certificate, (_, second) = stream
    # Task 0 has moved further than the limit by itself.
    certificate = certificate._replace(known=certificate.known.at[0].set(0))
    small = {name: w + 1e-4 * kernels_of(5)[name] for name, w in second.items()}
    for step in steps.values():
        kernels, found = step(certificate, second, small)
        assert all(np.array_equal(kernels[name], small[name]) for name in small)
        assert (int(found.scaled), int(found.refused)) == (0, 0)
        assert 0 < float(found.bound[1]) < 0.05


def test_a_guard_scales_a_step_to_within_the_limit_or_refuses_it(stream):
    certificate, (_, second) = stream
    certificate = certificate._replace(known=certificate.known.at[0].set(0))
    long = {name: w + 0.1 * kernels_of(5)[name] for name, w in second.items()}
    unguarded = steps["off"](certificate, second, long)[1]
    assert float(unguarded.bound[1]) > 0.05
    kernels, found = steps["scale"](certificate, second, long)
    assert (int(found.scaled), int(found.refused)) == (1, 0)
    assert float(found.bound[1]) <= 0.05
    assert not np.array_equal(kernels["layer00"], second["layer00"])
    kernels, found = steps["refuse"](certificate, second, long)
    assert (int(found.scaled), int(found.refused)) == (0, 1)
    assert all(np.array_equal(kernels[name], second[name]) for name in second)
    endless = {name: w + 100 * kernels_of(5)[name] for name, w in second.items()}
    assert int(steps["scale"](certificate, second, endless)[1].refused) == 1


def test_bad_input_is_refused(stream):
    certificate, (_, second) = stream
    with pytest.raises(ValueError, match="guard"):
        certificates.certify(certificate, second, second, BODY.gains, guard="stop")
    for limit in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="limit"):
            certificates.certify(certificate, second, second, BODY.gains, guard="scale", limit=limit)
    for name, options in (("rank", {"rank": 0}), ("num_tasks", {"num_tasks": 0})):
        with pytest.raises(ValueError, match=name):
            certificates.init_certificate(second, dict.fromkeys(second, 2), **{"num_tasks": 2, **options})
