"""Pools of experts, their routing and the historical subspace: golden vectors and the checks of the spec."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax.continual import igsp

EXPERTS, HIST = 5, 3

# Compiled as a whole: many small operations take longer.
apply = jax.jit(igsp.moe_lora_apply, static_argnames=("scale", "top_k"))
route = jax.jit(igsp.route, static_argnames="top_k")
init_pool = jax.jit(igsp.init_pool, static_argnums=(1, 2, 3, 4))
expand_pool = jax.jit(igsp.expand_pool, static_argnums=2)
prune_pool = jax.jit(igsp.prune_pool, static_argnums=2, static_argnames="relative")
add_task, nearest_task = jax.jit(igsp.add_task), jax.jit(igsp.nearest_task)
historical_basis = jax.jit(igsp.historical_basis, static_argnames=("energy", "max_rank"))


@pytest.fixture
def layer(golden, x64):
    """The golden vectors, and the pool and the router that they describe in this library's orientation."""
    g = golden("igsp/moe_lora")
    a, b = (jnp.asarray(g[name]).swapaxes(1, 2) for name in "AB")
    frozen = jnp.arange(EXPERTS) < int(g["num_hist"])
    pool = igsp.ExpertPool(a, b, jnp.ones(EXPERTS, bool), frozen, jnp.zeros(EXPERTS, jnp.int32))
    return g, pool, igsp.Router(jnp.asarray(g["router_W"]), jnp.asarray(g["router_b"]))


def penalized(g, pool, x, router_in, router, a, b):
    pool = pool._replace(a=a, b=b)
    y, probs = apply(x, router_in, jnp.asarray(g["W0"]).T, pool, router, float(g["scale"]))
    loss = jnp.mean(jnp.square(y - jnp.asarray(g["Y"])))
    reg = igsp.subspace_penalty(probs, igsp.candidate_mask(pool))
    return loss + float(g["lam"]) * reg, (loss, reg, y, probs)


def test_moe_lora_apply_its_penalty_and_gradients_are_golden(layer):
    g, pool, router = layer
    x, router_in = jnp.asarray(g["X"]), jnp.asarray(g["router_in"])
    differentiate = jax.jit(jax.grad(functools.partial(penalized, g, pool), argnums=(2, 3, 4), has_aux=True))
    (of_router, of_a, of_b), (loss, reg, y, probs) = differentiate(x, router_in, router, pool.a, pool.b)
    found = {
        "y": y,
        "probs": probs,
        "task_loss": loss,
        "reg": reg,
        "grad_router_W": of_router.kernel,
        "grad_router_b": of_router.bias,
        "grad_A_candidates": of_a[HIST:].swapaxes(1, 2),
        "grad_B_candidates": of_b[HIST:].swapaxes(1, 2),
        "gates_top2": route(router_in, router, pool.active, 2),
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, g[name], rtol=1e-10, atol=1e-13, err_msg=name)


def test_prune_pool_historical_basis_and_projection_are_golden(layer):
    g, pool, _ = layer
    np.testing.assert_array_equal(prune_pool(pool, jnp.asarray(g["mean_probs"]), float(g["tau"])).keep, g["keep"])
    basis, dim = historical_basis(pool)
    np.testing.assert_allclose(basis @ basis.T, g["hist_basis_projector"], rtol=1e-10, atol=1e-13)
    assert int(dim) == round(np.trace(g["hist_basis_projector"]))
    tx = igsp.orthogonal_complement_updates(basis)
    gradient = jnp.asarray(g["grad_A_candidates"]).swapaxes(1, 2)
    projected, _ = tx.update(gradient, tx.init(gradient))
    np.testing.assert_allclose(projected.swapaxes(1, 2), g["proj_grad_A_candidates"], rtol=1e-10, atol=1e-13)


def test_expert_kernel_gives_the_gradient_of_the_penalized_loss_and_the_probabilities(layer):
    g, pool, router = layer
    x, base, scale = jnp.asarray(g["X"]), jnp.asarray(g["W0"]).T, float(g["scale"])

    def by_kernel(router, a, b, probe):
        weights = float(g["lam"]) * igsp.candidate_mask(pool).astype(x.dtype)
        kernel = igsp.ExpertKernel(base, a, b, router, pool.active, penalty=weights, probe=probe, scale=scale)
        return jnp.mean(jnp.square(kernel.linear(x) - jnp.asarray(g["Y"])))

    zeros = jnp.zeros((len(x), EXPERTS))
    *found, probs = jax.jit(jax.grad(by_kernel, argnums=(0, 1, 2, 3)))(router, pool.a, pool.b, zeros)
    differentiate = jax.jit(jax.grad(functools.partial(penalized, g, pool), argnums=(2, 3, 4), has_aux=True))
    expected, aux = differentiate(x, x, router, pool.a, pool.b)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-12, atol=1e-14), tuple(found), expected)
    np.testing.assert_array_equal(probs, aux[-1])


def test_subspace_penalty_has_the_gradient_of_its_formula_and_is_one_without_history(layer):
    _, pool, _ = layer
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, EXPERTS)))
    candidates = igsp.candidate_mask(pool)

    def omega(logits):
        return igsp.subspace_penalty(jax.nn.softmax(logits), candidates)

    probs = jax.nn.softmax(logits)
    mass = jnp.sum(probs * candidates.astype(probs.dtype)[None], axis=-1, keepdims=True)
    expected = probs * (candidates.astype(probs.dtype)[None] - mass) / len(logits)
    np.testing.assert_allclose(jax.grad(omega)(logits), expected, atol=1e-12)
    assert 0 <= float(omega(logits)) <= 1
    np.testing.assert_allclose(igsp.subspace_penalty(probs, jnp.ones(EXPERTS, bool)), 1, rtol=1e-12)


def test_new_experts_change_nothing_and_inactive_ones_have_probability_and_gradient_zero():
    key = jax.random.key(0)
    empty = init_pool(key, 4, 2, 6, 3)
    x, w0 = jax.random.normal(key, (5, 6)), jax.random.normal(key, (6, 3))
    router = igsp.init_router(6, 4)
    y, probs = apply(x, x, w0, empty, router, 1.0)
    np.testing.assert_array_equal(y, x @ w0)
    np.testing.assert_array_equal(probs, 0)
    grown = expand_pool(key, empty, 2, task=0)
    y, probs = apply(x, x, w0, grown, router, 1.0)
    np.testing.assert_array_equal(y, x @ w0)
    np.testing.assert_allclose(probs, np.tile([0.5, 0.5, 0, 0], (5, 1)))
    full = grown._replace(b=jax.random.normal(key, grown.b.shape))

    def loss(pool, router):
        return jnp.sum(jnp.square(apply(x, x, w0, pool, router, 1.0)[0]))

    of_pool, of_router = jax.grad(loss, argnums=(0, 1), allow_int=True)(full, router)
    for gradient in (of_pool.a[2:], of_pool.b[2:], of_router.bias[2:], of_router.kernel[:, 2:]):
        np.testing.assert_array_equal(gradient, 0)
    assert float(jnp.abs(of_pool.b[:2]).min(axis=(1, 2)).max()) > 0


def test_route_by_top_k_uses_that_many_active_experts_and_sums_to_one():
    logits = jnp.asarray([[0.0, 3.0, 2.0, 1.0]])
    mask = jnp.asarray([True, False, True, True])
    router = igsp.Router(None, logits[0])
    probs = route(jnp.zeros((2, 1)), router, mask, 2)
    np.testing.assert_array_equal(probs > 0, np.tile([False, False, True, True], (2, 1)))
    np.testing.assert_allclose(jnp.sum(route(jnp.zeros((2, 1)), router, mask), axis=-1), 1, rtol=1e-6)


def test_pool_grows_is_pruned_and_frozen_and_its_historical_experts_stay_as_they_are():
    pool = jax.vmap(lambda key: init_pool(key, 6, 2, 8, 4))(jax.random.split(jax.random.key(0), 3))
    pool = expand_pool(jax.random.key(1), pool, 2, task=0)
    pool = pool._replace(b=jnp.where(pool.active[..., None, None], 1.0, 0.0) * jnp.ones_like(pool.b))
    old = igsp.freeze_pool(pool)
    grown = expand_pool(jax.random.key(2), old, 2, task=1)
    probs = jnp.asarray([[0.1, 0.4, 0.4, 0.1, 0, 0], [0.4, 0.4, 0.1, 0.1, 0, 0], [0.25, 0.25, 0.125, 0.375, 0, 0]])
    pruned = prune_pool(grown, probs, 0.5)  # at least an eighth, ties kept
    np.testing.assert_array_equal(pruned.keep, [[0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(pruned.pool.active[:, :2], True)
    np.testing.assert_array_equal(pruned.pool.owner[:, 2:4], [[1, -1], [-1, -1], [1, 1]])
    for new in (grown, pruned.pool, igsp.freeze_pool(pruned.pool)):
        np.testing.assert_array_equal(new.a[:, :2], old.a[:, :2])
        np.testing.assert_array_equal(new.b[:, :2], old.b[:, :2])
    counts = igsp.parameter_counts(pruned.pool, 2)
    np.testing.assert_array_equal(counts.total, np.array([3, 2, 4]) * 2 * (8 + 4))
    np.testing.assert_array_equal(counts.per_task, np.array([[2, 1], [2, 0], [2, 2]]) * 24)
    np.testing.assert_array_equal(counts.candidates, counts.total - counts.historical)


def test_prune_pool_does_not_depend_on_the_order_of_experts_and_keeps_the_most_used_where_none_suffices():
    pool = expand_pool(jax.random.key(0), init_pool(jax.random.key(0), 5, 1, 3, 3), 4, task=0)
    probs = jnp.asarray([0.1, 0.5, 0.15, 0.25, 0.0])
    order = jnp.asarray([3, 1, 0, 2, 4])
    keep = prune_pool(pool, probs, 0.7).keep
    moved = jax.tree.map(lambda x: x[order], pool)
    np.testing.assert_array_equal(prune_pool(moved, probs[order], 0.7).keep, keep[order])
    np.testing.assert_array_equal(prune_pool(pool, probs, 4.0).keep, [False, True, False, False, False])
    absolute = prune_pool(pool, probs, 0.15, relative=False)
    np.testing.assert_array_equal(absolute.keep, [False, True, True, True, False])


def test_historical_basis_has_all_directions_of_few_experts_and_none_of_no_expert():
    pool = expand_pool(jax.random.key(0), init_pool(jax.random.key(1), 4, 2, 9, 4), 2, task=0)
    _, none = historical_basis(pool)
    basis, dim = historical_basis(igsp.freeze_pool(pool))
    assert (int(none), int(dim)) == (0, 4)
    columns = jnp.moveaxis(pool.a[:2], 0, 1).reshape(9, 4)
    np.testing.assert_allclose(basis @ (basis.T @ columns), columns, atol=1e-5)
    assert int(historical_basis(igsp.freeze_pool(pool), max_rank=3)[1]) == 3


@jax.numpy_dtype_promotion("standard")
def test_orthogonal_complement_updates_after_adam_keep_experts_out_of_the_subspace():
    pool = expand_pool(jax.random.key(0), init_pool(jax.random.key(1), 4, 2, 9, 4), 2, task=0)
    basis, dim = historical_basis(igsp.freeze_pool(pool))
    project = igsp.orthogonal_complement_updates(basis)
    start = a = jnp.ones((2, 9, 2))

    def moved(tx):
        a, state = start, tx.init(start)
        for i in range(3):
            gradient = jax.random.normal(jax.random.key(i), a.shape)
            updates, state = tx.update(gradient, state, a)
            a = optax.apply_updates(a, updates)
        return jnp.max(jnp.abs(jnp.einsum("dq,edr->eqr", basis[:, : int(dim)], a - start)))

    assert float(moved(optax.chain(project, optax.adam(0.1), project))) < 1e-6
    assert float(moved(optax.chain(project, optax.adam(0.1)))) > 1e-2
    assert a is start


def test_router_converged_looks_at_the_layer_that_moves_most():
    before = jnp.asarray([[0.5, 0.5], [0.5, 0.5]])
    now = jnp.asarray([[0.5, 0.5], [0.52, 0.48]])
    assert not igsp.router_converged(before, now, 0.01)
    assert igsp.router_converged(before, now, 0.03)


def test_nearest_task_finds_the_task_and_leaves_what_is_far_to_the_frozen_model():
    rng = np.random.default_rng(0)
    centers = 6 * rng.standard_normal((3, 4))
    stats = igsp.init_task_stats(4, 4)
    for task, center in enumerate(centers):
        stats = add_task(stats, task, jnp.asarray(center + rng.standard_normal((200, 4)), jnp.float32))
    found = nearest_task(stats, jnp.asarray([*centers, [90.0, 90.0, 90.0, 90.0]], jnp.float32))
    np.testing.assert_array_equal(found.task, [0, 1, 2, -1])
    near = jnp.asarray(centers[1] + rng.standard_normal((400, 4)), jnp.float32)
    assert 0.9 < float(jnp.mean((nearest_task(stats, near).task == 1).astype(jnp.float32))) < 0.99


def test_complement_penalty_is_the_share_outside():
    a = jnp.stack([jnp.eye(4)[:, :2], jnp.eye(4)[:, 1:3], jnp.eye(4)[:, 2:]])
    basis = jnp.eye(4)[:, :2]
    np.testing.assert_allclose(igsp.complement_penalty(a, basis, jnp.ones(3)), 0.5)
    np.testing.assert_allclose(igsp.complement_penalty(a, basis, jnp.asarray([1.0, 0.0, 0.0])), 0.0)


def test_moe_lora_dense_uses_all_experts_in_training_and_top_k_in_evaluation():
    key = jax.random.key(0)
    pool = expand_pool(key, init_pool(key, 4, 2, 6, 3), 3, task=0)
    layer = igsp.MoELoRADense(3, 2, 4, 0.5, top_k=1, kernel=jnp.ones((6, 3)))
    x = jax.random.normal(key, (2, 7, 6))
    router = igsp.Router(jax.random.normal(key, (6, 4)), jnp.zeros(4))
    for train, used in ((True, 3), (False, 1)):
        y, probs = layer(x, x[:, 0], pool, router, train)
        assert y.shape == (2, 7, 3)
        np.testing.assert_array_equal(jnp.sum(probs > 0, axis=-1), used)


def make_pool(**changes):
    pool = igsp.expand_pool(jax.random.key(0), igsp.init_pool(jax.random.key(0), 4, 2, 6, 3), 2, task=0)
    return pool._replace(**changes)


def applied(pool=None, router=None, x=None, top_k=None):
    x = jnp.ones((2, 6)) if x is None else x
    router = igsp.init_router(6, 4) if router is None else router
    return igsp.moe_lora_apply(x, x, jnp.ones((6, 3)), pool or make_pool(), router, 1.0, top_k=top_k)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: igsp.expand_pool(jax.random.key(0), make_pool(), 3, 1), "pool: is full: .* 2 free slots of 4"),
        (lambda: igsp.expand_pool(jax.random.key(0), make_pool(), 0, 1), "num: expected at least 1"),
        (lambda: applied(make_pool(b=jnp.ones((4, 3, 3)))), "another rank"),
        (lambda: applied(router=igsp.init_router(5, 4)), r"router: expected kernel \[6, 4\]"),
        (lambda: applied(router=igsp.init_router(6, 5)), r"router: expected bias \[4\]"),
        (lambda: applied(x=jnp.ones((2, 5)), router=igsp.init_router(5, 4)), "x of shape|x, probs: expected"),
        (lambda: applied(top_k=5), "top_k: expected 1 to 4"),
        (lambda: igsp.prune_pool(make_pool(), jnp.ones(4), 0.0), "tau: expected a finite number above 0, got 0.0"),
        (lambda: igsp.prune_pool(make_pool(), jnp.ones(4), float("nan")), "tau: expected"),
        (lambda: igsp.prune_pool(make_pool(), jnp.ones(3), 0.5), "mean_probs: expected"),
        (lambda: igsp.prune_pool(make_pool(), jnp.full(4, jnp.nan), 0.5), "mean_probs: expected finite"),
        (lambda: igsp.init_pool(jax.random.key(0), 4, 5, 6, 3), "rank: expected at most 3"),
        (lambda: igsp.init_pool(jax.random.key(0), 0, 2, 6, 3), "max_experts: expected at least 1"),
        (lambda: igsp.historical_basis(make_pool(), 0.0), "energy: expected a share"),
        (lambda: igsp.subspace_penalty(jnp.ones((2, 4)), jnp.ones(3, bool)), "is_candidate: expected"),
        (lambda: igsp.router_converged(jnp.ones(3), jnp.ones(4), 0.1), "prev, new: expected one shape"),
        (lambda: igsp.MoELoRADense(3, 2, 4, 1.0, kernel=jnp.ones((6, 4))), "kernel: expected"),
        (lambda: igsp.mtil_metrics(np.ones((2, 3))), "square"),
        (lambda: igsp.mtil_metrics(np.full((2, 2), np.nan)), "finite"),
        (lambda: igsp.add_task(igsp.init_task_stats(2, 3), 0, jnp.full((2, 3), jnp.nan)), "features: expected finite"),
        (lambda: igsp.add_task(igsp.init_task_stats(2, 3), 0, jnp.ones((2, 4))), "features: expected"),
    ],
)
def test_what_cannot_serve_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_orthogonal_complement_updates_refuses_a_basis_that_does_not_fit():
    tx = igsp.orthogonal_complement_updates(jnp.eye(5))
    with pytest.raises(ValueError, match="basis: expected"):
        tx.update(jnp.ones((2, 6, 2)), tx.init(jnp.ones((2, 6, 2))))


def test_public_surface_of_the_spec_is_there():
    names = """ExpertPool init_pool expand_pool prune_pool freeze_pool MoELoRADense moe_lora_apply subspace_penalty
        router_converged candidate_mask historical_basis orthogonal_complement_updates ContinualState fit_task
        mtil_metrics parameter_counts"""
    assert set(names.split()) <= set(igsp.__all__)
    assert all(hasattr(igsp, name) for name in igsp.__all__)
    assert igsp.ContinualState._fields == ("pool", "routers", "masks", "task_stats")
    assert igsp.ExpertPool._fields == ("a", "b", "active", "frozen", "owner")
