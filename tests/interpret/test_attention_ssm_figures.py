"""The experiment of the index, in float64: a layer of states as heads, one by one, and gradients over distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.interpret import attention_ssm as ops

pytestmark = pytest.mark.slow  # what it computes is tested in the other files too

N, D, P, LENGTH = 8, 6, 6, 32


@pytest.fixture(scope="module")
def layers():
    """For each of three seeds a layer with distinct decays, and tokens."""
    with jax.enable_x64(True):
        found = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            # Apart, for near ones are told from each other by the last digits alone; and one that outlasts the others.
            decays = np.asarray([-0.7, -0.5, -0.3, -0.1, 0.15, 0.4, 0.65, 0.95])
            matrices = decays, rng.standard_normal((N, D)), rng.standard_normal((P, N))
            found.append((ops.LinearSSM(*map(jnp.asarray, matrices)), jnp.asarray(rng.standard_normal((LENGTH, D)))))
        return found


def test_a_layer_of_states_is_as_many_heads_as_it_has_decays(layers, x64, record_property):
    scan = jax.jit(ops.ssm_scan)
    errors, tails, fewer = [], [], []
    for ssm, x in layers:
        y, lags = scan(ssm, x), ops.lag_operators(ssm, LENGTH)
        assert ops.interaction_rank(lags, 1e-9).k == N
        values = np.linalg.svd(np.reshape(lags, (LENGTH, -1)), compute_uv=False)
        for k in range(1, N + 1):
            bank = ops.heads_from_lags(lags, k)
            made = np.einsum("nk,kpd->npd", np.asarray(bank.coef), np.asarray(bank.values))
            error = np.linalg.norm(made - lags) / np.linalg.norm(lags)
            tails.append(abs(error - np.linalg.norm(values[k:]) / np.linalg.norm(values)))
            fewer.append(error)
        banks = [ops.heads_from_ssm(ssm, LENGTH, basis=basis) for basis in ("svd", "pivoted", "companion", "modal")]
        assert [bank.coef.shape for bank in banks] == [(LENGTH, N)] * 4
        own = [ops.apply_heads(bank, x, "fft") for bank in banks] + [ops.apply_heads(banks[-1], x, "recurrent")]
        errors += [np.max(np.abs(heads - y)) / np.max(np.abs(y)) for heads in map(np.asarray, own)]
    record_property("heads_error", float(max(errors)))
    record_property("tail_error", float(max(tails)))
    record_property("error_with_one_head_less", float(min(fewer[N - 2 :: N])))
    assert max(errors) < 1e-10
    assert max(tails) < 1e-10
    assert min(fewer[N - 2 :: N]) > 1e-6
    assert max(fewer[N - 1 :: N]) < 1e-10


def test_gradients_of_states_decay_by_their_radius_and_those_of_attention_need_not(layers, x64, record_property):
    ratios = []
    profile_of = jax.jit(lambda ssm, x: ops.gradient_profile(lambda x: ops.ssm_scan(ssm, x), x))
    for ssm, x in layers:
        profile = profile_of(ssm, x)
        ratios.append(float(ops.gradient_decay(profile).log_slope) / np.log(ops.spectral_radius(ssm)))
        assert np.all(ops.ssm_decay_bound(ssm, LENGTH) >= profile * (1 - 1e-12))
    value = jnp.asarray(np.random.default_rng(3).standard_normal((P, D)))
    head = ops.AttentionHead(jnp.eye(D), jnp.eye(D), value)
    norm = jax.jit(lambda x, j: jnp.linalg.norm(ops.attention_jacobian(head, x, LENGTH - 1, j), 2))
    along = [
        norm(ops.highway_input(jax.random.key(0), LENGTH, D, distance), LENGTH - 1 - distance)
        for distance in range(1, LENGTH)
    ]
    record_property("slope_over_log_radius", float(ratios[0]))
    record_property("largest_slope_error", float(np.max(np.abs(np.asarray(ratios) - 1))))
    record_property("highway_ratio", float(max(along) / min(along)))
    assert np.max(np.abs(np.asarray(ratios) - 1)) < 0.05
    assert max(along) / min(along) < 1.05


def test_a_layer_of_states_fitted_to_sunspot_like_numbers_predicts_the_same_as_its_heads(x64):
    """A signal with a period of 11 steps, predicted a step ahead from fixed decays by ridge regression."""
    rng = np.random.default_rng(0)
    signal = [0.0, 0.0]
    for noise in rng.standard_normal(400):
        signal.append(1.6 * signal[-1] - 0.92 * signal[-2] + 0.3 * noise)
    signal = np.asarray(signal)
    decays = np.concatenate([np.asarray([0.5, 0.8, 0.95]), 0.95 * np.exp(1j * np.asarray([0.2, 0.4, 0.6, 0.9]))])
    features = ops.LinearSSM(jnp.asarray(decays), jnp.ones((7, 1)), jnp.eye(7, dtype=complex))
    parts = [
        np.asarray(ops.ssm_scan(features._replace(C=c * np.eye(7)), jnp.asarray(signal[:-1, None]))) for c in (1, -1j)
    ]
    states, target = np.concatenate(parts, axis=1), signal[1:]
    train, test = slice(0, 300), slice(300, None)
    gram = states[train].T @ states[train] + 0.1 * np.eye(14)
    weights = np.linalg.solve(gram, states[train].T @ target[train])
    ssm = features._replace(C=jnp.asarray((weights[:7] - 1j * weights[7:])[None]))
    predicted = np.asarray(ops.ssm_scan(ssm, jnp.asarray(signal[:-1, None])))[:, 0]
    bank = ops.heads_from_ssm(ssm, len(predicted), basis="modal")
    heads = np.asarray(ops.apply_heads(bank, jnp.asarray(signal[:-1, None]), "recurrent"))[:, 0]
    np.testing.assert_allclose(heads, predicted, atol=1e-10 * np.max(np.abs(predicted)))
    error, still = (np.mean(np.square(target[test] - own[test])) for own in (predicted, signal[:-1]))
    assert error < 0.6 * still  # the noise alone is 0.28 of it
    assert ops.heads_from_ssm(ssm, 50).values.shape == (1, 1, 1)  # operators of one input and output are numbers
