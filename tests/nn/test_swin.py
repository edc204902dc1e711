"""Swin transformers: windows, sizes, meshes, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import nn, train
from subspace_jax.nn.params import spec_count

TINY = nn.SwinConfig((16, 16), 2, 8, (2, 1), (2, 2), window=3, num_classes=5, convention="hf")


def random_params(config):
    """Every parameter normal, of order one tenth."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: np.float32(0.1) * rng.standard_normal(s.shape, s.dtype), nn.param_shapes(config))


@functools.partial(jax.jit, static_argnames="config")
def step(config, params, pixels):
    def loss(params):
        out = nn.swin_apply(config, params, pixels)
        return jnp.mean(jax.nn.logsumexp(out.logits, axis=-1) - out.logits[:, 0])

    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def tiny():
    """Parameters, and images whose maps are no multiples of the window."""
    return random_params(TINY), np.random.default_rng(1).standard_normal((8, 14, 20, 3), np.float32)


@pytest.mark.parametrize(("size", "params"), [("tiny", 28_288_354), ("base", 87_768_224)])
def test_count_params_of_swin_is_as_published(size, params):
    assert spec_count(nn.swin_specs(nn.SwinConfig.swin(size))) == params


@pytest.mark.slow
@pytest.mark.eight_devices
def test_swin_apply_on_a_mesh_has_loss_and_gradients_of_one_device(tiny):
    params, pixels = tiny
    loss, grads = step(TINY, params, pixels)
    mesh = train.make_mesh(2, 2, 2)
    shardings = train.param_shardings(params, nn.param_axes(TINY), mesh)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    value, split = step(TINY, jax.device_put(params, shardings), jax.device_put(pixels, rows))
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    chex.assert_trees_all_close(split, grads, rtol=1e-4, atol=1e-5)


def test_swin_apply_with_one_window_is_attention_with_a_bias():
    config = nn.SwinConfig((6, 6), 2, 8, (2,), (2,), window=3, num_classes=0, convention="hf")
    params, pixels = random_params(config), np.random.default_rng(1).standard_normal((2, 6, 6, 3), np.float32)
    before, after = jax.jit(functools.partial(nn.swin_apply, config, capture=(0, 1)))(params, pixels).hidden
    np.testing.assert_allclose(after, jax.jit(plain_blocks)(params, before), atol=1e-5)


def plain_blocks(params, x):
    """Two transformer blocks of nine tokens in a square, each of which sees all."""

    def dense(p, u):
        return u @ p["kernel"] + p["bias"][None, None]

    def norm(p, u):
        return nn.layer_norm(u, p["scale"], p["bias"], 1e-5)

    rows, columns = np.divmod(np.arange(9), 3)
    for block in params["stage0"].values():
        attn, u = block["attn"], norm(block["norm1"], x)
        q, k, v = (dense(attn[name], u).reshape(2, 9, 2, 4) for name in ("q", "k", "v"))
        table = attn["relative_bias"]["table"].reshape(5, 5, 2)
        bias = table[rows[:, None] - rows + 2, columns[:, None] - columns + 2]
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2 + jnp.moveaxis(bias, -1, 0)[None], axis=-1)
        x = x + dense(attn["out"], jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 9, 8))
        inner = jax.nn.gelu(dense(block["mlp"]["up"], norm(block["norm2"], x)), approximate=False)
        x = x + dense(block["mlp"]["down"], inner)
    return x


@pytest.mark.slow
def test_swin_apply_drops_branches_by_key_and_rematerializes_blocks(tiny):
    config = TINY.replace(drop_path=0.5, depths=(2, 1))
    run = jax.jit(functools.partial(nn.swin_apply, config, train=True))
    first, second = (run(*tiny, key=jax.random.key(i)).pooled for i in (0, 1))
    assert np.any(first != second)
    with pytest.raises(ValueError, match="key: a random key is needed"):
        nn.swin_apply(config, *tiny, train=True)
    plain, again = (jax.make_jaxpr(functools.partial(nn.swin_apply, TINY, remat=r))(*tiny).eqns for r in (False, True))
    # What is inside a block is one equation then, whose inside the backward pass computes again.
    assert len(again) < len(plain) / 2


@pytest.mark.parametrize("transform", ["none", *(pytest.param(t, marks=pytest.mark.slow) for t in ("grad", "remat"))])
@pytest.mark.parametrize(("image", "depth"), [pytest.param((16, 16), 5, marks=pytest.mark.slow), ((6, 6), 3)])
def test_swin_apply_in_a_scan_equals_blocks_one_by_one(image, depth, transform):
    config = TINY.replace(image_size=image, depths=(depth,), num_heads=(2,), drop_path=0.5)
    params = random_params(config)
    pixels = np.random.default_rng(2).standard_normal((4, *image, 3), np.float32)
    key = jax.random.key(0)

    def run(params, remat=False):
        return nn.swin_apply(config, params, pixels, train=True, key=key, remat=remat).pooled

    # Blocks that are not alike can't share one program.
    apart = {
        **params,
        "stage0": {**params["stage0"], "block0": {**params["stage0"]["block0"], "more": np.zeros(1, np.float32)}},
    }
    scans = ["scan" in str(jax.make_jaxpr(run)(p)) for p in (params, apart)]
    assert scans == [True, False]
    if transform == "none":
        chex.assert_trees_all_close(jax.jit(run)(params), jax.jit(run)(apart), rtol=1e-4, atol=1e-5)
        return
    one_by_one = jax.jit(jax.grad(lambda p: jnp.sum(run(p) ** 2)))(apart)
    del one_by_one["stage0"]["block0"]["more"]
    together = jax.jit(jax.grad(lambda p: jnp.sum(run(p, transform == "remat") ** 2)))(params)
    chex.assert_trees_all_close(together, one_by_one, rtol=1e-4, atol=1e-5)


def test_swin_apply_in_bfloat16_has_float32_logits(tiny):
    run = functools.partial(nn.swin_apply, TINY, dtype=jnp.bfloat16, capture="all")
    out = jax.eval_shape(run, *tiny)
    assert out.logits.dtype == jnp.float32
    assert out.tokens.dtype == jnp.bfloat16
    assert [x.shape for x in out.hidden] == [(8, 70, 8), (8, 20, 16), (8, 20, 16)]


def test_swin_apply_with_absolute_positions_takes_one_size():
    config = TINY.replace(absolute_positions=True)
    params = jax.eval_shape(lambda: nn.init_params(jax.random.key(0), config))
    shapes = jax.eval_shape(functools.partial(nn.swin_apply, config), params, jnp.zeros((1, 16, 16, 3)))
    assert shapes.logits.shape == (1, 5)
    with pytest.raises(ValueError, match=r"positions are those of images \(16, 16\), got \(16, 18\)"):
        jax.eval_shape(functools.partial(nn.swin_apply, config), params, jnp.zeros((1, 16, 18, 3)))


def test_swin_apply_refuses_images_smaller_than_a_window(tiny):
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
def test_swin_config_refuses_contradictions(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)
