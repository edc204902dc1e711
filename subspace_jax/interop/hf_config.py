"""``config.json`` of Hugging Face checkpoints, in and out."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

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


def read_config(folder: str | os.PathLike) -> CausalLMConfig:
    """Reads the ``config.json`` of a checkpoint folder; raises what :func:`config_from_hf` raises."""
    file = pathlib.Path(folder) / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected the folder of a Hugging Face checkpoint")
    try:
        fields = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(fields).__name__}")
    return config_from_hf(fields)


def config_from_hf(fields: Mapping[str, Any]) -> CausalLMConfig:
    """Turns the fields of a ``config.json`` into a config.

    Args:
      fields: The fields; sizes are needed, all else has the defaults of its architecture.  Both spellings of the
        rotary settings are read.

    Returns:
      The config.

    Raises:
      ValueError: The architecture, its rotary kind or its activation is not supported, a field that is needed is
        absent, or the fields contradict one another.
    """
    family = fields.get("model_type")
    if family not in _ARCHITECTURES:
        raise ValueError(f"model_type: {family!r} is not supported; expected one of {sorted(_ARCHITECTURES)}")
    if fields.get("quantization_config"):
        raise ValueError("quantization_config: quantised weights are not supported; expected plain floating point")
    tokens = {
        "bos_token": fields.get("bos_token_id"),
        "eos_tokens": _as_tuple(fields.get("eos_token_id")),
        "pad_token": fields.get("pad_token_id"),
    }
    if family == "gpt2":
        return _gpt2(fields, tokens)
    return _llama(family, fields, tokens)


def _gpt2(fields: Mapping[str, Any], tokens: dict[str, Any]) -> CausalLMConfig:
    if fields.get("add_cross_attention"):
        raise ValueError("add_cross_attention: a decoder with cross-attention is not supported")
    width, heads = _need(fields, "n_embd"), _need(fields, "n_head")
    if width % heads:
        raise ValueError(f"n_head: expected a divisor of n_embd {width}, got {heads}")
    return CausalLMConfig.gpt2(
        _need(fields, "vocab_size"),
        width,
        _need(fields, "n_layer"),
        heads,
        mlp_size=fields.get("n_inner") or 4 * width,
        max_length=fields.get("n_positions") or fields.get("n_ctx") or 1024,
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        activation=_activation(fields.get("activation_function", "gelu_new")),
        tied=fields.get("tie_word_embeddings", True),
        scale_scores=fields.get("scale_attn_weights", True),
        scale_by_layer=fields.get("scale_attn_by_inverse_layer_idx", False),
        **tokens,
    )


def _llama(family: str, fields: Mapping[str, Any], tokens: dict[str, Any]) -> CausalLMConfig:
    width, heads, layers = (_need(fields, f) for f in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_dim = fields.get("head_dim")
    if head_dim is None:
        if width % heads:
            raise ValueError(f"num_attention_heads: expected a divisor of hidden_size {width}, got {heads}")
        head_dim = width // heads
    kv_heads = fields.get("num_key_value_heads")
    if kv_heads is None:
        kv_heads = {"llama": heads, "mistral": 8, "qwen2": 32}[family]
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads: expected a divisor of num_attention_heads {heads}, got {kv_heads}")
    max_length = fields.get("max_position_embeddings") or {"llama": 2048, "mistral": 131072, "qwen2": 32768}[family]
    attention_bias = family == "llama" and fields.get("attention_bias", False)
    return CausalLMConfig(
        family=family,
        vocab_size=_need(fields, "vocab_size"),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_size=_need(fields, "intermediate_size"),
        max_length=max_length,
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope=_rope(fields, max_length),
        activation=_activation(fields.get("hidden_act", "silu")),
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=attention_bias,
        mlp_bias=family == "llama" and fields.get("mlp_bias", False),
        windows=_windows(family, fields, layers),
        tied=fields.get("tie_word_embeddings", False),
        **tokens,
    )


def _windows(family: str, fields: Mapping[str, Any], layers: int) -> tuple[int | None, ...] | None:
    window = fields.get("sliding_window", None if family == "llama" else 4096)
    if family == "llama" or window is None:
        return None
    if family == "mistral":
        return (window,) * layers
    if not fields.get("use_sliding_window", False):
        return None
    kinds = fields.get("layer_types")
    if kinds is None:
        full = fields.get("max_window_layers", 28)
        kinds = ["full_attention" if layer < full else "sliding_attention" for layer in range(layers)]
    known = {"full_attention": None, "sliding_attention": window}
    if len(kinds) != layers or not set(kinds) <= set(known):
        raise ValueError(f"layer_types: expected {layers} of {sorted(known)}, got {kinds}")
    windows = tuple(known[kind] for kind in kinds)
    return windows if any(windows) else None


def _rope(fields: Mapping[str, Any], max_length: int) -> Rope:
    settings = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    theta = settings.get("rope_theta") or fields.get("rope_theta") or 10000.0
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type: {kind!r} is not supported; expected 'default', 'linear' or 'llama3'")
    partial = settings.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor: heads that are turned in part are not supported, got {partial}")
    needed = {"default": (), "linear": ("factor",)}.get(kind, ("factor", "low_freq_factor", "high_freq_factor"))
    if absent := [name for name in needed if name not in settings]:
        raise ValueError(f"rope_type {kind!r} needs {absent}; got {settings}")
    values = {name: float(settings[name]) for name in needed}
    if kind == "llama3":
        values["original_length"] = int(settings.get("original_max_position_embeddings") or max_length)
    return Rope(theta=float(theta), kind=kind, **values)


def config_to_hf(config: CausalLMConfig, dtype: str = "float32") -> dict[str, Any]:
    """Turns a config into the fields of a ``config.json``, rotary settings in both spellings.

    Args:
      config: The config.
      dtype: Name of the type of the weights.

    Raises:
      ValueError: The model is none that its family can express.
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
        # Old readers know only that the first so many layers see everything.
        fields["max_window_layers"] = sum(w is None for w in windows)
    return fields


def _need(fields: Mapping[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {name}: expected a positive integer, got {value!r}")
    return value


def _activation(name: str) -> str:
    if name not in FROM_HF_ACTIVATION:
        raise ValueError(f"activation {name!r} is not supported; expected one of {sorted(FROM_HF_ACTIVATION)}")
    return FROM_HF_ACTIVATION[name]


def _as_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
