"""Qwen3, Gemma 2 and 3, YaRN and dynamic NTK between here and the installed transformers, by ``make test-peers``."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn
from subspace_jax.nn.params import map_specs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the peers come with the extra bench"),
]

SIZES = {"vocab_size": 48, "hidden_size": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
SMALL = {**SIZES, "mlp_size": 24, "max_length": 64}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 16, "beta_fast": 1.5, "beta_slow": 0.2}
CONFIGS = {
    "qwen3": nn.CausalLMConfig.qwen3(**SMALL, windows=(None, None, 5, 5)),
    "qwen3 with biases, tied": nn.CausalLMConfig.qwen3(**SMALL, qkv_bias=True, out_bias=True, tied=True),
    "gemma2": nn.CausalLMConfig.gemma2(
        **SMALL, score_dim=12, score_softcap=2.0, logit_softcap=5.0, windows=(5, None, 5, None)
    ),
    "gemma2 without caps, untied": nn.CausalLMConfig.gemma2(
        **SMALL, score_softcap=None, logit_softcap=None, tied=False, qkv_bias=True, out_bias=True, windows=None
    ),
    "gemma3": nn.CausalLMConfig.gemma3(
        **SMALL, rope=nn.Rope(1e4, "linear", 4.0), local_rope=nn.Rope(100.0), windows=(5, 5, None, 5)
    ),
    "gemma3 with a cap, by YaRN": nn.CausalLMConfig.gemma3(
        **SMALL, logit_softcap=5.0, rope=nn.Rope(100.0, **YARN), windows=(5, 5, None, 5)
    ),
    "llama by YaRN": nn.CausalLMConfig.llama3(**SMALL, rope=nn.Rope(100.0, **YARN, truncate=False)),
    "mistral by YaRN": nn.CausalLMConfig.mistral(**SMALL, rope=nn.Rope(100.0, **YARN, attention_factor=1.5)),
    "qwen2 by dynamic NTK": nn.CausalLMConfig.qwen2(**SMALL, rope=nn.Rope(1e4, "dynamic", 4.0, original_length=16)),
}
TOKENS = np.random.default_rng(0).integers(3, 48, (2, 30))


def params_of(config):
    draw = np.random.default_rng(1).standard_normal
    return map_specs(lambda spec: jnp.asarray(spec.value + 0.2 * draw(spec.shape), jnp.float32), nn.param_specs(config))


def logits_of(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_logits_of_what_save_causal_lm_writes(name, tmp_path):
    import torch
    import transformers

    config = CONFIGS[name]
    params = params_of(config)
    interop.save_causal_lm(tmp_path / "ours", config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    logits = nn.causal_lm_apply(config, params, jnp.asarray(TOKENS)).logits
    np.testing.assert_allclose(logits, logits_of(theirs), atol=1e-4)
    # What transformers writes is the same model.
    theirs.save_pretrained(tmp_path / "theirs")
    again, read = interop.load_causal_lm(tmp_path / "theirs")
    assert again == config
    np.testing.assert_array_equal(nn.causal_lm_apply(again, read, jnp.asarray(TOKENS)).logits, logits)


# By dynamic NTK transformers keeps keys that were rotated for shorter texts.
@pytest.mark.parametrize("name", [name for name in CONFIGS if "dynamic" not in name])
def test_transformers_continues_greedily_as_generate_does(name, tmp_path):
    import torch
    import transformers

    config = CONFIGS[name].replace(eos_tokens=())
    params = params_of(config)
    interop.save_causal_lm(tmp_path / "ours", config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        wanted = theirs.eval().generate(torch.tensor(TOKENS[:, :9]), max_new_tokens=12, do_sample=False).numpy()
    new = nn.generate(config, params, jnp.asarray(TOKENS[:, :9]), max_new_tokens=12)
    np.testing.assert_array_equal(new.tokens, wanted[:, 9:])
