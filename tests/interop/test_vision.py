"""Vision checkpoints: what the libraries that wrote them compute, other spellings, export, and what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn, train
from subspace_jax.interop import hf, timm

from .conftest import rewrite, tensors_of
from .vision_goldens import (
    CLOSE,
    DUAL,
    GOLDEN,
    HF,
    TIMM,
    copy,
    forward,
    found,
    gradients,
    gradients_are,
    jit,
    loaded,
    pixels,
    stored,
)

_SLOW = ("vit_model", "clip_legacy", "deit3_timm", "deit_distilled_timm")


def models(names):
    return [pytest.param(name, marks=pytest.mark.slow if name in _SLOW else []) for name in names]


every_model = pytest.mark.parametrize("name", models([*HF, *DUAL, *TIMM]))


@every_model
def test_hidden_states_pooled_vectors_and_logits_are_those_of_the_reference(name):
    golden, tower = stored(name), "vision_" if name in DUAL else ""
    output = found(name)
    wanted = {
        "tokens": golden.get(f"{tower}last_hidden_state", golden.get("features")),
        "pooled": golden.get(f"{tower}pooled"),
        "logits": None if name in (*DUAL, "siglip_vision_timm") else golden.get("logits"),
    }
    for field, value in wanted.items():
        if value is not None:
            chex.assert_trees_all_close(getattr(output, field), value, **CLOSE)
    if name != "vit_model":
        chex.assert_trees_all_close(np.stack(output.hidden), golden[f"{tower}hidden"], **CLOSE)
    if name == "deit_distilled":
        head = jax.tree.map(np.asarray, loaded(name)[1]["head"])
        chex.assert_trees_all_close(
            np.asarray(output.tokens[:, 0]) @ head["kernel"] + head["bias"], golden["cls_logits"], **CLOSE
        )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("vit", "siglip_vision_timm") else pytest.mark.slow)
        for n in (*HF, *DUAL, *TIMM)
        if "pixel_values_other" in stored(n)
    ],
)
def test_images_of_another_size_see_resampled_positions_as_in_the_reference(name):
    golden, tower = stored(name), "vision_" if name in DUAL else ""
    config, params = loaded(name)
    output = jit(lambda x: forward(name, params, x, resample=True))(pixels(name, "pixel_values_other"))
    wanted = {
        "tokens": golden.get(f"{tower}last_hidden_state_other", golden.get("features_other")),
        "pooled": golden.get(f"{tower}pooled_other"),
        "logits": None if "siglip" in name else golden.get("logits_other"),
    }
    for field, value in wanted.items():
        if value is not None:
            chex.assert_trees_all_close(getattr(output, field), value, **CLOSE)
    if "pos_embed_other" in golden:
        size = golden["pixel_values_other"].shape[2:]
        resized = nn.with_image_size(config, params, size)[1]["position"]["embedding"]
        chex.assert_trees_all_close(resized, golden["pos_embed_other"][0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="pass resample=True"):
        nn.vision_transformer_apply(config, params, pixels(name, "pixel_values_other"))


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit_timm", "deit3_timm"))]
)
def test_loss_and_its_gradients_are_those_of_the_reference(name):
    golden, (value, grads) = stored(name), gradients(name)
    chex.assert_trees_all_close(value, golden["loss"], **CLOSE)
    layout = (timm if name in TIMM else hf).vit.tensor_layout(loaded(name)[0])
    count = gradients_are(golden, layout.tensors, grads)
    assert count == sum(key.startswith("grad:") for key in golden)


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "vit_model", *TIMM])
def test_export_keeps_every_name_type_and_value(name, tmp_path):
    config, params = loaded(name)
    interop.save_vision(tmp_path / "out", config, params)
    original, written = tensors_of(GOLDEN / name), tensors_of(tmp_path / "out")
    assert sorted(original) == list(written)
    for key, tensor in original.items():
        assert (tensor.dtype, tensor.shape) == (written[key].dtype, written[key].shape)
        assert tensor.tobytes() == written[key].tobytes()
    again, reread = interop.load_vision(tmp_path / "out")
    assert again == config
    chex.assert_trees_all_equal(params, reread)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_tower_alone_is_exported_with_its_prefix_and_read_without_it_too(name, tmp_path):
    config, params = loaded(name)
    interop.save_vision(tmp_path / "out", config, params)
    assert all(key.startswith("vision_model.") for key in tensors_of(tmp_path / "out"))
    chex.assert_trees_all_equal(params, interop.load_vision(tmp_path / "out")[1])
    positions = {"embeddings.position_ids": np.arange(5)[None]}
    rewrite(tmp_path / "out", lambda t: {k.removeprefix("vision_model."): v for k, v in t.items()} | positions)
    again, reread = interop.load_vision(tmp_path / "out")
    assert again == config
    chex.assert_trees_all_equal(params, reread)


SPELLINGS = {
    "encoder.layer.": "layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "vit_model"])
def test_both_spellings_with_and_without_prefix_give_the_same_parameters(name, tmp_path):
    folder = copy(name, tmp_path / "new")

    def respell(key, prefix):
        for old, new in SPELLINGS.items():
            key = key.replace(old, new)
        bare = key.removeprefix("vit.").removeprefix("deit.")
        return key if not prefix or "classifier" in key else prefix + bare

    prefix = {"vit_model": "vit."}.get(name)
    rewrite(folder, lambda t: {respell(k, prefix): v for k, v in t.items()})
    chex.assert_trees_all_equal(loaded(name)[1], interop.load_vision(folder)[1])


def test_old_layer_scale_names_and_leftover_layers_of_timm_are_read(tmp_path):
    folder = copy("deit3_timm", tmp_path / "old")
    extra = {"pre_logits.fc.weight": np.zeros((2, 2), np.float32)}
    rewrite(
        folder,
        lambda t: {k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in t.items()} | extra,
    )
    config, params = interop.load_vision(folder)
    assert config == loaded("deit3_timm")[0]
    chex.assert_trees_all_equal(loaded("deit3_timm")[1], params)


def test_fields_that_a_config_lacks_have_the_defaults_of_its_type(tmp_path):
    folder = copy(
        "vit", tmp_path / "bare", hidden_act=..., layer_norm_eps=..., qkv_bias=..., num_channels=..., architectures=...
    )
    config, params = interop.load_vision(folder)
    assert config == loaded("vit")[0]
    chex.assert_trees_all_equal(loaded("vit")[1], params)
    config = hf.vit.config_from_fields({"model_type": "vit"})
    assert (config.width, config.num_layers, config.mlp_size, config.image_size) == (768, 12, 3072, (224, 224))
    assert (config.patch_size, config.norm_eps, config.num_classes) == (16, 1e-12, 2)
    clip = hf.vit.config_from_fields({"model_type": "clip", "vision_config": {}})
    assert (clip.patch_size, clip.activation, clip.norm_eps, clip.num_classes) == (32, "quick_gelu", 1e-5, 0)
    # The second copy that old files carry counts, with its defaults.
    old = {
        "model_type": "clip",
        "vision_config": {"hidden_size": 64, "patch_size": 8},
        "vision_config_dict": {"patch_size": 14},
    }
    clip = hf.vit.config_from_fields(old)
    assert (clip.width, clip.patch_size) == (768, 14)


def test_a_model_moves_between_the_libraries_where_both_can_express_it(tmp_path):
    config, params = loaded("vit_timm")
    interop.save_vision(tmp_path / "hf", config, params, layout="hf")
    moved = interop.load_vision(tmp_path / "hf")
    assert moved[0].architecture is None
    run = jit(lambda params: nn.vision_transformer_apply(moved[0], params, pixels("vit_timm")).logits)
    with jax.default_matmul_precision("highest"):
        chex.assert_trees_all_close(run(moved[1]), found("vit_timm").logits, **CLOSE)
    interop.save_vision(tmp_path / "timm", *moved, layout="timm")
    again, back = interop.load_vision(tmp_path / "timm")
    assert again == config
    chex.assert_trees_all_equal(params, back)
    with pytest.raises(ValueError, match=r"layout: 'timm' can't express this config; norm_eps: 1e-12 would be read as"):
        interop.save_vision(tmp_path / "no", *loaded("vit"), layout="timm")
    with pytest.raises(ValueError, match=r"has no tensors for|is no vision transformer"):
        interop.save_vision(tmp_path / "no", *loaded("deit3_timm"), layout="hf")


@pytest.mark.eight_devices
def test_load_vision_shards_parameters_over_a_mesh(tmp_path):
    mesh = train.make_mesh(2, 2, 2)
    for name in ("vit", "siglip_vision_timm", "siglip"):
        config, params = interop.load_vision(
            GOLDEN / name, shardings=lambda shapes, axes: train.param_shardings(shapes, axes, mesh)
        )
        chex.assert_trees_all_equal(loaded(name)[1], params)
        kernel = params["layers"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (2, config.width // 2, config.mlp_size // 2)
        interop.save_vision(tmp_path / name, config, params)
        chex.assert_trees_all_equal(loaded(name)[1], interop.load_vision(tmp_path / name)[1])


def test_an_asked_for_type_is_given():
    _, params = interop.load_vision(GOLDEN / "vit", dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    run = functools.partial(nn.vision_transformer_apply, loaded("vit")[0], logits_dtype=jnp.float32)
    output = jax.eval_shape(run, params, pixels("vit"))
    assert (output.tokens.dtype, output.logits.dtype) == (jnp.bfloat16, jnp.float32)


def test_what_differs_is_named(tmp_path):
    folder = copy("vit", tmp_path / "a", model_type="dinov3")
    with pytest.raises(ValueError, match="model_type: 'dinov3' is not supported; expected one of"):
        interop.load_vision(folder)
    with pytest.raises(ValueError, match="architectures: 'ViTForMaskedImageModeling' is not supported"):
        interop.load_vision(copy("vit", tmp_path / "b", architectures=["ViTForMaskedImageModeling"]))
    with pytest.raises(ValueError, match=r"expected \(64, 32\) from config.json, got|got \(64, 32\)"):
        interop.load_vision(copy("vit", tmp_path / "c", intermediate_size=48))
    folder = copy("vit", tmp_path / "d")
    rewrite(folder, lambda t: {k.replace("layernorm_after", "layernorm_behind"): v for k, v in t.items()})
    with pytest.raises(
        ValueError, match=r"missing: \['vit.encoder.layer.0.layernorm_after.bias'.*unexpected: \['vit.enc.*behind"
    ):
        interop.load_vision(folder)
    with pytest.raises(ValueError, match=r"classifier.weight: expected"):
        interop.load_vision(copy("vit", tmp_path / "e", id2label={"0": "a", "1": "b"}))
    for architecture in ("vit_base_patch16_siglip_gap_224", "vit_small_patch14_dinov2", "vit_relpos_base_patch16_224"):
        with pytest.raises(ValueError, match=r"architecture: 'vit_.*' is not supported"):
            interop.load_vision(copy("vit_timm", tmp_path / architecture, architecture=architecture))
    with pytest.raises(ValueError, match="architecture: 'convnext_tiny' is not supported"):
        interop.load_vision(copy("vit_timm", tmp_path / "f", architecture="convnext_tiny"))
    folder = copy("vit", tmp_path / "g")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only pickled weights"):
        interop.load_vision(folder)
    with pytest.raises(FileNotFoundError, match="no such file"):
        interop.load_vision(tmp_path / "nowhere")


def test_heads_and_activations_of_timm_are_known_by_the_names_of_architectures():
    def config(architecture, width, heads=None):
        d = width
        shapes = {
            "cls_token": (1, 1, d),
            "pos_embed": (1, 197, d),
            "patch_embed.proj.weight": (d, 3, 16, 16),
            "blocks.0.attn.qkv.weight": (3 * d, d),
            "blocks.0.mlp.fc1.weight": (4 * d, d),
            "head.weight": (10, d),
        }
        return timm.vit.config_from_fields({"architecture": architecture}, shapes)

    assert [config("vit_base_patch16_224", w).num_heads for w in (192, 768, 1152, 1280, 1664)] == [3, 12, 16, 16, 16]
    assert config("vit_base_patch16_clip_quickgelu_224", 768).activation == "quick_gelu"
    assert config("vit_base_patch16_clip_224", 768).norm_eps == 1e-5
    assert config("vit_base_patch16_siglip_224", 768).activation == "gelu"
    for tanh in ("vit_base_patch32_siglip_256", "vit_large_patch16_siglip_512", "vit_so400m_patch16_siglip_384"):
        assert config(tanh, 768).activation == "gelu_tanh"
    assert config("vit_so400m_patch14_siglip_384", 1152).activation == "gelu"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {"activation": "gelu_tanh"}),
        ("vit_model", {"norm_eps": 1e-12}),
        ("clip_vision_timm", {"activation": "gelu"}),
        ("deit3_timm", {"antialias_positions": False}),
    ],
)
def test_the_references_tell_one_setting_from_another(name, changes):
    config, params = loaded(name)
    images, golden = pixels(name), stored(name)
    if "antialias_positions" in changes:
        images, wanted = pixels(name, "pixel_values_other"), golden["features_other"]
    else:
        wanted = golden.get("last_hidden_state", golden.get("features"))
    run = functools.partial(nn.vision_transformer_apply, config.replace(**changes), resample=True)
    # The least of these differences is that of the two GELUs; the tolerance above is 1e-4.
    assert np.max(np.abs(jit(run)(params, images).tokens - wanted)) > 3e-4


def test_a_norm_behind_the_mean_of_patches_is_read_from_timm(tmp_path):
    folder = copy("vit_timm", tmp_path / "mean", global_pool="avg", model_args={"global_pool": "avg", "num_heads": 4})
    rewrite(folder, lambda t: {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in t.items()})
    config, params = interop.load_vision(folder)
    assert (config.pool, config.norm_at) == ("mean", "pooled")
    mean = np.asarray(found("vit_timm").hidden[-1])[:, 1:].mean(axis=1)
    unit = (mean - mean.mean(axis=1, keepdims=True)) / np.sqrt(mean.var(axis=1, keepdims=True) + 1e-6)
    output = jit(functools.partial(nn.vision_transformer_apply, config))(params, pixels("vit_timm"))
    chex.assert_trees_all_close(
        output.pooled, unit * np.asarray(params["norm"]["scale"]) + np.asarray(params["norm"]["bias"]), **CLOSE
    )
    interop.save_vision(tmp_path / "out", config, params)
    assert interop.load_vision(tmp_path / "out")[0] == config
