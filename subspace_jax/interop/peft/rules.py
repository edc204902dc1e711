"""The rules of PEFT: which modules an ``adapter_config.json`` selects, and with which rank and alpha."""

import collections
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import regex

# A regular expression of an untrusted file may take forever.
_SECONDS, _LONGEST = 5.0, 20_000
# {n} is compiled to n copies, nested ones to their product.
_COPIES = 1000
# The names by which PEFT knows a tied table, whatever its name in the model.
_TABLES = ("embed_tokens", "lm_head")


def match_modules(fields: Mapping[str, Any], modules: Iterable[str], *, linear: Iterable[str] = ()) -> list[str]:
    """Returns the modules that a config adapts, by the rules of PEFT.

    Args:
      fields: Those of ``adapter_config.json``.
      modules: Dotted paths of the modules, ``"model.layers.0.self_attn.q_proj"``.
      linear: The modules of "all-linear": linear layers without the head.

    Returns:
      The adapted modules, in the order of ``modules``.

    Raises:
      ValueError: ``target_modules`` is missing or matches nothing, fields contradict each other, or a regular
        expression is malformed, longer than 20,000 characters, repeats a part more than 1,000 times by ``{n}``, or
        takes more than 5 seconds of the CPU.
    """
    modules, targets = list(modules), fields.get("target_modules")
    if not targets:
        raise ValueError("target_modules: missing; PEFT would silently use a default of the architecture")
    layers, patterns = fields.get("layers_to_transform"), fields.get("layers_pattern")
    layers = None if layers == [] else layers
    for name, value in (("layers_to_transform", layers), ("layers_pattern", patterns)):
        if isinstance(targets, str) and value is not None:
            raise ValueError(f"{name}: not allowed where target_modules is a regular expression")
    if patterns and layers is None:
        raise ValueError("layers_pattern: expected layers_to_transform beside it, got none")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = list(linear)
    excluded, saved = fields.get("exclude_modules"), fields.get("modules_to_save") or ()
    wanted = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
    search = _searcher()

    def meant(module):
        if excluded and _means("exclude_modules", excluded, module, search):
            return False
        if any(search("modules_to_save", rf"(^|.*\.){name}($|\..*)", module) for name in saved):
            return False
        if not _means("target_modules", targets, module, search):
            return False
        # A module named in full is adapted in any layer.
        named = wanted is None or (not isinstance(targets, str) and module in targets)
        return named or _layer(module, patterns, search) in wanted

    found = [module for module in modules if meant(module)]
    if not found:
        raise ValueError(f"target_modules: {fields['target_modules']!r} matches none of the modules {modules[:5]}...")
    return found


def shortest_names(chosen: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Returns the shortest entries of ``target_modules`` that mean exactly some modules.

    A module of which a layer is left out, and one whose end names others too, is named in full.

    Args:
      chosen: The modules, by their full paths.
      modules: All modules of the model.
    """
    chosen = list(chosen)
    everywhere = collections.Counter(end for module in modules for end in _plain_ends(module))
    here = collections.Counter(end for module in chosen for end in _plain_ends(module))
    exact = (next((end for end in _plain_ends(m) if here[end] == everywhere[end]), m) for m in chosen)
    return list(dict.fromkeys(exact))


def saved_modules(fields: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """Returns the modules of ``modules_to_save``: a name is the end of a path, and includes its submodules."""
    names = tuple(fields.get("modules_to_save") or ())
    return [m for m in modules if any(m[: i + 1].endswith(names) for i in _ends_of_parts(m))]


def rank_and_alpha(fields: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Returns the rank and alpha of a module, each of the first pattern that matches."""
    return ranks_and_alphas(fields, [module])[module]


def ranks_and_alphas(fields: Mapping[str, Any], modules: Iterable[str]) -> dict[str, tuple[int, float]]:
    """Returns the rank and alpha of each module; raises like :func:`match_modules` for regular expressions."""
    search = _searcher()

    def resolve(field, module, default):
        for pattern, value in (fields.get(field) or {}).items():
            if search(field, rf"(.*\.)?({pattern})$", module):
                return value
        return default

    return {
        m: (resolve("rank_pattern", m, fields["r"]), resolve("alpha_pattern", m, fields["lora_alpha"])) for m in modules
    }


def tied_fields(fields: Mapping[str, Any], table: str, head: str) -> dict[str, Any]:
    """Returns the fields with what ``ensure_weight_tying`` adds: table and head, if either is named."""
    fields = dict(fields)
    saved, targets = fields.get("modules_to_save") or [], fields.get("target_modules") or []
    if any(name.split(".")[-1] in _TABLES for name in saved):
        return {**fields, "modules_to_save": [*saved, table, head]}
    if isinstance(targets, str):
        search = _searcher()
        if targets.lower() == "all-linear" or not _named(targets, _TABLES, search):
            return fields
        return {**fields, "target_modules": rf"(?:{targets}|{re.escape(table)}|{re.escape(head)})"}
    if any(name.split(".")[-1] in _TABLES for name in targets):
        return {**fields, "target_modules": [*targets, table, head]}
    return fields


def _searcher() -> Callable:
    """Returns a function that matches regular expressions at the start of texts, or in full, in limited total time."""
    end, compiled = time.process_time() + _SECONDS, {}

    def search(field: str, pattern: str, text: str, whole: bool = False) -> Any:
        if pattern not in compiled:
            compiled[pattern] = _compile(field, pattern)
        try:
            if (left := end - time.process_time()) <= 0:
                raise TimeoutError
            match = compiled[pattern].fullmatch if whole else compiled[pattern].match
            return match(text, timeout=left)
        except TimeoutError as error:
            raise ValueError(f"{field}: matching {_cut(pattern)!r} takes more than {_SECONDS} seconds") from error

    return search


def _compile(field: str, pattern: str) -> regex.Pattern:
    if len(pattern) > _LONGEST:
        raise ValueError(f"{field}: expected a regular expression of at most {_LONGEST} characters, got {len(pattern)}")
    try:
        # Only the syntax of Python, which PEFT uses: recursion, for one, takes unbounded memory.
        re.compile(pattern)
        if math.prod(max(int(n[:9]), 1) for n in re.findall(r"\{\s*(\d+)", pattern)) > _COPIES:
            raise ValueError(f"{field}: {_cut(pattern)!r} repeats a part more than {_COPIES} times")
        return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"{field}: {_cut(pattern)!r} is not a regular expression: {error}") from error


def _cut(pattern: str) -> str:
    return pattern if len(pattern) < 200 else f"{pattern[:200]}..."


def _named(pattern: str, names: Iterable[str], search: Callable) -> bool:
    return any(_means("target_modules", pattern, name, search) for name in names)


def _means(field: str, targets, module: str, search: Callable) -> bool:
    if isinstance(targets, str):
        return search(field, targets, module, whole=True) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _plain_ends(module: str) -> list[str]:
    """Returns the ends of a path that are of all layers: the shortest first, those without a number."""
    parts = module.split(".")
    first = max((i + 1 for i, part in enumerate(parts) if part.isdigit()), default=0)
    return [".".join(parts[i:]) for i in reversed(range(first, len(parts)))]


def _ends_of_parts(module: str) -> list[int]:
    return [i for i in range(len(module)) if i + 1 == len(module) or module[i + 1] == "."]


def _layer(module: str, patterns, search: Callable) -> int | None:
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
        return int(found["idx"]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := search("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", module):
            return int(found["idx"])
    return None
