"""Swin transformers of transformers and timm, against what these return."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn
from subspace_jax.nn.swin import relative_position_index, shifted_window_mask

from . import vision

CLOSE = {"atol": 1e-4, "rtol": 1e-5}


@pytest.mark.parametrize("name", ["swin", "swin_timm"])
def test_tokens_hidden_states_logits_loss_and_gradients(name):
    config, params = vision.load(name)
    wanted = vision.arrays(name)

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
    stored = dict(interop.write_tensors(interop.swin_names.tensor_names(config), grads))
    for key in [key for key in wanted if key.startswith("grad:")]:
        np.testing.assert_allclose(stored[key.removeprefix("grad:")], wanted[key], rtol=1e-3, atol=1e-5)


def test_another_size_pads_windows_and_patches_and_shifts_what_it_did_not():
    config, params = vision.load("swin")
    wanted = vision.arrays("swin")
    out = vision.run_swin(config, params, vision.pixels("swin", "pixel_values_other"))
    np.testing.assert_allclose(out.logits, wanted["logits_other"], **CLOSE)
    for k, state in enumerate(out.hidden):
        np.testing.assert_allclose(state, wanted[f"hidden_other_{k}"], **CLOSE)


def test_index_and_mask_are_those_of_the_reference():
    wanted = vision.arrays("swin")
    np.testing.assert_array_equal(relative_position_index(4), wanted["relative_position_index"])
    np.testing.assert_array_equal(shifted_window_mask(8, 8, 4, 2), wanted["attn_mask_stage0"])


@pytest.mark.parametrize("name", ["swin", "swin_timm"])
def test_what_is_written_is_what_was_read(name):
    config, params = vision.load(name)
    stored = vision.tensors(name)
    written = dict(interop.write_tensors(interop.swin_names.tensor_names(config), params))
    assert written.keys() == {key for key in stored if not key.endswith("relative_position_index")}
    for key, value in written.items():
        np.testing.assert_array_equal(value, stored[key])


@pytest.mark.parametrize("layout", ["hf_v5", "timm", "bare"])
def test_other_spellings_give_the_same_parameters(layout):
    config, params = vision.load("swin")
    names = interop.swin_names
    if layout == "bare":
        stored = {key.removeprefix("swin."): value for key, value in vision.tensors("swin").items()}
    else:
        stored = dict(interop.write_tensors(names.tensor_names(config, layout), params))
        assert "swin.encoder.layers.0.blocks.1.attention.self.query.weight" not in stored
    known = names.canonical_names(stored, "timm" if layout == "timm" else "hf")
    tensors = names.tensor_names(config, "timm" if layout == "timm" else "hf")
    again = interop.read_tensors(tensors, {ours: stored[theirs] for theirs, ours in known.items()})
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_the_authors_own_files_are_recognised():
    stored = vision.tensors("swin_timm")
    moved = {"layers.1.downsample": "layers.0.downsample", "head.fc": "head"}
    for old, new in moved.items():
        stored = {key.replace(old, new): value for key, value in stored.items()}
    stored["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((16, 16), np.int64)
    again, params = vision.load("swin_timm", stored)[1], vision.load("swin_timm")[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_timm_model_refuses_sizes_that_are_no_multiples_of_its_windows():
    config, params = vision.load("swin_timm")
    with pytest.raises(ValueError, match="multiples of its window of 4 only"):
        nn.swin_apply(config, params, jnp.zeros((1, 40, 32, 3)))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("swin", {"model_type": "swinv2"}, "model_type: expected 'swin', got 'swinv2'"),
        ("swin", {"window_size": 7}, r"relative_position_bias_table: expected \(169, 2\), got \(49, 2\)"),
        ("swin_timm", {"architecture": "swin_s3_tiny_224"}, "architecture: 'swin_s3_tiny_224' is not supported"),
        ("swin_timm", {"model_args": {"ape": True}}, r"model_args: \['ape'\]"),
    ],
)
def test_other_models_are_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        vision.load(name, **fields)


def test_absent_fields_have_the_defaults_of_transformers():
    expected = nn.SwinConfig.swin("tiny", num_classes=2, family="hf")
    assert interop.swin_names.config_from_hf({"model_type": "swin"}) == expected
