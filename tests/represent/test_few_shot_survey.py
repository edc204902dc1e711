"""Few-shot adapters: the reference code's numbers, and what the methods reduce to at the ends of their parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subspace_jax import metrics
from subspace_jax.represent import few_shot_survey as fs

PUBLIC = {
    *("zero_shot_logits", "ClipAdapter", "TipCache", "build_cache", "tip_logits", "search_tip", "fit_tip_f"),
    *("linear_probe", "CoOpPrompts", "assemble_prompts", "prompt_residual", "text_prototypes", "sample_shots"),
    *("vc_width", "domain_bound", "mixture_bound", "best_alpha"),
}


@pytest.fixture
def tip(golden, x64):
    return {name: jnp.asarray(value) for name, value in golden("few-shot-survey/tip_adapter").items()}


def accuracy(logits, labels):
    return 100 * np.mean(np.argmax(np.asarray(logits), axis=1) == np.asarray(labels))


def test_public_names_of_the_survey_exist():
    assert set(fs.__all__) >= PUBLIC
    assert {"proxy_a_distance", "mmd2", "coral", "frechet_distance"} <= set(metrics.__all__)


def test_tip_logits_are_those_of_the_reference(tip):
    cache = fs.build_cache(tip["support"], tip["support_y"], 6)
    zero_shot = fs.zero_shot_logits(tip["test"], tip["text"])
    chex.assert_trees_all_close(zero_shot, tip["zero_shot_logits"], atol=1e-8)
    # A block that does not divide the 24 keys, and one block.
    for block_size in (7, 1024):
        got = fs.tip_logits(tip["test"], cache, tip["text"], tip["alpha"], tip["beta"], block_size=block_size)
        chex.assert_trees_all_close(got, tip["tip_logits"], atol=1e-8)
        chex.assert_trees_all_close(got - zero_shot, tip["alpha"] * tip["cache_logits"], atol=1e-8)
    assert accuracy(zero_shot, tip["test_y"]) == pytest.approx(float(tip["acc_zero_shot"]))
    assert accuracy(got, tip["test_y"]) == pytest.approx(float(tip["acc_tip"]))


def test_search_tip_finds_the_pair_of_the_reference_loop(tip):
    cache = fs.build_cache(tip["support"], tip["support_y"], 6)
    grid = fs.tip_grid(tuple(map(float, tip["search_scale"])), tuple(map(int, tip["search_step"])))
    found = fs.search_tip(tip["val"], tip["val_y"], cache, tip["text"], *grid)
    assert found.beta == pytest.approx(float(tip["best_beta"]), abs=1e-8)
    assert found.alpha == pytest.approx(float(tip["best_alpha"]), abs=1e-8)
    assert found.accuracies.shape == (20, 6)
    assert found.accuracy == found.accuracies.max()
    logits = fs.tip_logits(tip["val"], cache, tip["text"], found.alpha, found.beta)
    assert accuracy(logits, tip["val_y"]) == pytest.approx(100 * found.accuracy)


def test_fit_tip_f_trains_the_keys_as_the_reference_loop(tip):
    cache = fs.build_cache(tip["support"], tip["support_y"], 6)
    order = tip["tipF_order"].reshape(-1, int(tip["tipF_batch"]))
    with jax.numpy_dtype_promotion("standard"):  # of Optax's AdamW in 64 bits
        trained, losses = fs.fit_tip_f(cache, tip["text"], order, alpha=float(tip["alpha"]), beta=float(tip["beta"]))
    chex.assert_trees_all_close(losses, tip["tipF_loss"], atol=1e-8)
    chex.assert_trees_all_close(trained.keys, tip["tipF_keys"], atol=1e-8)
    logits = fs.tip_logits(tip["test"], trained, tip["text"], tip["alpha"], tip["beta"])
    chex.assert_trees_all_close(logits, tip["tipF_logits"], atol=1e-8)


def test_clip_adapter_trains_as_the_reference_loop(golden, x64):
    file = golden("few-shot-survey/clip_adapter")
    shots = fs.Shots(jnp.asarray(file["raw_support"]), jnp.asarray(file["support_y"]))
    adapter = fs.ClipAdapter(24, reduction=4, ratio=float(file["ratio"]), rngs=nnx.Rngs(0))
    adapter.down.set_value(jnp.asarray(file["W1"]).T)
    adapter.up.set_value(jnp.asarray(file["W2"]).T)
    text = jnp.asarray(file["text"])
    chex.assert_trees_all_close(fs.zero_shot_logits(adapter(shots.features), text), file["logits0"], atol=1e-8)
    order = np.tile(np.arange(24), (12, 1))
    decay = optax.add_decayed_weights(float(file["sgd_weight_decay"]))
    tx = optax.chain(decay, optax.sgd(float(file["sgd_lr"]), float(file["sgd_momentum"])))
    trained, losses = fs.fit_clip_adapter(adapter, shots, text, order, tx=tx)
    chex.assert_trees_all_close(losses, file["loss"], atol=1e-8)
    chex.assert_trees_all_close(trained.down.get_value().T, file["final_W1"], atol=1e-8)
    chex.assert_trees_all_close(trained.up.get_value().T, file["final_W2"], atol=1e-8)
    logits = fs.zero_shot_logits(trained(jnp.asarray(file["raw_test"])), text)
    chex.assert_trees_all_close(logits, file["test_logits"], atol=1e-8)
    # The step of plain SGD shows the gradient.
    moved, _ = fs.fit_clip_adapter(adapter, shots, text, order[:1], tx=optax.sgd(1.0))
    chex.assert_trees_all_close((adapter.down - moved.down).T, file["grad_W1"], atol=1e-8)
    chex.assert_trees_all_close((adapter.up - moved.up).T, file["grad_W2"], atol=1e-8)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("context", ["ctx_csc0", "ctx_csc1"])
def test_assemble_prompts_gives_those_of_coop(golden, x64, position, context):
    file = golden("few-shot-survey/coop_prompts")
    got = fs.assemble_prompts(
        jnp.asarray(file[context]), jnp.asarray(file["token_embeddings"]), file["name_lens"], position
    )
    np.testing.assert_array_equal(got, file[f"prompts_{context[4:]}_{position}"])


def test_linear_probe_gives_the_logistic_regression_of_the_reference(golden, x64):
    file = golden("few-shot-survey/linear_probe")
    shots = fs.Shots(jnp.asarray(file["support"]), jnp.asarray(file["support_y"]))
    for c, coefficients, intercept, reached in zip(
        file["C"], file["coef"], file["intercept"], file["acc"], strict=True
    ):
        # In 64 bits Optax's L-BFGS mixes types of integers.
        with jax.numpy_dtype_promotion("standard"):
            probe = fs.linear_probe(shots, 6, float(c), tolerance=1e-9)
        # The reference's solver stops at a gradient of about 1e-5.
        chex.assert_trees_all_close(probe.kernel.T, coefficients, atol=1e-3)
        centered = [b - np.mean(b) for b in (np.asarray(probe.bias), intercept)]
        np.testing.assert_allclose(*centered, atol=1e-3)
        assert accuracy(probe.logits(jnp.asarray(file["test"])), file["test_y"]) == pytest.approx(reached)


def test_bounds_are_those_of_the_oracle(golden, x64):
    file = golden("few-shot-survey/bound_oracle")
    widths = fs.vc_width(file["m"], file["vc_dim"], file["delta"])
    chex.assert_trees_all_close(widths, file["vc_width"], atol=1e-8)
    rest = [file[name] for name in ("beta_target_fraction", "m_total", "vc_dim", "delta", "d_hdh", "lambda_star")]
    bounds = fs.mixture_bound(file["alpha_grid"], *rest)
    chex.assert_trees_all_close(bounds, file["alpha_bound"], atol=1e-8)
