"""The decoupling penalty, the variational probe and the subspace of its weights (arXiv 2508.12803)."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import linalg, losses
from subspace_jax.losses import decoupling
from subspace_jax.losses.decoupling import VariationalProbeParams, probe

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "decoupling-probe"
FIELDS = VariationalProbeParams._fields


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: jnp.asarray(x) for key, x in arrays.items()}


def params_of(arrays, prefix):
    return VariationalProbeParams(*(arrays[f"{prefix}_{name}"] for name in FIELDS))


def states(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def basis(dim, features=6, seed=0):
    return linalg.random_orthonormal(jax.random.key(seed), features, dim)


def test_probe_training_is_that_of_the_public_code():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # Optax raises float64 to int32 powers
        given = golden("variational_probe")
        start = params_of(given, "init")
        np.testing.assert_allclose(decoupling.probe_kl(start), given["kl_init"], rtol=1e-8)

        def loss(params, rows, of_inputs, of_logits):
            logits = probe.noisy_logits(params, given["H"][rows], of_inputs, of_logits)
            return probe.batch_codelength(params, logits, given["y"][rows], given["total_targets"]), logits

        opt, grad = optax.adam(given["lr"].item()), jax.jit(jax.value_and_grad(loss, has_aux=True))

        @jax.jit
        def step(params, state, *args):
            (value, logits), grads = grad(params, *args)
            updates, state = opt.update(grads, state)
            return optax.apply_updates(params, updates), state, value, logits, grads

        params, state, values = start, opt.init(start), []
        for i in range(given["steps"].item()):
            parts = (given[name][i] for name in ("batch_idx", "eps_z", "eps_act"))
            params, state, value, logits, grads = step(params, state, *parts)
            values.append(value)
            if i == 0:
                np.testing.assert_allclose(logits, given["logits0"], rtol=1e-8)
                chex.assert_trees_all_close(grads, params_of(given, "grad0"), rtol=1e-8)
        np.testing.assert_allclose(values, given["loss"], rtol=1e-8)
        chex.assert_trees_all_close(params, params_of(given, "final"), rtol=1e-8, atol=1e-12)


def test_posterior_clipped_variances_and_codelength_are_those_of_the_public_code():
    with jax.enable_x64(True):
        given = golden("variational_probe")
        clipped = decoupling.clip_variances(params_of(given, "final"), 0.04)
        np.testing.assert_allclose(clipped.weight_logvar, given["clipped_weight_logvar"], rtol=1e-8)
        np.testing.assert_allclose(clipped.bias_logvar, given["clipped_bias_logvar"], rtol=1e-8)
        mean, var = decoupling.posterior(clipped)
        np.testing.assert_allclose(mean, given["posterior_mean"], rtol=1e-8)
        np.testing.assert_allclose(var, given["posterior_var"], rtol=1e-8)
        np.testing.assert_allclose(decoupling.probe_logits(clipped, given["H"]), given["eval_logits"], rtol=1e-8)
        length = decoupling.codelength(clipped, given["H"], given["y"])
        np.testing.assert_allclose(length, given["codelength_nats"], rtol=1e-8)
        np.testing.assert_allclose(96 * np.log(4), given["uniform_codelength_nats"], rtol=1e-8)


def test_penalty_gradient_and_projection_are_those_of_the_oracle():
    with jax.enable_x64(True):
        given = golden("subspace_penalty")
        h, mask, lam = given["hidden"], given["mask"], given["lam"]
        q = decoupling.dominant_subspace(given["probe_weight"], 0, 2, mode="rows", center=False)
        np.testing.assert_allclose(q @ q.T, given["projector"], atol=1e-8)
        penalty = jax.jit(losses.decoupling_penalty, static_argnums=3)
        np.testing.assert_allclose(penalty(h, q, mask), given["penalty"], rtol=1e-8)
        np.testing.assert_allclose(penalty(h, q, mask, True), given["penalty_squared"], rtol=1e-8)
        grad = jax.grad(lambda h: lam * penalty(h, q, mask))(h)
        np.testing.assert_allclose(grad, given["penalty_grad"], atol=1e-8)
        np.testing.assert_allclose(losses.project_out(h, q), given["hidden_projected_out"], atol=1e-8)


def test_angles_and_one_against_the_rest_are_those_of_the_oracle():
    with jax.enable_x64(True):
        given = golden("subspace_penalty")
        of_rows = functools.partial(decoupling.dominant_subspace, target=0, k=4, mode="rows", center=False)
        angles = linalg.principal_angles(of_rows(given["probe_weight"]), of_rows(given["probe_weight_b"]))
        np.testing.assert_allclose(angles[::-1], given["subspace_angles_rad"], atol=1e-8)
        np.testing.assert_allclose(jnp.rad2deg(jnp.mean(angles)), given["ssa_mean_deg"], rtol=1e-8)
        for k in (1, 3):
            first = decoupling.dominant_subspace(given["probe_weight"], 0, k)[:, 0]
            np.testing.assert_allclose(first, given["one_vs_rest_direction"], atol=1e-8)


def test_penalty_is_0_for_no_subspace_and_the_mean_length_for_the_whole_space():
    h = states(0, 5, 6)
    assert losses.decoupling_penalty(h, jnp.zeros((6, 0))) == 0
    assert losses.decoupling_penalty(h, jnp.zeros((6, 2))) == 0
    lengths = jnp.linalg.norm(h, axis=1)
    np.testing.assert_allclose(losses.decoupling_penalty(h, basis(6)), jnp.mean(lengths), rtol=1e-5)
    np.testing.assert_allclose(
        losses.decoupling_penalty(h, basis(6), squared=True), jnp.mean(jnp.square(lengths)), rtol=1e-5
    )


def test_penalty_gradient_of_a_state_lies_in_the_subspace_with_one_over_the_count():
    h, q, mask = states(1, 2, 5, 6), basis(2), jnp.array([1, 1, 0, 1, 1])
    h = h.at[0, 0].set(losses.project_out(h[0, 0], q) * 0)  # a state without a component
    grad = jax.grad(losses.decoupling_penalty)(h, q, mask)
    np.testing.assert_allclose(losses.project_out(grad, q), 0, atol=1e-7)
    expected = np.tile(np.asarray(mask) / 8, (2, 1))
    expected[0, 0] = 0
    np.testing.assert_allclose(jnp.linalg.norm(grad, axis=-1), expected, rtol=1e-5)
    assert not jnp.any(jax.grad(losses.decoupling_penalty, argnums=1)(h, q, mask))  # a constant


def test_penalty_of_bfloat16_states_is_added_up_in_float32():
    h, q = states(2, 4096, 6), basis(2)
    got = losses.decoupling_penalty(h.astype(jnp.bfloat16), q)
    assert got.dtype == jnp.float32
    # States and basis are rounded to 8 bits; a mean in bfloat16 would stop growing long before 4096 states.
    np.testing.assert_allclose(got, losses.decoupling_penalty(h, q), rtol=4e-3)


def test_project_out_leaves_nothing_in_the_subspace_and_changes_nothing_twice():
    h, q = states(3, 7, 6), basis(2)
    rest = losses.project_out(h, q)
    np.testing.assert_allclose(rest @ q, 0, atol=1e-6)
    np.testing.assert_allclose(losses.project_out(rest, q), rest, atol=1e-6)


def test_probe_without_variance_is_a_linear_map():
    given = decoupling.init_variational_probe(jax.random.key(0), 6, 3)
    still = given._replace(**{name: jnp.full_like(getattr(given, name), -60) for name in FIELDS if "logvar" in name})
    x = states(4, 5, 6)
    expected = x @ (given.weight_mu * given.z_mu[None]).T + given.bias_mu[None]
    np.testing.assert_allclose(decoupling.probe_logits(still, x, jax.random.key(1)), expected, atol=1e-5)
    np.testing.assert_array_equal(decoupling.probe_logits(given, x), decoupling.probe_logits(given, x))
    assert jnp.max(jnp.abs(decoupling.probe_logits(given, x, jax.random.key(1)) - expected)) > 1e-4


def test_probe_noise_differs_between_rows():
    given = decoupling.init_variational_probe(jax.random.key(0), 6, 3)
    noisy = decoupling.probe_logits(given, jnp.ones((2, 6)), jax.random.key(1))
    assert jnp.all(noisy[0] != noisy[1])


def test_probe_kl_of_a_standard_normal_weight_is_0():
    zeros = VariationalProbeParams(*(jnp.zeros(s) for s in ((6,), (6,), (3, 6), (3, 6), (3,), (3,))))
    scales = decoupling.probe_kl(zeros)
    wider = zeros._replace(weight_mu=zeros.weight_mu + 1)
    np.testing.assert_allclose(decoupling.probe_kl(wider) - scales, 9, rtol=1e-5)  # 18 squares, halved


fit = jax.jit(lambda key, x, y: decoupling.fit_probe(
    key, decoupling.init_variational_probe(key, 8, 3), x, y, 150, optax.adam(5e-2)
).params)  # fmt: skip


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Optax raises float32 to int32 powers
def test_codelength_is_below_uniform_for_domains_that_can_be_told_and_not_for_random_ones():
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.integers(0, 3, 400), jnp.int32)
    x = states(5, 400, 8) + 3 * jnp.eye(3, 8)[y]
    uniform = 400 * np.log(3)
    assert decoupling.codelength(fit(jax.random.key(0), x, y), x, y) < 0.5 * uniform
    other = jnp.asarray(rng.permutation(y))
    found = fit(jax.random.key(0), x, other)
    assert decoupling.codelength(found, x, other) > 0.95 * uniform
    # A row that does not count changes neither.
    first = functools.partial(decoupling.codelength, found)
    np.testing.assert_allclose(first(x, other.at[0].set(-1)), first(x[1:], other[1:]), rtol=1e-6)


@pytest.mark.slow
def test_dominant_subspaces_of_all_directions_span_the_same():
    weight = states(6, 4, 9)
    spans = [decoupling.dominant_subspace(weight, 1, 3, mode=mode) for mode in ("target", "rows")]
    for q in spans:
        assert linalg.orthonormality_error(q) < 1e-5
    # Angles of float32 bases: rounding of 1e-7, and some more from the singular vectors.
    np.testing.assert_allclose(linalg.principal_angles(*spans), 0, atol=1e-5)
    difference = weight[0] - weight[1]
    one = decoupling.dominant_subspace(weight[:2], 0, mode="binary")[:, 0]
    np.testing.assert_allclose(one, difference / jnp.linalg.norm(difference), atol=1e-6)


@pytest.mark.slow
def test_dominant_subspace_takes_the_directions_that_hold_the_energy():
    # Centred rows +-3 e1, +-1 e2, with 9 of 10 parts of the squares in the first direction.
    weight = jnp.zeros((4, 5)).at[0, 0].set(3).at[1, 0].set(-3).at[2, 1].set(1).at[3, 1].set(-1)
    shapes = [decoupling.dominant_subspace(weight, 0, mode="rows", energy=e).shape for e in (0.85, 0.95, 1.0)]
    assert shapes == [(5, 1), (5, 2), (5, 2)]


@pytest.mark.slow
def test_average_subspace_begins_with_the_new_one_and_moves_less_the_more_it_keeps():
    old, new = basis(2, seed=1), basis(2, seed=2)
    first = decoupling.average_subspace(jnp.zeros_like(old), new, 0.5)
    np.testing.assert_allclose(linalg.principal_angles(first, new), 0, atol=1e-5)
    moved = [linalg.projector_distance(old, decoupling.average_subspace(old, new, keep)) for keep in (0.9, 0.5, 0.1)]
    assert moved[0] < moved[1] < moved[2]
    both = 0.3 * old @ old.T + 0.7 * new @ new.T
    leading = jnp.linalg.eigh(both)[1][:, -2:]
    np.testing.assert_allclose(
        linalg.principal_angles(decoupling.average_subspace(old, new, 0.3), leading), 0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.decoupling_penalty(states(0, 5, 6), basis(2, 7)), "h, q: expected states"),
        (lambda: losses.decoupling_penalty(states(0, 5, 6), basis(2), jnp.ones(4)), "mask: expected the last leading"),
        (lambda: losses.decoupling_penalty(states(0, 5, 6), basis(2), jnp.zeros(5)), "mask: expected at least one"),
        (lambda: decoupling.dominant_subspace(states(0, 4, 6), 4), "target: expected a domain in 0 to 3, got 4"),
        (lambda: decoupling.dominant_subspace(states(0, 4, 6), 0, 4), "k: expected 1 to 3"),
        (lambda: decoupling.dominant_subspace(states(0, 4, 2), 0, 3), "k: expected 1 to 2"),
        (lambda: decoupling.dominant_subspace(states(0, 4, 6), 0, 5, mode="rows", center=False), "k: expected 1 to 4"),
        (lambda: decoupling.dominant_subspace(states(0, 4, 6), 0, mode="svd"), "mode: expected one of"),
        (lambda: decoupling.dominant_subspace(states(0, 4, 6), 0, mode="binary"), "mode: 'binary' is for a probe of"),
        (lambda: decoupling.dominant_subspace(states(0, 4, 6) * jnp.nan, 0), "weight: expected finite"),
        (lambda: decoupling.dominant_subspace(states(0, 4, 6), 0, energy=0.0), "energy: expected a share"),
        (lambda: decoupling.init_variational_probe(jax.random.key(0), 6, 1), "num_features, num_classes: expected"),
        (lambda: decoupling.clip_variances(None, 0.0), "largest: expected a positive variance"),
        (lambda: fit_on(states(0, 4, 6), [0, 1, 2, 0]), r"y: expected domains in 0 to 1, or -1, got 0 to 2"),
        (lambda: fit_on(states(0, 4, 6), [1, 1, -1, 1]), r"y: expected rows of at least two domains, got only \[1\]"),
        (lambda: fit_on(states(0, 4, 6).at[1].set(jnp.nan), [0, 1, 1, 0]), "x: expected finite hidden states"),
        (lambda: fit_on(states(0, 4, 6), [0, 1, 1]), "x, y: expected"),
    ],
)
def test_what_can_t_serve_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def fit_on(x, y):
    start = decoupling.init_variational_probe(jax.random.key(0), x.shape[1], 2)
    return decoupling.fit_probe(jax.random.key(0), start, x, jnp.asarray(y, jnp.int32), 1, optax.sgd(0.1))


def test_an_empty_mask_that_is_traced_gives_no_penalty():
    value, grad = jax.jit(jax.value_and_grad(losses.decoupling_penalty))(states(0, 5, 6), basis(2), jnp.zeros(5))
    assert value == 0
    assert not jnp.any(grad)
