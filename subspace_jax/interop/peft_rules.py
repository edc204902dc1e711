"""PEFT's rules: which modules an ``adapter_config.json`` means, and with which rank and alpha."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

DEFAULT_TARGETS = {
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
}


def match_modules(fields: Mapping[str, Any], modules: Iterable[str], *, linear: Iterable[str] = ()) -> list[str]:
    """Lists the modules that a config adapts, by PEFT's rules.

    Args:
      fields: Those of ``adapter_config.json``.
      modules: Dotted paths of the modules there are, ``"model.layers.0.self_attn.q_proj"``.
      linear: Those of them that "all-linear" means: linear layers without the head.

    Returns:
      The adapted ones, in the order of ``modules``.

    Raises:
      ValueError: ``target_modules`` is missing or matches nothing, or fields contradict each other.
    """
    modules, targets = list(modules), fields.get("target_modules")
    if not targets:
        raise ValueError("target_modules: missing; PEFT would fall back to a default of the architecture in silence")
    layers = fields.get("layers_to_transform")
    if isinstance(targets, str) and layers is not None:
        raise ValueError("layers_to_transform: not allowed where target_modules is a regular expression")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = list(linear)
    excluded, saved = fields.get("exclude_modules"), fields.get("modules_to_save") or ()
    wanted = None if layers is None else {layers} if isinstance(layers, int) else set(layers)

    def meant(module):
        if excluded and _means(excluded, module):
            return False
        if any(_ends(module, name) for name in saved) or not _means(targets, module):
            return False
        return wanted is None or _layer(module, fields.get("layers_pattern")) in wanted

    found = [module for module in modules if meant(module)]
    if not found:
        raise ValueError(f"target_modules: {fields['target_modules']!r} matches none of the modules {modules[:5]}...")
    return found


def rank_and_alpha(fields: Mapping[str, Any], module: str) -> tuple[int, float]:
    """The rank and alpha of a module: of the first pattern that matches, each for itself."""

    def resolve(patterns, default):
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    return resolve(fields.get("rank_pattern"), fields["r"]), resolve(fields.get("alpha_pattern"), fields["lora_alpha"])


def _means(targets, module: str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(_ends(module, target) for target in targets)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _layer(module: str, patterns) -> int | None:
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", f".{module}")
        return int(found[1]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(found[1])
    return None
