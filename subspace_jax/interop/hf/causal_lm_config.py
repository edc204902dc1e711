"""``config.json`` of causal language models of Hugging Face, read and written."""

from collections.abc import Mapping
from typing import Any

from subspace_jax.interop.config_fields import (
    MAX_HEAD_DIM,
    MAX_LAYERS,
    checked_integer,
    flag,
    integer,
    number,
    shown,
    word,
)
from subspace_jax.interop.hf.causal_lm_rope import ropes_from_hf, ropes_to_hf
from subspace_jax.nn import CausalLMConfig

FROM_HF_ACTIVATION = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
TO_HF_ACTIVATION = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu", "tanh": "tanh"}
_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_GEMMA = ("gemma2", "gemma3_text")
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
# Of fields that are absent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    "gemma2": {
        **_GEMMA_DEFAULTS,
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {**_GEMMA_DEFAULTS, "max_position_embeddings": 131072},
}

# Fields for which null means the default.
_MAY_BE_NULL = {
    "n_inner",
    "n_positions",
    "n_ctx",
    "head_dim",
    "max_position_embeddings",
    "layer_types",
    "rope_theta",
    "rope_local_base_freq",
    "rope_scaling",
    "rope_parameters",
}


def config_from_hf(fields: Mapping[str, Any]) -> CausalLMConfig:
    """Converts the fields of ``config.json`` to a config.

    Args:
      fields: The fields; sizes are required, others have the defaults of the architecture.  Both spellings of the
        rotary settings are read.

    Returns:
      The config.

    Raises:
      ValueError: The architecture, its kind of rotary embedding or its activation is not supported, a required field is
        absent, a field has the wrong type or is out of range, or fields contradict one another.
    """
    if fields.get("model_type") == "gemma3":
        raise ValueError("model_type: 'gemma3', of text and images, is not supported; its text model is 'gemma3_text'")
    family = word(fields, "model_type", None, _ARCHITECTURES)
    if fields.get("quantization_config"):
        raise ValueError("quantization_config: quantized weights are not supported; expected plain floating point")
    fields = {name: value for name, value in fields.items() if value is not None or name not in _MAY_BE_NULL}
    fields = {**_DEFAULTS[family], **fields}
    tokens = token_ids(fields)
    if family == "gpt2":
        return _gpt2(fields, tokens)
    return _llama(family, fields, tokens)


def token_ids(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the BOS, EOS and padding tokens of ``config.json`` or ``generation_config.json``."""
    ends = fields.get("eos_token_id")
    if isinstance(ends, list):
        ends = [checked_integer("eos_token_id", end, 0) for end in ends]
    else:
        ends = [_token("eos_token_id", ends)]
    return {
        "bos_token": _token("bos_token_id", fields.get("bos_token_id")),
        "eos_tokens": tuple(end for end in ends if end is not None),
        "pad_token": _token("pad_token_id", fields.get("pad_token_id")),
    }


def _token(name: str, value: Any) -> int | None:
    # Some files have -1 for none.
    return None if value is None or (value == -1 and isinstance(value, int)) else checked_integer(name, value, 0)


def _gpt2(fields: Mapping[str, Any], tokens: dict[str, Any]) -> CausalLMConfig:
    if flag(fields, "add_cross_attention", False):
        raise ValueError("add_cross_attention: a decoder with cross-attention is not supported")
    width, heads = integer(fields, "n_embd"), integer(fields, "n_head")
    if width % heads:
        raise ValueError(f"n_head: expected a divisor of n_embd {width}, got {heads}")
    return CausalLMConfig.gpt2(
        integer(fields, "vocab_size"),
        width,
        integer(fields, "n_layer", most=MAX_LAYERS),
        heads,
        mlp_size=integer(fields, "n_inner", 4 * width),
        max_length=integer(fields, "n_positions" if "n_positions" in fields else "n_ctx", 1024),
        norm_eps=number(fields, "layer_norm_epsilon", 1e-5, least=0, most=1),
        activation=_activation(fields, "activation_function", "gelu_new"),
        tied=flag(fields, "tie_word_embeddings", True),
        scale_scores=flag(fields, "scale_attn_weights", True),
        scale_by_layer=flag(fields, "scale_attn_by_inverse_layer_idx", False),
        **tokens,
    )


def _llama(family: str, fields: Mapping[str, Any], tokens: dict[str, Any]) -> CausalLMConfig:
    width, heads = integer(fields, "hidden_size"), integer(fields, "num_attention_heads")
    layers = integer(fields, "num_hidden_layers", most=MAX_LAYERS)
    if "head_dim" not in fields and width % heads:
        raise ValueError(f"num_attention_heads: expected a divisor of hidden_size {width}, got {heads}")
    head_dim = integer({"head_dim": width // heads, **fields}, "head_dim", most=MAX_HEAD_DIM)
    # Null means as many as query heads, absence the default of the architecture.
    kv_heads = heads if fields.get("num_key_value_heads") is None else integer(fields, "num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads: expected a divisor of num_attention_heads {heads}, got {kv_heads}")
    rope, local_rope, max_length = ropes_from_hf(fields, local=family == "gemma3_text")
    gemma = family in _GEMMA
    activation = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    attention_bias = family not in ("mistral", "qwen2") and flag(fields, "attention_bias", False)
    return CausalLMConfig(
        family=family,
        vocab_size=integer(fields, "vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_size=integer(fields, "intermediate_size"),
        max_length=max_length,
        norm="rms_offset" if gemma else "rms",
        norm_eps=number(fields, "rms_norm_eps", 1e-6, least=0, most=1),
        post_norms=gemma,
        qk_norm=family in ("qwen3", "gemma3_text"),
        rope=rope,
        local_rope=local_rope,
        activation=_activation(fields, *activation),
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=attention_bias,
        mlp_bias=family == "llama" and flag(fields, "mlp_bias", False),
        windows=_windows(family, fields, layers),
        tied=flag(fields, "tie_word_embeddings", False),
        scale_embeddings=gemma,
        **(_gemma(family, fields) if gemma else {}),
        **tokens,
    )


def _gemma(family: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    if flag(fields, "use_bidirectional_attention", False):
        raise ValueError("use_bidirectional_attention: expected false; an encoder is not supported")
    names = {"attn_logit_softcapping": "score_softcap", "final_logit_softcapping": "logit_softcap"}
    caps = {ours: None if fields[name] is None else number(fields, name) for name, ours in names.items()}
    if family == "gemma3_text" and caps["score_softcap"] is not None:
        raise ValueError(
            f"attn_logit_softcapping: expected null for 'gemma3_text', whose attention normalizes queries and keys "
            f"instead; got {shown(fields['attn_logit_softcapping'])}"
        )
    return {"score_dim": number(fields, "query_pre_attn_scalar"), **caps}


def _windows(family: str, fields: Mapping[str, Any], layers: int) -> tuple[int | None, ...] | None:
    if family == "llama":
        return None
    window = None if fields.get("sliding_window", 0) is None else integer(fields, "sliding_window", 4096)
    if family == "mistral":
        return None if window is None else (window,) * layers
    known = {"full_attention": None, "sliding_attention": window}
    if family in _GEMMA:
        period = 2 if family == "gemma2" else integer(fields, "sliding_window_pattern", 6)
        full = [(layer + 1) % period == 0 for layer in range(layers)]
    else:
        first = integer(fields, "max_window_layers", 28, least=0)
        full = [layer < first for layer in range(layers)]
    kinds = fields.get("layer_types", ["full_attention" if is_full else "sliding_attention" for is_full in full])
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in list(known) for kind in kinds):
        raise ValueError(f"layer_types: expected {layers} of {sorted(known)}, got {shown(kinds)}")
    if family in _GEMMA and window is None and "sliding_attention" in kinds:
        raise ValueError("sliding_window: expected a positive integer for layers of 'sliding_attention', got None")
    windows = tuple(known[kind] for kind in kinds)
    used = family in _GEMMA or flag(fields, "use_sliding_window", False)
    return windows if used and any(windows) else None


def config_to_hf(config: CausalLMConfig, dtype: str = "float32") -> dict[str, Any]:
    """Converts a config to the fields of ``config.json``, with both spellings of the rotary settings.

    Args:
      config: The config.
      dtype: Name of the dtype of the weights.

    Raises:
      ValueError: The family can't express the model.
    """
    common = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_token,
        "eos_token_id": config.eos_tokens[0] if len(config.eos_tokens) == 1 else list(config.eos_tokens) or None,
        "pad_token_id": config.pad_token,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    own = _gpt2_fields(config) if config.family == "gpt2" else _llama_fields(config)
    fields = {**common, **own}
    read_back = config_from_hf(fields)
    if read_back != config:
        differs = [name for name in vars(config) if getattr(config, name) != getattr(read_back, name)]
        raise ValueError(f"a checkpoint of family {config.family!r} can't express this config: {differs}")
    return fields


def _gpt2_fields(config: CausalLMConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": None if config.mlp_size == 4 * config.hidden_size else config.mlp_size,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": TO_HF_ACTIVATION[config.activation],
        "scale_attn_weights": config.scale_scores,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
    }


def _llama_fields(config: CausalLMConfig) -> dict[str, Any]:
    fields = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_size,
        "rms_norm_eps": config.norm_eps,
        **ropes_to_hf(config, local=config.family == "gemma3_text"),
    }
    windows = config.windows or (None,) * config.num_layers
    window = next((w for w in windows if w), None)
    kinds = ["sliding_attention" if w else "full_attention" for w in windows]
    if config.family in _GEMMA:
        act = config.activation
        fields["hidden_activation"] = "gelu_pytorch_tanh" if act == "gelu_tanh" else TO_HF_ACTIVATION[act]
        score_dim = float(config.score_dim or config.head_dim)
        fields["query_pre_attn_scalar"] = int(score_dim) if score_dim.is_integer() else score_dim
        fields["attn_logit_softcapping"] = config.score_softcap
        fields["final_logit_softcapping"] = config.logit_softcap
        fields["sliding_window"], fields["layer_types"] = window or 4096, kinds
    else:
        fields["hidden_act"] = TO_HF_ACTIVATION[config.activation]
    if config.family not in ("mistral", "qwen2"):
        fields["attention_bias"] = config.out_bias
    if config.family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    if config.family == "mistral":
        fields["sliding_window"] = config.window
    if config.family in ("qwen2", "qwen3"):
        fields["use_sliding_window"] = config.windows is not None
        fields["sliding_window"], fields["layer_types"] = window, kinds
        # Old readers use full attention in the first layers, up to this number.
        fields["max_window_layers"] = sum(w is None for w in windows)
    return fields


def _activation(fields: Mapping[str, Any], name: str, default: str) -> str:
    return FROM_HF_ACTIVATION[word(fields, name, default, FROM_HF_ACTIVATION)]
