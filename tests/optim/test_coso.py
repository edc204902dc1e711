"""What CoSO and Frequent Directions promise, beyond the contract of all transforms and the golden vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import linalg, optim
from subspace_jax.linalg.frequent_directions import SVD_METHODS


def gaussian(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("method", SVD_METHODS)
def test_what_a_sketch_leaves_out_is_positive_and_bounded_by_what_was_subtracted(x64, method):
    rank, total, subtracted, sketch = 4, 0.0, 0.0, linalg.frequent_directions_init(9, 4, (2,), jnp.float64)
    for i in range(6):
        g = gaussian((2, 9, 7), i, jnp.float64)
        s = jnp.linalg.svd(g, compute_uv=False)
        subtracted += s[:, rank] ** 2
        u = linalg.canonical_svd(g)[0][..., :rank]
        d = jnp.sqrt(s[:, :rank] ** 2 - s[:, rank : rank + 1] ** 2)
        merged = jnp.linalg.svd(jnp.concatenate([sketch.sketch, u * d[:, None, :]], axis=-1), compute_uv=False)
        subtracted += merged[:, rank] ** 2
        sketch = linalg.frequent_directions_update(sketch, g, method=method)
        total += g @ g.mT
    values = jnp.linalg.eigvalsh(total - sketch.sketch @ sketch.sketch.mT)
    # Rounding of sums of about 100, and in the Gram matrices of "gram_eigh".
    assert jnp.all(values >= -1e-11)
    assert jnp.all(values[:, -1] <= subtracted * (1 + 1e-12))
    assert jnp.all(linalg.orthonormality_error(sketch.basis) < 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("method", SVD_METHODS)
def test_columns_of_low_joint_rank_are_sketched_exactly(x64, method):
    span, sketch, total = gaussian((9, 3), 1, jnp.float64), linalg.frequent_directions_init(9, 3, (), jnp.float64), 0.0
    for i in range(4):
        g = span @ gaussian((3, 6), 2 + i, jnp.float64)
        sketch = linalg.frequent_directions_update(sketch, g, method=method)
        total += g @ g.T
    np.testing.assert_allclose(sketch.sketch @ sketch.sketch.T, total, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["input", "output"])
def test_later_tasks_leave_the_history_alone(side):
    """In stacks of kernels, each with a history of its own."""
    w = jnp.zeros((3, 12, 10))
    tx = optim.coso(0.1, 2, 4, side=side, refresh_every=2)
    step, state = jax.jit(tx.update), tx.init(w)
    for task in range(3):
        start, held = w, state.history
        for t in range(4):
            updates, state = step(gaussian(w.shape, 10 * task + t), state)
            w = w + updates
        moved = w - start if side == "input" else (w - start).mT
        np.testing.assert_allclose(held.mT @ moved, 0, atol=1e-6)
        np.testing.assert_allclose(held.mT @ state.proj, 0, atol=1e-6)
        assert jnp.all(linalg.orthonormality_error(state.proj) < 1e-5)
        state = optim.coso_end_task(state, 0.7)
        used = jnp.sum(state.history**2, axis=-2)
        assert jnp.all(state.history_dim == jnp.sum(jnp.round(used), axis=-1).astype(jnp.int32))
        gram = linalg.gram(state.history, state.history)
        np.testing.assert_allclose(gram, jnp.round(used)[..., None] * jnp.eye(used.shape[-1])[None], atol=1e-5)
    assert jnp.all(state.history_dim > 0)


@pytest.mark.slow
def test_the_end_of_a_task_drops_all_but_the_history():
    w = jnp.zeros((8, 6))
    tx = optax.partition({"a": optim.coso(0.1, 2, 3), "b": optax.trace(0.9)}, {"kernel": "a", "head": "b"})
    params = {"kernel": w, "head": w}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(2):
        _, state = update({"kernel": gaussian((8, 6), i), "head": w + 1}, state, params)
    ended = jax.jit(optim.coso_end_task)(state, 0.9)
    kernel = ended.inner_states["a"].inner_state
    assert jax.tree.structure(ended) == jax.tree.structure(state)
    for x in (kernel.count, kernel.proj, kernel.mu, kernel.nu, kernel.sketch, kernel.sigma):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(x))
    assert kernel.history_dim["kernel"] > 0
    assert jnp.all(
        ended.inner_states["b"].inner_state.trace["head"] == state.inner_states["b"].inner_state.trace["head"]
    )


@pytest.mark.slow
def test_a_first_direction_that_holds_the_threshold_is_kept_if_asked_for():
    g = gaussian((8, 1)) @ gaussian((1, 6), 1)
    tx = optim.coso(0.1, 2, 3, method="svd")
    _, state = tx.update(g, tx.init(g))
    assert optim.coso_end_task(state, 0.9).history_dim == 0
    assert optim.coso_end_task(state, 0.9, min_directions=1).history_dim == 1


def test_memory_is_what_the_method_needs_to_the_byte():
    m, n, r1, r2, k = 12, 9, 2, 4, 5
    state = jax.eval_shape(optim.coso(0.1, r1, r2, max_history=k).init, jnp.zeros((3, m, n)))
    numbers = 3 * (m * r1 + 2 * n * r1 + 2 * m * r2 + r2 + m * k + 1) + 2
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == 4 * numbers


def test_bad_input_is_refused():
    for arguments, options, message in (
        ((0.1, 0), {}, "rank"),
        ((0.1, 4, 3), {}, "sketch_rank"),
        ((0.1, 2, 3), {"side": "left"}, "side"),
        ((0.1, 2, 3), {"refresh_every": 0}, "refresh_every"),
        ((0.1, 2, 3), {"method": "qr"}, "method"),
    ):
        with pytest.raises(ValueError, match=message):
            optim.coso(*arguments, **options)
    with pytest.raises(TypeError, match="refresh_every"):
        optim.coso(0.1, 2, 3, refresh_every=jnp.asarray(2))
    w, tx = jnp.zeros((8, 6)), optim.coso(0.1, 2, 3, max_history=1, weight_decay=0.1)
    with pytest.raises(ValueError, match="sketch_rank"):
        optim.coso(0.1, 2, 6).init(w)
    with pytest.raises(ValueError, match="params"):
        tx.update(w, tx.init(w))
    for threshold in (0.0, 1.5):
        with pytest.raises(ValueError, match="threshold"):
            optim.coso_end_task(tx.init(w), threshold)
    with pytest.raises(TypeError, match="CoSOState"):
        optim.coso_end_task(optax.EmptyState())
    _, state = jax.jit(tx.update)(gaussian((8, 6)), tx.init(w), w)
    with pytest.raises(ValueError, match="history: expected at most 1"):
        optim.coso_end_task(state, 1.0)
    assert jax.jit(optim.coso_end_task)(state, 1.0).history_dim == 1
