"""Maps between two models: golden vectors of their loss, and what the maps and the orders are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subspace_jax import linalg, losses, metrics, optim
from subspace_jax.represent import lambda_orthogonality as compat

from ..variants import rest_slow

TERMS = ("backward", "forward", "contrastive", "orthogonality")


def settings_of(g):
    names = ("lam", "kappa", "temperature")
    return compat.CompatSettings(tuple(map(float, g["weights"])), *(float(g[name]) for name in names))


def test_compat_loss_its_gradients_and_eight_steps_are_golden(golden, x64):
    g = golden("lambda-orthogonality/training")
    new, old, labels = (jnp.asarray(g[name]) for name in ("h_new", "h_old", "labels"))
    start = compat.CompatParams(
        *(compat.Affine(jnp.asarray(g[f"W_{name}0"]), jnp.asarray(g[f"b_{name}0"])) for name in "bf")
    )
    settings = settings_of(g)
    differentiate = jax.value_and_grad(
        lambda params: compat.compat_loss(params, new, old, labels, settings), has_aux=True
    )
    tx = optax.sgd(float(g["lr"]), momentum=float(g["momentum"]))

    @jax.jit
    def step(params, state):
        (loss, terms), gradients = differentiate(params)
        updates, state = tx.update(gradients, state)
        return (
            jnp.stack([*(terms[name] for name in TERMS), loss]),
            gradients,
            optax.apply_updates(params, updates),
            state,
        )

    params, state, found = start, tx.init(start), []
    for i in range(8):
        terms, gradients, params, state = step(params, state)
        found.append(terms)
        if i == 0:
            for name, own in zip("bf", gradients, strict=True):
                chex.assert_trees_all_close(tuple(own), (g[f"grad_W_{name}"], g[f"grad_b_{name}"]), atol=1e-8)
    chex.assert_trees_all_close(found[0], g["terms0"], atol=1e-8)
    chex.assert_trees_all_close(jnp.stack(found), g["terms"], atol=1e-8)
    for name, own in zip("bf", params, strict=True):
        chex.assert_trees_all_close(tuple(own), (g[f"W_{name}"], g[f"b_{name}"]), atol=1e-8)


def rotated(d=6, count=200):
    """New vectors, old ones that are a rotation of them, and the rotation."""
    rng = np.random.default_rng(0)
    new = jnp.asarray(rng.standard_normal((count, d)), jnp.float32)
    rotation = linalg.random_orthonormal(jax.random.key(1), d, d)
    return new, linalg.times(new, rotation), rotation


@pytest.mark.slow
def test_a_large_weight_and_no_threshold_bring_the_backward_map_to_the_procrustes_solution():
    new, old, rotation = rotated()
    chex.assert_trees_all_close(linalg.orthogonal_procrustes(new, old), rotation, atol=1e-5)
    noisy = 1.3 * old + 0.3 * jax.random.normal(jax.random.key(2), old.shape)
    goal = linalg.orthogonal_procrustes(new, noisy)
    settings = compat.CompatSettings((1.0, 0.0, 0.0, 20.0), lam=0.0)
    forward = compat.Affine(jnp.eye(6), jnp.zeros(6))

    def loss(kernel):
        params = compat.CompatParams(compat.Affine(kernel, jnp.zeros(6)), forward)
        return compat.compat_loss(params, new, noisy, jnp.zeros(200, jnp.int32), settings)[0]

    def step(kernel, _):
        return kernel - 1e-3 * jax.grad(loss)(kernel), None

    start = linalg.random_orthonormal(jax.random.key(3), 6, 6)
    start = start.at[:, 0].multiply(jnp.sign(jnp.linalg.det(start)) * jnp.sign(jnp.linalg.det(goal)))
    kernel = jax.jit(lambda start: jax.lax.scan(step, start, length=8000)[0])(start)
    # At the threshold 0 the penalty has a kink, around which steps of 1e-3 with a weight of 20 go back and forth.
    assert losses.orthogonality_residual(kernel) < 0.05
    assert jnp.linalg.norm(kernel - goal) < 0.1


def test_add_lambda_orthogonality_adds_the_gradient_of_the_penalty_to_kernels_alone():
    w = jax.random.normal(jax.random.key(0), (5, 3))
    params = {"kernel": w, "bias": jnp.ones(3)}
    tx = optim.add_lambda_orthogonality(2.0, 0.5, 10.0)
    gradients = {"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    expected = 1 + 2 * jax.jit(jax.grad(lambda w: losses.lambda_orthogonality(w, 0.5, 10.0)))(w)
    chex.assert_trees_all_close(updates, {"kernel": expected, "bias": jnp.ones(3)}, atol=1e-5)
    for name, arguments in (("weight", (-1.0, 1.0)), ("lam", (1.0, -1.0)), ("kappa", (1.0, 1.0, 0.0))):
        with pytest.raises(ValueError, match=f"{name}: expected a number"):
            optim.add_lambda_orthogonality(*arguments)
    with pytest.raises(ValueError, match="params: got None, expected the kernels"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("method", rest_slow(["cayley", "expm"]))
def test_adapters_start_as_the_identity_and_the_rotation_stays_one(method):
    h = jax.random.normal(jax.random.key(0), (4, 5))
    apply = nnx.jit(lambda adapter, h: adapter(h))
    chex.assert_trees_all_close(apply(compat.AffineAdapter(5, 3), h), h[:, :3])
    chex.assert_trees_all_close(apply(compat.AffineAdapter(3, 5), h[:, :3]), np.pad(h[:, :3], ((0, 0), (0, 2))))
    adapter = compat.OrthogonalAdapter(5, method)
    chex.assert_trees_all_close(apply(adapter, h), h)
    adapter.skew.set_value(jax.random.normal(jax.random.key(1), (5, 5)))
    chex.assert_trees_all_close(jnp.linalg.norm(apply(adapter, h), axis=1), jnp.linalg.norm(h, axis=1), rtol=1e-5)
    with pytest.raises(ValueError, match="a rotation needs vectors of one width, got 3 old and 5 new"):
        compat.CompatAdapters(3, 5, strict=True)


def test_backfill_order_begins_with_what_lies_farthest_from_its_class_or_from_all():
    mapped = jnp.asarray([[0.0, 0.0], [3.0, 0.0], [0.0, 9.0], [10.0, 1.0]])
    means_of, order_of = jax.jit(compat.class_means, static_argnums=2), jax.jit(compat.backfill_order)
    means = means_of(jnp.asarray([[-1.0, 0.0], [1.0, 0.0], [10.0, 0.0]]), jnp.asarray([0, 0, 1]), 2)
    chex.assert_trees_all_close(means, jnp.asarray([[0.0, 0.0], [10.0, 0.0]]))
    assert order_of(mapped, means).tolist() == [2, 1, 3, 0]
    assert order_of(mapped, means, jnp.asarray([1, 0, 0, 1])).tolist() == [0, 2, 1, 3]


def test_backfill_curve_replaces_items_in_order_and_has_the_area_of_its_trapezoids():
    mapped, new = jnp.zeros((4, 1)), jnp.asarray([[1.0], [2.0], [3.0], [4.0]])
    order = jnp.asarray([3, 0, 2, 1])
    shares = jnp.asarray([0.0, 0.25, 0.5, 1.0])
    values, area = metrics.backfill_curve(jnp.sum, mapped, new, order, shares)
    assert values.tolist() == [0, 4, 5, 10]
    assert area == pytest.approx(0.25 * 2 + 0.25 * 4.5 + 0.5 * 7.5)
    assert metrics.update_gain(0.7, 0.6, 0.9) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="mapped, new, order: expected"):
        metrics.backfill_curve(jnp.sum, mapped, new[:3], order, shares)
    with pytest.raises(ValueError, match="shares: expected at least two"):
        metrics.backfill_curve(jnp.sum, mapped, new, order, shares[:1])


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (
            "expected the vectors of the same examples in the same order, got 29 old and 30 new",
            {"old": jnp.ones((29, 4))},
        ),
        (r"labels: expected one of each pair, \[30\], got shape \[29\]", {"labels": jnp.zeros(29, jnp.int32)}),
        (r"new: expected vectors \[examples, n\], got shape \[30\]", {"new": jnp.ones(30)}),
        (r"backward: expected a kernel \[5, 4\] for these vectors, got \[6, 4\]", {"new": jnp.ones((30, 5))}),
        (r"backward: expected a kernel \[6, 3\] for these vectors, got \[6, 4\]", {"old": jnp.ones((30, 3))}),
        ("temperature", {"settings": compat.CompatSettings(temperature=0.0)}),
        ("lam: expected a threshold of at least 0", {"settings": compat.CompatSettings(lam=-1.0)}),
        ("kappa: expected a sharpness above 0", {"settings": compat.CompatSettings(kappa=0.0)}),
    ],
)
def test_compat_loss_refuses_what_can_not_serve(error, change):
    given = {"new": jnp.ones((30, 6)), "old": jnp.ones((30, 4)), "labels": jnp.zeros(30, jnp.int32), **change}
    settings = given.pop("settings", compat.CompatSettings())
    params = compat.CompatAdapters(4, 6).params()
    with pytest.raises(ValueError, match=error):  # nothing is computed
        jax.eval_shape(lambda: compat.compat_loss(params, given["new"], given["old"], given["labels"], settings))


def test_every_name_of_the_public_surface_is_there():
    for room, names in {
        losses: (
            "orthogonality_residual",
            "lambda_orthogonality",
            "lambda_orthogonality_tree",
            "supervised_contrastive",
        ),
        linalg: ("orthogonal_from_skew", "orthogonal_procrustes", "project_to_lambda_ball", "pairwise_sq_distances"),
        metrics: ("cmc", "retrieval_map", "update_gain", "backfill_curve"),
        optim: ("add_lambda_orthogonality",),
        compat: ("AffineAdapter", "OrthogonalAdapter", "CompatParams", "compat_loss", "backfill_order", "CompatTask"),
    }.items():
        assert set(names) <= set(room.__all__)
        assert all(callable(getattr(room, name)) for name in names)
