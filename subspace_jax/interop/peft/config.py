"""The fields of PEFT's ``adapter_config.json``, checked to ask for no more than LoRA or DoRA."""

import logging
import pathlib
import reprlib
from collections.abc import Mapping
from typing import Any

from subspace_jax.data.json_object import read_json_object

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
# Each changes the forward pass or stores other arrays, and is not implemented.
_REFUSED = (
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "megatron_config",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "arrow_config",
    "kasa_config",
    "lora_bias",
    "monteclora_config",
    "velora_config",
)
# How the factors began, or where the adapter comes from: without effect on the stored arrays.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
# Initializations of the factors only, and those that change the base weights too.
_STARTS = ("eva", "gaussian", "mica", "orthogonal")
_CHANGING_STARTS = ("corda", "loftq", "lora_ga", "olora", "pissa")


def _is_int(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e38


def _is_rank(x: Any) -> bool:
    return _is_int(x) and x >= 1


def _are_texts(x: Any) -> bool:
    return isinstance(x, list | tuple | set | frozenset) and all(isinstance(text, str) for text in x)


def _is_text_or_texts(x: Any) -> bool:
    return isinstance(x, str) or _are_texts(x)


def _is_pattern(x: Any, valid) -> bool:
    return isinstance(x, Mapping) and all(isinstance(key, str) and valid(value) for key, value in x.items())


_EXPECTED = {
    "alpha_pattern": (lambda x: _is_pattern(x, _is_number), "an object of numbers"),
    "bias": (lambda x: x in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    "ensure_weight_tying": (lambda x: isinstance(x, bool), "true or false"),
    "exclude_modules": (_is_text_or_texts, "a regular expression or a list of names"),
    "init_lora_weights": (lambda x: isinstance(x, bool | str), "true, false or a name"),
    "layers_pattern": (_is_text_or_texts, "a name or a list of names"),
    "layers_to_transform": (
        lambda x: _is_int(x) or (isinstance(x, list | tuple) and all(_is_int(i) for i in x)),
        "an integer or a list of integers",
    ),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (lambda x: _is_number(x) and 0 <= x < 1, "a number in [0, 1)"),
    "modules_to_save": (_are_texts, "a list of names"),
    "r": (_is_rank, "an integer of at least 1"),
    "rank_pattern": (lambda x: _is_pattern(x, _is_rank), "an object of integers of at least 1"),
    "target_modules": (_is_text_or_texts, "a regular expression or a list of names"),
    "use_dora": (lambda x: isinstance(x, bool), "true or false"),
    "use_rslora": (lambda x: isinstance(x, bool), "true or false"),
}


def read_fields(folder: pathlib.Path) -> dict[str, Any]:
    """Reads ``adapter_config.json``; errors name the file, and the folder of the adapter in the folder of a run."""
    file = folder / CONFIG
    if not file.exists():
        if (folder / "adapter" / CONFIG).exists():
            raise ValueError(f"{folder}: this is a run; its adapter is {folder / 'adapter'}")
        if (folder / "checkpoints").is_dir():
            raise ValueError(f"{folder}: this is a run without an adapter for PEFT; expected the folder of an adapter")
        raise FileNotFoundError(f"{folder}: has no {CONFIG}; expected the folder of a PEFT adapter")
    fields = read_json_object(file)
    known = {"peft_type", *_EXPECTED, *_REFUSED, *_WITHOUT_EFFECT}
    if unknown := {name: value for name, value in fields.items() if name not in known and value}:
        log.warning("%s: these fields are set, unknown, and have no effect: %s", file, sorted(unknown))
    return fields


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raises ValueError where fields are missing, of the wrong type, or ask for what is not implemented."""
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: expected 'LORA', got {fields.get('peft_type')!r}")
    if missing := [name for name in ("r", "lora_alpha") if fields.get(name) is None]:
        raise ValueError(f"{CONFIG}: lacks {missing}")
    if asked := [name for name in _REFUSED if fields.get(name)]:
        raise ValueError(f"{CONFIG}: {asked} are not supported: they make another layer than LoRA's or DoRA's")
    for name, (valid, expected) in _EXPECTED.items():
        value = fields.get(name)
        if value is not None and not valid(value):
            raise ValueError(f"{name}: expected {expected}, got {reprlib.repr(value)}")
    start = fields.get("init_lora_weights")
    if not isinstance(start, str) or start.lower() in _STARTS:
        return
    if start.lower().startswith(_CHANGING_STARTS):
        raise ValueError(
            f"init_lora_weights: {start!r} also changes the base weights, which the folder does not hold; save it from "
            "PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it, or merge it there"
        )
    raise ValueError(f"init_lora_weights: expected true, false or one of {_STARTS}, got {start!r}")
