"""CLIP and SigLIP with both towers: what the reference computes, export, and what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, losses, nn, train
from subspace_jax.interop.hf.clip import dual_config_from_fields, dual_tensor_layout

from .conftest import rewrite, tensors_of
from .vision_goldens import CLOSE, DUAL, GOLDEN, copy, gradients_are, jit, pixels, stored

every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "siglip" else pytest.mark.slow) for name in DUAL]
)


@functools.cache
def loaded(name):
    return interop.load_dual(GOLDEN / name)


@functools.cache
def found(name):
    """Loss and gradients of a golden model, and all else that it computes on the way."""
    config, params = loaded(name)
    ids = jnp.asarray(stored(name)["input_ids"], jnp.int32)

    def loss(params):
        text = nn.text_tower_apply(config.text, params["text"], ids, capture="all")
        image_features = nn.encode_image(config, params, pixels(name), normalize=False)
        text_features = text.pooled
        if config.projection_size:
            text_features = text_features @ params["text_projection"]["kernel"]
        scores = nn.similarity(config, params, image_features, text_features)
        numbers = [params["similarity"][key] for key in ("scale", "bias") if key in params["similarity"]]
        own = (losses.siglip_loss if config.biased else losses.clip_loss)(image_features, text_features, *numbers)
        return jnp.mean(own), (text, image_features, text_features, scores)

    # One of the two models of CLIP suffices for the gradients: they differ in settings of the forward pass.
    run = jax.value_and_grad(loss, has_aux=True) if name != "clip_legacy" else lambda params: (loss(params), None)
    with jax.default_matmul_precision("highest"):
        return jit(run)(params)


@every_model
def test_embeddings_similarities_and_loss_are_those_of_the_reference(name):
    golden, ((loss, (text, image, words, scores)), _) = stored(name), found(name)
    chex.assert_trees_all_close(np.stack(text.hidden), golden["text_hidden"], **CLOSE)
    chex.assert_trees_all_close(text.tokens, golden["text_last_hidden_state"], **CLOSE)
    chex.assert_trees_all_close(text.pooled, golden["text_pooled"], **CLOSE)
    if "image_features" in golden:
        chex.assert_trees_all_close(image, golden["image_features"], **CLOSE)
        chex.assert_trees_all_close(words, golden["text_features"], **CLOSE)
    chex.assert_trees_all_close(image / jnp.linalg.norm(image, axis=1, keepdims=True), golden["image_embeds"], **CLOSE)
    chex.assert_trees_all_close(words / jnp.linalg.norm(words, axis=1, keepdims=True), golden["text_embeds"], **CLOSE)
    chex.assert_trees_all_close(scores, golden["logits_per_image"], **CLOSE)
    chex.assert_trees_all_close(scores.T, golden["logits_per_text"], **CLOSE)
    chex.assert_trees_all_close(loss, golden["loss"], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_gradients_are_those_of_the_reference(name):
    golden, (_, grads) = stored(name), found(name)
    count = gradients_are(golden, dual_tensor_layout(loaded(name)[0]).tensors, grads)
    assert count == sum(key.startswith("grad:") for key in golden)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["siglip", "clip", "clip_legacy"])
def test_encode_text_with_a_mask_ignores_padding(name):
    golden, (config, params) = stored(name), loaded(name)
    ids, mask = (jnp.asarray(golden[key], jnp.int32) for key in ("input_ids", "attention_mask"))

    @jit
    def run(ids, mask):
        text = nn.text_tower_apply(config.text, params["text"], ids, attention_mask=mask)
        return text, nn.encode_text(config, params, ids, mask)

    with jax.default_matmul_precision("highest"):
        text, vectors = run(ids, mask)
    if name == "siglip":
        chex.assert_trees_all_close(text.pooled, golden["text_pooled_masked"], **CLOSE)
    else:
        chex.assert_trees_all_close(text.tokens, golden["text_last_hidden_state_masked"], **CLOSE)
        chex.assert_trees_all_close(vectors, golden["text_embeds_masked"], **CLOSE)
        # Causality: what stands behind the end token can't matter, masked or not.
        chex.assert_trees_all_close(vectors, golden["text_embeds"], **CLOSE)
    chex.assert_trees_all_close(
        nn.similarity(config, params, found(name)[0][1][1], vectors), golden["logits_per_image_masked"], **CLOSE
    )


@every_model
def test_export_keeps_every_name_type_and_value(name, tmp_path):
    config, params = loaded(name)
    interop.save_dual(tmp_path / "out", config, params)
    original, written = tensors_of(GOLDEN / name), tensors_of(tmp_path / "out")
    assert sorted(original) == list(written)
    for key, tensor in original.items():
        assert (tensor.dtype, tensor.shape) == (written[key].dtype, written[key].shape)
        assert tensor.tobytes() == written[key].tobytes()
    again, reread = interop.load_dual(tmp_path / "out")
    assert again == config
    chex.assert_trees_all_equal(params, reread)


@pytest.mark.eight_devices
def test_load_dual_shards_parameters_over_a_mesh():
    mesh = train.make_mesh(2, 2, 2)
    split = interop.load_dual(
        GOLDEN / "siglip", shardings=lambda shapes, axes: train.param_shardings(shapes, axes, mesh)
    )[1]
    chex.assert_trees_all_equal(split, loaded("siglip")[1])
    assert split["text"]["embed"]["embedding"].addressable_shards[0].data.shape == (30, 16)


def test_what_follows_the_end_token_does_not_matter():
    config, params = loaded("clip")
    ids = stored("clip")["input_ids"].astype(np.int32)
    ends = stored("clip")["eos_position"]
    other = np.where(np.arange(ids.shape[1])[None] > ends[:, None], 3, ids)
    run = jit(functools.partial(nn.encode_text, config, params))
    np.testing.assert_allclose(run(jnp.asarray(other)), run(jnp.asarray(ids)), atol=1e-6)


def test_bad_texts_are_named_and_where_traced_give_nan():
    config, params = loaded("clip")
    ids = stored("clip")["input_ids"].astype(np.int32)
    endless = np.where(ids == config.text.end_token, 3, ids)
    encode = functools.partial(nn.encode_text, config, params)
    with pytest.raises(ValueError, match="text 0 has no end token 59"):
        encode(endless)
    assert jnp.all(jnp.isnan(jit(encode)(jnp.asarray(endless))))
    with pytest.raises(ValueError, match=r"tokens: 60 at \(0, 0\) is outside the vocabulary of 60 tokens"):
        encode(jnp.full((1, 4), 60, jnp.int32))
    with pytest.raises(ValueError, match="tokens: 13 positions, the tower has 12"):
        encode(jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(TypeError, match="tokens: expected integers, got float32"):
        encode(jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape \(3, 11\) of tokens"):
        encode(ids, jnp.ones((3, 4)))
    with pytest.raises(ValueError, match="similarity: expected"):
        nn.similarity(config, params, jnp.ones((2, 20)), jnp.ones((2, 19)))
    with pytest.raises(ValueError, match="projection_size: vectors of 32 and 24 features need a projection"):
        config.replace(projection_size=0)


def test_folders_of_other_models_and_with_other_tensors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model_type: 'siglip2' is not supported"):
        interop.load_dual(copy("siglip", tmp_path / "a", model_type="siglip2"))
    folder = copy("clip", tmp_path / "b")
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != "logit_scale"})
    with pytest.raises(ValueError, match=r"missing: \['logit_scale'\]; unexpected: none"):
        interop.load_dual(folder)
    extra = {"text_model.embeddings.position_ids": np.arange(12)[None]}
    rewrite(folder, lambda t: {**t, **extra, "logit_scale": np.float32(1).reshape(())})
    assert interop.load_dual(folder)[1]["similarity"]["scale"] == 1


def test_fields_that_a_config_lacks_have_the_defaults_of_its_type():
    clip = dual_config_from_fields({"model_type": "clip"})
    assert (clip.text.width, clip.text.num_heads, clip.text.max_length, clip.projection_size) == (512, 8, 77, 512)
    assert (clip.vision.width, clip.vision.patch_size, clip.text.end_token) == (768, 32, 49407)
    siglip = dual_config_from_fields({"model_type": "siglip"})
    assert (siglip.text.pool, siglip.text.causal, siglip.text.head_size, siglip.biased) == ("last", False, 768, True)
    old = {"text_config": {"hidden_size": 64}, "text_config_dict": {"num_attention_heads": 4}}
    assert dual_config_from_fields({"model_type": "clip", **old}).text.width == 512
