"""What Riemannian SGD and Adam promise, beyond the contract of all transforms and the golden vectors."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subspace_jax import linalg, optim
from subspace_jax.manifolds import grassmann

from ..variants import rest_slow

TRANSPORTS = ("euclidean", "project", "parallel")
RATE, MOMENTUM, B1, B2, EPS = 0.1, 0.9, 0.9, 0.999, 1e-8
N, K, BATCH, STEPS = 9, 3, 2, 8

both = pytest.mark.parametrize("make", [optim.riemannian_sgd, optim.riemannian_adam], ids=["sgd", "adam"])
adam_slow = pytest.mark.parametrize(
    "make", rest_slow([optim.riemannian_sgd, optim.riemannian_adam], optim.riemannian_sgd)
)


def random_gradient(step, s):
    return jax.random.normal(jax.random.fold_in(jax.random.key(3), step), s.shape) / 8


def points(dtype=jnp.float32, n=N, k=K, batch=(BATCH,)):
    return grassmann.random_point(jax.random.key(0), n, k, batch, dtype)


def gaussian(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def symmetric(n, dtype):
    a = gaussian((n, n), dtype)
    return (a + a.T) / 2


def projectors(s):
    return s @ s.mT


def worst(x):
    return float(jnp.max(jnp.abs(x)))


def defects(s):
    """Orthonormality errors, computed in float64."""
    s = np.asarray(s, np.float64)
    return np.linalg.norm(s.swapaxes(-1, -2) @ s - np.eye(s.shape[-1]), axis=(-2, -1))


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def trajectory(tx, gradient, s, state, num_steps):
    """Bases and states after each step; ``gradient(step, s)``."""

    def step(carry, i):
        s, state = carry
        updates, state = tx.update(gradient(i, s), state, s)
        s = optax.apply_updates(s, updates)
        return (s, state), (s, state)

    return jax.lax.scan(step, (s, state), jnp.arange(num_steps))[1]


def by_the_book(adam, transport, retraction, s, gradient):
    """The steps of the specification, from the functions of the manifold."""
    m, v = jnp.zeros_like(s), jnp.zeros_like(s[..., :1, :1])
    for i in range(STEPS):
        raw = gradient(i, s)
        g = grassmann.tangent_project(s, raw)
        if adam:
            m = B1 * (grassmann.tangent_project(s, m) if transport == "project" else m) + (1 - B1) * g
            v = B2 * v + (1 - B2) * jnp.mean(g * g, axis=(-2, -1), keepdims=True)
            scale = 1 / (1 - B1 ** (i + 1)) / (jnp.sqrt(v / (1 - B2 ** (i + 1))) + EPS)
        else:
            scale = 1.0
            if transport == "euclidean":
                m = MOMENTUM * m + raw
            else:
                m = MOMENTUM * (grassmann.tangent_project(s, m) if transport == "project" else m) + g
        h = -RATE * scale * grassmann.tangent_project(s, m)
        new = grassmann.retract(s, h, retraction)
        if transport == "parallel":
            m = grassmann.parallel_transport(s, h, m)
        if retraction == "qr":
            m = m @ grassmann.align(s, new)
        if transport == "parallel" and retraction != "exp":
            m = grassmann.tangent_project(new, m)
        s = new
        yield s, m


VARIANTS = [
    *((False, *options) for options in itertools.product(TRANSPORTS, grassmann.RETRACTIONS)),
    *((True, *options) for options in zip(TRANSPORTS, ("qr", "exp", "exp"), strict=True)),
    (True, "parallel", "qr"),
]


@pytest.mark.parametrize(
    ("adam", "transport", "retraction"),
    rest_slow(VARIANTS, (False, "euclidean", "qr")),
)
def test_steps_are_those_of_the_specification_whatever_the_basis(x64, adam, transport, retraction):
    s, a = points(jnp.float64), symmetric(N, jnp.float64)
    turn = linalg.random_orthonormal(jax.random.key(1), K, K, (BATCH,), jnp.float64)
    make = optim.riemannian_adam if adam else optim.riemannian_sgd
    tx = make(RATE, transport=transport, retraction=retraction, reorth_every=3)

    def gradient(_, s):
        return -(a @ s)

    path, states = trajectory(tx, gradient, s, tx.init(s), STEPS)
    for t, (point, m) in enumerate(by_the_book(adam, transport, retraction, s, gradient)):
        np.testing.assert_allclose(path[t], point, rtol=0, atol=1e-11)
        h = states.momentum[t]
        h, m = (h, m) if transport == "euclidean" else (grassmann.tangent_project(point, x) for x in (h, m))
        np.testing.assert_allclose(h, m, rtol=0, atol=1e-11)
    assert worst(linalg.orthonormality_error(path)) < 1e-13

    turned, turned_states = trajectory(tx, gradient, s @ turn, tx.init(s @ turn), STEPS)
    assert worst(projectors(turned) - projectors(path)) < 1e-12
    between = path.mT @ turned
    assert worst(states.momentum @ between - turned_states.momentum) < 1e-10, "stored vectors turn with the basis"


@pytest.mark.parametrize("transport", rest_slow(TRANSPORTS, "parallel"))
def test_the_first_step_spans_the_geodesic(x64, transport):
    s, g = points(jnp.float64), gaussian((BATCH, N, K), jnp.float64)
    tx = optim.riemannian_sgd(RATE, transport=transport)
    new = s + tx.update(g, tx.init(s), s)[0]
    h = -RATE * (g - s @ (s.mT @ g))
    u, sigma, rt = np.linalg.svd(h, full_matrices=False)
    expected = ((s @ rt.mT) * np.cos(sigma)[:, None] + u * np.sin(sigma)[:, None]) @ rt
    assert worst(projectors(new) - projectors(expected)) < 1e-12
    assert worst(linalg.orthonormality_error(new)) < 1e-13


@pytest.mark.slow
@adam_slow
@pytest.mark.parametrize("reorth_every", [1, 5, None])
def test_float32_bases_stay_orthonormal_after_each_of_1000_steps(make, reorth_every):
    s = points(n=64, k=8)
    tx = make(RATE, reorth_every=reorth_every)
    path, _ = trajectory(tx, random_gradient, s, tx.init(s), 1000)
    # About 3e-7 was seen: roundings of I - X, which is small, not of X.
    assert np.max(defects(path)) < 6e-7


@pytest.mark.slow
def test_a_step_from_bases_with_drift_removes_it_where_due():
    s = points(n=64, k=8)
    s += 1e-4 * gaussian(s.shape) / 8
    for reorth_every, low, high in ((1, 0.0, 1e-6), (None, 1e-5, 1e-3)):
        tx = optim.riemannian_sgd(RATE, reorth_every=reorth_every)
        updates, _ = tx.update(gaussian(s.shape, seed=1), tx.init(s), s)
        assert low <= np.max(defects(s + updates)) < high


@pytest.mark.slow
def test_a_gradient_that_is_all_but_normal_costs_precision_in_proportion():
    s = points(n=64, k=8)
    for normal in (1.0, 100.0):
        grads = normal * s @ gaussian((BATCH, 8, 8)) + 0.1 * gaussian(s.shape, seed=1)
        tx = optim.riemannian_sgd(RATE)
        updates, _ = tx.update(grads, tx.init(s), s)
        assert np.max(defects(s + updates)) < 1e-6 * max(1.0, normal)


@adam_slow
def test_without_a_gradient_bases_stay_as_they_are(make):
    s = points()
    tx = make(RATE, reorth_every=None)
    updates, _ = tx.update(jnp.zeros_like(s), tx.init(s), s)
    np.testing.assert_array_equal(updates, np.zeros_like(s))


@adam_slow
@pytest.mark.parametrize("retraction", rest_slow(grassmann.RETRACTIONS, "qr"))
def test_a_rate_of_0_leaves_bases_as_they_are(make, retraction):
    s = points()
    tx = make(0.0, retraction=retraction)
    updates, _ = tx.update(gaussian(s.shape), tx.init(s), s)
    assert worst(updates) < 1e-6


def test_a_rate_of_0_leaves_float64_bases_as_they_are(x64):
    s = points(jnp.float64)
    tx = optim.riemannian_sgd(0.0)
    assert worst(tx.update(gaussian(s.shape, jnp.float64), tx.init(s), s)[0]) < 1e-14


@pytest.mark.slow
@both
def test_the_whole_space_does_not_move(x64, make):
    s = points(jnp.float64, n=4, k=4)
    tx = make(RATE, eps=1e-3) if make is optim.riemannian_adam else make(RATE)
    updates, _ = tx.update(gaussian(s.shape, jnp.float64), tx.init(s), s)
    assert worst(updates) < 1e-12


def test_weight_decay_never_touches_bases():
    params = {"kernel": jnp.ones((2, 2)), "head": {"bases": points()}}
    euclidean = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
    tx = optim.with_geometry(euclidean, optim.riemannian_sgd(0.1, reorth_every=None))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], np.full((2, 2), -0.05), rtol=1e-6)
    np.testing.assert_array_equal(updates["head"]["bases"], np.zeros_like(params["head"]["bases"]))


def test_dampening_starts_at_the_second_step():
    s, first, second = points(), gaussian((BATCH, N, K), seed=1), gaussian((BATCH, N, K), seed=2)
    tx = optim.riemannian_sgd(RATE, momentum=0.8, dampening=0.3)
    updates, state = tx.update(first, tx.init(s), s)
    np.testing.assert_array_equal(state.momentum, first)
    _, state = tx.update(second, state, s + updates)
    np.testing.assert_allclose(state.momentum, 0.8 * first + 0.7 * second, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@both
def test_dimensions_mix_in_one_tree(make):
    params = {"one": points(k=1), "several": (points(k=4, batch=()), points(n=20, k=2, batch=(2, 3)))}
    grads = jax.tree.map(lambda s: gaussian(s.shape), params)
    tx = make(RATE)
    update = jax.jit(tx.update)
    together, _ = update(grads, tx.init(params), params)
    apart = jax.tree.map(lambda g, s: update(g, tx.init(s), s)[0], grads, params)
    chex.assert_trees_all_close(together, apart, rtol=1e-6, atol=1e-7)


@adam_slow
def test_the_schedule_is_read_before_the_step_is_counted(make):
    s, g = points(), gaussian((BATCH, N, K))
    seen = make(lambda count: jnp.asarray([0.0, RATE])[count], lr_factor=2.0, reorth_every=None)
    updates, state = seen.update(g, seen.init(s), s)
    assert worst(updates) < 1e-6
    assert int(state.count) == 1
    got, _ = seen.update(g, state, s)
    expected, _ = make(2 * RATE, reorth_every=None).update(g, state, s)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


@both
@pytest.mark.parametrize(
    ("transport", "retraction"),
    rest_slow(itertools.product(TRANSPORTS, grassmann.RETRACTIONS), ("euclidean", "exp"), ("parallel", "polar")),
)
def test_a_step_holds_no_large_decomposition(make, transport, retraction):
    n, k = 37, 3
    s = points(n=n, k=k)
    tx = make(RATE, transport=transport, retraction=retraction)
    steps = set(equations(jax.make_jaxpr(tx.update)(s, tx.init(s), s).jaxpr))
    assert {name for name, _ in steps} >= {"dot_general", "cholesky"}
    for name, shapes in steps:
        assert name not in ("svd", "lu", "geqrf", "householder_product", "qr")
        assert all(shape.count(n) < 2 for shape in shapes)
        if name in ("eigh", "cholesky", "triangular_solve"):
            assert all(n not in shape for shape in shapes)


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, tuple(v.aval.shape for v in (*eqn.invars, *eqn.outvars))
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(sub := getattr(sub, "jaxpr", sub), "eqns"):
                yield from equations(sub)


@pytest.mark.slow
@both
def test_the_leading_subspace_of_a_matrix_is_found(x64, make):
    q = np.linalg.qr(gaussian((10, 10), jnp.float64))[0]
    a = jnp.asarray(q * np.r_[5.0, 4.0, 3.0, np.linspace(1, 0, 7)] @ q.T)
    s = points(jnp.float64, n=10, k=3)

    def gradient(_, s):
        return -(a @ s)

    tx = make(0.02)
    path, _ = trajectory(tx, gradient, s, tx.init(s), 400)
    assert worst(grassmann.dist(path[-1], jnp.asarray(q[:, :3]))) < 1e-6
    assert worst(jnp.trace(path[-1].mT @ (a @ path[-1]), axis1=-2, axis2=-1) - 12.0) < 1e-6


@pytest.mark.parametrize(
    "bases",
    [
        {"head": {"bases": 1.0, "kernel": 2.0}},
        nnx.State({"head": {"bases": nnx.Param(np.ones(1)), "kernel": nnx.Param(np.ones(1))}}),
        {"head": {"bases": (1.0, [1.0]), "kernel": (2.0, [2.0])}},
    ],
    ids=["dict", "nnx", "tuples"],
)
def test_labels_follow_names(bases):
    labels = optim.geometry_labels(bases)
    assert jax.tree.structure(labels) == jax.tree.structure(bases)
    assert set(jax.tree.leaves(labels["head"]["bases"])) == {"grassmann"}
    assert set(jax.tree.leaves(labels["head"]["kernel"])) == {"euclidean"}


def test_labels_ignore_parts_of_names():
    assert optim.geometry_labels((1.0, {"mybases": 2.0, "bases_": 3.0})) == (
        "euclidean",
        {"mybases": "euclidean", "bases_": "euclidean"},
    )


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "teleport"}, "transport: expected one of .*'euclidean'.*got 'teleport'"),
        ({"retraction": "svd"}, "retraction: expected one of .*'cayley'.*got 'svd'"),
        ({"reorth_every": 0}, "reorth_every: expected a whole number of at least 1.*got 0"),
        ({"reorth_every": 2.5}, "reorth_every: .*got 2.5"),
    ],
)
def test_unknown_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(RATE, **options)


def test_nesterov_is_refused():
    with pytest.raises(ValueError, match="nesterov"):
        optim.riemannian_sgd(RATE, nesterov=True)


@both
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.ones((4, 2), np.int32), TypeError, "head/bases: expected floating-point bases, got int32"),
        (np.ones((4, 2), np.complex64), TypeError, "head/bases: .*got complex64"),
        (np.ones((2, 4)), ValueError, r"head/bases: expected bases .* 1 <= k <= n, got \(2, 4\)"),
        (np.ones((4, 0)), ValueError, r"head/bases: .*got \(4, 0\)"),
        (np.ones(4), ValueError, r"head/bases: .*got \(4,\)"),
        (1.001 * np.eye(4, 2), ValueError, "head/bases: the columns are not orthonormal .*random_point"),
        (np.full((4, 2), np.nan), ValueError, "head/bases: the columns are not orthonormal"),
    ],
    ids=["int", "complex", "wide", "empty", "vector", "long", "nan"],
)
def test_init_refuses_what_is_no_basis(make, bad, error, message):
    with pytest.raises(error, match=message):
        make(RATE).init({"head": {"bases": bad}})


@both
def test_init_takes_bases_that_are_orthonormal_to_single_precision(make):
    state = make(RATE).init(jnp.eye(4, 2) * 1.0002)
    chex.assert_tree_all_finite(state)


@both
def test_update_refuses_missing_params(make):
    s = points()
    tx = make(RATE)
    with pytest.raises(ValueError, match=r"params: got None.*update\(gradients, state, params\)"):
        tx.update(s, tx.init(s))
