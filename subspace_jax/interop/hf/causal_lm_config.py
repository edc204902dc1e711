"""``config.json`` of causal language models of Hugging Face, read and written."""

from collections.abc import Mapping
from typing import Any

from subspace_jax.interop.config_fields import (
    MAX_HEAD_DIM,
    MAX_LAYERS,
    checked_integer,
    flag,
    group,
    integer,
    number,
    shown,
    word,
)
from subspace_jax.nn import CausalLMConfig, Rope

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
    family = word(fields, "model_type", None, _ARCHITECTURES)
    if fields.get("quantization_config"):
        raise ValueError("quantization_config: quantized weights are not supported; expected plain floating point")
    tokens = token_ids(fields)
    fields = {name: value for name, value in fields.items() if value is not None or name not in _MAY_BE_NULL}
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
    absent = {"llama": heads, "mistral": 8, "qwen2": 32}[family]
    kv_heads = heads if fields.get("num_key_value_heads", 0) is None else integer(fields, "num_key_value_heads", absent)
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads: expected a divisor of num_attention_heads {heads}, got {kv_heads}")
    longest = {"llama": 2048, "mistral": 131072, "qwen2": 32768}[family]
    max_length = integer(fields, "max_position_embeddings", longest)
    attention_bias = family == "llama" and flag(fields, "attention_bias", False)
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
        norm_eps=number(fields, "rms_norm_eps", 1e-6, least=0, most=1),
        rope=_rope(fields, max_length),
        activation=_activation(fields, "hidden_act", "silu"),
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=attention_bias,
        mlp_bias=family == "llama" and flag(fields, "mlp_bias", False),
        windows=_windows(family, fields, layers),
        tied=flag(fields, "tie_word_embeddings", False),
        **tokens,
    )


def _windows(family: str, fields: Mapping[str, Any], layers: int) -> tuple[int | None, ...] | None:
    if family == "llama":
        return None
    window = None if fields.get("sliding_window", 0) is None else integer(fields, "sliding_window", 4096)
    if family == "mistral":
        return None if window is None else (window,) * layers
    known = {"full_attention": None, "sliding_attention": window}
    full = integer(fields, "max_window_layers", 28, least=0)
    kinds = ["full_attention" if layer < full else "sliding_attention" for layer in range(layers)]
    kinds = fields.get("layer_types", kinds)
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in list(known) for kind in kinds):
        raise ValueError(f"layer_types: expected {layers} of {sorted(known)}, got {shown(kinds)}")
    windows = tuple(known[kind] for kind in kinds)
    return windows if flag(fields, "use_sliding_window", False) and any(windows) else None


def _rope(fields: Mapping[str, Any], max_length: int) -> Rope:
    settings = {**group(fields, "rope_scaling"), **group(fields, "rope_parameters")}
    settings = {name: value for name, value in settings.items() if value is not None}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type: {shown(kind)} is not supported; expected 'default', 'linear' or 'llama3'")
    if nested := sorted(name for name in settings if name.endswith("_attention")):
        raise ValueError(f"rope_parameters: settings for each kind of layer are not supported, got {shown(nested)}")
    partial = settings.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor: partial rotary embeddings are not supported, got {shown(partial)}")
    needed = {"default": (), "linear": ("factor",)}.get(kind, ("factor", "low_freq_factor", "high_freq_factor"))
    if absent := [name for name in needed if name not in settings]:
        raise ValueError(f"rope_type {kind!r} needs {absent}; got {shown(settings)}")
    values = {name: number(settings, name) for name in needed}
    if kind == "llama3":
        values["original_length"] = integer(settings, "original_max_position_embeddings", max_length)
    theta = number(settings if "rope_theta" in settings else fields, "rope_theta", 10000.0)
    return Rope(theta=theta, kind=kind, **values)


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
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": TO_HF_ACTIVATION[config.activation],
    }
    if config.rope is not None:
        scaling = {}
        if config.rope.kind != "default":
            scaling["factor"] = config.rope.factor
        if config.rope.kind == "llama3":
            scaling["low_freq_factor"] = config.rope.low_freq_factor
            scaling["high_freq_factor"] = config.rope.high_freq_factor
            scaling["original_max_position_embeddings"] = config.rope.original_length
        kind = {"rope_type": config.rope.kind}
        fields["rope_theta"] = config.rope.theta
        fields["rope_scaling"] = {**kind, **scaling} if scaling else None
        fields["rope_parameters"] = {**kind, "rope_theta": config.rope.theta, **scaling}
    if config.family == "llama":
        fields["attention_bias"], fields["mlp_bias"] = config.out_bias, config.mlp_bias
    if config.family == "mistral":
        fields["sliding_window"] = config.window
    if config.family == "qwen2":
        windows = config.windows or (None,) * config.num_layers
        fields["use_sliding_window"] = config.windows is not None
        fields["sliding_window"] = next((w for w in windows if w), None)
        fields["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
        # Old readers use full attention in the first layers, up to this number.
        fields["max_window_layers"] = sum(w is None for w in windows)
    return fields


def _activation(fields: Mapping[str, Any], name: str, default: str) -> str:
    return FROM_HF_ACTIVATION[word(fields, name, default, FROM_HF_ACTIVATION)]
