"""Models of the Llama family in GGUF files: config, names of tensors, and parameters read onto devices."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from subspace_jax.interop.config_fields import MAX_HEAD_DIM, MAX_LAYERS, integer, naming, number, shown, word
from subspace_jax.interop.gguf.format import Header, read_header
from subspace_jax.interop.gguf.tensors import BlockTensor
from subspace_jax.interop.hf.causal_lm_config import config_from_hf
from subspace_jax.interop.hf.causal_lm_names import tensor_names
from subspace_jax.interop.reading import Shardings, match_tensors, read_params
from subspace_jax.interop.tensors import PyTree, TensorLayout
from subspace_jax.nn import CausalLMConfig, Rope, causal_lm_specs, rope_frequencies

# Architecture of the file to family.  Llama and Mistral share one.
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TABLE, _HEAD, _ROPE = "token_embd.weight", "output.weight", "rope_freqs.weight"
_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Entries that other models of the architecture have, with the values that change nothing.
_UNSUPPORTED = {
    "expert_count": 0,
    "attention.scale": 0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0,
    "logit_scale": 0,
    "embedding_scale": 0,
    "residual_scale": 0,
}


def load_causal_lm(
    path: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> tuple[CausalLMConfig, PyTree]:
    """Reads a GGUF file of a Llama, Mistral, Qwen2 or Qwen3 directly onto devices.

    Each process decodes the slices of its own devices only, some rows at a time: there is no second copy of the
    parameters.  Rows of queries and keys are brought from the rotary order of llama.cpp into that of Hugging Face.

    Args:
      path: The file; of tensors F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K.
      shardings: See :func:`subspace_jax.interop.load_causal_lm`.
      dtype: Dtype of the parameters; by default that in the file, float32 for quantized tensors.

    Returns:
      The config, see :func:`read_config`, and the parameters, see :func:`subspace_jax.nn.causal_lm_specs`.

    Raises:
      ValueError: The architecture is not supported, tensors are missing, unexpected or of the wrong shape, or the file
        is damaged or truncated; see :func:`read_header`.
      FileNotFoundError: There is no such file.
    """
    config, stored = open_causal_lm(path)
    return config, read_params(layout_of(config), stored, shardings=shardings, dtype=dtype)


def read_config(path: str | os.PathLike) -> CausalLMConfig:
    """Reads the config of a language model in a GGUF file.

    The vocabulary is as large as the embedding table; the head is tied where the file has none.  Texts end at the EOS
    token and, if the file names one, at the token that ends a turn.  Factors for rotary frequencies, as files of
    Llama 3.1 have, become a rotary embedding of kind "llama3".

    Args:
      path: The file.

    Raises:
      ValueError: As for :func:`load_causal_lm`.
      FileNotFoundError: There is no such file.
    """
    return open_causal_lm(path)[0]


def layout_of(config: CausalLMConfig) -> TensorLayout:
    """Returns the tensors of a model by their names at Hugging Face."""
    return TensorLayout(causal_lm_specs(config), tensor_names(config))


def open_causal_lm(path: str | os.PathLike) -> tuple[CausalLMConfig, dict[str, BlockTensor]]:
    """Returns the config of a file, and its tensors by their names at Hugging Face, not read yet."""
    header = read_header(path)
    with naming(path):
        config = config_from_hf(config_fields(header))
        _check_rope(header, config)
    stored = {_name(name): tensor for name, tensor in header.tensors.items() if name != _ROPE}
    if config.family == "llama":
        # llama.cpp rotates pairs of neighbours there, and halves of a head in other architectures.
        for layer in range(config.num_layers):
            for module, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
                for kind in ("weight", "bias"):
                    name = f"model.layers.{layer}.self_attn.{module}.{kind}"
                    if name in stored and stored[name].shape[0] == heads * config.head_dim:
                        stored[name] = dataclasses.replace(stored[name], heads=heads)
    match_tensors(path, f"a {config.family!r} with {config.num_layers} layers", layout_of(config), stored)
    return config, stored


def _name(name: str) -> str:
    """Returns the name of a tensor at Hugging Face; the own one where there is no such tensor."""
    if match := re.fullmatch(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)", name):
        layer, module, kind = match.groups()
        return f"model.layers.{layer}.{_LAYER_MODULES[module]}.{kind}" if module in _LAYER_MODULES else name
    module, _, kind = name.rpartition(".")
    return f"{_MODULES[module]}.{kind}" if module in _MODULES else name


def config_fields(header: Header) -> dict[str, Any]:
    """Converts the metadata of a file to the fields of ``config.json``.

    Raises:
      ValueError: The architecture is not supported, or a field is absent, of the wrong type, or out of range.
    """
    metadata, tensors = header.metadata, header.tensors
    family = _FAMILIES[word(metadata, "general.architecture", None, _FAMILIES)]
    architecture = metadata["general.architecture"]
    own = {name.removeprefix(f"{architecture}."): value for name, value in metadata.items()}
    for name, neutral in _UNSUPPORTED.items():
        if own.get(name, neutral) != neutral:
            raise ValueError(f"{architecture}.{name}: not supported, got {shown(own[name])}")
    if _TABLE not in tensors or len(tensors[_TABLE].shape) != 2:
        raise ValueError(f"{_TABLE}: expected this tensor, with two axes")
    layers = integer(own, "block_count", most=MAX_LAYERS)
    if layers > len(tensors):
        raise ValueError(f"block_count: {layers} layers, the file has {len(tensors)} tensors")
    width, heads = integer(own, "embedding_length"), integer(own, "attention.head_count")
    head_dim = integer(own, "attention.key_length", max(1, width // heads), most=MAX_HEAD_DIM)
    for name in ("attention.value_length", "rope.dimension_count"):
        if own.get(name, head_dim) != head_dim:
            raise ValueError(f"{architecture}.{name}: expected {head_dim}, the width of a head, got {shown(own[name])}")
    fields = {
        "model_type": family,
        "vocab_size": tensors[_TABLE].shape[0],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": integer(own, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": integer(own, "feed_forward_length"),
        "max_position_embeddings": integer(own, "context_length"),
        "rms_norm_eps": number(own, "attention.layer_norm_rms_epsilon", least=0, most=1),
        "rope_theta": number(own, "rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(own, tensors),
        "tie_word_embeddings": _HEAD not in tensors,
        **_token_ids(metadata),
    }
    if family == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in tensors
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return fields


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "eot": "eot", "pad": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    ends = [token for token in dict.fromkeys((ids["eos"], ids["eot"])) if token is not None]
    return {"bos_token_id": ids["bos"], "eos_token_id": ends, "pad_token_id": ids["pad"]}


def _rope_scaling(own: Mapping[str, Any], tensors: Mapping[str, BlockTensor]) -> dict[str, Any] | None:
    if _ROPE in tensors:
        # Only divisors of frequencies are in the file: the largest is the factor, the bounds those of all known models.
        length = own.get("rope.scaling.original_context_length", 8192)
        settings = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": length}
        return {"rope_type": "llama3", "factor": float(np.max(tensors[_ROPE].read())), **settings}
    kind = word(own, "rope.scaling.type", "none", ("none", "linear", "yarn"))
    if kind == "none":
        return {"rope_type": "linear", "factor": own["rope.scale_linear"]} if "rope.scale_linear" in own else None
    scaling = {"rope_type": kind, "factor": own.get("rope.scaling.factor")}
    if kind == "linear":
        return scaling
    if own.get("rope.scaling.attn_factor", 1) != 1:
        raise ValueError(f"rope.scaling.attn_factor: not supported, got {shown(own['rope.scaling.attn_factor'])}")
    names = {
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "rope.scaling.yarn_beta_fast": "beta_fast",
        "rope.scaling.yarn_beta_slow": "beta_slow",
    }
    return scaling | {there: own[here] for here, there in names.items() if here in own}


def _check_rope(header: Header, config: CausalLMConfig) -> None:
    """Raises ValueError where factors of rotary frequencies are not those that the config gives."""
    if _ROPE not in header.tensors:
        return
    plain = rope_frequencies(Rope(theta=config.rope.theta), config.head_dim)
    factors = header.tensors[_ROPE].read()
    if factors.shape != plain.shape or not np.allclose(
        plain / factors, rope_frequencies(config.rope, config.head_dim), rtol=1e-4
    ):
        raise ValueError(
            f"{_ROPE}: expected the {plain.size} factors of Llama 3.1 for an original length of "
            f"{config.rope.original_length}, got {factors.shape} with a largest one of {config.rope.factor:.6g}"
        )
