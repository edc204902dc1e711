"""Swin transformers: windows, sizes, meshes, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import nn, train
from subspace_jax.nn.causal_lm_params import ParamSpec

TINY = nn.SwinConfig((16, 16), 2, 8, (2, 1), (2, 2), window=3, num_classes=5, family="hf")


@functools.partial(jax.jit, static_argnames=("config", "options"))
def step(config, params, pixels, key=None, options=()):
    def loss(params):
        out = nn.swin_apply(config, params, pixels, key=key, **dict(options))
        return jnp.mean(jax.nn.logsumexp(out.logits, axis=-1) - out.logits[:, 0])

    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def tiny():
    """Parameters of order one tenth, and images whose maps are no multiples of the window."""
    params = jax.tree.map(lambda x: 5 * x, nn.swin_init(jax.random.key(0), TINY))
    return params, jax.random.normal(jax.random.key(1), (8, 14, 20, 3))


@pytest.mark.parametrize(("size", "params"), [("tiny", 28_288_354), ("base", 87_768_224)])
def test_well_known_models_have_the_published_number_of_parameters(size, params):
    specs = jax.tree.leaves(nn.swin_specs(nn.SwinConfig.swin(size)), is_leaf=lambda x: isinstance(x, ParamSpec))
    assert sum(int(np.prod(spec.shape)) for spec in specs) == params


def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(tiny):
    params, pixels = tiny
    loss, grads = step(TINY, params, pixels)
    mesh = train.make_mesh(2, 2, 2)
    shardings = train.param_shardings(params, nn.swin_axes(TINY), mesh)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    value, split = step(TINY, jax.device_put(params, shardings), jax.device_put(pixels, rows))
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), split, grads)


def test_one_window_without_shift_is_plain_attention_with_a_bias():
    config = nn.SwinConfig((6, 6), 2, 8, (2,), (2,), window=3, num_classes=0, family="hf")
    params = jax.tree.map(lambda x: 5 * x, nn.swin_init(jax.random.key(0), config))
    out = nn.swin_apply(config, params, jax.random.normal(jax.random.key(1), (2, 6, 6, 3)), capture=(0, 1))
    x = out.hidden[0]
    for i in range(2):
        p = params["stage0"][f"block{i}"]
        u = nn.layer_norm(x, p["norm1"]["scale"], p["norm1"]["bias"], config.norm_eps)
        q, k, v = (
            (u @ p["attn"][n]["kernel"] + p["attn"][n]["bias"][None, None]).reshape(2, 9, 2, 4) for n in ("q", "k", "v")
        )
        table = np.asarray(p["attn"]["relative_bias"]["table"]).reshape(5, 5, 2)
        y, z = np.divmod(np.arange(9), 3)
        bias = table[y[:, None] - y + 2, z[:, None] - z + 2]
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2 + np.moveaxis(bias, -1, 0)[None], axis=-1)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 9, 8)
        x = x + mixed @ p["attn"]["out"]["kernel"] + p["attn"]["out"]["bias"][None, None]
        u = nn.layer_norm(x, p["norm2"]["scale"], p["norm2"]["bias"], config.norm_eps)
        u = jax.nn.gelu(u @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"][None, None], approximate=False)
        x = x + u @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"][None, None]
    np.testing.assert_allclose(out.hidden[1], x, atol=1e-5)


def test_dropped_branches_and_recomputed_blocks(tiny):
    params, pixels = tiny
    config = TINY.replace(drop_path_rate=0.5)
    key = jax.random.key(3)
    loss, grads = step(config, params, pixels, key, (("train", True),))
    again, recomputed = step(config, params, pixels, key, (("train", True), ("remat", True)))
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), recomputed, grads)
    assert loss != step(TINY, params, pixels)[0]


def test_bfloat16_activations_give_float32_logits(tiny):
    run = functools.partial(nn.swin_apply, TINY, dtype=jnp.bfloat16, capture="all")
    out = jax.eval_shape(run, *tiny)
    assert out.logits.dtype == jnp.float32
    assert out.tokens.dtype == jnp.bfloat16
    assert [x.shape for x in out.hidden] == [(8, 70, 8), (8, 20, 16), (8, 20, 16)]


def test_absolute_positions_belong_to_one_size():
    config = TINY.replace(absolute_positions=True)
    params = nn.swin_init(jax.random.key(0), config)
    shapes = jax.eval_shape(functools.partial(nn.swin_apply, config), params, jnp.zeros((1, 16, 16, 3)))
    assert shapes.logits.shape == (1, 5)
    with pytest.raises(ValueError, match=r"positions are those of images \(16, 16\), got \(16, 18\)"):
        nn.swin_apply(config, params, jnp.zeros((1, 16, 18, 3)))


def test_images_smaller_than_a_window_are_refused(tiny):
    with pytest.raises(ValueError, match="fewer than a window of 3"):
        nn.swin_apply(TINY, tiny[0], jnp.zeros((1, 8, 16, 3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": (3, 2)}, r"num_heads: expected divisors of the widths \(8, 16\)"),
        ({"depths": (2,)}, "depths: expected a positive number for each of num_heads"),
        ({"activation": "gelu_new"}, "activation: expected one of"),
        ({"image_size": (1, 16)}, "image_size: expected height and width of at least a patch of 2"),
    ],
)
def test_models_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)
