"""The online decoupler, and what is measured of domains (arXiv 2508.12803)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, train
from subspace_jax.represent import decoupling_probe
from subspace_jax.represent.decoupling_probe import OnlineDecoupler
from subspace_jax.represent.decoupling_probe.data import domain_mixture
from subspace_jax.represent.decoupling_probe.task import DecoupledClassifierTask, build, default_config

PUBLIC = [
    "VariationalProbeParams",
    "init_variational_probe",
    "probe_logits",
    "probe_kl",
    "probe_loss",
    "clip_variances",
    "posterior",
    "codelength",
    "fit_probe",
    "dominant_subspace",
    "decoupling_penalty",
    "project_out",
    "subspace_angles",
    "OnlineDecoupler",
]

DECOUPLER = OnlineDecoupler(3, 0, every=3, probe_steps=60, capacity=64, per_step=24)
observe, maybe_update, penalty = (jax.jit(f) for f in (DECOUPLER.observe, DECOUPLER.maybe_update, DECOUPLER.penalty))


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        yield


def domain_states(seed, count=48, features=8):
    """States of three domains, the corners of a triangle in the plane of two axes, a quarter of them padding."""
    rng = np.random.default_rng(seed)
    y = np.where(np.arange(count) % 4 == 3, -1, rng.integers(0, 3, count)).astype(np.int32)
    corners = np.array([[6.0, 0.0], [-3.0, 5.0], [-3.0, -5.0]])
    x = rng.standard_normal((count, features)) + np.where(y >= 0, corners[y].T, 0).T @ np.eye(2, features)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y)


@pytest.mark.parametrize("name", PUBLIC)
def test_decoupling_probe_has_every_public_name(name):
    assert hasattr(decoupling_probe, name)


def test_maybe_update_finds_the_subspace_when_it_is_due_and_leaves_it_between():
    state = DECOUPLER.init(jax.random.key(0), 8)
    bases = []
    for i in range(7):
        x, y = domain_states(i)
        state = observe(state, x, y, jax.random.key(2 * i))
        state = maybe_update(state, jax.random.key(2 * i + 1))
        bases.append(state.basis)
    assert not bases[0].any()
    assert not bases[1].any()
    assert penalty(state._replace(basis=bases[1]), x, y) == 0
    for i in (3, 4):
        np.testing.assert_array_equal(bases[i], bases[2])
    assert jnp.any(bases[5] != bases[2])
    np.testing.assert_array_equal(bases[6], bases[5])
    assert linalg.orthonormality_error(bases[5]) < 1e-5
    angles = decoupling_probe.subspace_angles(bases[5], jnp.eye(8)[:, :2])
    assert jnp.max(angles) < np.deg2rad(20)  # of 64 noisy states
    assert int(state.step) == 7


def test_observe_keeps_the_latest_states_and_padding_only_where_there_is_nothing_else():
    state = DECOUPLER.init(jax.random.key(0), 8)
    slots = []
    for i in range(3):
        x, y = domain_states(i)
        state = observe(state, x, y, jax.random.key(i))
        slots.append(int(state.slot))
        new = slice(slots[-1] - 24, slots[-1])
        assert jnp.all(state.labels[new] >= 0)  # 36 of the 48 states are real
        for row, label in zip(np.asarray(state.states[new]), state.labels[new], strict=True):
            (at,) = np.flatnonzero((np.asarray(x) == row).all(axis=1))
            assert y[at] == label
    assert slots == [24, 48, 24]  # a third batch does not fit into 64
    only_padding = observe(state, x, jnp.full_like(y, -1), jax.random.key(9))
    assert jnp.all(only_padding.labels[24:48] == -1)


def test_update_needs_states_of_the_target_and_of_others():
    state = DECOUPLER.init(jax.random.key(0), 8)
    x, _ = domain_states(0)
    state = state._replace(step=jnp.int32(2))
    for label in (0, 1):
        one_sided = observe(state, x, jnp.full(48, label, jnp.int32), jax.random.key(0))
        after = maybe_update(one_sided, jax.random.key(1))
        assert after.step == 3  # an estimate is due
        assert not after.basis.any()
        np.testing.assert_array_equal(after.probe.params.weight_mu, state.probe.params.weight_mu)


def test_penalty_of_others_leaves_the_target_free():
    x, y = domain_states(0)
    state = DECOUPLER.init(jax.random.key(0), 8)._replace(basis=jnp.eye(8)[:, :2])
    grad = jax.jit(jax.grad(dataclasses.replace(DECOUPLER, only="others").penalty, argnums=1))(state, x, y)
    moves = jnp.any(grad != 0, axis=1)
    np.testing.assert_array_equal(moves, y > 0)
    np.testing.assert_array_equal(jnp.any(jax.grad(penalty, argnums=1)(state, x, y) != 0, axis=1), y >= 0)


def test_share_of_states_that_shrink_is_the_same():
    x, y = domain_states(0)
    state = DECOUPLER.init(jax.random.key(0), 8)._replace(basis=jnp.eye(8)[:, :2])
    share = DECOUPLER.share(state, x, y)
    np.testing.assert_allclose(DECOUPLER.share(state, 0.1 * x, y), share, rtol=1e-5)
    np.testing.assert_allclose(DECOUPLER.penalty(state, 0.1 * x, y), 0.1 * DECOUPLER.penalty(state, x, y), rtol=1e-5)
    assert 0 < share < 1


def test_random_mode_draws_another_subspace_each_time_and_trains_no_probe():
    control = dataclasses.replace(DECOUPLER, mode="random")
    x, y = domain_states(0)
    state = observe(control.init(jax.random.key(0), 8), x, y, jax.random.key(0))
    draw = jax.jit(control.update)
    one, other = (draw(state, jax.random.key(i)) for i in (1, 2))
    assert linalg.orthonormality_error(one.basis) < 1e-5
    assert linalg.projector_distance(one.basis, other.basis) > 0.1
    np.testing.assert_array_equal(one.probe.params.weight_mu, state.probe.params.weight_mu)


def test_domain_measures_split_the_codelength_and_compare_the_means():
    x, y = domain_states(0)
    probe = decoupling_probe.init_variational_probe(jax.random.key(0), 8, 3)

    @jax.jit
    def measure(x, y):
        lengths = decoupling_probe.domain_codelengths(probe, x, y)
        return lengths, decoupling_probe.codelength(probe, x, y), decoupling_probe.domain_distances(x, y, 3)

    lengths, total, found = measure(x, y)
    np.testing.assert_allclose(np.sum(lengths), total, rtol=1e-5)
    means = [np.asarray(x)[np.asarray(y) == i].mean(axis=0) for i in range(3)]
    np.testing.assert_allclose(found.l2[0, 2], np.linalg.norm(means[0] - means[2]), rtol=1e-5)
    cosine = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    np.testing.assert_allclose(found.cosine[1, 0], cosine, rtol=1e-4)
    with pytest.raises(ValueError, match="x, y: expected"):
        decoupling_probe.domain_distances(x, y[1:], 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_domains": 1}, "num_domains: expected at least two domains, got 1"),
        ({"target": 3}, "target: expected a domain in 0 to 2, got 3"),
        ({"dim": 3}, "dim: expected 0 to 2 for 3 domains, got 3"),
        ({"mode": "binary", "dim": 2}, "dim: expected 0 to 1"),
        ({"mode": "svd"}, "mode: expected one of"),
        ({"only": "some"}, "only: expected one of"),
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected above 0"),
        ({"smoothing": 1.0}, r"smoothing: expected a share in \[0, 1\)"),
    ],
)
def test_online_decoupler_refuses_fields_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DECOUPLER, **fields)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("decoupling.weight=-0.1", "decoupling.weight: expected a finite number at least 0, got -0.1"),
        ("decoupling.target=first", "decoupling.target: expected one of"),
        ("decoupling.every=0", "decoupling.every: expected at least 1"),
        ("model.features=()", "model.features: expected widths"),
        ("data.num_train=0", "data.num_train, num_test: expected at least 1"),
    ],
)
def test_a_run_on_the_mixture_refuses_fields_by_name(setting, message):
    with pytest.raises(ValueError, match=message):
        build(train.override(default_config(), [setting]))


def test_what_does_not_fit_the_decoupler_is_refused():
    x, y = domain_states(0)
    with pytest.raises(ValueError, match="dim: expected at most the 1 features"):
        DECOUPLER.init(jax.random.key(0), 1)
    with pytest.raises(ValueError, match="y: expected a domain for each of the states"):
        DECOUPLER.observe(DECOUPLER.init(jax.random.key(0), 8), x, y[1:], jax.random.key(0))
    with pytest.raises(ValueError, match="weight: expected at least 0, got -1"):
        DecoupledClassifierTask((8, 8, 3), DECOUPLER, -1)
    with pytest.raises(ValueError, match=r"decoupling: expected examples of at least two domains, got \['es'\]"):
        train.decoupler_of(train.default_decoupling(), ["es"])
    with pytest.raises(ValueError, match="shares: expected 3 probabilities"):
        domain_mixture(0, shares=(0.5, 0.4, 0.3))
