"""What stands in a ``config.json`` is checked field by field, before anything is built of it."""

import json
import math
import time

import numpy as np
import pytest

from subspace_jax import interop
from subspace_jax.data.json_object import read_json_object
from subspace_jax.interop import hf

from .test_hf_config import GPT2, LLAMA
from .vision_goldens import copy

QWEN2 = {**LLAMA, "model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
MISTRAL = {**LLAMA, "model_type": "mistral"}
ROPE = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TOWER = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **TOWER}
DINOV2 = {"model_type": "dinov2_with_registers", **TOWER}
CLIP = {"model_type": "clip", "vision_config": TOWER, "text_config": {"hidden_size": 32}}

# No value of these is any field's; of numbers, sizes and flags.
NOTHING = ("", "abc", [], [1, "a"], {}, {"a": 1}, "x" * 10_000)
NUMBERS = (*NOTHING, None, True, math.nan, math.inf, -math.inf, -1, -1.5, 1e300, 2**70)
SIZES = (*NUMBERS, 0, 1.5, 32.0, 10**12, [32])
ROPES = ("a", [1], {}, True, math.nan, math.inf, -1, 0, 1e300)
FLAGS = (*NOTHING, 0, 1, 1.0, "true", [True])
WORDS = (*NOTHING, None, 0, 1.5, True, ["silu"])


def cases(read, base, kinds, below=None):
    """One test for each field: what reads it, what surrounds it, and values that it must not have."""
    for names, values in kinds.items():
        for name in names.split():
            yield pytest.param(read, base, below, name, values, id=f"{base['model_type']}-{below or ''}-{name}")


VISION = hf.vit.config_from_fields
DUAL = hf.clip.dual_config_from_fields
PAIRS = tuple(value for value in SIZES if value != [32])
ALL = [
    *cases(interop.config_from_hf, GPT2, {"vocab_size n_embd n_layer n_head": SIZES}),
    *cases(interop.config_from_hf, GPT2, {"layer_norm_epsilon": NUMBERS, "activation_function model_type": WORDS}),
    *cases(interop.config_from_hf, GPT2, {"tie_word_embeddings scale_attn_weights add_cross_attention": FLAGS}),
    *cases(interop.config_from_hf, LLAMA, {"vocab_size hidden_size num_hidden_layers intermediate_size": SIZES}),
    *cases(interop.config_from_hf, LLAMA, {"num_attention_heads": SIZES, "rms_norm_eps": NUMBERS, "hidden_act": WORDS}),
    *cases(interop.config_from_hf, LLAMA, {"attention_bias mlp_bias tie_word_embeddings": FLAGS}),
    *cases(interop.config_from_hf, {**LLAMA, "rope_scaling": ROPE}, {"factor": ROPES}, "rope_scaling"),
    *cases(interop.config_from_hf, {**LLAMA, "rope_parameters": ROPE}, {"rope_theta": ROPES}, "rope_parameters"),
    *cases(VISION, VIT, {"hidden_size num_hidden_layers num_attention_heads intermediate_size num_channels": SIZES}),
    *cases(VISION, VIT, {"image_size patch_size": PAIRS, "layer_norm_eps": NUMBERS, "hidden_act pooler_act": WORDS}),
    *cases(
        VISION,
        VIT,
        {
            "qkv_bias": FLAGS,
            "pooler_output_size": ("3", 0, 1.5, [], True),
            "architectures": ("abc", 3, [1], [None], {"a": 1}),
        },
    ),
    *cases(VISION, VIT, {"id2label": ("abc", 3, [1], True), "num_labels": (-1, 1.5, None, "a", [], 2**40)}),
    *cases(
        VISION,
        DINOV2,
        {"mlp_ratio": NUMBERS, "use_swiglu_ffn use_mask_token": FLAGS, "num_register_tokens": (*NUMBERS, 1.5, [4])},
    ),
    *cases(
        hf.clip.dual_config_from_fields,
        CLIP,
        {"hidden_size num_hidden_layers": SIZES, "hidden_act": WORDS},
        "vision_config",
    ),
    *cases(
        hf.clip.dual_config_from_fields, CLIP, {"hidden_size vocab_size max_position_embeddings": SIZES}, "text_config"
    ),
    *cases(DUAL, CLIP, {"eos_token_id": ("a", [], [1], None, -1, 1.5)}, "text_config"),
    *cases(
        hf.clip.dual_config_from_fields, CLIP, {"vision_config text_config": ("a", [1], 3), "projection_dim": SIZES}
    ),
    *cases(hf.resnet.config_from_fields, {"model_type": "resnet"}, {"embedding_size num_channels": SIZES}),
    *cases(hf.resnet.config_from_fields, {"model_type": "resnet"}, {"layer_type hidden_act": WORDS}),
    *cases(hf.resnet.config_from_fields, {"model_type": "resnet"}, {"downsample_in_bottleneck": FLAGS}),
    *cases(hf.resnet.config_from_fields, {"model_type": "resnet"}, {"depths": (*SIZES[:-1], [0], [10**9], [1] * 99)}),
    *cases(hf.swin.config_from_fields, {"model_type": "swin"}, {"embed_dim": SIZES, "image_size window_size": PAIRS}),
    *cases(hf.swin.config_from_fields, {"model_type": "swin"}, {"mlp_ratio layer_norm_eps": NUMBERS}),
    *cases(hf.swin.config_from_fields, {"model_type": "swin"}, {"depths": (*SIZES[:-1], [0], [10**9], [1] * 99)}),
]


@pytest.mark.parametrize(("read", "base", "below", "name", "values"), ALL)
def test_values_of_the_wrong_type_or_range_are_refused_by_config_from_hf(read, base, below, name, values):
    where = name if below is None or below.startswith("rope") else f"{below}: {name}"
    for value in values:
        with pytest.raises(ValueError) as caught:
            read({**base, name: value} if below is None else {**base, below: {**base[below], name: value}})
        message = str(caught.value)
        assert message.startswith(where)
        assert "\n" not in message
        assert len(message) < 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**LLAMA, "num_key_value_heads": 0}, "num_key_value_heads: expected a positive integer, got 0"),
        ({**LLAMA, "head_dim": 10**6}, "head_dim: expected at most 65536"),
        ({**LLAMA, "hidden_size": 2**30, "num_attention_heads": 1}, "head_dim: expected at most 65536"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 10000, got 1000000000"),
        ({**LLAMA, "max_position_embeddings": 0}, "max_position_embeddings: expected a positive integer, got 0"),
        ({**GPT2, "n_positions": 0}, "n_positions: expected a positive integer, got 0"),
        ({**GPT2, "n_inner": 0}, "n_inner: expected a positive integer, got 0"),
        ({**LLAMA, "rope_theta": 0}, "rope_theta: expected a number in"),
        ({**LLAMA, "rope_scaling": "linear"}, "rope_scaling: expected an object, got 'linear'"),
        ({**LLAMA, "rope_scaling": {"type": ["linear"]}}, r"rope_type: \['linear'\] is not supported"),
        ({**LLAMA, "rope_parameters": {"full_attention": ROPE}}, "settings for each kind of layer are not supported"),
        ({**MISTRAL, "sliding_window": 0}, "sliding_window: expected a positive integer, got 0"),
        ({**QWEN2, "layer_types": 3}, "layer_types: expected 4 of"),
        ({**QWEN2, "layer_types": [[]] * 4}, "layer_types: expected 4 of"),
        ({**QWEN2, "layer_types": ["full_attention"] * 100_000}, "layer_types: expected 4 of"),
        ({**LLAMA, "eos_token_id": "2"}, "eos_token_id: expected an integer of at least 0, got '2'"),
        ({**LLAMA, "eos_token_id": [2, None]}, "eos_token_id: expected an integer of at least 0, got None"),
        ({**LLAMA, "eos_token_id": 2.0}, "eos_token_id: expected an integer of at least 0, got 2.0"),
        ({**LLAMA, "bos_token_id": True}, "bos_token_id: expected an integer of at least 0, got True"),
        ({**LLAMA, "pad_token_id": 2**40}, "pad_token_id: expected at most"),
    ],
)
def test_config_from_hf_names_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        interop.config_from_hf(fields)


def test_minus_one_is_no_token_and_null_heads_of_keys_are_those_of_queries():
    config = interop.config_from_hf({**MISTRAL, "pad_token_id": -1, "num_key_value_heads": None})
    assert (config.pad_token, config.num_kv_heads) == (None, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"[" * 100_000, "not JSON: nested too deeply"),
        (b'{"a": ' * 100_000, "not JSON: nested too deeply"),
        (b'{"model_type": "ll\xffama"}', "not JSON: 'utf-8' codec can't decode"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
)
def test_files_that_hold_no_json_object_are_named_by_read_json_object(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read_json_object(tmp_path / "config.json")
    for read in (interop.read_config, interop.load_causal_lm, interop.load_vision, interop.load_dual):
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size"])
def test_a_size_that_the_weights_have_not_is_refused_by_read_config_at_once(copied, name):
    folder, begin = copied("llama", **{name: 10**4 if name == "num_hidden_layers" else 10**9}), time.process_time()
    with pytest.raises(ValueError, match=r"config.json says 10000 layers|from config.json|config.json: head_dim"):
        interop.read_config(folder)
    # Specs of so many layers would take a minute.
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit", {"num_hidden_layers": 9999}, "config.json says 9999 layers, the weights have"),
        ("swin", {"depths": [2, 9999]}, "config.json says 10001 layers, the weights have"),
        ("resnet", {"depths": [1, 2, 9999]}, "config.json says 10002 layers, the weights have"),
        ("vit", {"hidden_size": 10**9}, "expected .* from config.json, got"),
        ("vit", {"num_labels": 10**9, "id2label": ...}, "classifier.weight: expected .* from config.json, got"),
        ("vit", {"image_size": 10**9}, "config.json: image_size: expected at most 16384"),
        ("swin", {"window_size": 10**4}, "expected .* from config.json, got"),
        ("vit_timm", {"architecture": ["vit"]}, r"config.json: architecture: \['vit'\] is not supported"),
        ("vit_timm", {"model_args": {"act_layer": "relu"}}, r"model_args: \['act_layer'\] may change"),
        ("vit_timm", {"model_args": {"global_pool": "max"}}, "global_pool: 'max' is not supported"),
        ("vit_timm", {"model_args": {"num_heads": 0}}, "num_heads: expected a positive integer, got 0"),
        ("swin_timm", {"model_args": {"img_size": "a"}}, "img_size: expected a positive integer, got 'a'"),
        ("swin_timm", {"model_args": {}, "pretrained_cfg": {"input_size": 3}}, "input_size: expected channels"),
        ("resnet_timm", {"model_args": [1]}, r"model_args: expected an object, got \[1\]"),
        ("vit_timm", {"num_classes": 9}, "num_classes: expected 7, which the tensors have, got 9"),
        ("vit_timm", {"model_args": {"embed_dim": 64}}, "embed_dim: expected 32, which the tensors have, got 64"),
        ("vit_timm", {"model_args": {"mlp_ratio": 3}}, "mlp_ratio: expected 128 / 32, which the tensors have, got 3"),
        ("vit_timm", {"model_args": {"img_size": [64, 64]}}, "img_size: the tensors have 16 positions of patches of 8"),
        ("swin_timm", {"model_args": {"depths": [2, 4]}}, r"depths: expected \(2, 2\), which .* got \[2, 4\]"),
        ("swin_timm", {"model_args": {"global_pool": "max"}}, "global_pool: 'max' is not supported"),
        ("resnet_timm", {"model_args": {"channels": [4] * 4}}, "channels: expected .* which the tensors have"),
        ("vit", {"transformers_weights": "other.safetensors"}, "transformers_weights: files of other names"),
    ],
)
def test_load_vision_names_the_field_and_the_file(tmp_path, name, changes, message):
    folder = copy(name, tmp_path / "copy", **changes)
    with pytest.raises(ValueError, match=f"{folder}.*{message}"):
        interop.load_vision(folder)


def test_an_image_size_that_fits_comes_before_a_square_in_load_vision(tmp_path):
    folder = copy("vit_timm", tmp_path / "copy", model_args={"img_size": [16, 64], "num_heads": 4})
    config, params = interop.load_vision(folder)
    assert config.image_size == (16, 64)
    assert params["position"]["embedding"].shape == (17, 32)


def test_a_tensor_of_other_axes_is_refused_where_a_config_is_read_off_it(tmp_path):
    folder = copy("vit_timm", tmp_path / "copy")
    tensors = {name: np.array(t.read()) for name, t in interop.open_folder(folder).items()}
    for shape in ((32,), (32, 3, 8, 0)):
        tensors["patch_embed.proj.weight"] = np.zeros(shape, np.float32)
        interop.write_safetensors(
            folder / "model.safetensors", {n: (t.shape, t.dtype) for n, t in tensors.items()}, tensors.values()
        )
        with pytest.raises(
            ValueError, match=r"patch_embed.proj.weight: expected a tensor with 4 axes, none of them empty"
        ):
            interop.load_vision(folder)


def test_a_run_and_an_adapter_are_no_model_and_read_config_says_where_it_is(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"task": "subspace_jax.language.finetune", "train": {}}))
    for read in (interop.read_config, interop.load_causal_lm, interop.load_vision, interop.load_dual):
        with pytest.raises(ValueError, match=f"{tmp_path}: this is a run without a folder of its model"):
            read(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"this is a run that trained an adapter.* the adapter is {tmp_path}/adapter"):
        interop.read_config(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/adapter: this is a PEFT adapter"):
        interop.read_config(tmp_path / "adapter")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}: this is a run; its model is {tmp_path}/model"):
        interop.read_config(tmp_path)
    with pytest.raises(ValueError, match=r"config.json: expected the folder of a Hugging Face or timm checkpoint"):
        interop.read_config(tmp_path / "config.json")
