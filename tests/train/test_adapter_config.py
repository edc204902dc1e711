"""Fields of a config to adapter configs: every method, dropout, convolutions, and invalid fields."""

import pytest

from subspace_jax import adapters, train


def settings(**fields):
    config = train.default_adapter()
    config.update(fields)
    return train.adapter_settings(config, ["w"])


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
