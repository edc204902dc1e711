"""Round trips with the installed PEFT and transformers: tied and untied models of all families, by ``make test-peers``.

Every comparison is of float32 logits of two layers 16 wide, which lie between 1 and 10.
"""

import functools
import importlib.util
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, interop, language, nn

pytestmark = [
    # Half a second each, and many; the quick run reads folders that PEFT wrote once, in tests/interop.
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the peers come with the extra bench"),
]

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma3_text")
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))
# Of each family: the table, two modules of every layer, and one that has them under another parent.
_LLAMA = {
    "TABLE": "embed_tokens",
    "FULL_TABLE": "model.embed_tokens",
    "Q": "q_proj",
    "DOWN": "down_proj",
    "LAYERS": "layers",
    "NAMED": "model.layers.1.self_attn.q_proj",
}
NAMES = {
    "gpt2": {
        "TABLE": "wte",
        "FULL_TABLE": "transformer.wte",
        "Q": "c_attn",
        "DOWN": "mlp.c_proj",
        "LAYERS": "h",
        "NAMED": "transformer.h.1.attn.c_attn",
    },
    **{family: _LLAMA for family in FAMILIES[1:]},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
both_kinds = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])

# What PEFT is asked for; Q, DOWN and so on stand for the family's names.
TABLES = {
    "the table is saved": {"modules_to_save": ["TABLE"]},
    "the head is saved": {"modules_to_save": ["lm_head"]},
    "both are saved": {"modules_to_save": ["FULL_TABLE", "lm_head"]},
    "both are saved as one": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "the table is adapted": {"target_modules": ["Q", "TABLE"]},
    "the head is adapted": {"target_modules": ["Q", "lm_head"], "use_rslora": True},
    "the head is adapted by DoRA": {"target_modules": ["Q", "lm_head"], "use_dora": True},
    "both are adapted": {"target_modules": ["Q", "TABLE", "lm_head"]},
    "both are adapted as one": {"target_modules": ["DOWN", "lm_head"], "ensure_weight_tying": True},
    "both are adapted as one, by DoRA": {
        "target_modules": ["Q", "lm_head"],
        "ensure_weight_tying": True,
        "use_dora": True,
    },
    "both are meant by a regular expression": {
        "target_modules": r"(.*\.)?(Q|TABLE|lm_head)",
        "ensure_weight_tying": True,
    },
}
LAYERS = {
    "LoRA": {"target_modules": "all-linear"},
    "rsLoRA": {"target_modules": ["Q", "DOWN"], "use_rslora": True},
    "DoRA": {"target_modules": "all-linear", "use_dora": True},
    "DoRA of one layer": {"target_modules": ["Q", "DOWN"], "use_dora": True, "layers_to_transform": [1]},
    "a layer by its pattern": {"target_modules": ["Q"], "layers_to_transform": 0, "layers_pattern": "LAYERS"},
    "layers are passed over where a module is named in full": {
        "target_modules": ["DOWN", "NAMED"],
        "layers_to_transform": [0],
    },
    "patterns": {
        "target_modules": ["Q", "DOWN"],
        "rank_pattern": {"DOWN": 3, r".*\.0\..*Q": 1},
        "alpha_pattern": {r"(LAYERS|none)\.1\..*": 7},
        "exclude_modules": r".*\.1\..*DOWN",
    },
    "biases of adapted modules": {"target_modules": ["Q"], "bias": "lora_only"},
    "orthogonal": {"target_modules": ["Q"], "init_lora_weights": "orthogonal"},
    "gaussian": {"target_modules": ["Q"], "init_lora_weights": "gaussian"},
    "mica": {"target_modules": ["Q"], "init_lora_weights": "mica"},
    "olora, converted": {"target_modules": ["Q"], "init_lora_weights": "olora"},
    "pissa, converted": {"target_modules": ["Q", "DOWN"], "init_lora_weights": "pissa"},
}


def in_turn(cases):
    return [(what, FAMILIES[i % len(FAMILIES)]) for i, what in enumerate(cases)]


def renamed(value, family):
    if isinstance(value, dict):
        return {renamed(k, family): renamed(v, family) for k, v in value.items()}
    if isinstance(value, list):
        return [renamed(v, family) for v in value]
    if not isinstance(value, str) or value == "all-linear":
        return value
    return re.sub("|".join(sorted(NAMES[family], key=len, reverse=True)), lambda found: NAMES[family][found[0]], value)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model of transformers with random weights."""
    import torch
    import transformers

    @functools.cache
    def write(family, tied):
        sizes = {"vocab_size": 40, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1}
        if family == "gpt2":
            config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **sizes)
        else:
            kinds = {
                "llama": transformers.LlamaConfig,
                "mistral": transformers.MistralConfig,
                "qwen2": transformers.Qwen2Config,
                "qwen3": transformers.Qwen3Config,
                "gemma3_text": transformers.Gemma3TextConfig,
            }
            config = kinds[family](
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                intermediate_size=24,
                max_position_embeddings=32,
                **sizes,
            )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        disturb(model, 0.3)
        folder = tmp_path_factory.mktemp(f"{family}-{tied}")
        model.save_pretrained(folder)
        return folder

    return write


def disturb(model, by=0.1):
    """Moves what trains."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))


def opened(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def torch_logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


@functools.cache
def _apply(config):
    return jax.jit(functools.partial(nn.causal_lm_apply, config))


def logits(config, params):
    return np.asarray(_apply(config)(params, jnp.asarray(TOKENS, jnp.int32)).logits)


def same(got, wanted):
    # Sums of 16 float32 numbers in another order: a few parts in 1e7 of logits up to 10.
    np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=2e-5)


def with_peft(folder, out, family, asked):
    """Writes an adapter that PEFT made and moved; returns the logits of PEFT with what it reads back."""
    import peft

    asked = {"target_modules": ["Q"], **asked}
    config = peft.LoraConfig(r=2, lora_alpha=5, task_type="CAUSAL_LM", **renamed(asked, family))
    convert = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(opened(folder), config)
        if asked.get("init_lora_weights") in ("pissa", "olora"):
            model.peft_config["default"].init_lora_weights = True
            model.save_pretrained(out / "initial")
            model.peft_config["default"].init_lora_weights = asked["init_lora_weights"]
            convert = {"path_initial_model_for_weight_conversion": str(out / "initial")}
        disturb(model)
        trained = torch_logits(model)
        model.save_pretrained(out / "adapter", **convert)
        if convert:
            # Its base is no longer that of the folder in this process.
            return trained, None
        model = peft.PeftModel.from_pretrained(opened(folder), out / "adapter")
        wanted = torch_logits(model)
        np.testing.assert_allclose(wanted, trained, atol=1e-5)
        model.merge_and_unload().save_pretrained(out / "merged by peft")
    return wanted, out / "merged by peft"


def check_reading(folder, out, family, asked):
    wanted, merged = with_peft(folder, out, family, asked)
    config, params = language.load_adapted(folder, out / "adapter")
    assert np.abs(wanted - logits(*interop.load_causal_lm(folder))).max() > 0.01
    same(logits(config, params), wanted)
    language.merge_adapter(folder, out / "adapter", out / "merged")
    same(torch_logits(opened(out / "merged")), wanted)
    assert json.loads((out / "merged" / "config.json").read_text())["tie_word_embeddings"] == config.tied
    if merged is not None:
        # Not what was wanted for an adapted table that is tied: PEFT merges into both places what it computes in one.
        same(logits(*interop.load_causal_lm(merged)), torch_logits(opened(merged)))
    return config


@every_family
@pytest.mark.parametrize("what", TABLES)
def test_load_adapted_reads_tables_of_tied_models_as_peft_does(what, family, base, tmp_path):
    if family == "gpt2" and what.startswith("both are adapted as one"):
        pytest.skip("what PEFT trains as one it reads as one of two: it does not know the name of this table")
    config = check_reading(base(family, True), tmp_path, family, TABLES[what])
    assert config.tied == (what == "both are saved as one")


@pytest.mark.parametrize(("what", "family"), in_turn(TABLES))
def test_load_adapted_reads_tables_of_untied_models_as_peft_does(what, family, base, tmp_path):
    assert not check_reading(base(family, False), tmp_path, family, TABLES[what]).tied


@pytest.mark.parametrize(("what", "family"), in_turn(LAYERS))
def test_load_adapted_reads_layers_as_peft_does(what, family, base, tmp_path):
    check_reading(base(family, family == "qwen2"), tmp_path, family, LAYERS[what])


@pytest.mark.parametrize(
    ("family", "bias"),
    [("gpt2", "lora_only"), ("gpt2", "all"), ("llama", "all"), ("qwen2", "lora_only"), ("qwen2", "all")],
)
def test_load_adapted_reads_biases_as_peft_does(family, bias, base, tmp_path):
    check_reading(base(family, True), tmp_path, family, {"target_modules": ["Q", "DOWN"], "bias": bias})


def settings_of(family, tied):
    """Adapters of our own that PEFT has counterparts of."""
    q = "attn/qkv" if family == "gpt2" else "attn/q"
    yield "LoRA", {q: adapters.LoRA(2, 3.0), "mlp/down": adapters.LoRA(3, 1.0)}
    yield (
        "rsLoRA by layers",
        {q: adapters.LoRA((1, 3), (2.0, 5.0), rslora=True), "mlp/up": adapters.LoRA((0, 2), 1.0, rslora=True)},
    )
    yield "DoRA", {"attn/*": adapters.DoRA(2, 3.0), "mlp/down": adapters.DoRA((0, 2), 3.0)}
    yield "whole table", {q: adapters.LoRA(2, 3.0), "embed/embedding": adapters.Full()}
    if not tied:
        yield "whole head", {q: adapters.LoRA(2, 3.0), "head/kernel": adapters.Full()}
        yield "tables", {q: adapters.DoRA(2, 3.0), "embed": adapters.DoRA(2, 3.0), "head": adapters.DoRA(2, 3.0)}
    if family in ("gpt2", "qwen2"):
        yield "biases", {q: adapters.LoRA(2, 3.0), f"{q}/bias": adapters.Full()}
        if family == "gpt2":
            yield "all biases", {q: adapters.LoRA(2, 3.0), "re:.*/bias": adapters.Full()}


def moved(trainable, settings):
    rng = np.random.default_rng(0)
    # Beyond the rank of a layer there are zeros.
    padded = any(isinstance(getattr(setting, "rank", 0), tuple) for setting in settings.values())

    def move(x):
        kept = np.asarray(x) != 0 if padded and np.any(x) else True
        return x + 0.1 * rng.standard_normal(x.shape, np.float32) * kept

    return jax.tree.map(move, trainable)


@every_family
@both_kinds
def test_peft_reads_what_save_peft_adapter_writes(family, tied, base, tmp_path):
    import peft

    folder = base(family, tied)
    config, params = interop.load_causal_lm(folder)
    for what, settings in settings_of(family, tied):
        trainable = moved(adapters.init(jax.random.key(0), params, settings), settings)
        wanted = logits(config, adapters.merge(params, trainable, settings))
        interop.save_peft_adapter(tmp_path / what, config, trainable, settings)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected).*")
            model = peft.PeftModel.from_pretrained(opened(folder), tmp_path / what)
        same(torch_logits(model), wanted)
        merged = model.merge_and_unload()
        same(torch_logits(merged), wanted)
        # And back again.
        own, params_read = language.load_adapted(folder, tmp_path / what)
        assert own.tied == tied
        same(logits(own, params_read), wanted)
