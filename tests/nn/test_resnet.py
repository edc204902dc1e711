"""Residual networks and VGG: sizes, training, meshes, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import nn, train
from subspace_jax.nn.params import spec_count

# A deep stem, groups, shortcuts that average: every kind of part.
TINY = nn.ResNetConfig.resnet_d(
    50, depths=(1, 1), widths=(16, 32), inner_widths=(8, 16), groups=2, stem=(4, 4, 8), num_classes=5, drop_path=0.3
)
VGG = nn.VGGConfig((1, 1), (4, 8), (16, 12), (0.5, 0.0), image_size=(8, 8), num_classes=5)


@pytest.fixture(scope="module")
def tiny():
    """Parameters whose blocks are not the identity, statistics, images and labels."""
    rng = np.random.default_rng(0)
    params, stats = jax.tree.map(lambda s: rng.uniform(0.2, 0.6, s.shape).astype(s.dtype), nn.param_shapes(TINY))
    params = jax.tree.map(lambda x: x - np.float32(0.4) * (x.ndim > 1), params)
    return params, stats, rng.standard_normal((16, 17, 20, 3), np.float32), np.arange(16, dtype=np.int32) % 5


@functools.partial(jax.jit, static_argnames=("config", "options"))
def step(config, params, stats, pixels, labels, key, options=()):
    def loss(params):
        out = nn.resnet_apply(config, params, stats, pixels, train=True, key=key, **dict(options))
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out.logits), labels[:, None], axis=1)), out

    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, grads, out.batch_stats


@pytest.mark.parametrize(
    ("config", "params"),
    [
        (nn.ResNetConfig.resnet(18), 11_689_512),
        (nn.ResNetConfig.resnet(34), 21_797_672),
        (nn.ResNetConfig.resnet(50), 25_557_032),
        (nn.ResNetConfig.resnet(101), 44_549_160),
        (nn.ResNetConfig.resnet(152), 60_192_808),
        (nn.ResNetConfig.resnet_d(50), 25_576_264),
        (nn.ResNetConfig.resnext50(), 25_028_904),
    ],
)
def test_count_params_of_resnets_is_as_published(config, params):
    assert spec_count(nn.resnet_specs(config)[0]) == params


def test_count_params_of_vgg13_bn_is_as_published():
    assert spec_count(nn.vgg_specs(nn.VGGConfig())[0]) == 133_053_736


@pytest.mark.slow
@pytest.mark.eight_devices
def test_resnet_apply_on_a_mesh_has_gradients_and_statistics_of_one_device(tiny):
    params, stats, pixels, labels = tiny
    key = jax.random.key(2)
    loss, grads, after = step(TINY, params, stats, pixels, labels, key)
    # Axes that split the batch, and one that copies it.
    mesh = train.make_mesh(2, 2, 2)
    axes = nn.param_axes(TINY)
    shardings = train.param_shardings(params, axes[0], mesh)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    split = step(
        TINY,
        jax.device_put(params, shardings),
        jax.device_put(stats, NamedSharding(mesh, P())),
        jax.device_put(pixels, rows),
        jax.device_put(labels, rows),
        key,
    )
    np.testing.assert_allclose(split[0], loss, rtol=1e-5)
    # Sums over the batch in another order, through nine normalisations.
    chex.assert_trees_all_close(split[2], after, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(split[1], grads, rtol=1e-3, atol=1e-4)


def test_resnet_apply_with_frozen_stats_drops_branches_and_keeps_statistics(tiny):
    params, stats, pixels, _ = tiny
    run = jax.jit(functools.partial(nn.resnet_apply, TINY, train=True, frozen_stats=True))
    out, other = (run(params, stats, pixels, key=jax.random.key(i)) for i in (0, 1))
    chex.assert_trees_all_equal(out.batch_stats, stats)
    # Of two blocks only the second is ever dropped; without it the features are those of the shortcut.
    assert np.any(out.pooled != other.pooled)


def test_remat_of_resnet_apply_checkpoints_each_block(tiny):
    jaxpr = jax.make_jaxpr(functools.partial(nn.resnet_apply, TINY, remat=True))(*tiny[:3])
    assert sum(eqn.primitive.name.startswith(("remat", "checkpoint")) for eqn in jaxpr.eqns) == 2


def test_drop_path_leaves_out_examples_and_keeps_the_mean():
    branch = jnp.ones((4000, 2))
    out = nn.drop_path(jax.random.key(0), branch, 0.25)
    np.testing.assert_allclose(np.unique(out), [0, 4 / 3], rtol=1e-6)
    np.testing.assert_array_equal(out[:, 0], out[:, 1])
    # 4000 draws: the deviation of the mean is 0.009.
    assert abs(float(jnp.mean(out)) - 1) < 0.04
    assert nn.drop_path(None, branch, 0.25) is branch
    assert nn.drop_path_rates(0.3, 4) == pytest.approx((0, 0.1, 0.2, 0.3))


def test_halve_averages_the_pixels_inside():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    expected = [[3, 5, 6.5], [10.5, 12.5, 14]]
    np.testing.assert_allclose(nn.halve(x)[0, :, :, 0], expected)


def test_max_pool_ignores_its_padding_and_conv_pads_all_sides_alike():
    x = -jnp.ones((1, 4, 4, 1))
    np.testing.assert_array_equal(nn.max_pool(x, 3, strides=2, padding=1), -jnp.ones((1, 2, 2, 1)))
    kernel = jnp.ones((3, 3, 1, 1))
    np.testing.assert_array_equal(nn.conv(-x, kernel, strides=2, padding=1)[0, :, :, 0], [[4, 6], [6, 9]])
    np.testing.assert_array_equal(nn.conv(-x, kernel, strides=2)[0, :, :, 0], [[9, 6], [6, 4]])


def test_conv_keeps_groups_apart():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((1, 5, 5, 4), (3, 3, 2, 6)))
    out = nn.conv(x, kernel, groups=2)
    np.testing.assert_allclose(out[..., 3:], nn.conv(x[..., 2:], kernel[..., 3:]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"has 4 channels, kernel \(3, 3, 2, 6\) takes 2"):
        nn.conv(x, kernel)


def test_resnet_apply_in_bfloat16_has_float32_logits_and_statistics():
    config = TINY.replace(drop_path=0.0)
    run = functools.partial(nn.resnet_apply, config, train=True, dtype=jnp.bfloat16, capture="all")
    params, stats = jax.eval_shape(lambda: nn.init_params(jax.random.key(0), config))
    out = jax.eval_shape(run, params, stats, jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32))
    assert out.logits.dtype == jnp.float32
    assert out.tokens.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(out.batch_stats)} == {jnp.dtype(jnp.float32)}
    assert [x.shape for x in out.hidden] == [(2, 8, 8, 8), (2, 4, 4, 16), (2, 2, 2, 32)]


@pytest.mark.parametrize("capture", [(0, -1), "all", ()])
def test_resnet_apply_captures_hidden_states(tiny, capture):
    run = functools.partial(nn.resnet_apply, TINY, capture=capture)
    hidden = jax.eval_shape(run, *tiny[:3]).hidden
    assert hidden is None if capture == () else len(hidden) == (3 if capture == "all" else 2)


@pytest.mark.parametrize(
    ("pixels", "options", "error", "message"),
    [
        (np.zeros((2, 16, 16, 4), np.float32), {}, ValueError, r"pixels: expected \[batch, height, width, 3\]"),
        (np.zeros((2, 16, 16, 3), np.uint8), {}, TypeError, "standardized floating-point images, got uint8"),
        (np.zeros((2, 16, 16, 3), np.float32), {"train": True}, ValueError, "key: a random key is needed"),
        (np.zeros((2, 16, 16, 3), np.float32), {"capture": (3,)}, ValueError, "hidden states 0 to 2"),
    ],
)
def test_resnet_apply_refuses_wrong_input(tiny, pixels, options, error, message):
    with pytest.raises(error, match=message):
        nn.resnet_apply(TINY, tiny[0], tiny[1], pixels, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.ResNetConfig.resnet(51), r"depth: expected one of \[18, 34, 50, 101, 152\]"),
        (lambda: nn.ResNetConfig((1,), (8, 16)), "widths: expected a positive number for each of 1 stages"),
        (lambda: nn.ResNetConfig.resnet(50, groups=3), "groups: expected a divisor"),
        (lambda: nn.ResNetConfig.resnet(18, stem=(8, 8)), "stem: expected the channels of one convolution or of three"),
        (lambda: nn.VGGConfig(image_size=(16, 16)), "image_size: expected at least 32 pixels"),
    ],
)
def test_resnet_and_vgg_configs_refuse_contradictions(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_model_updates_batch_stats_in_training_mode_only(tiny):
    params, stats, pixels, _ = tiny
    config = TINY.replace(num_classes=0, drop_path=0.0)
    model = nn.Model(config, {k: v for k, v in params.items() if k != "head"}, stats)
    call = nnx.jit(lambda model, x: model(x).pooled)
    assert call(model, pixels).shape == (16, 32) == (16, model.out_features)
    chex.assert_trees_all_equal(model.batch_stats, stats)
    model.train()
    call(model, pixels)
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), model.batch_stats, stats)
    assert all(jax.tree.leaves(changed))
    for variable in jax.tree.leaves(nnx.state(model), is_leaf=lambda v: isinstance(v, nnx.Variable)):
        assert len(variable.get_metadata()["axes"]) == variable.get_value().ndim


def test_model_needs_params_or_rngs():
    with pytest.raises(ValueError, match="Model: expected params, or rngs"):
        nn.Model(nn.SwinConfig())
    with pytest.raises(ValueError, match="batch_stats: VGGConfig needs them"):
        nn.Model(VGG, params={})
    with pytest.raises(TypeError, match="config: expected one of"):
        nn.Model("resnet50")


@pytest.mark.slow
def test_model_of_vgg_applies_dropout_in_training():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: nn.init_params(jax.random.key(0), VGG))
    params, stats = jax.tree.map(lambda s: rng.uniform(0.1, 0.3, s.shape).astype(s.dtype), shapes)
    x = rng.standard_normal((4, 8, 8, 3), np.float32)
    model = nn.Model(VGG, params, stats)
    run = nnx.jit(lambda model, x, key: model(x, key=key, capture="all"))
    first, second = (run(model, x, jax.random.key(i)) for i in (0, 1))
    np.testing.assert_array_equal(first.logits, second.logits)
    assert first.logits.shape == (4, 5)
    assert [h.shape for h in first.hidden] == [(4, 4, 4, 4), (4, 2, 2, 8)]
    model.train()
    first, second = (run(model, x, jax.random.key(i)) for i in (0, 1))
    assert np.any(first.logits != second.logits)
    with pytest.raises(ValueError, match="key: a random key is needed to train with dropout"):
        model(x)
    with pytest.raises(ValueError, match=r"pixels: expected images \(8, 8\)"):
        model(jnp.zeros((1, 16, 16, 3)))
