"""What transforms of projected gradients promise, beyond the contract of all transforms and the golden vectors."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subspace_jax import linalg, optim
from subspace_jax.optim.projected.options import METHODS, MOMENTS, SIDES

from ..variants import rest_slow


def gaussian(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def low_rank(m, n, rank, seed=0):
    """A matrix with singular values 1, 1/2, 1/4, ... and a small remainder."""
    u, v = (jnp.linalg.qr(gaussian((size, rank), seed + i))[0] for i, size in enumerate((m, n)))
    return (u * 0.5 ** jnp.arange(rank, dtype=jnp.float32)[None, :]) @ v.T + 1e-4 * gaussian((m, n), seed + 2)


def projector(basis):
    return basis @ basis.mT


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("side", "method"),
    rest_slow(itertools.product(SIDES, METHODS), ("std", "subspace_iteration")),
)
def test_at_full_rank_nothing_is_lost(side, method):
    if method == "random" and side in ("reverse_std", "left", "full"):
        pytest.skip("a random subspace of the longer side does not hold the gradient")
    w, g = jnp.zeros((3, 7, 5)), gaussian((3, 7, 5))
    tx = optim.low_rank_projection(optax.sgd(0.1), 7, optim.ProjectionOptions(side, method=method))
    updates, _ = jax.jit(tx.update)(g, tx.init(w))
    np.testing.assert_allclose(updates, -0.1 * g, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize("method", ["randomized", "subspace_iteration"])
def test_fast_refreshes_find_the_leading_subspace(method, side):
    g = low_rank(40, 24, 4)
    tx = optim.low_rank_projection(optax.identity(), 4, optim.ProjectionOptions(side, method=method))
    basis = jax.jit(tx.update)(g, tx.init(g))[1].bases
    u, _, vt = linalg.canonical_svd(g)
    for found, exact in ((basis.left, u[:, :4]), (basis.right, vt[:4].T)):
        if found is not None:
            # The remainder is 1e-3 of the last direction; a float32 SVD itself is good for about 1e-5 there.
            np.testing.assert_allclose(projector(found), projector(exact), atol=1e-4)


@pytest.mark.slow
def test_subspace_iteration_follows_a_turning_gradient_without_jumps_of_sign():
    g, turn = low_rank(30, 20, 3), 0.05 * gaussian((30, 30), 9)
    tx = optim.low_rank_projection(optax.identity(), 3, optim.ProjectionOptions("left", refresh_every=1))
    step, state = jax.jit(tx.update), tx.init(g)
    before = step(g, state)[1]
    for i in range(1, 4):
        moved = linalg.expm(i * (turn - turn.T) / 10) @ g
        after = step(moved, before)[1]
        # Neighbouring bases are turned by hundredths of a radian.
        assert jnp.all(jnp.diagonal(after.bases.left.T @ before.bases.left) > 0.98)
        before = after


def test_a_refresh_by_subspace_iteration_contains_no_svd_or_eigenproblem():
    g = jnp.zeros((64, 32))
    tx = optim.galore(0.1, rank=4)
    text = str(jax.make_jaxpr(tx.update)(g, tx.init(g)))
    assert "svd" not in text
    assert "eigh" not in text
    assert "cond" in text


@pytest.mark.slow
def test_leaves_take_turns():
    params = [jnp.zeros((6, 4))] * 3
    tx = optim.low_rank_projection(optax.identity(), 2, optim.ProjectionOptions(refresh_every=6))
    step, state = jax.jit(tx.update), tx.init(params)
    changed = []
    for i in range(12):
        _, after = step([gaussian((6, 4), 3 * i + j) for j in range(3)], state)
        changed.append([j for j in range(3) if not jnp.array_equal(after.bases[j].right, state.bases[j].right)])
        state = after
    assert changed == [[0, 1, 2], [], [1], [], [2], [], [0], [], [1], [], [2], []]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refresh_every", "method"),
    [(3, "random"), *((period, "subspace_iteration") for period in (1, 2, 3, 7))],
)
def test_slices_of_a_stack_take_turns_each_once_in_a_period(refresh_every, method):
    """Also where there are more of them than steps; a second axis of experts goes along with the first."""
    params = {"layers": jnp.zeros((3, 6, 4)), "one": jnp.zeros((6, 4)), "experts": jnp.zeros((2, 2, 6, 4))}
    options = optim.ProjectionOptions(refresh_every=refresh_every, method=method)
    tx = optim.low_rank_projection(optax.identity(), 2, options)
    step, state = jax.jit(tx.update), tx.init(params)
    steps = {name: [[] for _ in p.reshape(-1, 6, 4)] for name, p in params.items()}
    for i in range(2 * refresh_every + 1):
        grads = {name: gaussian(p.shape, 10 * i + j) for j, (name, p) in enumerate(params.items())}
        _, after = step(grads, state)
        for name, seen in steps.items():
            old, new = (np.asarray(s.bases[name].right).reshape(-1, 4, 2) for s in (state, after))
            for k, own in enumerate(seen):
                own.extend([i] if not np.array_equal(old[k], new[k]) else [])
        state = after
    assert step._cache_size() == 1
    # Leaves are flattened in the order of their names: slices 0 and 1 are experts, 2 to 4 layers.
    first = {"experts": [0, 0, 1, 1], "layers": [2, 3, 4], "one": [5]}
    for name, numbers in first.items():
        turns = [k * refresh_every // 6 for k in numbers]
        expected = [sorted({0, *range(turn, 2 * refresh_every + 1, refresh_every)}) for turn in turns]
        assert steps[name] == expected


@pytest.mark.parametrize(
    ("maker", "options"),
    rest_slow(
        [(optim.fira, {}), *((optim.galore, {"moments": moments}) for moments in MOMENTS)],
        (optim.galore, {"moments": "rotate"}),
    ),
)
def test_a_stack_is_what_its_slices_are_as_leaves_of_their_own(maker, options):
    """Order and turns are the same; random numbers of the first step are not, so that its bases are exact."""
    tx = maker(0.1, rank=2, refresh_every=5, method="svd", **options)
    step, stacked, apart = jax.jit(tx.update), tx.init(jnp.zeros((3, 6, 4))), tx.init([jnp.zeros((6, 4))] * 3)
    for i in range(9):
        g = gaussian((3, 6, 4), i)
        whole, stacked = step(g, stacked)
        parts, apart = step(list(g), apart)
        np.testing.assert_allclose(whole, jnp.stack(parts), rtol=1e-5, atol=1e-6)
        bases = jnp.stack([b.right for b in apart[0].bases])
        np.testing.assert_allclose(stacked[0].bases.right, bases, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moments", "method"),
    [("keep", "random"), *((moments, "subspace_iteration") for moments in MOMENTS)],
)
def test_leafwise_steps_are_those_of_all_leaves_at_once(moments, method):
    """Decay inside reads parameters; the stack has two batch axes, and one leaf is none."""
    sizes = {"stacks": (2, 3, 5, 7), "kernel": (8, 4), "bias": (3,)}
    start = {name: gaussian(shape, i) for i, (name, shape) in enumerate(sizes.items())}
    inner, ends = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.1)), []
    for leafwise in (False, True):
        options = optim.ProjectionOptions(refresh_every=2, method=method, moments=moments)
        tx = optim.low_rank_projection(inner, 2, options, leafwise=leafwise)
        with jax.numpy_dtype_promotion("standard"):  # which Optax's Adam needs
            params, state, step = start, tx.init(start), jax.jit(tx.update)
            for i in range(3):
                updates, state = step(jax.tree.map(lambda x, i=i: jnp.sin((i + 1) * x + i), start), state, params)
                params = optax.apply_updates(params, updates)
        ends.append((params, state))
    chex.assert_trees_all_close(*ends, rtol=2e-5, atol=2e-5)


def test_random_bases_of_slices_differ():
    tx = optim.low_rank_projection(optax.identity(), 2, optim.ProjectionOptions(refresh_every=3, method="random"))
    g = gaussian((3, 6, 4))
    right = np.asarray(jax.jit(tx.update)(g, tx.init(g))[1].bases.right)
    assert not any(np.allclose(right[i], right[j]) for i, j in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.slow
def test_all_leaves_at_once_without_staggering():
    params = [jnp.zeros((6, 4))] * 2
    tx = optim.low_rank_projection(optax.identity(), 2, optim.ProjectionOptions(refresh_every=2, staggered=False))
    step, state = jax.jit(tx.update), tx.init(params)
    for i in range(4):
        _, after = step([gaussian((6, 4), 2 * i + j) for j in range(2)], state)
        same = [jnp.array_equal(a.right, b.right) for a, b in zip(after.bases, state.bases, strict=True)]
        assert same == [i % 2 == 1] * 2
        state = after


@pytest.mark.parametrize(
    ("moments", "side"),
    rest_slow(itertools.product(MOMENTS, ["left", "right", "full"]), ("rotate", "full"), ("reset", "right")),
)
def test_moments_are_kept_reset_or_rotated_at_a_refresh(moments, side):
    first, second = gaussian((6, 5), 1), gaussian((6, 5), 2)
    inner = optax.trace(0.5)
    options = optim.ProjectionOptions(side, 1, "svd", moments=moments)
    tx = optim.low_rank_projection(inner, 3, options)
    step = jax.jit(tx.update)
    _, before = step(first, tx.init(first))
    _, after = step(second, before)

    def low(basis, g):
        g = g if basis.left is None else basis.left.T @ g
        return g if basis.right is None else g @ basis.right

    carried = before.inner.trace
    if moments == "reset":
        carried = jnp.zeros_like(carried)
    if moments == "rotate":
        back = carried if before.bases.left is None else before.bases.left @ carried
        back = back if before.bases.right is None else back @ before.bases.right.T
        carried = low(after.bases, back)
    np.testing.assert_allclose(after.inner.trace, low(after.bases, second) + 0.5 * carried, atol=1e-5)


def test_rotated_second_moments_stay_positive():
    tx = optim.galore(0.1, rank=3, refresh_every=1, method="svd", moments="rotate")
    state = tx.init(jnp.zeros((6, 5)))
    step = jax.jit(tx.update)
    for i in range(4):
        state = step(gaussian((6, 5), i), state)[1]
    assert jnp.all(state[0].inner.nu > 0)


def test_state_is_what_the_paper_counts_to_the_byte():
    params = {"kernel": jnp.zeros((3, 40, 24)), "bias": jnp.zeros(24)}
    state = jax.eval_shape(optim.galore(0.1, rank=4).init, params)
    counters = 4 * 4
    # A placeholder for the side that the kernel has no basis of.
    absent = 4
    # The shorter side's basis, two moments of the longer side, and two full moments of the bias.
    assert bytes_of(state) == 4 * (3 * (24 * 4 + 2 * 40 * 4) + 2 * 24) + absent + counters


def test_ranks_and_sides_are_chosen_leaf_by_leaf():
    params = {"a": {"kernel": jnp.zeros((8, 6))}, "b": {"kernel": jnp.zeros((6, 8)), "bias": jnp.zeros(8)}}

    def rank(path, shape):
        return {"a/kernel": 2, "b/kernel": min(shape) // 2}.get(path)

    bases = jax.eval_shape(optim.galore(0.1, rank).init, params)[0].bases
    assert bases["a"]["kernel"].right.shape == (6, 2)
    assert bases["b"]["kernel"].left.shape == (6, 3)
    assert bases["b"]["bias"] == optax.MaskedNode()


def test_axes_make_matrices_of_kernels_of_any_layout():
    w, g = jnp.zeros((4, 6, 2, 3)), gaussian((4, 6, 2, 3))
    as_matrices = g.transpose(1, 0, 2, 3).reshape(6, 4, 6)
    options = optim.ProjectionOptions("left", method="svd")
    numbers = optax.contrib.MuonDimensionNumbers(0, (2, 3))
    tx = optim.scale_by_galore(2, options._replace(weight_dimension_numbers=numbers))
    plain = optim.scale_by_galore(2, options)
    got, state = jax.jit(tx.update)(g, tx.init(w))
    expected, _ = jax.jit(plain.update)(as_matrices, plain.init(as_matrices))
    assert state.bases.left.shape == (6, 4, 2)
    np.testing.assert_allclose(got, expected.reshape(6, 4, 2, 3).transpose(1, 0, 2, 3), atol=1e-6)


def test_the_fallback_takes_what_is_not_projected():
    params = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
    fallback = optax.chain(optax.add_decayed_weights(1.0), optax.sgd(1.0))
    tx = optim.low_rank_projection(optax.sgd(0.5), rank=4, fallback=fallback)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_allclose(updates["bias"], -2.0)
    np.testing.assert_allclose(updates["kernel"], -0.5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [optax.adamw, optax.lion, optax.adafactor, optax.contrib.muon, optax.lamb, optax.rmsprop, optax.adagrad]
)
def test_any_transform_goes_inside(make):
    params = {"kernel": gaussian((8, 6)), "bias": jnp.ones(6)}
    grads = jax.tree.map(lambda x: 0.1 * x, params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tx = optim.low_rank_projection(make(0.1), rank=2)
        step = jax.jit(tx.update)
        updates, state = step(grads, tx.init(params), params)
        assert jnp.linalg.matrix_rank(updates["kernel"], rtol=1e-4) <= 2
        chex.assert_tree_all_finite(step(grads, state, params)[0])


BAD = [
    ({"rank": 0}, ValueError, "rank: expected an integer of at least 1, got 0"),
    ({"rank": 2.5}, TypeError, "rank"),
    ({"rank": True}, ValueError, "rank"),
    ({"rank": jnp.asarray(2)}, TypeError, "rank: .*static_args"),
    ({"refresh_every": jnp.asarray(2)}, TypeError, "refresh_every: .*static_args"),
    ({"refresh_every": 0}, ValueError, "refresh_every"),
    ({"side": "both"}, ValueError, "side: .*'both'"),
    ({"method": "qr"}, ValueError, "method: .*'qr'"),
    ({"moments": "drop"}, ValueError, "moments: .*'drop'"),
    ({"rounds": 0}, ValueError, "rounds"),
    ({"seed": -1}, ValueError, "seed"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda x: str(x)[:30])
def test_bad_options_are_refused_at_once(options, error, message):
    with pytest.raises(error, match=message):
        optim.galore(0.1, **options)


def test_a_traced_rank_or_period_is_named():
    for name, other in (("rank", "refresh_every"), ("refresh_every", "rank")):
        tx = optax.inject_hyperparams(optim.galore, static_args=(other, "rounds", "seed"))(0.1, rank=2)
        with pytest.raises(TypeError, match=f"{name}: .*static_args"):
            tx.init(jnp.zeros((4, 4)))


def test_rules_that_return_nonsense_are_refused():
    params = {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}
    with pytest.raises(ValueError, match="rank of bias"):
        optim.galore(0.1, lambda path, shape: 0).init({"bias": params["bias"]})
    with pytest.raises(ValueError, match="bias: expected a floating-point kernel"):
        optim.galore(0.1, lambda path, shape: 2).init(params)
    numbers = optax.contrib.MuonDimensionNumbers(0, 0)
    with pytest.raises(ValueError, match="different reduction and output axes of kernel"):
        optim.galore(0.1, 2, weight_dimension_numbers=numbers).init({"kernel": params["kernel"]})


def test_an_inner_transform_that_does_not_fit_is_refused():
    params = {"kernel": jnp.zeros((4, 4))}
    growing = optax.GradientTransformation(lambda p: jnp.zeros(1), lambda g, s, p=None: (g, jnp.zeros(2)))
    flat = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (jax.tree.map(jnp.ravel, g), s))
    strange = optax.GradientTransformation(lambda p: {"kernel": jnp.zeros((4, 4))}, lambda g, s, p=None: (g, s))
    bound = optax.GradientTransformation(
        lambda p: (), lambda g, s, p=None: (jax.tree.map(jnp.add, g, {"kernel": jnp.zeros((3, 3))}), s)
    )
    for inner, message in ((growing, "inner: .*state"), (flat, "inner: .*updates"), (bound, "inner: .*fails")):
        with pytest.raises(ValueError, match=message):
            optim.low_rank_projection(inner, 2).init(params)
    for moments in ("reset", "rotate"):
        with pytest.raises(ValueError, match=r"inner: .*moments"):
            optim.low_rank_projection(strange, 2, optim.ProjectionOptions(moments=moments)).init(params)


def test_weight_decay_asks_for_parameters():
    tx = optim.galore(0.1, rank=2, weight_decay=0.1)
    with pytest.raises(ValueError, match="params: got None"):
        jax.eval_shape(tx.update, jnp.zeros((4, 4)), tx.init(jnp.zeros((4, 4))))


@pytest.mark.slow
def test_fira_at_full_rank_adds_the_gradient_scaled_by_the_ratio_of_norms():
    g = gaussian((7, 5))
    tx = optim.fira(1.0, rank=5, method="svd", scale=0.25, eps=0.0)
    updates, _ = tx.update(g, tx.init(g))
    v = linalg.canonical_svd(g)[2].T
    r = g @ v
    # Adam's first direction is the sign of R, up to the bias correction that cancels its decay.
    n = jnp.sign(r)
    f = jnp.linalg.norm(n, axis=-1, keepdims=True) / jnp.linalg.norm(r, axis=-1, keepdims=True)
    np.testing.assert_allclose(updates, -(0.25 * n @ v.T + 0.75 * g * f), atol=2e-4)


def test_apollo_by_tensors_steps_along_the_gradient():
    g = gaussian((2, 7, 5))
    tx = optim.apollo_mini(1.0)
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    ratio = updates / g
    np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[:, :1, :1], g.shape), rtol=1e-4)
    assert state[0].norm.shape == (2,)


@pytest.mark.slow
def test_apollo_keeps_a_projection_for_a_period_and_leaves_take_turns():
    """Projections are not stored: two moments of rank r are all the state, and a number for the limiter."""
    params = [jnp.zeros((8, 6)), jnp.zeros((8, 6))]
    tx = optim.apollo(1.0, rank=2, refresh_every=4, b1=0.0)
    state, seen, step = tx.init(params), [], jax.jit(tx.update)
    assert bytes_of(state) == 2 * 4 * (2 * 8 * 2 + 1) + 3 * 4
    g = [gaussian((8, 6))] * 2
    for _ in range(8):
        _, state = step(g, state)
        seen.append(state[0].mu)
    changed = [[j for j in range(2) if not np.allclose(a[j], b[j])] for a, b in itertools.pairwise(seen)]
    # Steps 1 to 7; without momentum the first moment is the projection of one and the same gradient.
    assert changed == [[], [1], [], [0], [], [1], []]


@pytest.mark.slow
def test_online_pca_turns_the_basis_towards_the_gradients_of_now():
    """No step is a refresh, and the state of the tracker is counted."""
    first, later = low_rank(12, 20, 3), low_rank(12, 20, 3, seed=5)
    tx = optim.online_subspace_descent(0.1, rank=3, refresh_every=10)
    step, state = jax.jit(tx.update), tx.init(first)
    # A placeholder for each side without a basis, and two counters.
    assert bytes_of(state) == 4 * (3 * 12 * 3 + 2 * 20 * 3) + 4 * 3 + 2 * 4

    def missed(state):
        p = jnp.linalg.qr(state.bases.left)[0]
        return float(jnp.linalg.norm(later - p @ (p.T @ later)) / jnp.linalg.norm(later))

    _, state = step(first, state)
    before = missed(state)
    for _ in range(60):
        _, state = step(later, state)
    assert missed(state) < 0.5 * before
    with pytest.raises(ValueError, match="tracker"):
        optim.online_subspace_descent(0.1, tracker="adam")


@pytest.mark.parametrize(
    ("name", "method"),
    rest_slow(
        [("adan", "random"), *((name, "subspace_iteration") for name in ("adan", "amsgrad", "belief", "lion"))],
        ("adan", "random"),
    ),
)
def test_second_moments_are_known_by_what_they_do(name, method):
    """Adan has first moments in a field ``v``, and second ones in ``n``, which must not get negative by a rotation."""
    options = optim.ProjectionOptions(moments="rotate", method=method, refresh_every=1)
    tx = optim.low_rank_projection(getattr(optax, f"scale_by_{name}")(), 2, options)
    step = jax.jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies floats by int32
        state = tx.init(gaussian((8, 6)))
        for seed in range(4):
            updates, state = step(gaussian((8, 6), seed), state)
    chex.assert_tree_all_finite(updates)
    for second in {"adan": ("n",), "amsgrad": ("nu", "nu_max"), "belief": ("nu",), "lion": ()}[name]:
        assert jnp.all(getattr(state.inner, second) >= 0)
    first = {"adan": "v"}.get(name, "mu")
    assert jnp.any(getattr(state.inner, first) < 0)


def test_moments_that_cannot_be_rotated_are_refused():
    def update(updates, state, params=None):
        return updates, jax.tree.map(lambda m, g: 0.9 * m + jnp.maximum(g, 0.0) - 0.1, state, updates)

    strange = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    with pytest.raises(ValueError, match=r"inner: .* neither a first nor a second moment.*'keep' or 'reset'"):
        optim.low_rank_projection(strange, 2, optim.ProjectionOptions(moments="rotate")).init(jnp.zeros((8, 6)))
    optim.low_rank_projection(strange, 2, optim.ProjectionOptions(moments="reset")).init(jnp.zeros((8, 6)))


def test_a_rule_of_ranks_sees_the_same_paths_in_a_tree_of_flax():
    seen = set()

    def rank(path, shape):
        seen.add(path)
        return 2 if path.endswith("kernel") else None

    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    state = jax.eval_shape(optim.galore(0.1, rank).init, nnx.state(model, nnx.Param))
    assert seen == {"kernel", "bias"}
    assert {x.shape for x in jax.tree.leaves(state[0].sides.right)} == {(4, 2)}
