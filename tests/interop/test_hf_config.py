import json

import pytest

from subspace_jax import interop, nn

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_head": 4, "n_layer": 2}


def read(**changes):
    return interop.config_from_hf({**LLAMA, **changes})


def test_a_config_goes_out_and_comes_back(model, checkpoint):
    config = interop.read_config(checkpoint(model))
    assert interop.config_from_hf(json.loads(json.dumps(interop.config_to_hf(config)))) == config


@pytest.mark.parametrize(
    "config",
    [
        nn.CausalLMConfig.gpt2(scale_by_layer=True, scale_scores=False, activation="relu", mlp_size=100),
        nn.CausalLMConfig.tiny(),
        nn.CausalLMConfig.llama3("70b", eos_tokens=(1, 2), bos_token=0, pad_token=3, mlp_bias=True),
        nn.CausalLMConfig.llama3("8b", qkv_bias=True, out_bias=True, rope=nn.Rope(kind="linear", factor=2.0)),
        nn.CausalLMConfig.mistral("7b"),
        nn.CausalLMConfig.qwen2("7b", windows=(None,) * 20 + (4096,) * 8),
    ],
)
def test_every_preset_goes_out_and_comes_back(config):
    fields = json.loads(json.dumps(interop.config_to_hf(config)))
    assert interop.config_from_hf(fields) == config
    # Readers that know one spelling of the rotary settings only get the same.
    for spelling in (("rope_theta", "rope_scaling"), ("rope_parameters",)):
        assert interop.config_from_hf({k: v for k, v in fields.items() if k not in spelling}) == config


@pytest.mark.parametrize("model", ["llama", "llama31", "mistral", "qwen2"])
def test_both_rotary_spellings_read_the_same(model, checkpoint):
    fields = json.loads((checkpoint(model) / "config.json").read_text())
    settings = dict(fields.pop("rope_parameters"))
    fields["rope_theta"] = settings.pop("rope_theta")
    kind = settings.pop("rope_type")
    fields["rope_scaling"] = None if kind == "default" else {"type": kind, **settings}
    assert interop.config_from_hf(fields) == interop.read_config(checkpoint(model))


def test_what_is_absent_has_the_default_of_its_architecture():
    config = read()
    assert (config.rope, config.norm_eps, config.tied, config.head_dim) == (nn.Rope(), 1e-6, False, 8)
    assert read(num_key_value_heads=None).num_kv_heads == 4
    assert read(model_type="mistral").windows == (4096,) * 4
    assert read(model_type="mistral", sliding_window=None).windows is None
    gpt2 = interop.config_from_hf(GPT2)
    assert (gpt2.tied, gpt2.mlp_size, gpt2.max_length, gpt2.norm_eps) == (True, 128, 1024, 1e-5)
    assert gpt2.eos_tokens == ()
    assert read(eos_token_id=[3, 4]).eos_tokens == (3, 4)


def test_windows_of_qwen2():
    qwen2 = {"model_type": "qwen2", "sliding_window": 7}
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert read(**qwen2, use_sliding_window=False, layer_types=kinds).windows is None
    assert read(**qwen2, use_sliding_window=True, layer_types=kinds).windows == (None, 7, None, 7)
    assert read(**qwen2, use_sliding_window=True, max_window_layers=3).windows == (None, None, None, 7)
    assert read(**qwen2, use_sliding_window=True).windows is None
    assert read(**qwen2).qkv_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type: 'bert' is not supported; expected one of"),
        ({"model_type": None}, "model_type: None is not supported"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads 4, got 3"),
        ({"hidden_size": 33}, "num_attention_heads: expected a divisor of hidden_size 33, got 4"),
        ({"hidden_size": None}, "hidden_size: expected a positive integer, got None"),
        ({"vocab_size": "96"}, "vocab_size: expected a positive integer, got '96'"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type: 'proportional' is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type: 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' needs .*low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: .* got 0.5"),
        ({"hidden_act": "swiglu"}, "hidden_act: 'swiglu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["chunked"] * 4},
            "layer_types: expected 4",
        ),
        ({**GPT2, "n_head": 5}, "n_head: expected a divisor of n_embd 32, got 5"),
        ({**GPT2, "add_cross_attention": True}, "cross-attention is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (nn.CausalLMConfig.gpt2(rope=nn.Rope()), r"'gpt2' can't express this config: \['rope'\]"),
        (nn.CausalLMConfig.llama3("8b", windows=(8,) * 32), r"'llama' can't express this config: \['windows'\]"),
        (nn.CausalLMConfig.llama3("8b", norm="layer"), r"'llama' can't express this config: \['norm'\]"),
    ],
)
def test_models_that_no_checkpoint_can_express_are_not_written(config, message):
    with pytest.raises(ValueError, match=message):
        interop.config_to_hf(config)


@pytest.mark.parametrize(("text", "message"), [("{", "config.json: not JSON"), ("[]", "expected a JSON object")])
def test_a_config_file_has_to_be_an_object(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        interop.read_config(tmp_path)
