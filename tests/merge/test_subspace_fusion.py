"""Merging of parameter trees: golden vectors, what the rules are, and what they refuse."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax.merge import subspace_fusion as fusion
from subspace_jax.merge.subspace_fusion.concrete import ConcreteSettings, mask_of_noise, used_lam

from ..variants import rest_slow
from .trees import NAMES, network, random_tree, tree

PUBLIC = (
    *("task_vectors", "apply_task_vectors", "average", "task_arithmetic", "ties_merge", "fisher_diagonal"),
    *("fisher_merge", "regmean_stats", "regmean_merge", "concrete_mask", "rescale_mask", "mask_task_vectors"),
    *("prediction_entropy", "entropy_objective", "ConcreteState", "concrete_task_arithmetic_step"),
    *("concrete_adamerging_step", "adamerging_step"),
)


def test_names_of_the_public_surface_exist_and_are_documented():
    assert set(PUBLIC) <= set(fusion.__all__)
    assert all(getattr(fusion, name).__doc__ for name in fusion.__all__)


def models_of(g):
    return tree(g, "base"), [tree(g, f"ft{i}") for i in range(3)]


def layered(lam):
    """Coefficients ``[T, K]`` as a tree."""
    return {name: jnp.asarray(lam[:, i]) for i, name in enumerate(NAMES)}


def test_concrete_masks_their_gradients_and_what_they_scale_are_golden(golden, x64):
    g = golden("subspace-fusion/merging")
    base, finetuned = models_of(g)
    taus, logits = fusion.task_vectors(base, finetuned), tree(g, "mask/logits")

    def loss(logits, u, temperature):
        mask = mask_of_noise(logits, u, temperature)
        applied = fusion.mask_task_vectors(taus, mask)
        total = sum((i + 1) * sum(jnp.sum(x**3) for x in tau.values()) for i, tau in enumerate(applied))
        return total, (mask, applied)

    @jax.jit
    def everything(logits, noise, bin_u):
        losses = [jax.value_and_grad(loss, has_aux=True)(logits, u, temperature) for temperature, u in noise.items()]
        hard = mask_of_noise(logits, bin_u, 0.5, hard=True)
        return losses, hard, fusion.concrete_mask(logits, jax.random.key(0), mode="mean")

    noise = {temperature: tree(g, f"mask/u_T{temperature}") for temperature in (0.5, 1.3)}
    losses, hard, mean = everything(logits, noise, tree(g, "mask/bin_u"))
    for temperature, ((value, (mask, applied)), gradient) in zip(noise, losses, strict=True):
        chex.assert_trees_all_close(mask, tree(g, f"mask/m_T{temperature}"), atol=1e-10)
        for i, tau in enumerate(applied):
            chex.assert_trees_all_close(tau, tree(g, f"mask/applied_T{temperature}/{i}"), atol=1e-10)
        chex.assert_trees_all_close(value, g[f"mask/loss_T{temperature}"], rtol=1e-10)
        chex.assert_trees_all_close(gradient, tree(g, f"mask/grad_T{temperature}"), atol=1e-10, rtol=1e-10)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: np.asarray(x) > 0, hard), jax.device_get(tree(g, "mask/bin")))
    chex.assert_trees_all_close(mean, tree(g, "mask/mean_field"), atol=1e-10)


def test_average_task_arithmetic_and_both_kinds_of_coefficients_are_golden(golden, x64):
    g = golden("subspace-fusion/merging")
    clamped = ConcreteSettings(clamp=True)

    @jax.jit
    def merges(base, finetuned, task_wise, layer_wise):
        taus = fusion.task_vectors(base, finetuned)
        return {
            "avg": fusion.average(finetuned),
            "ta03": fusion.task_arithmetic(base, finetuned, 0.3),
            "tw/merged": fusion.apply_task_vectors(base, taus, used_lam(task_wise, clamped)),
            "lw/merged": fusion.apply_task_vectors(base, taus, used_lam(layer_wise, clamped)),
        }

    for name, merged in merges(*models_of(g), jnp.asarray(g["tw/lam"]), layered(g["lw/lam"])).items():
        chex.assert_trees_all_close(merged, tree(g, name), atol=1e-10)


@pytest.mark.parametrize("keep", rest_slow([20, 50]))
def test_ties_merge_is_golden(golden, x64, keep):
    g = golden("subspace-fusion/merging")
    flat = jnp.asarray(g["ties/flat"])
    taus = [{"first": row[:30].reshape(5, 6), "second": row[30:]} for row in flat]
    merges = jax.jit(lambda taus: {name: fusion.ties_merge(taus, keep / 100, name) for name in ("sum", "mean", "max")})
    for combine, merged in merges(taus).items():
        found = np.concatenate([np.ravel(merged["first"]), merged["second"]])
        chex.assert_trees_all_close(found, g[f"ties/{combine}{keep}"], atol=1e-10)


@pytest.mark.slow
def test_trimming_and_elected_signs_of_ties_are_golden(golden, x64):
    from subspace_jax.merge.subspace_fusion import ties

    g = golden("subspace-fusion/merging")
    for keep in (20, 50):
        rows = [jnp.asarray(row) for row in g["ties/flat"]]
        kept = [ties.trim(row, ties.threshold([row], keep / 100)) for row in rows]
        chex.assert_trees_all_close(jnp.stack(kept), g[f"ties/trim{keep}"], atol=1e-10)
        share = np.asarray([float(jnp.mean(row != 0)) for row in kept], np.float32)
        np.testing.assert_allclose(share, g[f"ties/kept{keep}"])
        signs = np.asarray(ties.elected(kept))
        np.testing.assert_array_equal(np.where(signs == 0, np.sign(signs.sum()), signs), g[f"ties/sign{keep}"])


def test_entropy_and_fisher_diagonals_and_their_merge_are_golden(golden, x64):
    g = golden("subspace-fusion/merging")
    chex.assert_trees_all_close(fusion.prediction_entropy(jnp.asarray(g["ent/logits"])), g["ent/H"], atol=1e-10)
    _, finetuned = models_of(g)

    @jax.jit
    def both(params, head, x):
        halves = [fusion.fisher_diagonal(network(head), params, part, "batch") for part in jnp.split(x, 2)]
        return fusion.fisher_diagonal(network(head), params, x), jax.tree.map(lambda a, b: (a + b) / 2, *halves)

    batched = []
    for i, params in enumerate(finetuned):
        exact, own = both(params, jnp.asarray(g[f"fisher/head{i}"]), jnp.asarray(g[f"fisher/x{i}"]))
        chex.assert_trees_all_close(exact, tree(g, f"fisher/exact{i}"), atol=1e-10)
        chex.assert_trees_all_close(own, tree(g, f"fisher/w{i}"), atol=1e-10)
        batched.append(own)
    names = {"norm": True, "raw": False}
    merges = jax.jit(lambda a, b: {name: fusion.fisher_merge(a, b, normalize=n) for name, n in names.items()})
    for name, merged in merges(finetuned, batched).items():
        chex.assert_trees_all_close(merged, tree(g, f"fisher/merged_{name}"), atol=1e-10)


def test_regmean_merge_is_golden(golden, x64):
    g = golden("subspace-fusion/merging")
    _, finetuned = models_of(g)
    models, stats = [], []
    for i, params in enumerate(finetuned):
        x = g[f"fisher/x{i}"]
        hidden = np.maximum(x @ np.asarray(params["l1.weight"]).T + np.asarray(params["l1.bias"]), 0)
        models.append({name: jnp.asarray(np.asarray(leaf).T) for name, leaf in params.items()})
        # In two parts, as of two batches.
        first = fusion.regmean_stats(jnp.asarray(x[:3]))
        own = {"l1.weight": fusion.regmean_stats(jnp.asarray(x[3:]), first)}
        stats.append({**own, "l2.weight": fusion.regmean_stats(jnp.asarray(hidden))})
    alphas = {alpha: float(np.float32(alpha)) for alpha in (1.0, 0.9)}
    merges = jax.jit(lambda m, s: {name: fusion.regmean_merge(m, s, alpha=alpha) for name, alpha in alphas.items()})
    for alpha, merged in merges(models, stats).items():
        found = {name: np.asarray(leaf).T for name, leaf in merged.items()}
        chex.assert_trees_all_close(found, tree(g, f"regmean/{alpha}"), atol=1e-10)


def test_a_sampled_mask_above_a_half_has_the_mean_of_the_mean_field():
    logits = jnp.asarray([-2.0, -0.3, 0.0, 1.0, 3.0])
    drawn = jnp.broadcast_to(logits, (20_000, 5))
    mean = 1 / (1 + np.exp(-np.asarray(logits)))
    for mode in ("sample", "hard"):
        mask = np.asarray(fusion.concrete_mask(drawn, jax.random.key(1), 0.7, mode))
        assert np.all((mask >= 0) & (mask <= 1))
        share = np.mean(mask > 0.5, axis=0)
        assert np.all(np.abs(share - mean) < 3 * np.sqrt(mean * (1 - mean) / 20_000))
    assert set(np.unique(mask)) == {0, 1}


def test_large_logits_and_mean_field_at_zero_leave_task_vectors_as_they_are():
    base, models = random_tree(0), [random_tree(1), random_tree(2)]
    taus = fusion.task_vectors(base, models)

    @jax.jit
    def merges(taus):
        found = [fusion.apply_task_vectors(base, taus, 0.3)]
        for value, mode in ((1e4, "sample"), (0.0, "mean")):
            logits = jax.tree.map(lambda x: jnp.full(x.shape, value), taus[0])  # noqa: B023
            mask = fusion.concrete_mask(logits, jax.random.key(0), mode=mode)
            found += [fusion.apply_task_vectors(base, taus, 0.3, mask=mask), fusion.mask_task_vectors(taus, mask)]
        return found

    want, large, large_taus, mean, mean_taus = merges(taus)
    for merged, masked in ((large, large_taus), (mean, mean_taus)):
        chex.assert_trees_all_equal(masked, taus)
        chex.assert_trees_all_equal(merged, want)


def test_rescaling_does_not_depend_on_the_scale_of_a_mask_and_a_mask_of_zeros_stays():
    mask = {"a": jax.random.uniform(jax.random.key(0), (5, 4)), "b": jnp.zeros(3)}
    once, scaled = fusion.rescale_mask(mask), fusion.rescale_mask(jax.tree.map(lambda x: 0.125 * x, mask))
    chex.assert_trees_all_close(once, scaled, rtol=1e-6)
    chex.assert_trees_all_close(jnp.mean(once["a"]), 1.0, rtol=1e-6)
    chex.assert_trees_all_equal(once["b"], jnp.zeros(3))


@pytest.mark.slow
def test_apply_task_vectors_masks_as_mask_task_vectors_does():
    base, models = random_tree(0), [random_tree(1), random_tree(2)]
    taus = fusion.task_vectors(base, models)
    logits = jax.tree.map(lambda x: x + 1, taus[0])
    mask, lam = fusion.concrete_mask(logits, jax.random.key(2)), jnp.asarray([0.2, -0.5])
    apart = fusion.apply_task_vectors(base, fusion.mask_task_vectors(taus, mask), lam)
    chex.assert_trees_all_close(fusion.apply_task_vectors(base, taus, lam, mask=mask), apart, atol=1e-6)


def test_simple_merges_agree_where_they_must():
    base, models = random_tree(0), [random_tree(i) for i in (1, 2, 3)]
    lam = jnp.asarray([0.1, 0.4, -0.2])

    @jax.jit
    def merges(base, models):
        taus = fusion.task_vectors(base, models)
        one, thirds = fusion.task_arithmetic(base, models[:1], 1.0), fusion.task_arithmetic(base, models, 1 / 3)
        none = fusion.apply_task_vectors(base, taus, 0.0)
        rows = fusion.apply_task_vectors(base, taus, jax.tree.map(lambda _: lam, taus[0]))
        return one, thirds, none, rows, fusion.apply_task_vectors(base, taus, lam), fusion.average(models)

    one, thirds, none, rows, wise, mean = merges(base, models)
    chex.assert_trees_all_close(one | {"steps": 0}, models[0] | {"steps": 0}, atol=1e-6)
    chex.assert_trees_all_equal(none, base)
    chex.assert_trees_all_close(mean | {"steps": 0}, thirds | {"steps": 0}, atol=1e-6)
    chex.assert_trees_all_equal(rows, wise)


def test_counters_are_no_part_of_task_vectors_and_tied_weights_stay_tied():
    base, models = random_tree(0), [random_tree(1), random_tree(2)]
    for model in (base, *models):
        model["head"] = {"kernel": model["down"]["kernel"]}

    @jax.jit
    def merges(base, models):
        taus = fusion.task_vectors(base, models, tied={"head/kernel": "down/kernel"})
        logits = jax.tree.map(jnp.zeros_like, taus[0])
        mask = fusion.concrete_mask(logits, jax.random.key(0))
        return taus[0], logits, fusion.apply_task_vectors(base, taus, 0.5, mask=mask), fusion.ties_merge(taus)

    tau, logits, merged, trimmed = merges(base, models)
    assert tau["steps"] is None
    assert len(jax.tree.leaves(logits)) == 3
    assert merged["steps"] == 0
    chex.assert_trees_all_equal(merged["head"], merged["down"])
    assert not np.allclose(merged["down"]["kernel"], base["down"]["kernel"])
    assert trimmed["head"] == tau["head"] == {"kernel": fusion.Tied("down/kernel")}


def test_ties_of_one_model_that_keeps_all_is_its_task_vector():
    base, models = random_tree(0), [random_tree(1)]
    (tau,) = fusion.task_vectors(base, models)
    merges = jax.jit(lambda tau: [fusion.ties_merge([tau], 1.0, combine) for combine in ("sum", "mean", "max")])
    for merged in merges(tau):
        chex.assert_trees_all_equal(merged, tau)


def test_ties_where_vectors_cancel_takes_the_sign_of_most_entries():
    one, two = jnp.asarray([3.0, 1.0, 2.0, -5.0]), jnp.asarray([-3.0, 1.0, 2.0, 1.0])
    largest = jax.jit(lambda one, two: fusion.ties_merge([one, two], 1.0, "max"))
    # Entry 0 cancels; the others have signs +, +, -: entry 0 is positive.
    np.testing.assert_array_equal(largest(one, two), [3.0, 1.0, 2.0, -5.0])
    np.testing.assert_array_equal(largest(-one, -two), [-3.0, -1.0, -2.0, 5.0])
    # Opposite vectors: all cancel, no sign is elected, and what is not positive is kept.
    np.testing.assert_array_equal(fusion.ties_merge([one, -one], 1.0), -np.abs(one))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_ties_threshold_is_the_order_statistic_of_all_magnitudes(dtype):
    from subspace_jax.merge.subspace_fusion.ties import threshold

    x = jax.random.normal(jax.random.key(0), (40, 7)).astype(dtype)
    tau = {"a": x[:13], "b": x[13:]}
    order = np.sort(np.abs(np.asarray(x, np.float32)).reshape(-1))
    find = jax.jit(lambda tau: [threshold(tau, keep) for keep in (0.01, 0.2, 0.9, 1.0)])
    for found, keep in zip(find(jax.tree.map(lambda x: x.astype(jnp.float32), tau)), (0.01, 0.2, 0.9, 1), strict=True):
        assert found == order[max(280 - int(keep * 280), 1) - 1]
    zeros = {"a": jnp.zeros((13, 7)), "b": jnp.zeros(3).at[1].set(-0.5)}
    chex.assert_trees_all_equal(fusion.ties_merge([zeros], 0.5), zeros)


def test_fisher_and_regmean_with_equal_statistics_are_the_average_and_of_one_model_the_model():
    models = [random_tree(1), random_tree(2)]
    x = np.random.default_rng(3).standard_normal((50, 4), np.float32)

    @jax.jit
    def merges(models, x):
        fisher = jax.tree.map(jnp.ones_like, fusion.task_vectors(models[0], models)[0])
        stats = {"up/kernel": fusion.regmean_stats(x)}
        one = fusion.regmean_merge(models[:1], [stats], alpha=0.5, damping=0.1)
        both = fusion.fisher_merge(models, [fisher, fisher]), fusion.regmean_merge(models, [stats, stats])
        return fusion.average(models), *both, one

    mean, by_fisher, by_regmean, one = merges(models, x)
    chex.assert_trees_all_close(by_fisher, mean, atol=1e-6)
    chex.assert_trees_all_close(by_regmean, mean, atol=1e-5)
    chex.assert_trees_all_close(one, models[0], atol=1e-5)


@pytest.mark.slow
def test_exact_fisher_of_a_linear_softmax_model_is_known_and_a_sampled_one_is_without_bias():
    x = jax.random.normal(jax.random.key(0), (6, 3))
    params = {"kernel": jax.random.normal(jax.random.key(1), (3, 4))}

    def apply(params, x):
        return jnp.matmul(x, params["kernel"])

    p = jax.nn.softmax(apply(params, x))
    want = jnp.mean(jnp.square(x)[:, :, None] * (p * (1 - p))[:, None], axis=0)
    exact = fusion.fisher_diagonal(apply, params, x)
    chex.assert_trees_all_close(exact["kernel"], want, rtol=1e-4)
    keys = jax.random.split(jax.random.key(2), 4000)
    drawn = jax.vmap(lambda key: fusion.fisher_diagonal(apply, params, x, "sampled", key=key)["kernel"])(keys)
    error = jnp.std(drawn, axis=0) / np.sqrt(4000.0)
    assert bool(jnp.all(jnp.abs(jnp.mean(drawn, axis=0) - want) < 4 * error))


def test_prediction_entropy_is_log_classes_for_uniform_logits_and_0_for_certain_ones():
    logits = np.array([[3, 3, 3], [1e4, -1e4, 0], [0, 1e4, 1e4]], np.float32)

    @jax.jit
    def both(x):
        found, back = jax.vjp(fusion.prediction_entropy, x)
        return found, *back(jnp.ones_like(found))

    found, gradient = both(logits)
    np.testing.assert_allclose(found, np.log(np.array([3, 1, 2], np.float32)), rtol=1e-6, atol=1e-6)
    assert np.all(np.isfinite(gradient))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 0.02), (jnp.float32, 1e-6)])
def test_merges_keep_the_dtype_of_a_model(dtype, tolerance):
    whole, models = random_tree(0), [random_tree(1), random_tree(2)]
    low = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, [whole, *models])
    merged = fusion.task_arithmetic(low[0], low[1:])
    assert merged["up"]["kernel"].dtype == dtype
    as_float = jax.tree.map(lambda x: x.astype(jnp.float32), merged)
    want = jax.tree.map(lambda x: x.astype(jnp.float32), fusion.task_arithmetic(whole, models))
    chex.assert_trees_all_close(as_float, want, atol=2 * tolerance, rtol=tolerance)


BASE, OTHER = random_tree(0), random_tree(1)
TAUS = fusion.task_vectors(BASE, [OTHER])
STATS = {"up/kernel": fusion.GramStats(jnp.ones((4, 4)), jnp.asarray(1.0))}


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("finetuned: expected at least one model", lambda: fusion.task_vectors(BASE, [])),
        ("models: expected at least one, got none", lambda: fusion.average([])),
        ("taus: expected at least one task vector", lambda: fusion.apply_task_vectors(BASE, [], 0.3)),
        ("taus: expected at least one task vector", lambda: fusion.ties_merge([])),
        ("only one of them has down/kernel", lambda: fusion.task_vectors(BASE, [{**OTHER, "down": {}}])),
        (
            r"leaves of one shape, up/bias is \(6,\) and \(5,\)",
            lambda: fusion.average([BASE, {**OTHER, "up": {**OTHER["up"], "bias": jnp.zeros(5)}}]),
        ),
        (
            "model 0 down/kernel: expected finite numbers, got 1",
            lambda: fusion.task_vectors(
                BASE, [{**OTHER, "down": {"kernel": OTHER["down"]["kernel"].at[0, 0].set(jnp.nan)}}]
            ),
        ),
        (r"lam: expected a number or \[1\]", lambda: fusion.apply_task_vectors(BASE, TAUS, jnp.ones(2))),
        (
            r"lam: expected a number or \[1\].* in up/bias",
            lambda: fusion.apply_task_vectors(
                BASE, TAUS, jax.tree.map(lambda x: jnp.ones(2 if x.ndim == 1 else 1), TAUS[0])
            ),
        ),
        ("lam: expected the leaves of a task vector", lambda: fusion.apply_task_vectors(BASE, TAUS, {"up": 0.3})),
        ("tied: expected paths of leaves", lambda: fusion.task_vectors(BASE, [OTHER], tied={"head": "up/kernel"})),
        (
            "tied: expected leaves of one shape",
            lambda: fusion.task_vectors(BASE, [OTHER], tied={"down/kernel": "up/kernel"}),
        ),
        ("temperature: expected a number above 0, got 0", lambda: fusion.concrete_mask(TAUS[0], jax.random.key(0), 0)),
        ("mode: expected one of", lambda: fusion.concrete_mask(TAUS[0], jax.random.key(0), mode="soft")),
        ("temperature: expected", lambda: fusion.concrete_init(TAUS, fusion.Optimizers(), settings=BAD)),
        ("keep: expected a share", lambda: fusion.ties_merge(TAUS, 0.0)),
        ("keep: expected a share", lambda: fusion.ties_merge(TAUS, 1.5)),
        ("combine: expected one of", lambda: fusion.ties_merge(TAUS, combine="min")),
        ("mode: expected one of", lambda: fusion.fisher_diagonal(None, BASE, None, "diagonal")),
        ("key: expected a random key", lambda: fusion.fisher_diagonal(None, BASE, None, "sampled")),
        ("fishers: expected one for each of 1", lambda: fusion.fisher_merge([OTHER], [])),
        (
            "the sum of the Gram matrices is singular.*alpha < 1 or damping",
            lambda: fusion.regmean_merge([BASE], [STATS]),
        ),
        ("alpha: expected a factor", lambda: fusion.regmean_merge([BASE], [STATS], alpha=2.0)),
        ("damping: expected at least 0", lambda: fusion.regmean_merge([BASE], [STATS], damping=-1.0)),
        ("stats: expected those of each", lambda: fusion.regmean_merge([BASE], [])),
        ("stats: expected the same paths", lambda: fusion.regmean_merge([BASE, OTHER], [STATS, {}])),
        (
            r"stats: expected sums \[..., in, in\]",
            lambda: fusion.regmean_merge([BASE], [{"down/kernel": STATS["up/kernel"]}]),
        ),
        ("batches: expected one for each of 1", lambda: fusion.entropy_objective([None], BASE, [])),
    ],
)
def test_what_can_not_be_merged_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


BAD = ConcreteSettings(temperature=-1.0)


@pytest.mark.slow
def test_damping_makes_a_singular_sum_regular():
    merged = fusion.regmean_merge([BASE, OTHER], [STATS, STATS], damping=0.1)
    assert bool(jnp.all(jnp.isfinite(merged["up"]["kernel"])))


def test_concrete_init_follows_the_optimizers():
    state = fusion.concrete_init(TAUS, fusion.Optimizers(lam=optax.sgd(1.0)), layerwise=False)
    assert state.logits is None
    assert state.lam.shape == (1,)
