"""Few-shot adapters: the reference code's numbers, and what the methods reduce to at the ends of their parameters."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import metrics, train
from subspace_jax.represent import few_shot_survey as fs

PUBLIC = {
    *("zero_shot_logits", "ClipAdapter", "TipCache", "build_cache", "tip_logits", "search_tip", "fit_tip_f"),
    *("linear_probe", "CoOpPrompts", "assemble_prompts", "prompt_residual", "text_prototypes", "sample_shots"),
    *("vc_width", "domain_bound", "mixture_bound", "best_alpha"),
}


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to int32 powers, and mixes integers in 64 bits
        yield


@pytest.fixture
def tip(golden, x64):
    return {name: jnp.asarray(value) for name, value in golden("few-shot-survey/tip_adapter").items()}


def accuracy(logits, labels):
    return 100 * np.mean(np.argmax(np.asarray(logits), axis=1) == np.asarray(labels))


def test_public_names_of_the_survey_exist():
    assert set(fs.__all__) >= PUBLIC
    assert {"proxy_a_distance", "mmd2", "coral", "frechet_distance"} <= set(metrics.__all__)


def test_tip_logits_are_those_of_the_reference(tip):
    cache = CACHE(tip["support"], tip["support_y"], 6)
    zero_shot = ZERO_SHOT(tip["test"], tip["text"])
    chex.assert_trees_all_close(zero_shot, tip["zero_shot_logits"], atol=1e-8)
    # A block that does not divide the 24 keys, and one block.
    for block_size in (7, 1024):
        run = jax.jit(functools.partial(fs.tip_logits, block_size=block_size))
        got = run(tip["test"], cache, tip["text"], tip["alpha"], tip["beta"])
        chex.assert_trees_all_close(got, tip["tip_logits"], atol=1e-8)
        chex.assert_trees_all_close(got - zero_shot, tip["alpha"] * tip["cache_logits"], atol=1e-8)
    assert accuracy(zero_shot, tip["test_y"]) == pytest.approx(float(tip["acc_zero_shot"]))
    assert accuracy(got, tip["test_y"]) == pytest.approx(float(tip["acc_tip"]))


def test_search_tip_finds_the_pair_of_the_reference_loop(tip):
    cache = CACHE(tip["support"], tip["support_y"], 6)
    grid = fs.tip_grid(tuple(map(float, tip["search_scale"])), tuple(map(int, tip["search_step"])))
    found = fs.search_tip(tip["val"], tip["val_y"], cache, tip["text"], *grid)
    assert found.beta == pytest.approx(float(tip["best_beta"]), abs=1e-8)
    assert found.alpha == pytest.approx(float(tip["best_alpha"]), abs=1e-8)
    assert found.accuracies.shape == (20, 6)
    assert found.accuracy == found.accuracies.max()
    logits = TIP(tip["val"], cache, tip["text"], found.alpha, found.beta)
    assert accuracy(logits, tip["val_y"]) == pytest.approx(100 * found.accuracy)


def test_fit_tip_f_trains_the_keys_as_the_reference_loop(tip, standard_promotion):
    cache = CACHE(tip["support"], tip["support_y"], 6)
    order = tip["tipF_order"].reshape(-1, int(tip["tipF_batch"]))
    trained, losses = fs.fit_tip_f(cache, tip["text"], order, alpha=float(tip["alpha"]), beta=float(tip["beta"]))
    chex.assert_trees_all_close(losses, tip["tipF_loss"], atol=1e-8)
    # Before its first step it is Tip-Adapter.
    first, labels = tip["support"][order[0]], np.asarray(tip["support_y"])[order[0]]
    logits = np.asarray(TIP(first, cache, tip["text"], tip["alpha"], tip["beta"], 100.0))
    each = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(12), labels]
    assert losses[0] == pytest.approx(each.mean(), abs=1e-9)
    chex.assert_trees_all_close(trained.keys, tip["tipF_keys"], atol=1e-8)
    logits = TIP(tip["test"], trained, tip["text"], tip["alpha"], tip["beta"])
    chex.assert_trees_all_close(logits, tip["tipF_logits"], atol=1e-8)


@pytest.fixture
def adapter(golden, x64):
    """The reference's file, its adapter, examples and prototypes."""
    file = golden("few-shot-survey/clip_adapter")
    shots = fs.Shots(jnp.asarray(file["raw_support"]), jnp.asarray(file["support_y"]))
    adapter = fs.ClipAdapter(24, reduction=4, ratio=float(file["ratio"]), rngs=nnx.Rngs(0))
    adapter.down.set_value(jnp.asarray(file["W1"]).T)
    adapter.up.set_value(jnp.asarray(file["W2"]).T)
    return file, adapter, shots, jnp.asarray(file["text"])


@pytest.mark.slow
def test_clip_adapter_has_the_reference_s_gradient(adapter):
    file, adapter, shots, text = adapter
    # A step of plain SGD shows it.
    moved, _ = fs.fit_clip_adapter(adapter, shots, text, np.arange(24)[None], tx=optax.sgd(1.0))
    for name, own, then in (("W1", adapter.down, moved.down), ("W2", adapter.up, moved.up)):
        chex.assert_trees_all_close((own.get_value() - then.get_value()).T, file[f"grad_{name}"], atol=1e-8)


def test_clip_adapter_trains_as_the_reference_loop(adapter):
    file, adapter, shots, text = adapter
    run = jax.jit(lambda adapter, x: fs.zero_shot_logits(adapter(x), text))
    chex.assert_trees_all_close(run(adapter, shots.features), file["logits0"], atol=1e-8)
    order = np.tile(np.arange(24), (12, 1))
    decay = optax.add_decayed_weights(float(file["sgd_weight_decay"]))
    tx = optax.chain(decay, optax.sgd(float(file["sgd_lr"]), float(file["sgd_momentum"])))
    trained, losses = fs.fit_clip_adapter(adapter, shots, text, order, tx=tx)
    chex.assert_trees_all_close(losses, file["loss"], atol=1e-8)
    chex.assert_trees_all_close(trained.down.get_value().T, file["final_W1"], atol=1e-8)
    chex.assert_trees_all_close(trained.up.get_value().T, file["final_W2"], atol=1e-8)
    logits = run(trained, jnp.asarray(file["raw_test"]))
    chex.assert_trees_all_close(logits, file["test_logits"], atol=1e-8)


def test_optimizers_warm_up_and_end_at_0_and_are_the_same_objects():
    assert fs.sgd_of_coop(2e-3, 10, 2) is fs.sgd_of_coop(2e-3, 10, 2)
    tx, one = fs.sgd_of_coop(2e-3, 10, 2), jnp.zeros(())
    state, found = tx.init(one), []
    for _ in range(3):
        update, state = tx.update(jnp.ones(()), state, one)
        found.append(float(update))
    # Momentum 0.9: gradients of 1 sum to 1, 1.9 and 2.71.
    want = [-1e-5, -1.9e-5, -2.71e-3 * (1 + np.cos(0.2 * np.pi))]
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("context", ["ctx_csc0", "ctx_csc1"])
def test_assemble_prompts_gives_those_of_coop(golden, x64, position, context):
    file = golden("few-shot-survey/coop_prompts")
    got = fs.assemble_prompts(
        jnp.asarray(file[context]), jnp.asarray(file["token_embeddings"]), file["name_lens"], position
    )
    np.testing.assert_array_equal(got, file[f"prompts_{context[4:]}_{position}"])


def test_linear_probe_gives_the_logistic_regression_of_the_reference(golden, x64, standard_promotion):
    file = golden("few-shot-survey/linear_probe")
    shots = fs.Shots(jnp.asarray(file["support"]), jnp.asarray(file["support_y"]))
    for c, coefficients, intercept, reached in zip(
        file["C"], file["coef"], file["intercept"], file["acc"], strict=True
    ):
        probe = fs.linear_probe(shots, 6, float(c), tolerance=1e-9)
        # The reference's solver stops at a gradient of about 1e-5.
        chex.assert_trees_all_close(probe.kernel.T, coefficients, atol=1e-3)
        centered = [b - np.mean(b) for b in (np.asarray(probe.bias), intercept)]
        np.testing.assert_allclose(*centered, atol=1e-3)
        assert accuracy(probe.logits(jnp.asarray(file["test"])), file["test_y"]) == pytest.approx(reached)
        share = np.asarray(jax.nn.softmax(probe.logits(shots.features), axis=1))
        gradient = probe.kernel + c * shots.features.T @ (share - np.eye(6)[shots.labels])
        assert np.abs(gradient).max() < 24 * c * 1e-8  # 24 examples; 1e-9 is the tolerance of their mean


WIDTH, MIXTURE, BEST_ALPHA = jax.jit(fs.vc_width), jax.jit(fs.mixture_bound), jax.jit(fs.best_alpha)


def test_bounds_are_those_of_the_oracle(golden, x64):
    file = golden("few-shot-survey/bound_oracle")
    widths = WIDTH(file["m"], file["vc_dim"], file["delta"])
    chex.assert_trees_all_close(widths, file["vc_width"], atol=1e-8)
    rest = [file[name] for name in ("beta_target_fraction", "m_total", "vc_dim", "delta", "d_hdh", "lambda_star")]
    bounds = MIXTURE(file["alpha_grid"], *rest)
    chex.assert_trees_all_close(bounds, file["alpha_bound"], atol=1e-8)


@pytest.fixture(scope="module")
def sets():
    """Support features of 4 classes, 5 of each; queries; prototypes."""
    rng = np.random.default_rng(0)
    text = rng.standard_normal((4, 8)).astype(np.float32)
    labels = np.repeat(np.arange(4, dtype=np.int32), 5)
    support = (text[labels] + 0.8 * rng.standard_normal((20, 8))).astype(np.float32)
    queries = (text[rng.integers(0, 4, 30)] + 0.8 * rng.standard_normal((30, 8))).astype(np.float32)
    return fs.Shots(jnp.asarray(support), labels), jnp.asarray(queries), jnp.asarray(text)


TIP, ZERO_SHOT, CACHE = jax.jit(fs.tip_logits), jax.jit(fs.zero_shot_logits), jax.jit(fs.build_cache, static_argnums=2)
# Logits up to 100 have rounding errors of 1e-5 in float32.
ROUNDING = {"atol": 3e-5}


def unit(x):
    return np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)


def test_tip_logits_reduce_to_zero_shot_to_class_counts_and_to_the_nearest_key(sets):
    shots, queries, text = sets
    cache = CACHE(*shots, 4)
    zero_shot = ZERO_SHOT(queries, text)
    chex.assert_trees_all_close(TIP(queries, cache, text, 0.0, 5.5, 100.0), zero_shot, **ROUNDING)
    uneven = cache._replace(values=jnp.asarray(np.repeat(np.arange(4, dtype=np.int32), (7, 5, 5, 3))))
    counts = np.broadcast_to(np.array([7, 5, 5, 3], np.float32), zero_shot.shape)
    chex.assert_trees_all_close(TIP(queries, uneven, text, 1.0, 0.0, 100.0) - zero_shot, counts, **ROUNDING)
    # Close to their nearest key, so that its weight does not underflow.
    close = np.tile(shots.features[:15], (2, 1)) + 0.05 * np.asarray(queries)
    nearest = np.asarray(cache.values)[np.argmax(unit(close) @ np.asarray(cache.keys).T, axis=1)]
    found = np.argmax(TIP(jnp.asarray(close), cache, text, 1e30, 1000.0, 100.0), axis=1)
    np.testing.assert_array_equal(found, nearest)


def test_tip_logits_do_not_depend_on_the_order_of_the_cache(sets):
    shots, queries, text = sets
    one, order = CACHE(*shots, 4), np.random.default_rng(1).permutation(20)
    other = fs.TipCache(*(jnp.asarray(np.asarray(part)[order]) for part in one))
    rest = (text, 1.0, 5.5, 100.0)
    chex.assert_trees_all_close(TIP(queries, one, *rest), TIP(queries, other, *rest), **ROUNDING)


def shapes_in(jaxpr):
    """Shapes of all values of a program and of those it calls."""
    for equation in jaxpr.eqns:
        yield from (value.aval.shape for value in equation.outvars)
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


def test_tip_logits_and_their_gradient_hold_no_affinity_of_all_pairs_and_no_one_hot_values():
    queries, keys, text = jnp.ones((50, 4)), jnp.ones((4000, 4)), jnp.ones((30, 4))

    def loss(keys):
        cache = fs.TipCache(keys, jnp.zeros(4000, jnp.int32))
        return jnp.sum(fs.tip_logits(queries, cache, text, block_size=500))

    shapes = list(shapes_in(jax.make_jaxpr(jax.grad(loss))(keys).jaxpr))
    assert (500, 50) in shapes  # a block is there
    assert max(np.prod(shape, dtype=int) for shape in shapes) <= 500 * 50 + 500


def test_build_cache_averages_views_before_it_normalizes(sets):
    features = np.stack([sets[0].features, 3 * sets[0].features + 1])
    got = CACHE(jnp.asarray(features), sets[0].labels, 4).keys
    chex.assert_trees_all_close(got, unit(features.mean(axis=0)), atol=1e-6)


def test_text_prototypes_normalize_average_and_normalize():
    embeddings = np.array([[[10.0, 0.0], [0.0, 1.0]], [[3.0, 4.0], [3.0, 4.0]]], np.float32)
    want = np.array([[0.5**0.5, 0.5**0.5], [0.6, 0.8]], np.float32)
    chex.assert_trees_all_close(jax.jit(fs.text_prototypes)(embeddings), want, atol=1e-6)
    labels = np.array([0, 0, 1, 1])
    by_class = jax.jit(fs.class_prototypes, static_argnums=2)
    chex.assert_trees_all_close(by_class(embeddings.reshape(4, 2), labels, 2), want, atol=1e-6)


def test_clip_adapter_of_ratio_0_is_the_identity(sets):
    adapter = fs.ClipAdapter(8, ratio=0.0, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(adapter(sets[0].features), sets[0].features)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_assemble_prompts_keeps_start_context_and_tokens(position):
    # Numbers 100 to 104 are the context, 0 the start, 1 to 5 placeholders, 6 to 11 name and rest.
    embeddings = jnp.broadcast_to(jnp.arange(12.0)[None, :, None], (2, 12, 1))
    got = fs.assemble_prompts(100 + jnp.arange(5.0)[:, None], embeddings, np.array([2, 3]), position)[..., 0]
    for row in got:
        assert sorted(row.tolist()) == [0, *range(6, 12), *range(100, 105)]
    want = {
        "end": [0, 100, 101, 102, 103, 104, 6, 7, 8],
        "middle": [0, 100, 101, 6, 7, 8, 102, 103, 104],
        "front": [0, 6, 7, 8, 100, 101, 102, 103, 104],
    }
    assert got[1, :9].tolist() == want[position]


@pytest.mark.slow
def test_linear_probe_does_not_depend_on_its_start(sets):
    shots, _, text = sets
    start = fs.Probe(100.0 * text.T, jnp.zeros(4))
    found = [fs.linear_probe(shots, 4, 0.1, start=first) for first in (None, start)]
    chex.assert_trees_all_close(*found, atol=1e-3)


@pytest.mark.slow
def test_search_probe_takes_a_weight_that_no_other_of_its_grid_beats(sets):
    shots, _, _ = sets
    fit, validation = (fs.Shots(shots.features[half::2], shots.labels[half::2]) for half in (0, 1))
    probe, c = fs.search_probe(fit, validation, 4, steps=2)
    reached = accuracy(probe.logits(validation.features), validation.labels)
    assert c not in (1e6, 1e-6)
    for other in (1e4, 1.0, 1e-4):
        logits = fs.linear_probe(fit, 4, other).logits(validation.features)
        assert reached >= accuracy(logits, validation.labels)


def test_bounds_move_with_examples_capacity_and_gap_and_best_alpha_is_their_minimum():
    # Beyond twice the examples, capacity counts no more, and the logarithm does not turn.
    m, v = np.array([1e3, 1e4, 1e4, 100, 100, 100]), np.array([20.0, 20.0, 40.0, 150.0, 200.0, 1e6])
    widths = WIDTH(m.astype(np.float32), v.astype(np.float32), 0.05)
    assert widths[1] < widths[2] < widths[0]
    assert widths[3] < widths[4] == widths[5]
    assert fs.domain_bound(0.1, 0.2, 0.4, 0.05) == pytest.approx(0.55)
    assert fs.domain_bound(0.1, 0.2, 0.8, 0.05) > fs.domain_bound(0.1, 0.2, 0.4, 0.05)
    grid = np.linspace(0.0, 1.0, 2001, dtype=np.float32)
    # Few and many examples: an inner minimum, and the end of the interval.
    for m, gap in ((2e3, 0.4), (2e5, 0.4), (1e9, 2.0)):
        rest = (0.1, m, 25.0, 0.05, gap, 0.05)
        best = BEST_ALPHA(*rest)
        bounds = MIXTURE(np.append(grid[:-1], best).astype(np.float32), *rest)
        # Near its minimum a bound in float32 is flat over some steps of the grid.
        assert bounds[-1] <= np.min(bounds) * (1 + 1e-6)
    assert best == 1.0
    near, far = (MIXTURE(grid, 0.1, 2e3, 25.0, 0.05, gap, 0.05) for gap in (0.0, 2.0))
    assert near[-1] == far[-1]
    assert np.all(near[:-1] < far[:-1])


def test_sample_shots_are_nested_fixed_by_their_key_and_of_each_class():
    labels = np.array([2, 0, 1, 0, 2, 1, 0, 2, 1, 0])
    many, few = (fs.sample_shots(jax.random.key(3), labels, k) for k in (3, 2))
    np.testing.assert_array_equal(many[:, :2], few)
    np.testing.assert_array_equal(labels[many], np.repeat(np.arange(3)[:, None], 3, axis=1))
    assert len(np.unique(many)) == 9
    assert any((fs.sample_shots(jax.random.key(seed), labels, 3) != many).any() for seed in range(3))


@pytest.mark.slow
def test_residuals_start_at_the_prototypes_and_a_low_rank_is_a_product(sets, standard_promotion):
    shots, _, text = sets
    move = jax.jit(fs.prompt_residual)
    for rank in (None, 2):
        start = fs.start_residual(text, jax.random.key(0), rank)
        chex.assert_trees_all_close(move(text, start), unit(text), atol=1e-6)
    order = np.tile(np.arange(20), (20, 1))
    low, losses = fs.fit_residual(start, shots, text, order, tx=optax.adam(1e-2))
    assert losses[-1] < 0.9 * losses[0]
    want = unit(text + np.asarray(low.u) @ np.asarray(low.v).T)
    chex.assert_trees_all_close(move(text, low), want, atol=1e-6)
    chex.assert_trees_all_close(move(text, jnp.ones(8)), unit(text + 1.0), atol=1e-6)


def test_text_subspace_of_full_rank_keeps_the_classes_and_cca_pairs_single_directions(sets):
    shots, queries, text = sets
    maps = fs.text_subspace(text, 4)
    projected = ZERO_SHOT(maps.of_images(queries), maps.of_texts(text))
    np.testing.assert_array_equal(np.argmax(projected, 1), np.argmax(ZERO_SHOT(queries, text), 1))
    maps = jax.jit(lambda *sets: fs.cca_subspace(fs.Shots(*sets[:2]), sets[2], 3, ridge=1e-4))(*shots, text)
    x, y = maps.of_images(shots.features), maps.of_texts(text)[shots.labels]
    cross = x.T @ y / 20
    assert jnp.all(jnp.diag(cross) > 0.5)
    chex.assert_trees_all_close(cross, jnp.diag(jnp.diag(cross)), atol=1e-3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("labels: expected integers in 0 to 3, got 0 to 4", lambda f, y, t: fs.build_cache(f, y + (y == 3), 4)),
        ("labels: expected integers in 0 to 2", lambda f, y, t: fs.linear_probe(fs.Shots(f, y), 3)),
        ("features: expected finite vectors other than 0, got 1", lambda f, y, t: fs.build_cache(f.at[2].set(0), y, 4)),
        ("embeddings: expected finite vectors", lambda f, y, t: fs.text_prototypes(jnp.zeros((2, 1, 3)))),
        ("features, text: expected", lambda f, y, t: fs.zero_shot_logits(f[:, 1:], t)),
        ("features, text: expected", lambda f, y, t: fs.tip_logits(f, fs.TipCache(f[:, 1:], y), t)),
        ("beta: expected at least 0", lambda f, y, t: fs.tip_logits(f, fs.TipCache(f, y), t, beta=-1.0)),
        ("beta: expected at least 0", lambda f, y, t: fs.search_tip(f, y, fs.TipCache(f, y), t, [-1.0], [1.0])),
        ("betas, alphas: expected", lambda f, y, t: fs.search_tip(f, y, fs.TipCache(f, y), t, [], [1.0])),
        ("shots: expected at least 1", lambda f, y, t: fs.sample_shots(jax.random.key(0), y, 0)),
        (r"class to count: \{0: 5", lambda f, y, t: fs.sample_shots(jax.random.key(0), y, 6)),
        (r"class to count: \{4: 0\}", lambda f, y, t: fs.sample_shots(jax.random.key(0), y, 5, 5)),
        ("delta: expected a number in", lambda f, y, t: fs.vc_width(100, 5, 1.0)),
        ("delta: expected a number in", lambda f, y, t: fs.mixture_bound(0.5, 0.1, 100, 5, 0.0, 1.0, 0.0)),
        ("m: expected a positive", lambda f, y, t: fs.vc_width(0, 5, 0.1)),
        ("ratio: expected", lambda f, y, t: fs.ClipAdapter(8, ratio=1.5, rngs=nnx.Rngs(0))),
        ("reduction: expected 1 to 8", lambda f, y, t: fs.ClipAdapter(8, reduction=9, rngs=nnx.Rngs(0))),
        ("c: expected a positive", lambda f, y, t: fs.linear_probe(fs.Shots(f, y), 4, 0.0)),
        ("rank: expected 1 to 4", lambda f, y, t: fs.start_residual(t, jax.random.key(0), 5)),
        ("delta: expected", lambda f, y, t: fs.prompt_residual(t, jnp.zeros(4))),
        ("k: expected 1 to 3", lambda f, y, t: fs.cca_subspace(fs.Shots(f, y), t, 4)),
        ("k: expected 1 to", lambda f, y, t: fs.text_subspace(t, 5)),
    ],
)
def test_bad_input_is_refused_by_name(sets, message, call):
    shots, _, text = sets
    with pytest.raises(ValueError, match=message):
        call(shots.features, shots.labels, text)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("name_lengths: expected 0 to 7, beside", {"name_lengths": np.array([1, 8])}),
        ("context, embeddings: expected", {"context": jnp.ones((4, 3))}),
        ("position: expected one of", {"position": "left"}),
        ("name_lengths: expected 2 integers", {"name_lengths": np.array([1])}),
    ],
)
def test_assemble_prompts_refuses_what_does_not_fit(message, changes):
    fitting = {"context": jnp.ones((4, 2)), "embeddings": jnp.ones((2, 12, 2)), "name_lengths": np.array([1, 7])}
    fs.assemble_prompts(**fitting)
    with pytest.raises(ValueError, match=message):
        fs.assemble_prompts(**{**fitting, **changes})


@pytest.mark.eight_devices
def test_sharded_tip_logits_and_trained_keys_equal_those_of_one_device(sets, standard_promotion):
    shots, queries, text = sets
    cache = fs.build_cache(shots.features[:16], shots.labels[:16], 4)
    mesh = train.make_mesh()
    rows = NamedSharding(mesh, P(mesh.axis_names))
    run = jax.jit(lambda x, cache: fs.tip_logits(x, cache, text, block_size=6))
    placed = jax.device_put(queries[:24], rows)
    for keys in (cache, jax.device_put(cache, rows)):
        chex.assert_trees_all_close(run(placed, keys), run(queries[:24], cache), atol=3e-5)
    order = np.tile(np.arange(16), (3, 1))
    single, sharded = (fs.fit_tip_f(part, text, order)[0].keys for part in (cache, jax.device_put(cache, rows)))
    # AdamW divides by roots of second moments: three steps of 1e-3 at most.
    chex.assert_trees_all_close(single, sharded, atol=1e-5)
