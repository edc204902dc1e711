"""The tensors of a PEFT adapter as arrays of adapters, and the fields that describe adapters."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from subspace_jax.adapters import AdapterConfig, DoRA, Full, LoRA
from subspace_jax.interop.peft.models import Config, PeftModel, linear_modules, peft_model
from subspace_jax.interop.peft.rules import (
    match_modules,
    ranks_and_alphas,
    saved_modules,
    shortest_names,
    tied_fields,
)
from subspace_jax.interop.tensors import Place, at

Configs = Mapping[str, AdapterConfig]

_HEAD, _TABLE, _HEAD_KERNEL = "lm_head", "embed/embedding", "head/kernel"
_DEFAULTS = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "bias": "none",
    "exclude_modules": None,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "rank_pattern": {},
    "revision": None,
    "task_type": "CAUSAL_LM",
}


class TiedTablesError(ValueError):
    """An adapter changes the embedding table of a tied model, but not its head, or the other way round."""


UNTIE = (
    "the model's head is its embedding table, and PEFT changes only one of them; untie the model by "
    "nn.untie_causal_lm, and read the adapter for the config that it returns"
)


def version_of(config: Config, tensors: Iterable[str]) -> str:
    """Returns the version of transformers whose paths a file has; "v5" where they agree."""
    own = peft_model(config, "v4").places.keys() - peft_model(config, "v5").places.keys()
    return "v4" if any(name.startswith(tuple(own)) for name in tensors) else "v5"


def written_out(fields: Mapping[str, Any], config: Config, tensors: Iterable[str] = ()) -> Mapping[str, Any]:
    """Returns the fields with the tables that PEFT reads without being told.

    These are what ``ensure_weight_tying`` adds, of a model that is no longer tied if the file has both, and tensors by
    the names of the model's own table and head, which PEFT copies into the model.
    """
    model = peft_model(config)
    if not model.language:
        return fields
    table = next(m for m, p in model.places.items() if p.path == ("embed",))
    has_both = all(any(name.startswith(f"{m}.") for name in tensors) for m in (table, _HEAD))
    if fields.get("ensure_weight_tying") and (model.tied or has_both):
        fields = tied_fields(fields, table, _HEAD)
    saved = saved_modules(fields, (table, _HEAD))
    loose = [m for m in (table, _HEAD) if m not in saved and f"{m}.weight" in tensors]
    # One of them alone would change both tables of a tied model, where these are one tensor.
    if loose and (not model.tied or len(saved) + len(loose) == 2):
        fields = {**fields, "modules_to_save": [*(fields.get("modules_to_save") or ()), *loose]}
    return fields


def layout(
    fields: Mapping[str, Any], config: Config, version: str = "v5"
) -> tuple[dict[str, AdapterConfig], dict[str, dict[str, int | None]]]:
    """Returns the adapter config of each path, and the modules of each path with their layers.

    In a tied model a table that trains itself has two modules, with equal tensors.

    Raises:
      TiedTablesError: Embedding table and head of a tied model differ.
      ValueError: The fields have no counterpart in the model.
    """
    model = peft_model(config, version)
    if model.tied:
        settings, names = layout(fields, config.replace(tied=False), version)
        table, head = settings.get(_TABLE), settings.pop(_HEAD_KERNEL, None)
        if table != head or (table is not None and not table.trains_weight):
            raise TiedTablesError(f"{'modules_to_save' if Full() in (table, head) else 'target_modules'}: {UNTIE}")
        if head is not None:
            names[_TABLE] |= names.pop(_HEAD_KERNEL)
        return settings, names
    places = {m: p for m, p in model.places.items() if model.weight_of(p) is not None}
    targets = match_modules(fields, places, linear=linear_modules(model))
    settings, names = _adapted(fields, model, {m: places[m] for m in targets})
    for module in saved_modules(fields, places):
        place = places[module]
        if place.layer is not None or module in targets:
            what = "adapted, too" if module in targets else "one of stacked layers"
            unstacked = [m for m, p in places.items() if p.layer is None]
            raise ValueError(f"modules_to_save: {module!r} is {what}; expected one of {unstacked}")
        for name in [name for name in (model.weight_of(place), "bias") if name in at(model.specs, place.path)]:
            path = "/".join((*place.path, name))
            settings[path], names[path] = Full(), {module: None}
    for path, modules in _biases(fields, model, targets).items():
        settings[path], names[path] = Full(), modules
    return settings, names


def _adapted(
    fields: Mapping[str, Any], model: PeftModel, places: Mapping[str, Place]
) -> tuple[dict[str, AdapterConfig], dict[str, dict[str, int | None]]]:
    """LoRA or DoRA of each path, with the rank and the alpha of each of its layers."""
    method = DoRA if fields.get("use_dora") else LoRA
    ranks: dict[str, dict] = {}
    names: dict[str, dict] = {}
    for module, own in ranks_and_alphas(fields, places).items():
        place = places[module]
        path = "/".join((*place.path, model.weight_of(place)))
        ranks.setdefault(path, {})[place.layer] = own
        names.setdefault(path, {})[module] = place.layer
    settings = {}
    for path, own in ranks.items():
        shape = at(model.specs, path.split("/")).shape
        layers = [None] if None in own else range(shape[0])
        rank = tuple(own[i][0] if i in own else 0 for i in layers)
        alpha = tuple(own[i][1] if i in own else fields["lora_alpha"] for i in layers)
        settings[path] = method(
            rank[0] if len(set(rank)) == 1 else rank,
            alpha[0] if len(set(alpha)) == 1 else alpha,
            rslora=bool(fields.get("use_rslora")),
            dropout=fields.get("lora_dropout") or 0.0,
            window=len(shape) - 2 if None in own else 0,
        )
    return settings, names


def _biases(fields: Mapping[str, Any], model: PeftModel, targets: Iterable[str]) -> dict[str, dict[str, int | None]]:
    """The biases that train, by path: those of adapted modules, or all."""
    bias = fields.get("bias") or "none"
    if bias == "none":
        return {}
    if bias == "all" and not model.language:
        raise ValueError("bias: 'all' is read for language models only; expected 'none' or 'lora_only'")
    targets, found = set(targets), {}
    for module, place in model.places.items():
        if "bias" in at(model.specs, place.path) and (bias == "all" or module in targets):
            # PEFT wraps the layers that it adapts.
            name = f"{module}.base_layer" if module in targets else module
            found.setdefault("/".join((*place.path, "bias")), {})[name] = place.layer
    for path, modules in found.items():
        layers = set(modules.values())
        if None not in layers and len(layers) < (count := at(model.specs, path.split("/")).shape[0]):
            raise ValueError(f"bias: {bias!r} of {len(layers)} among {count} layers of {path} is not supported")
    return found


def rank_in(config: LoRA, layer: int | None) -> int:
    """Returns the rank of a layer."""
    return config.rank[layer] if isinstance(config.rank, tuple) else config.rank


def tensors_of(config: AdapterConfig, path: str, shape: tuple[int, ...], layer: int | None) -> dict[str, tuple]:
    """Returns for each array of one module: name in the file, shape there, and the axis there of each axis here."""
    shape = shape if layer is None else shape[1:]
    if path.endswith("/bias"):
        return {"full": (".bias", shape, (0,))}
    *window, rows, columns = shape
    # A convolution's kernel is stored as [out, in, *window]; a linear layer is one without window.
    swapped = (*range(2, 2 + len(window)), 1, 0)
    table = path.endswith("/embedding")
    if config.trains_weight:
        own = ((rows, columns), (0, 1)) if table else ((columns, rows, *window), swapped)
        return {"full": (".weight", *own)}
    rank = rank_in(config, layer)
    a, b = (".lora_embedding_A", ".lora_embedding_B") if table else (".lora_A.weight", ".lora_B.weight")
    ones = (1,) * len(window)
    magnitude = (1, columns, *ones) if window else (columns,)
    found = {
        "a": (a, (rank, rows, *window), swapped),
        "b": (b, (columns, rank, *ones), swapped),
        "magnitude": (".lora_magnitude_vector", magnitude, tuple(range(len(magnitude)))),
    }
    return {name: tensor for name, tensor in found.items() if name in config.labels}


def full_shape(config: AdapterConfig, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Returns the shape of an array of a weight, over all its layers."""
    if config.trains_weight:
        return shape
    *lead, rows, columns = shape
    rank = max(config.rank) if isinstance(config.rank, tuple) else config.rank
    inner = lead[: len(lead) - config.window]
    return {"a": (*lead, rows, rank), "b": (*inner, rank, columns), "magnitude": (*inner, columns)}[name]


def make_fields(config: Config, chosen: Configs, base_model: str, version: str = "v5") -> dict[str, Any]:
    """Returns the fields for adapters, ranks and alphas of their own as patterns.

    Modules of language models have the shortest names that mean no other one, those of vision models their full paths:
    patch embeddings and others that are no target here may have the same ends.

    Raises:
      ValueError: PEFT has no counterpart of the adapters.
    """
    model = peft_model(config, version)
    adapted = {path: c for path, c in chosen.items() if not c.trains_weight}
    _check_configs(model, adapted)
    targets, ranks, alphas, saved = [], {}, {}, []
    for module, place in model.places.items():
        path = "/".join((*place.path, model.weight_of(place) or ""))
        if path in adapted and (rank := rank_in(adapted[path], place.layer)):
            alpha = adapted[path].alpha
            targets.append(module)
            ranks[module] = rank
            alphas[module] = alpha[place.layer] if isinstance(alpha, tuple) else alpha
        elif path in chosen and path not in adapted and place.layer is None:
            saved.append(module)
    rank, alpha = (max(set(d.values()), key=list(d.values()).count) for d in (ranks, alphas))
    # The table of a tied model is saved as both modules, and stays tied where PEFT trains it.
    both = {"ensure_weight_tying": True} if model.tied and _TABLE in chosen else {}
    saved += [_HEAD] if both else []
    made = {
        **_DEFAULTS,
        **next(iter(adapted.values())).peft_fields(),
        "alpha_pattern": _patterns(alphas, alpha),
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": model.fan_in_fan_out,
        "lora_alpha": alpha,
        "modules_to_save": saved or None,
        "r": rank,
        "rank_pattern": _patterns(ranks, rank),
        "target_modules": shortest_names(targets, model.places) if model.language else targets,
        "task_type": "CAUSAL_LM" if model.language else None,
        **both,
    }
    return made | {"bias": _bias_of(made, config, chosen, version)}


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Returns the values of modules that differ from a default, by regular expressions of their names."""
    patterns = {}
    for value in set(values.values()) - {default}:
        for name in shortest_names([m for m, own in values.items() if own == value], values):
            patterns[re.escape(name)] = value
    return patterns


def _check_configs(model: PeftModel, adapted: Configs) -> None:
    if strange := [f"{path}: {c}" for path, c in adapted.items() if c.peft_fields() is None]:
        raise ValueError(f"settings: without a counterpart in PEFT: {strange}")
    if changed := [path for path, c in adapted.items() if not c.keeps_base]:
        raise ValueError(f"settings: {changed} belong to changed base weights, which PEFT would not have; merge them")
    fields = [c.peft_fields() for c in adapted.values()]
    dropouts = {own.pop("lora_dropout") for own in fields}
    if not fields or any(own != fields[0] for own in fields):
        raise ValueError("settings: PEFT has LoRA or DoRA, and one kind of scale, in one folder; got a mixture or none")
    if len(dropouts) != 1:
        raise ValueError("settings: PEFT has one dropout in a folder; got several")
    if model.tied and _TABLE in adapted:
        raise ValueError("settings: the embedding is tied to the head, which PEFT leaves without its update; merge it")


def _bias_of(made: Mapping[str, Any], config: Config, chosen: Configs, version: str) -> str:
    """The field ``bias`` by which PEFT trains exactly these biases."""
    left = chosen.keys()
    for bias in ("none", "lora_only", "all"):
        try:
            meant = layout({**made, "bias": bias}, config, version)[0].keys()
        except TiedTablesError:
            raise
        except ValueError:
            continue
        if meant == chosen.keys():
            return bias
        left = left - meant
    raise ValueError(
        f"settings: {sorted(left) or 'some of the biases'} train without a counterpart in PEFT, which saves modules "
        "outside of the layers, and biases, all of them or those of adapted modules"
    )
