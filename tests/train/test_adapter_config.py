"""Fields of a config to adapter configs: every method, dropout, convolutions, and invalid fields."""

import pytest

from subspace_jax import adapters, nn, train

LLAMA = nn.CausalLMConfig("llama", 20, 8, 2, 2, 2, 4, 16, 16)


def settings(model=None, **fields):
    config = train.default_adapter()
    config.update(fields)
    return train.adapter_settings(config, ["w"], model)


def test_each_method_has_its_fields():
    assert settings(method="lora", dropout=0.1) == {"w": adapters.LoRA(8, 16.0, dropout=0.1)}
    assert settings(method="dora", rank=4, window=2) == {"w": adapters.DoRA(4, 8.0, window=2)}
    assert settings(method="rslora", alpha=3.0, groups=2, window=1, init="gaussian") == {
        "w": adapters.LoRA(8, 3.0, rslora=True, init="gaussian", window=1, groups=2)
    }
    assert settings(method="flora", dropout=0.2) == {"w": adapters.FLoRA((8, 8), dropout=0.2)}
    assert settings(method="svfit", rank=3) == {"w": adapters.SVFit(3)}
    assert settings(method="effort") == {"w": adapters.Effort(1)}
    assert settings(modules_to_save="head,b") == {"head": adapters.Full(), "b": adapters.Full()}


def test_a_rule_has_ranks_of_its_own():
    assert settings(method="flora", target_modules="conv1=8x4x3x3:2.5,fc=2,up", rank=6, init="normal002") == {
        "conv1": adapters.FLoRA((8, 4, 3, 3), 2.5, init="normal002"),
        "fc": adapters.FLoRA((2, 2), init="normal002"),
        "up": adapters.FLoRA((6, 6), init="normal002"),
    }
    assert settings(method="lora", target_modules="q=16:8,v=2") == {
        "q": adapters.LoRA(16, 8.0),
        "v": adapters.LoRA(2, 4.0),
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "lore"}, r"adapter.method: expected one of \('lora'.*got 'lore'"),
        (
            {"method": "lora", "target_modules": "conv=8x8x3x3"},
            r"adapter.target_modules: one rank for each axis is for 'flora', got \(8",
        ),
        ({"method": "svfit", "dropout": 0.1}, "adapter.dropout: 'svfit' has none, got 0.1"),
        ({"method": "lora", "dropout": 1.0}, r"adapter.dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"method": "flora", "window": 2}, "adapter.window, groups: of LoRA and DoRA.*name a rank for each axis"),
        ({"method": "flora", "init": "kaiming"}, "adapter.init: expected one of .'kaiming_normal'"),
        ({"method": "effort", "groups": 2}, "adapter.window, groups: of LoRA and DoRA, got 0 and 2 for 'effort'"),
        ({"method": "lora", "base_dtype": "int4"}, "adapter.base_dtype: expected one of .*got 'int4'"),
        ({"method": "lora", "target_modules": "w,w"}, "adapter.target_modules: 'w' is named twice"),
        ({"target_modules": "w"}, "adapter.target_modules: 'w' without adapter.method"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        settings(**fields)


def test_a_language_model_is_adapted_by_the_names_of_peft():
    lora, attention = adapters.LoRA(8, 16.0), [f"layers/attn/{name}/kernel" for name in ("q", "k", "v", "out")]
    mlp = [f"layers/mlp/{name}/kernel" for name in ("gate", "up", "down")]
    for text, paths in {
        "q_proj,v_proj": [attention[0], attention[2]],
        "self_attn.o_proj": [attention[3]],
        "all-linear": [*attention, *mlp],
        r".*\.(q|v)_proj": [attention[0], attention[2]],
        r".*self_attn.*": attention,
        "lm_head": ["head/kernel"],
        "attn/q": ["attn/q"],
        "re:layers/attn/.*": ["re:layers/attn/.*"],
    }.items():
        assert settings(LLAMA, method="lora", target_modules=text) == dict.fromkeys(paths, lora)
    ranked = settings(LLAMA, method="lora", target_modules="q_proj=16:8,all-linear=4")
    assert ranked == {
        attention[0]: adapters.LoRA(16, 8.0),
        **dict.fromkeys([*attention[1:], *mlp], adapters.LoRA(4, 8.0)),
    }
    saved = settings(LLAMA, modules_to_save="embed_tokens,lm_head")
    assert saved == {"embed/embedding": adapters.Full(), "head/kernel": adapters.Full()}


def test_gpt2_is_adapted_by_its_own_names_of_peft():
    gpt2 = nn.CausalLMConfig.gpt2(20, 8, 2, 2, max_length=16)
    found = settings(gpt2, method="lora", target_modules="c_attn,c_proj")
    assert list(found) == ["layers/attn/qkv/kernel", "layers/attn/out/kernel", "layers/mlp/down/kernel"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "attn/qq"}, "^adapter.target_modules: 'attn/qq' matches none of .*near: .'layers/attn/q"),
        ({"target_modules": "query"}, "^adapter.target_modules: 'query' matches none of"),
        ({"modules_to_save": "haed"}, "^adapter.modules_to_save: 'haed' matches none of .*near: .'head/kernel'"),
        ({"target_modules": "q_proj,self_attn.q_proj"}, "^adapter.target_modules: 'self_attn.q_proj' is named twice"),
        ({"target_modules": "q_proj,attn/q"}, "^adapter.target_modules: earlier rules match everything that 'attn/q'"),
        (
            {"target_modules": "model.layers.1.self_attn.q_proj"},
            "^adapter.target_modules: '.*q_proj' means 1 of the 2 layers of layers/attn/q/kernel; expected all of them",
        ),
    ],
)
def test_rules_that_match_no_weight_of_a_language_model_are_named_by_their_field(fields, message):
    with pytest.raises(ValueError, match=message):
        settings(LLAMA, method="lora", **fields)
