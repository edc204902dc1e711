"""AdaPreLoRA: what its factor step is, what it does not depend on, and a train step that delivers its energies."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import adapters, nn, optim, train
from subspace_jax.optim.lora._factors import Factors
from subspace_jax.optim.lora.adaprelora import factor_step, mean_squares, preconditioner
from subspace_jax.optim.lora.lora_pro import adjusted

from ..variants import rest_slow

ROWS, COLUMNS, RANK = 9, 7, 3


def problem(seed=0, scale=1.7, rank=RANK, b_zero=False):
    """Tall factors ``a [in, r]``, ``b [out, r]`` and the gradient ``[in, out]`` of their weight."""
    rng = np.random.default_rng(seed)
    a, b, g = (rng.standard_normal(shape) for shape in ((ROWS, rank), (COLUMNS, rank), (ROWS, COLUMNS)))
    return factors(a, 0 * b if b_zero else b, g, scale), jnp.asarray(g)


def factors(a, b, g, scale):
    a, b, g = map(jnp.asarray, (a, b, g))
    energies = jnp.sum(g**2, axis=1), jnp.sum(g**2, axis=0)
    return Factors(a, b, scale * g @ b, scale * g.T @ a, jnp.asarray(scale), energies)


def weights(f):
    return preconditioner(*mean_squares("full", f), 0.0)[0]


def change(f, da, db):
    """The first-order change of the weight."""
    return f.scale * (da @ f.b.T + f.a @ db.T)


def close(got, expected, rtol=1e-10):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol)


def test_the_step_is_the_balanced_one_of_all_least_squares_solutions(x64):
    f, g = problem()
    rows, columns = map(np.asarray, weights(f))
    da, db = factor_step(f, rows, columns, 0.0, 0.0)
    root = np.sqrt(np.outer(rows, columns))
    a, b, s = np.asarray(f.a), np.asarray(f.b), float(f.scale)

    def operator(sign):
        """``root * (da b^T + sign a db^T)`` for the entries of da, then of db."""
        units = np.eye((ROWS + COLUMNS) * RANK)
        split = ROWS * RANK
        made = [
            root * (u[:split].reshape(ROWS, RANK) @ b.T + sign * a @ u[split:].reshape(COLUMNS, RANK).T) for u in units
        ]
        return np.stack([m.ravel() for m in made], axis=1)

    wanted = (root * np.asarray(g) / np.outer(rows, columns)).ravel()
    forward = s * operator(1)
    best = np.linalg.lstsq(forward, wanted, rcond=None)[0]
    _, values, vt = np.linalg.svd(forward)
    null = vt[np.sum(values > 1e-9 * values[0]) :].T
    assert null.shape[1] == RANK**2
    imbalance = operator(-1)
    best = best - null @ np.linalg.lstsq(imbalance @ null, imbalance @ best, rcond=None)[0]
    close(np.concatenate([da.ravel(), db.ravel()]), best)


def test_what_is_left_of_the_ideal_step_is_orthogonal_to_all_that_factors_can_do(x64):
    f, g = problem(1)
    rows, columns = weights(f)
    h = jnp.outer(rows, columns)
    left = h * (change(f, *factor_step(f, rows, columns, 0.0, 0.0)) - g / h)
    close(left @ f.b, jnp.zeros_like(f.a))
    close(left.T @ f.a, jnp.zeros_like(f.b))


def test_a_change_of_basis_changes_the_steps_alike(x64):
    f, g = problem(2)
    turn = jnp.asarray(np.random.default_rng(3).standard_normal((RANK, RANK)))
    turned = factors(f.a @ turn, f.b @ jnp.linalg.inv(turn).T, g, float(f.scale))
    da, db = factor_step(f, *weights(f), 0.0, 0.0)
    other = factor_step(turned, *weights(turned), 0.0, 0.0)
    close(other[0], da @ turn, 1e-9)
    close(other[1], db @ jnp.linalg.inv(turn).T, 1e-9)


@pytest.mark.slow
def test_without_a_preconditioner_the_weight_moves_as_with_lora_pro(x64):
    f, g = problem(4)
    step = change(f, *factor_step(f, jnp.ones(ROWS), jnp.ones(COLUMNS), 0.0, 0.0))
    on_a, on_b = (x @ jnp.linalg.solve(x.T @ x, x.T) for x in (f.a, f.b))
    close(step, on_a @ g + g @ on_b - on_a @ g @ on_b)
    close(step, change(f, *adjusted(f, 0.0)))


@pytest.mark.slow
def test_factors_of_full_rank_follow_the_ideal_step_itself(x64):
    f, g = problem(5, rank=COLUMNS)
    rows, columns = weights(f)
    close(change(f, *factor_step(f, rows, columns, 0.0, 0.0)), g / jnp.outer(rows, columns), 1e-8)


def test_the_scale_may_be_put_into_a_factor(x64):
    f, g = problem(6)
    inside = factors(f.a, f.scale * f.b, g, 1.0)
    steps = [change(x, *factor_step(x, *weights(x), 0.0, 0.0)) for x in (f, inside)]
    close(*steps)


def one_step(tx, f):
    tree = {"a": f.a, "b": f.b.T}
    return jax.jit(tx.update)({"a": f.grad_a, "b": f.grad_b.T}, tx.init(tree), tree, energies={"": f.energies})


@pytest.mark.slow
@pytest.mark.parametrize("stats", ["full", "sum", "projected"])
def test_the_size_of_the_loss_does_not_matter(x64, stats):
    f, g = problem(7)
    tx = optim.scale_by_adaprelora(scale=1.7, stats=stats)
    steps = [one_step(tx, factors(f.a, f.b, c * g, 1.7))[0] for c in (1.0, 1e-3, 1e4)]
    for other in steps[1:]:
        jax.tree.map(close, other, steps[0])


@pytest.mark.parametrize("stats", rest_slow(["full", "sum", "projected"], "full"))
def test_a_factor_of_zeros_is_left_by_a_finite_step(x64, stats):
    f, _ = problem(8, b_zero=True)
    updates, _ = one_step(optim.scale_by_adaprelora(scale=1.7, stats=stats), f)
    assert not np.any(updates["a"])
    assert np.all(np.isfinite(updates["b"]))
    assert np.any(updates["b"])


@pytest.mark.parametrize("stats", ["sum", "projected"])
def test_energies_of_surrogates_are_those_of_the_dense_matrix(x64, stats):
    f, g = problem(9)
    if stats == "sum":
        dense = f.a @ f.grad_b.T + f.grad_a @ f.b.T
    else:
        on_a, on_b = (x @ jnp.linalg.solve(x.T @ x, x.T) for x in (f.a, f.b))
        dense = on_a @ g + g @ on_b - on_a @ g @ on_b
    # Projections of the statistic have a ridge of 1e-6.
    rtol = 1e-10 if stats == "sum" else 1e-4
    for got, axis in zip(mean_squares(stats, f), (1, 0), strict=True):
        close(got, jnp.mean(dense**2, axis=axis), rtol)


@pytest.mark.slow
def test_rows_and_columns_without_gradient_stay(x64):
    f, g = problem(10)
    f = factors(f.a, jnp.eye(COLUMNS, RANK), g.at[:, 4].set(0), 1.7)
    updates, _ = one_step(optim.scale_by_adaprelora(scale=1.7), f)
    assert np.all(np.isfinite(updates["a"]))
    np.testing.assert_array_equal(updates["b"][:, 4], 0)


@pytest.mark.slow
def test_no_gradient_at_all_is_no_step():
    f, g = problem(11)
    updates, state = one_step(optim.scale_by_adaprelora(), factors(f.a, f.b, 0 * g, 1.0))
    assert all(not np.any(x) for x in jax.tree.leaves((updates, state.momentum, state.energy)))


@pytest.mark.slow
def test_a_cap_on_the_change_of_the_weight_is_kept(x64):
    f, _ = problem(12)
    size = lambda updates: jnp.sqrt(jnp.mean(change(f, updates["a"], updates["b"].T) ** 2))  # noqa: E731
    free, _ = one_step(optim.scale_by_adaprelora(scale=1.7), f)
    capped, _ = one_step(optim.scale_by_adaprelora(optim.AdaPreLoRAOptions(clip_rms=0.1), scale=1.7), f)
    assert size(free) > 0.2
    close(size(capped), 0.1)


@pytest.mark.slow
def test_transported_momenta_follow_factors_that_are_given_another_basis_between_steps(x64):
    f, _ = problem(13)
    turn = jnp.asarray(np.random.default_rng(14).standard_normal((RANK, RANK)))
    grads = jnp.asarray(np.random.default_rng(15).standard_normal((3, ROWS, COLUMNS)))

    def path(transport, turned):
        tx = optim.adaprelora(0.05, scale=1.7, damping_rel=0.0, damping_abs=0.0, transport=transport)
        tree = {"a": f.a, "b": f.b.T}
        state = tx.init(tree)
        for i, g in enumerate(grads):
            if turned and i == 1:
                tree = {"a": tree["a"] @ turn, "b": jnp.linalg.inv(turn) @ tree["b"]}
            now = factors(tree["a"], tree["b"].T, g, 1.7)
            gradient = {"a": now.grad_a, "b": now.grad_b.T}
            updates, state = tx.update(gradient, state, tree, energies={"": now.energies})
            tree = optax.apply_updates(tree, updates)
        return tree["a"] @ tree["b"]

    close(path(True, True), path(True, False), 1e-8)
    assert np.max(np.abs(path(False, True) - path(False, False))) > 1e-2


@dataclasses.dataclass(frozen=True)
class Fit(train.Task):
    """Fits the rank-4 target of the specification through a LoRA with energy probes, as a task of the train loop."""

    base: tuple = dataclasses.field(default=(8, 16))

    @property
    def rules(self):
        return {"kernel": adapters.LoRA(2, 4.0)}

    def init(self, key):
        trainable = adapters.init(key, {"kernel": jnp.zeros(self.base)}, self.rules)
        return adapters.add_gradient_probes(trainable), {}

    def axes(self):
        names = jax.sharding.PartitionSpec("embed", "mlp")
        shapes = jax.eval_shape(self.init, jax.random.key(0))[0]
        return adapters.logical_axes({"kernel": names}, shapes, self.rules)[1], {}

    def loss(self, params, variables, batch, *, key, step):
        del key, step
        kernel = adapters.bind({"kernel": jnp.zeros(self.base)}, params, self.rules)["kernel"]
        error = nn.linear(batch["x"], kernel) - batch["y"]
        return jnp.mean(jnp.square(error)), (variables, {})


@pytest.mark.eight_devices
def test_one_train_step_delivers_energies_and_8_devices_change_nothing():
    rng = np.random.default_rng(16)
    batches = [{n: rng.standard_normal((32, w)).astype(np.float32) for n, w in (("x", 8), ("y", 16))} for _ in range(2)]
    tx = optim.adaprelora(0.1, scale=2.0)
    ends = []
    for mesh in (train.make_mesh(1), train.make_mesh(8)):
        state = train.init_state(Fit(), tx, mesh)
        step = train.jit_train_step(Fit(), tx, mesh)
        for batch in batches:
            state, metrics = step(state, train.to_device(batch, train.batch_sharding(mesh)))
        assert not metrics["skipped"]
        ends.append(jax.tree.map(np.asarray, (state.params, state.opt_state)))
    chex.assert_trees_all_close(*ends, rtol=1e-4, atol=1e-6)
    energy = ends[0][1][0].energy["kernel"]
    # Two steps of (1 - b2) each: not zero, and both sides have one sum.
    assert energy["a"].mean() > 0
    np.testing.assert_allclose(energy["a"].mean(), energy["b"].mean(), rtol=1e-5)
    np.testing.assert_array_equal(ends[0][0]["kernel"]["row_energy"], 0)
