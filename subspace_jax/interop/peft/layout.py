"""Where the tensors of a PEFT adapter are in our trees, and the fields that describe adapters made here."""

from collections.abc import Iterable, Mapping
from typing import Any

from subspace_jax.adapters import DoRA, Full, LoRA
from subspace_jax.interop.hf.names import Place, module_places
from subspace_jax.interop.peft.rules import match_modules, ranks_and_alphas, saved_modules, tied_fields
from subspace_jax.interop.peft.vision import VisionConfig, vision_adapter_names, vision_adapter_specs
from subspace_jax.nn import CausalLMConfig, causal_lm_specs

PyTree = Any
Config = CausalLMConfig | VisionConfig

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
    """An adapter changes the embedding of a tied model otherwise than its head."""


UNTIE = (
    "the model's head is its embedding, and PEFT changes the one without the other; untie the model by "
    "nn.untie_causal_lm, and read the adapter for the config that it returns"
)


def specs_of(config: Config) -> PyTree:
    """Describes the parameters that adapters of a model go to."""
    return causal_lm_specs(config) if isinstance(config, CausalLMConfig) else vision_adapter_specs(config)


def is_tied(config: Config) -> bool:
    """Whether the words of a language model are scored by its embedding."""
    return isinstance(config, CausalLMConfig) and config.tied


def version_of(config: Config, tensors: Iterable[str]) -> str:
    """By which version's paths a file names its modules; by those of either one where they agree."""
    own = _places(config, "v4").keys() - _places(config, "v5").keys()
    return "v4" if any(name.startswith(tuple(own)) for name in tensors) else "v5"


def written_out(fields: Mapping[str, Any], config: Config, tensors: Iterable[str] = ()) -> Mapping[str, Any]:
    """The fields, with the tables that PEFT reads without being told.

    Those are what ``ensure_weight_tying`` adds, of a model that is no longer tied if the file has both, and tensors
    of the names of the model's own table and head, which PEFT puts into the model itself.
    """
    if not isinstance(config, CausalLMConfig):
        return fields
    table = next(m for m, p in module_places(config).items() if p.path == ("embed",))
    has_both = all(any(name.startswith(f"{m}.") for name in tensors) for m in (table, _HEAD))
    if fields.get("ensure_weight_tying") and (config.tied or has_both):
        fields = tied_fields(fields, table, _HEAD)
    saved = saved_modules(fields, (table, _HEAD))
    loose = [m for m in (table, _HEAD) if m not in saved and f"{m}.weight" in tensors]
    # One of them alone would change both tables of a tied model, for these are one tensor there.
    if loose and (not config.tied or len(saved) + len(loose) == 2):
        fields = {**fields, "modules_to_save": [*(fields.get("modules_to_save") or ()), *loose]}
    return fields


def layout(
    fields: Mapping[str, Any], config: Config, version: str = "v5"
) -> tuple[dict[str, Any], dict[str, dict[str, int | None]]]:
    """AdapterConfig of each path, and the modules of each with their layers.

    Of a tied model a table that trains as a whole has two modules, which hold the same numbers.

    Raises:
      TiedTablesError: Embedding and head of a tied model are changed otherwise.
      ValueError: What the fields mean has no place here.
    """
    if is_tied(config):
        settings, names = layout(fields, config.replace(tied=False), version)
        table, head = settings.get(_TABLE), settings.pop(_HEAD_KERNEL, None)
        if table != head or isinstance(table, LoRA | DoRA):
            raise TiedTablesError(f"{'modules_to_save' if Full() in (table, head) else 'target_modules'}: {UNTIE}")
        if head is not None:
            names[_TABLE] |= names.pop(_HEAD_KERNEL)
        return settings, names
    specs, every = specs_of(config), _places(config, version)
    places = {m: p for m, p in every.items() if leaf_of(specs, p) is not None}
    linear = [m for m, p in places.items() if p.path[-1] not in ("embed", "position", "conv")]
    if isinstance(config, CausalLMConfig):
        linear = [m for m in linear if places[m].path != ("head",)]
    targets = match_modules(fields, places, linear=linear)
    settings, names = _adapted(fields, specs, {m: places[m] for m in targets})
    for module in saved_modules(fields, places):
        place = places[module]
        if place.layer is not None or module in targets:
            what = "adapted, too" if module in targets else "one of stacked layers"
            whole = [m for m, p in places.items() if p.layer is None]
            raise ValueError(f"modules_to_save: {module!r} is {what}; expected one of {whole}")
        for name in [name for name in (leaf_of(specs, place), "bias") if name in at(specs, place.path)]:
            path = "/".join((*place.path, name))
            settings[path], names[path] = Full(), {module: None}
    for path, modules in _biases(fields, config, specs, every, targets).items():
        settings[path], names[path] = Full(), modules
    return settings, names


def _adapted(
    fields: Mapping[str, Any], specs: PyTree, places: Mapping[str, Place]
) -> tuple[dict[str, Any], dict[str, dict[str, int | None]]]:
    """LoRA or DoRA of each path, with the rank and the alpha of each of its layers."""
    method = DoRA if fields.get("use_dora") else LoRA
    ranks: dict[str, dict] = {}
    names: dict[str, dict] = {}
    for module, own in ranks_and_alphas(fields, places).items():
        place = places[module]
        path = "/".join((*place.path, leaf_of(specs, place)))
        ranks.setdefault(path, {})[place.layer] = own
        names.setdefault(path, {})[module] = place.layer
    settings = {}
    for path, own in ranks.items():
        shape = at(specs, path.split("/")).shape
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


def _biases(
    fields: Mapping[str, Any], config: Config, specs: PyTree, places: Mapping[str, Place], targets: Iterable[str]
) -> dict[str, dict[str, int | None]]:
    """The biases that train, by path: those of adapted modules, or all."""
    bias = fields.get("bias") or "none"
    if bias == "none":
        return {}
    if bias == "all" and not isinstance(config, CausalLMConfig):
        raise ValueError("bias: 'all' is read for language models only; expected 'none' or 'lora_only'")
    targets, found = set(targets), {}
    for module, place in places.items():
        if "bias" in at(specs, place.path) and (bias == "all" or module in targets):
            # PEFT's layer wraps the one that it adapts.
            name = f"{module}.base_layer" if module in targets else module
            found.setdefault("/".join((*place.path, "bias")), {})[name] = place.layer
    for path, modules in found.items():
        layers = set(modules.values())
        if None not in layers and len(layers) < (count := at(specs, path.split("/")).shape[0]):
            raise ValueError(f"bias: {bias!r} of {len(layers)} among {count} layers of {path} is not supported")
    return found


def tensors_of(setting: Any, path: str, shape: tuple[int, ...], layer: int | None) -> dict[str, tuple]:
    """Our arrays of one module: name in the file, shape there, and which axis there each axis here is."""
    shape = shape if layer is None else shape[1:]
    if path.endswith("/bias"):
        return {"full": (".bias", shape, (0,))}
    *window, rows, columns = shape
    # A convolution's kernel is stored as [out, in, *window]; factors of a linear map are those of a window of no axes.
    swapped = (*range(2, 2 + len(window)), 1, 0)
    table = path.endswith("/embedding")
    if isinstance(setting, Full):
        own = ((rows, columns), (0, 1)) if table else ((columns, rows, *window), swapped)
        return {"full": (".weight", *own)}
    rank = setting.rank[layer] if isinstance(setting.rank, tuple) else setting.rank
    a, b = (".lora_embedding_A", ".lora_embedding_B") if table else (".lora_A.weight", ".lora_B.weight")
    ones = (1,) * len(window)
    found = {"a": (a, (rank, rows, *window), swapped), "b": (b, (columns, rank, *ones), swapped)}
    if isinstance(setting, DoRA):
        magnitude = (1, columns, *ones) if window else (columns,)
        found["magnitude"] = (".lora_magnitude_vector", magnitude, tuple(range(len(magnitude))))
    return found


def full_shape(setting: Any, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Shape of one of our arrays of a weight, over all its layers."""
    if name == "full":
        return shape
    *lead, rows, columns = shape
    rank = max(setting.rank) if isinstance(setting.rank, tuple) else setting.rank
    window = getattr(setting, "window", 0)
    inner = lead[: len(lead) - window]
    return {"a": (*lead, rows, rank), "b": (*inner, rank, columns), "magnitude": (*inner, columns)}[name]


def make_fields(config: Config, chosen: Mapping[str, Any], base_model: str, version: str = "v5") -> dict[str, Any]:
    """The config of adapters that were made here: modules by their whole paths, ranks of their own as patterns.

    Raises:
      ValueError: PEFT has no counterpart of the settings.
    """
    adapted = {path: s for path, s in chosen.items() if isinstance(s, LoRA | DoRA)}
    _check_settings(config, chosen, adapted)
    first = next(iter(adapted.values()))
    specs = specs_of(config)
    names = {("/".join((*p.path, leaf_of(specs, p) or "")), p.layer): m for m, p in _places(config, version).items()}
    targets, ranks, alphas, saved = [], {}, {}, []
    for (path, layer), module in names.items():
        setting = chosen.get(path)
        if isinstance(setting, Full) and layer is None:
            saved.append(module)
        if path not in adapted:
            continue
        rank = setting.rank[layer] if isinstance(setting.rank, tuple) else setting.rank
        if rank:
            targets.append(module)
            ranks[module] = rank
            alphas[module] = setting.alpha[layer] if isinstance(setting.alpha, tuple) else setting.alpha
    rank, alpha = (max(set(d.values()), key=list(d.values()).count) for d in (ranks, alphas))
    language = isinstance(config, CausalLMConfig)
    # The table of a tied model is in both places, and goes on to be one where PEFT trains it.
    both = {"ensure_weight_tying": True} if is_tied(config) and _TABLE in chosen else {}
    saved += [_HEAD] if both else []
    escaped = {m: m.replace(".", r"\.") for m in targets}
    made = {
        **_DEFAULTS,
        "alpha_pattern": {escaped[m]: v for m, v in alphas.items() if v != alpha},
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": language and config.family == "gpt2",
        "lora_alpha": alpha,
        "lora_dropout": first.dropout,
        "modules_to_save": saved or None,
        "r": rank,
        "rank_pattern": {escaped[m]: v for m, v in ranks.items() if v != rank},
        "target_modules": targets,
        "task_type": "CAUSAL_LM" if language else None,
        "use_dora": isinstance(first, DoRA),
        "use_rslora": first.rslora,
        **both,
    }
    return made | {"bias": _bias_of(made, config, chosen, version)}


def _check_settings(config: Config, chosen: Mapping[str, Any], adapted: Mapping[str, Any]) -> None:
    if strange := [f"{path}: {s}" for path, s in chosen.items() if not isinstance(s, LoRA | DoRA | Full)]:
        raise ValueError(f"settings: without a counterpart in PEFT: {strange}")
    if changed := [path for path, s in adapted.items() if not s.keeps_base]:
        raise ValueError(f"settings: {changed} belong to changed base weights, which PEFT would not have; merge them")
    if len({(type(s), s.rslora) for s in adapted.values()}) != 1:
        raise ValueError("settings: PEFT has LoRA or DoRA, and one kind of scale, in one folder; got a mixture or none")
    if len({s.dropout for s in adapted.values()}) != 1:
        raise ValueError("settings: PEFT has one dropout in a folder; got several")
    if is_tied(config) and _TABLE in adapted:
        raise ValueError("settings: the embedding is tied to the head, which PEFT leaves without its update; merge it")


def _bias_of(made: Mapping[str, Any], config: Config, chosen: Mapping[str, Any], version: str) -> str:
    """The field ``bias`` by which PEFT trains just these."""
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
        f"settings: {sorted(left) or 'some of the biases'} train as a whole, without a counterpart in PEFT, which has "
        "whole modules outside of the layers, and biases, all of them or those of adapted modules"
    )


def _places(config: Config, version: str) -> dict[str, Place]:
    return module_places(config) if isinstance(config, CausalLMConfig) else vision_adapter_names(config, version)


def leaf_of(specs: PyTree, place: Place) -> str | None:
    """The weight of a module, if it has one that may be adapted."""
    parts = at(specs, place.path)
    return next((name for name in ("kernel", "embedding") if name in parts), None)


def at(tree: PyTree, path: Iterable[str]) -> Any:
    """What is at a path of a nested dict."""
    for key in path:
        tree = tree[key]
    return tree
