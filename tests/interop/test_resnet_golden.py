"""Residual networks of transformers and timm, against what these return."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn
from subspace_jax.interop import hf, timm

from . import vision_goldens as vision
from .conftest import tensors_of

# The tolerance of the reference's own independent reproduction is 1.6e-5 on logits up to 19; float32 convolutions
# in another order reach several times that.
CLOSE = {"atol": 2e-4, "rtol": 1e-5}
MODELS = ("resnet", "resnet_v1", "resnet_basic", "resnet_timm", "resnet_d_timm")


def channels_last(x):
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("resnet", "resnet_d_timm") else pytest.mark.slow) for name in MODELS],
)
def test_resnet_apply_gives_the_hidden_states_and_logits_of_the_reference(name):
    config, tree = interop.load_vision(vision.GOLDEN / name)
    wanted = vision.stored(name)
    out = vision.run_resnet(config, tree, vision.pixels(name))
    tokens = wanted["features"] if "timm" in name else wanted["last_hidden_state"]
    np.testing.assert_allclose(out.logits, wanted["logits"], **CLOSE)
    np.testing.assert_allclose(out.tokens, channels_last(tokens), **CLOSE)
    np.testing.assert_allclose(out.pooled, wanted["pooled"].reshape(out.pooled.shape), **CLOSE)
    states = [key for key in wanted if key.startswith("hidden_")]
    assert len(out.hidden) == len(states)
    for k, state in enumerate(out.hidden):
        np.testing.assert_allclose(state, channels_last(wanted[f"hidden_{k}"]), **CLOSE)
    assert out.batch_stats is None


@pytest.mark.parametrize(
    "name", ["resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet_v1", "resnet_basic"))]
)
def test_one_training_pass_gives_loss_gradients_and_running_statistics(name):
    config, tree = interop.load_vision(vision.GOLDEN / name)
    wanted = vision.stored(name)

    @jax.jit
    def step(params, images, labels):
        def loss(params):
            with jax.default_matmul_precision("highest"):
                out = nn.resnet_apply(config, params, tree["batch_stats"], images, train=True)
            picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits), labels[:, None], axis=1)
            return -jnp.mean(picked), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    labels = jnp.asarray(wanted["labels"], jnp.int32)
    (loss, out), grads = step(tree["params"], vision.pixels(name), labels)
    np.testing.assert_allclose(out.logits, wanted["train_logits"], **CLOSE)
    np.testing.assert_allclose(loss, wanted["train_loss"], atol=1e-4)
    check_after(name, config, out.batch_stats)
    stored = vision.in_files(hf.resnet.tensor_layout(config).tensors, {**tree, "params": grads})
    expected = [key for key in wanted if key.startswith("train_grad:")]
    assert len(expected) == 3
    for key in expected:
        # Of gradients through batch normalisation over nine numbers a channel, 1e-3 is what float32 leaves.
        np.testing.assert_allclose(stored[key.removeprefix("train_grad:")], wanted[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_timm"])
def test_one_training_pass_of_timm_gives_running_statistics(name):
    config, tree = interop.load_vision(vision.GOLDEN / name)
    out = vision.run_resnet(config, tree, vision.pixels(name), train=True, capture=())
    np.testing.assert_allclose(out.logits, vision.stored(name)["train_logits"], **CLOSE)
    check_after(name, config, out.batch_stats)


def check_after(name, config, batch_stats):
    wanted = {key.removeprefix("train_after:"): value for key, value in vision.stored(name).items()}
    seen = 0
    for tensor in (timm if "timm" in name else hf).resnet.tensor_layout(config).tensors:
        if tensor.name in wanted:
            value = batch_stats
            for key in tensor.place.path[1:]:
                value = value[key]
            np.testing.assert_allclose(value, wanted[tensor.name], rtol=1e-4, atol=1e-5)
            seen += 1
    assert seen >= 8


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_was_read(name, tmp_path):
    config, tree = interop.load_vision(vision.GOLDEN / name)
    interop.save_vision(tmp_path / "out", config, tree)
    stored, written = tensors_of(vision.GOLDEN / name), tensors_of(tmp_path / "out")
    assert written.keys() == {key for key in stored if not key.endswith("num_batches_tracked")}
    for key, value in written.items():
        np.testing.assert_array_equal(value, stored[key])
        assert value.dtype == stored[key].dtype
    assert interop.load_vision(tmp_path / "out")[0] == config


def test_a_bare_model_without_prefix_and_head_is_read_and_written(tmp_path):
    stored = {
        key.removeprefix("resnet."): value
        for key, value in tensors_of(vision.GOLDEN / "resnet").items()
        if not key.startswith("classifier.")
    }
    config, tree = interop.load_vision(vision.copy("resnet", tmp_path / "in", stored))
    assert config.num_classes == 0
    interop.save_vision(tmp_path / "out", config, tree)
    again, same = interop.load_vision(tmp_path / "out")
    assert again == config
    _, whole = interop.load_vision(vision.GOLDEN / "resnet")
    del whole["params"]["head"]
    chex.assert_trees_all_equal(tree, whole)
    chex.assert_trees_all_equal(same, whole)


@pytest.mark.parametrize(
    "config",
    [
        nn.ResNetConfig.resnet(18, depths=(1, 1, 1, 1), widths=(8, 8, 8, 16), num_classes=3, channels=1),
        nn.ResNetConfig.resnext50(depths=(1, 1, 1, 1), widths=(16, 16, 16, 16), inner_widths=(8,) * 4, groups=4),
        nn.ResNetConfig.resnet_d(50, depths=(1, 1, 1, 1), widths=(16,) * 4, inner_widths=None, stem=(3, 4, 8)),
    ],
)
def test_a_fresh_network_goes_to_a_folder_of_timm_and_back(config, tmp_path):
    rng = np.random.default_rng(0)
    params, stats = jax.tree.map(lambda s: rng.standard_normal(s.shape, s.dtype), nn.param_shapes(config))
    tree = {"params": params, "batch_stats": stats}
    interop.save_vision(tmp_path / "out", config, tree, "timm")
    again, same = interop.load_vision(tmp_path / "out")
    assert again == config.replace(architecture=again.architecture)
    chex.assert_trees_all_equal(same, tree)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "resnetaa50"}, "architecture: 'resnetaa50' is not supported"),
        ({"architecture": "resnet50_gn"}, "architecture: 'resnet50_gn' is not supported"),
        ({"model_args": {"output_stride": 8}}, r"model_args: \['output_stride'\]"),
        ({"global_pool": "max"}, "global_pool: 'max' is not supported"),
    ],
)
def test_timm_networks_that_compute_something_else_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        interop.load_vision(vision.copy("resnet_timm", tmp_path, **fields))


def test_files_of_another_network_are_refused_by_name(tmp_path):
    stored = tensors_of(vision.GOLDEN / "resnet_timm")
    stored["layer1.0.se.conv_reduce.weight"] = stored.pop("layer1.0.bn1.weight")
    with pytest.raises(ValueError, match=r"missing: \['layer1.0.bn1.weight'\]; unexpected: \['layer1.0.se"):
        interop.load_vision(vision.copy("resnet_timm", tmp_path, stored))
    nine = {str(i): "" for i in range(9)}
    with pytest.raises(ValueError, match=r"classifier.1.weight: expected \(9, 48\).*, got \(7, 48\)"):
        interop.load_vision(vision.copy("resnet", tmp_path, id2label=nine))
    with pytest.raises(ValueError, match="hidden_act: 'gelu' is not supported"):
        interop.load_vision(vision.copy("resnet", tmp_path, hidden_act="gelu"))
    with pytest.raises(ValueError, match="'hf' can't express a deep stem"):
        hf.resnet.tensor_layout(nn.ResNetConfig.resnet_d(18))
    config, tree = interop.load_vision(vision.GOLDEN / "resnet")
    with pytest.raises(ValueError, match="'timm' has four stages"):
        interop.save_vision(tmp_path / "out", config, tree, "timm")


def test_absent_fields_have_the_defaults_of_transformers():
    expected = nn.ResNetConfig.resnet(50, num_classes=2, convention="hf")
    assert hf.resnet.config_from_fields({"model_type": "resnet"}) == expected
