"""Vision transformers: DINOv2 against its reference, what options change and what they leave, and bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subspace_jax import interop, nn, train

TINY = {"image_size": (16, 16), "patch_size": 4, "width": 16, "num_layers": 3, "num_heads": 2, "mlp_size": 32}


# Programs that run once: to optimise their machine code takes as long as all else of a compilation.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
CONFIG = nn.VisionTransformerConfig("vit", **TINY, num_classes=8, registers=2, layer_scale=True, pre_norm=True)


def random(shapes):
    """Parameters without a compilation for each shape."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s.shape, np.float32)), shapes)


@pytest.fixture(scope="module")
def model():
    pixels = np.random.default_rng(1).standard_normal((8, 16, 16, 3), np.float32)
    return CONFIG, random(nn.param_shapes(CONFIG)), jnp.asarray(pixels)


@functools.cache
def base():
    """The model without options."""
    return jit(functools.partial(nn.vision_transformer_apply, CONFIG, capture="all"))


def dino(golden, name):
    data = golden(f"subspacead/{name}")
    width, heads, layers, side, patch, registers, ratio, swiglu = (int(n) for n in data["config"])
    gated = {"gated_mlp": True, "activation": "silu", "mlp_size": 64} if swiglu else {"mlp_size": ratio * width}
    sizes = {"width": width, "num_layers": layers, "num_heads": heads, "patch_size": patch}
    config = nn.VisionTransformerConfig.dinov2("small", registers, image_size=(side, side), **sizes, **gated)
    return config, {k.removeprefix("ckpt/"): v for k, v in data.items() if k.startswith("ckpt/")}, data


@pytest.mark.parametrize("name", ["dinov2_swiglu_reg", "dinov2_mlp_plain"])
def test_vision_transformer_apply_matches_the_dinov2_reference(golden, name):
    config, flat, data = dino(golden, name)
    params = interop.load_dino_params(flat, config)
    # At one size some states, at the other all: what is asked for must not depend on the rest.
    for j, capture in enumerate(([-2, 0], "all")):
        pixels = jnp.asarray(data[f"pixels{j}"].transpose(0, 2, 3, 1))
        run = functools.partial(nn.vision_transformer_apply, config, resample=True, capture=capture)
        with jax.default_matmul_precision("highest"):
            found = jit(run)(params, pixels)
        wanted = data[f"hidden_states{j}"]
        wanted = wanted if capture == "all" else wanted[[0, config.num_layers - 1]]
        np.testing.assert_allclose(np.stack(found.hidden), wanted, atol=1e-4, rtol=1e-5)
        np.testing.assert_allclose(found.tokens, data[f"last_hidden_state{j}"], atol=1e-4, rtol=1e-5)
    resized = nn.with_image_size(config, params, data["pixels1"].shape[2:])[1]["position"]["embedding"]
    np.testing.assert_allclose(resized, data["pos_embed1"][0], atol=1e-5)


def test_load_dino_params_reads_the_names_of_meta(golden):
    config, flat, _ = dino(golden, "dinov2_swiglu_reg")
    wanted = interop.load_dino_params(flat, config)
    renames = [
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.", ""),
        ("encoder.layer.", "blocks."),
        ("attention.output.dense", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
        ("weights_in", "w12"),
        ("weights_out", "w3"),
        ("layernorm", "norm"),
    ]
    meta = {}
    for name, value in flat.items():
        if ".attention.attention." not in name:
            meta[functools.reduce(lambda n, pair: n.replace(*pair), renames, name)] = value
    for layer in range(config.num_layers):
        for kind in ("weight", "bias"):
            parts = [f"encoder.layer.{layer}.attention.attention.{n}.{kind}" for n in ("query", "key", "value")]
            meta[f"blocks.{layer}.attn.qkv.{kind}"] = np.concatenate([flat[part] for part in parts])
    chex.assert_trees_all_equal(interop.load_dino_params(meta, config), wanted)
    prefixed = {f"dinov2_with_registers.{name}": value for name, value in flat.items()}
    chex.assert_trees_all_equal(interop.load_dino_params(prefixed, config), wanted)
    changed = {("extra" if name == "layernorm.bias" else name): value for name, value in flat.items()}
    with pytest.raises(ValueError, match=r"missing: \['layernorm.bias'\]; unexpected: \['extra'\]"):
        interop.load_dino_params(changed, config)


@pytest.mark.slow
def test_save_vision_and_load_vision_round_trip_dinov2(golden, tmp_path):
    for name in ("dinov2_swiglu_reg", "dinov2_mlp_plain"):
        config, flat, _ = dino(golden, name)
        params = interop.load_dino_params(flat, config)
        interop.save_vision(tmp_path / name, config, params)
        again, reread = interop.load_vision(tmp_path / name)
        assert again == config
        chex.assert_trees_all_equal(reread, params)
        written = {key: np.asarray(t.read()) for key, t in interop.open_folder(tmp_path / name).items()}
        assert written.keys() == flat.keys()
        assert all(value.tobytes() == flat[key].tobytes() for key, value in written.items())


@pytest.mark.slow
@pytest.mark.eight_devices
def test_vision_transformer_apply_on_a_mesh_equals_one_device(model):
    config, params, pixels = model
    mesh = train.make_mesh(2, 2, 2)
    axes = nn.param_axes(config)
    split = jax.device_put(params, train.param_shardings(params, axes, mesh))

    def loss(params, pixels):
        output = nn.vision_transformer_apply(config, params, pixels)
        return jnp.mean(jnp.square(output.logits)) + jnp.mean(jnp.square(output.tokens - 1)), output.logits

    run = jit(jax.value_and_grad(loss, has_aux=True))
    (_, logits), grads = run(params, pixels)
    (_, sharded), split_grads = run(split, jax.device_put(pixels, train.batch_sharding(mesh)))
    # Sums over features that are split over two devices come in another order.
    np.testing.assert_allclose(sharded, logits, atol=1e-5)
    chex.assert_trees_all_close(split_grads, grads, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_vision_transformer_apply_drops_paths_in_training_only(model):
    config, params, pixels = model
    dropping = config.replace(drop_path=(0.0, 0.0, 0.5))
    run = jit(lambda key: nn.vision_transformer_apply(dropping, params, pixels, train=True, key=key, capture="all"))
    clean = base()(params, pixels)
    stacked = [run(jax.random.key(seed)) for seed in range(40)]
    for output in stacked[:2]:
        np.testing.assert_allclose(output.hidden[2], clean.hidden[2], atol=1e-6)
    # A sample whose two branches are both left out passes the block unchanged: one in four does.
    same = np.mean([jnp.all(o.hidden[3] == o.hidden[2], axis=(1, 2)) for o in stacked])
    assert 0.15 < same < 0.35
    assert not np.allclose(stacked[0].logits, stacked[1].logits)
    np.testing.assert_array_equal(run(jax.random.key(3)).logits, stacked[3].logits)
    with pytest.raises(ValueError, match="key: stochastic depth needs a random key"):
        nn.vision_transformer_apply(dropping, params, pixels, train=True)
    assert config.replace(drop_path=0.2).drop_rates == (0.0, 0.1, 0.2)
    with pytest.raises(ValueError, match=r"drop_path: expected rates in \[0, 1\)"):
        config.replace(drop_path=(0.1,))


@pytest.mark.slow
def test_vision_transformer_apply_with_zero_gains_is_the_identity(model):
    _, params, pixels = model
    none = {name: {"scale": jnp.zeros((3, 16))} for name in ("attn_gain", "mlp_gain")}
    found = base()({**params, "layers": {**params["layers"], **none}}, pixels)
    np.testing.assert_array_equal(found.hidden[3], found.hidden[0])


def test_attention_pooling_is_invariant_to_the_order_of_patches():
    config = nn.VisionTransformerConfig(
        "siglip", **{**TINY, "num_layers": 1}, class_token=False, attention_pool=True, pool="attention"
    )
    params = random(nn.param_shapes(config))
    params = {**params, "position": jax.tree.map(jnp.zeros_like, params["position"])}
    pixels = random(jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32))
    run = jit(functools.partial(nn.vision_transformer_apply, config, params))
    one, two = run(pixels), run(jnp.roll(pixels, 4, axis=2))
    np.testing.assert_allclose(one.pooled, two.pooled, atol=1e-6)
    assert not np.allclose(one.tokens, two.tokens, atol=1e-3)


def test_model_holds_vision_transformer_params_with_their_axes(model):
    config, params, pixels = model
    module = nn.Model(config, params)
    chex.assert_trees_all_equal(module.params, params)
    assert module.weights["layers"]["attn"]["q"]["kernel"].get_metadata()["axes"] == ("layers", "embed", "heads")
    drawn = nnx.eval_shape(lambda: nn.Model(config, rngs=nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, drawn.params) == jax.tree.map(jnp.shape, params)
    assert jax.eval_shape(module, pixels).logits.shape == (8, 8)
    fresh = jax.eval_shape(lambda key: nn.init_params(key, config, jnp.bfloat16), jax.random.key(0))
    assert fresh == nn.param_shapes(config, jnp.bfloat16)
    with pytest.raises(ValueError, match="expected params, or rngs"):
        nn.Model(config)


def test_count_params_of_vision_transformers_is_as_published():
    def millions(config):
        return round(sum(np.prod(s.shape) for s in jax.tree.leaves(nn.param_shapes(config))) / 1e6, 1)

    made = nn.VisionTransformerConfig
    # timm's own counts of vit_base_patch16_224, deit3_small and deit3_base; DINOv2's as its authors print them.
    assert millions(made.vit("base")) == 86.6
    assert (millions(made.deit3("small")), millions(made.deit3("base"))) == (22.1, 86.6)
    assert round(millions(made.dinov2("giant", 4)), -1) == 1140
    with pytest.raises(ValueError, match="size: expected one of"):
        made.vit("enormous")


def test_vision_transformer_apply_refuses_wrong_images_and_options(model):
    config, params, pixels = model
    run = functools.partial(nn.vision_transformer_apply, config, params)
    with pytest.raises(ValueError, match=r"pixels: expected \[batch, height, width, 3\], got \(8, 16, 16, 1\)"):
        run(pixels[..., :1])
    with pytest.raises(TypeError, match="pixels: expected standardized floating-point images, got uint8"):
        run(jnp.zeros((1, 16, 16, 3), jnp.uint8))
    with pytest.raises(ValueError, match=r"an image of \(3, 16\) is smaller than a patch of 4"):
        run(pixels[:, :3], resample=True)
    with pytest.raises(ValueError, match=r"positions are for images of \(16, 16\), got \(12, 16\)"):
        run(pixels[:, :12])
    with pytest.raises(ValueError, match=r"capture: expected hidden states 0 to 3, got \(4,\)"):
        run(pixels, capture=[4])
    with pytest.raises(ValueError, match="remat: expected one of"):
        nn.LayerOptions(remat="some")
    oblong, more = config.replace(image_size=(8, 16)), jnp.zeros((1, 16, 16, 3))
    with pytest.raises(ValueError, match="positions of a 2 x 4 grid can't be resampled"):
        nn.vision_transformer_apply(oblong, params, more, resample=True)
    for changes, message in [
        ({"pool": "distilled"}, "pool: the model has no 'distilled' to pool"),
        ({"family": "bert"}, "family: expected one of"),
        ({"activation": "mish"}, "activation: expected one of"),
        ({"num_heads": 3}, "num_heads: expected a divisor of the width 16, got 3"),
        ({"image_size": (2, 16)}, "image_size: expected height and width of at least a patch of 4"),
        ({"num_layers": 0}, "num_layers: expected a positive integer, got 0"),
        ({"distilled_head": True}, "distilled_head: expected a distillation token"),
        ({"pool": "none"}, "num_classes: 8 classes need a pooled vector"),
    ]:
        with pytest.raises(ValueError, match=message):
            config.replace(**changes)
