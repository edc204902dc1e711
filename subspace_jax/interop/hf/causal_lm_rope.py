"""The rotary settings in ``config.json`` of causal language models of Hugging Face, read and written."""

import math
from collections.abc import Mapping
from typing import Any

from subspace_jax.interop.config_fields import checked_integer, flag, group, integer, number, shown
from subspace_jax.nn import CausalLMConfig, Rope

Fields = Mapping[str, Any]

_KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "dynamic": ("factor",),
}
# Of models whose layers with a window have rotary positions of their own.
_FULL, _LOCAL = "full_attention", "sliding_attention"


def ropes_from_hf(fields: Fields, *, local: bool) -> tuple[Rope, Rope | None, int]:
    """Reads the rotary settings, in both spellings.

    Args:
      fields: The fields; nulls count as absent.
      local: Whether layers with a window have settings of their own, as in Gemma 3.

    Returns:
      The settings, those of layers with a window or None, and the longest sequence.

    Raises:
      ValueError: A field is absent, has the wrong type or is out of range, or the kind of settings is not supported.
    """
    length = integer(fields, "max_position_embeddings")
    scaling, parameters = group(fields, "rope_scaling"), group(fields, "rope_parameters")
    nested = sorted(name for name in {**scaling, **parameters} if name.endswith("_attention"))
    if local:
        if unknown := sorted(parameters.keys() - {_FULL, _LOCAL}):
            raise ValueError(f"rope_parameters: expected {_FULL!r} and {_LOCAL!r}, got {shown(unknown)}")
        scaling, parameters = {**scaling, **group(parameters, _FULL)}, group(parameters, _LOCAL)
        rope = _rope(scaling, fields, length, number(fields, "rope_theta", 1e6))
        local_rope = _rope(parameters, fields, length, number(fields, "rope_local_base_freq", 10000.0))
    else:
        if nested:
            raise ValueError(f"rope_parameters: settings for each kind of layer are not supported, got {shown(nested)}")
        rope = _rope({**scaling, **parameters}, fields, length, number(fields, "rope_theta", 10000.0))
        local_rope = None
    return rope, local_rope, _longest(rope, length)


def _rope(settings: Fields, fields: Fields, length: int, theta: float) -> Rope:
    settings = {name: value for name, value in settings.items() if value is not None}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"rope_type: {shown(kind)} is not supported; expected one of {sorted(_KINDS)}")
    partial = settings.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor: partial rotary embeddings are not supported, got {shown(partial)}")
    original = integer(settings, "original_max_position_embeddings", length)
    if kind == "yarn" and "original_max_position_embeddings" in settings:
        settings = {"factor": length / original, **settings}
    if absent := [name for name in _KINDS[kind] if name not in settings]:
        raise ValueError(f"rope_type {kind!r} needs {absent}; got {shown(settings)}")
    values: dict[str, Any] = {name: number(settings, name) for name in _KINDS[kind]}
    if kind in ("llama3", "yarn"):
        values["original_length"] = original
    if kind == "dynamic":  # for which transformers passes over another original length
        values["original_length"] = length
    if kind == "yarn":
        values |= _yarn(settings, values["factor"])
    return Rope(theta=number(settings, "rope_theta", theta), kind=kind, **values)


def _yarn(settings: Fields, factor: float) -> dict[str, Any]:
    values: dict[str, Any] = {
        "beta_fast": number(settings, "beta_fast", 32.0),
        "beta_slow": number(settings, "beta_slow", 1.0),
        "truncate": flag(settings, "truncate", True),
    }
    shares = [number(settings, name, 0.0, least=0) for name in ("mscale", "mscale_all_dim")]
    if "attention_factor" in settings:
        values["attention_factor"] = number(settings, "attention_factor")
    elif all(shares):
        own, all_dims = (0.1 * share * math.log(max(factor, 1)) + 1 for share in shares)
        values["attention_factor"] = own / all_dims
    return values


def _longest(rope: Rope, length: int) -> int:
    if rope.kind == "dynamic":
        return checked_integer("max_position_embeddings times factor", int(rope.factor * length))
    if rope.kind == "yarn":
        return max(length, checked_integer("original length times factor", int(rope.factor * rope.original_length)))
    return length


def ropes_to_hf(config: CausalLMConfig, *, local: bool) -> dict[str, Any]:
    """Returns the rotary settings in both spellings, and the field with the longest sequence.

    Args:
      config: The model.
      local: Whether its family has settings of their own for layers with a window.
    """
    if config.rope is None:
        return {"max_position_embeddings": config.max_length}
    scaling = _scaling(config.rope)
    full = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta, **scaling}
    fields = {
        "max_position_embeddings": config.rope.original_length if config.rope.kind == "dynamic" else config.max_length,
        "rope_theta": config.rope.theta,
        "rope_scaling": {"rope_type": config.rope.kind, **scaling} if scaling else None,
        "rope_parameters": full,
    }
    if not local:
        return fields
    rope = config.local_rope or Rope()
    own = {"rope_type": rope.kind, "rope_theta": rope.theta, **_scaling(rope)}
    return {**fields, "rope_local_base_freq": rope.theta, "rope_parameters": {_FULL: full, _LOCAL: own}}


def _scaling(rope: Rope) -> dict[str, Any]:
    scaling: dict[str, Any] = {} if rope.kind == "default" else {"factor": rope.factor}
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_length
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        scaling |= {} if rope.truncate else {"truncate": False}
        scaling |= {} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}
    return scaling
