"""Swin transformers of transformers and timm, against what these return."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn
from subspace_jax.interop import hf, timm
from subspace_jax.nn.models.swin.windows import relative_position_index, shifted_window_mask

from . import vision_goldens as vision
from .conftest import tensors_of

CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.mark.parametrize("name", ["swin", pytest.param("swin_timm", marks=pytest.mark.slow)])
def test_swin_apply_gives_the_hidden_states_loss_and_gradients_of_the_reference(name):
    config, params = interop.load_vision(vision.GOLDEN / name)
    wanted = vision.stored(name)

    @jax.jit
    def step(params, images, labels):
        def loss(params):
            with jax.default_matmul_precision("highest"):
                out = nn.swin_apply(config, params, images, capture="all")
            picked = jnp.take_along_axis(jax.nn.log_softmax(out.logits), labels[:, None], axis=1)
            return -jnp.mean(picked), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, out), grads = step(params, vision.pixels(name), jnp.asarray(wanted["labels"], jnp.int32))
    tokens = wanted["last_hidden_state"] if name == "swin" else wanted["features"]
    np.testing.assert_allclose(out.logits, wanted["logits"], **CLOSE)
    np.testing.assert_allclose(out.pooled, wanted["pooled"], **CLOSE)
    np.testing.assert_allclose(out.tokens, tokens.reshape(out.tokens.shape), **CLOSE)
    assert len(out.hidden) == 3
    for k, state in enumerate(out.hidden):
        np.testing.assert_allclose(state, wanted[f"hidden_{k}"].reshape(state.shape), **CLOSE)
    np.testing.assert_allclose(loss, wanted["loss"], atol=1e-5)
    stored = vision.in_files((timm if "timm" in name else hf).swin.tensor_layout(config).tensors, grads)
    for key in [key for key in wanted if key.startswith("grad:")]:
        np.testing.assert_allclose(stored[key.removeprefix("grad:")], wanted[key], rtol=1e-3, atol=1e-5)


def test_another_size_pads_windows_and_patches_and_shifts_what_it_did_not():
    config, params = interop.load_vision(vision.GOLDEN / "swin")
    wanted = vision.stored("swin")
    run = jax.jit(functools.partial(nn.swin_apply, config, capture="all"))
    with jax.default_matmul_precision("highest"):
        out = run(params, vision.pixels("swin", "pixel_values_other"))
    np.testing.assert_allclose(out.logits, wanted["logits_other"], **CLOSE)
    for k, state in enumerate(out.hidden):
        np.testing.assert_allclose(state, wanted[f"hidden_other_{k}"], **CLOSE)


def test_index_and_mask_are_those_of_the_reference():
    wanted = vision.stored("swin")
    np.testing.assert_array_equal(relative_position_index(4), wanted["relative_position_index"])
    np.testing.assert_array_equal(shifted_window_mask(8, 8, 4, 2), wanted["attn_mask_stage0"])


@pytest.mark.parametrize("name", ["swin", "swin_timm"])
def test_what_is_written_is_what_was_read(name, tmp_path):
    config, params = interop.load_vision(vision.GOLDEN / name)
    interop.save_vision(tmp_path / "out", config, params)
    stored, written = tensors_of(vision.GOLDEN / name), tensors_of(tmp_path / "out")
    assert written.keys() == stored.keys()
    for key, value in written.items():
        np.testing.assert_array_equal(value, stored[key])
        assert value.dtype == stored[key].dtype
    assert interop.load_vision(tmp_path / "out")[0] == config


@pytest.mark.parametrize("layout", ["v5", "bare"])
def test_other_spellings_give_the_same_parameters(layout, tmp_path):
    config, params = interop.load_vision(vision.GOLDEN / "swin")
    if layout == "bare":
        stored = {key.removeprefix("swin."): v for key, v in tensors_of(vision.GOLDEN / "swin").items()}
    else:
        stored = vision.in_files(hf.swin.tensor_layout(config, layout).tensors, params)
        assert "swin.encoder.layers.0.blocks.1.attention.q_proj.weight" in stored
    again = interop.load_vision(vision.copy("swin", tmp_path, stored))
    assert again[0] == config
    chex.assert_trees_all_equal(again[1], params)


def test_a_model_goes_from_transformers_to_timm_where_the_epsilons_agree(tmp_path):
    config, params = interop.load_vision(vision.GOLDEN / "swin")
    with pytest.raises(ValueError, match=r"can't express this config; norm_eps: 0.02"):
        interop.save_vision(tmp_path / "out", config, params, "timm")
    config = config.replace(norm_eps=1e-5)
    interop.save_vision(tmp_path / "out", config, params, "timm")
    again, same = interop.load_vision(tmp_path / "out")
    assert again == config.replace(convention="timm", architecture=again.architecture)
    chex.assert_trees_all_equal(same, params)


def test_the_authors_own_files_are_recognised(tmp_path):
    stored = tensors_of(vision.GOLDEN / "swin_timm")
    for old, new in {"layers.1.downsample": "layers.0.downsample", "head.fc": "head"}.items():
        stored = {key.replace(old, new): value for key, value in stored.items()}
    stored["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((16, 16), np.int64)
    again = interop.load_vision(vision.copy("swin_timm", tmp_path, stored))[1]
    chex.assert_trees_all_equal(again, interop.load_vision(vision.GOLDEN / "swin_timm")[1])


def test_a_timm_model_refuses_sizes_that_are_no_multiples_of_its_windows():
    config, params = interop.load_vision(vision.GOLDEN / "swin_timm")
    with pytest.raises(ValueError, match="multiples of its window of 4 only"):
        nn.swin_apply(config, params, jnp.zeros((1, 40, 32, 3)))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("swin", {"model_type": "swinv2"}, "model_type: 'swinv2' is not supported"),
        ("swin", {"window_size": 7}, r"relative_position_bias_table: expected \(169, 2\).*, got \(49, 2\)"),
        ("swin_timm", {"architecture": "swin_s3_tiny_224"}, "architecture: 'swin_s3_tiny_224' is not supported"),
        ("swin_timm", {"model_args": {"ape": True}}, r"model_args: \['ape'\]"),
    ],
)
def test_other_models_are_refused(name, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        interop.load_vision(vision.copy(name, tmp_path, **fields))


def test_absent_fields_have_the_defaults_of_transformers():
    expected = nn.SwinConfig.swin("tiny", num_classes=2, convention="hf")
    assert hf.swin.config_from_fields({"model_type": "swin"}) == expected
