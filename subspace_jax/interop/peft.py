"""LoRA and DoRA adapters as Hugging Face PEFT folders, in and out, of language and of vision models."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from subspace_jax.adapters import DoRA, Full, LoRA
from subspace_jax.adapters.surface import settings_of
from subspace_jax.interop.causal_lm_write import replacing
from subspace_jax.interop.names import Place, module_places
from subspace_jax.interop.peft_rules import match_modules, rank_and_alpha
from subspace_jax.interop.safetensors_io import read_header, write_safetensors
from subspace_jax.interop.vision_adapters import (
    VisionConfig,
    vision_adapter_names,
    vision_adapter_specs,
    without_effect,
)
from subspace_jax.nn import CausalLMConfig, causal_lm_specs

PyTree = Any
Config = CausalLMConfig | VisionConfig

_PREFIX = "base_model.model."
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
# Each changes the forward pass, and none is implemented.
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
)
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


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as it was read.

    Attributes:
      trainable: Its arrays, for :func:`subspace_jax.adapters.bind`.
      settings: Path of each weight to its setting.
      fields: Those of ``adapter_config.json``, to be written again.
    """

    trainable: PyTree
    settings: Mapping[str, Any]
    fields: Mapping[str, Any]


def load_peft_adapter(folder: str | os.PathLike, config: Config) -> PeftAdapter:
    """Reads a folder that PEFT wrote, LoRA, rsLoRA or DoRA.

    Paths of ViT, DeiT, DINOv2 and Swin may be those of transformers 5 or of 4 (PEFT itself takes only those of the
    version that it runs on).  An adapter of a residual network is for both its trees, as ``load_vision`` gives them.
    A head under ``modules_to_save`` comes with its bias.  Layers that the folder leaves out, or gives another rank,
    are filled up with zeros, because our layers are stacked.  Factors come as float32, as PEFT has them.  A stored
    copy of an adapted embedding is passed over.

    Args:
      folder: Has ``adapter_config.json`` and ``adapter_model.safetensors``.
      config: The model that it is for.

    Returns:
      The adapter.

    Raises:
      ValueError: A field is missing or asks for what is not implemented, tensors are missing (PEFT leaves those random
        or zero), left over, without the prefix, or of the wrong shape, weights are pickled, or the embedding of a tied
        model is adapted, whose head PEFT leaves as it is.
      FileNotFoundError: A file is not there.
    """
    folder = pathlib.Path(folder)
    if not (folder / _CONFIG).exists():
        raise FileNotFoundError(f"{folder}: has no {_CONFIG}")
    fields = json.loads((folder / _CONFIG).read_text())
    if not (folder / _TENSORS).exists():
        if (folder / "adapter_model.bin").exists():
            raise ValueError(f"{folder}: adapter_model.bin is pickled, and reading it may run any code; convert it")
        raise FileNotFoundError(f"{folder}: has no {_TENSORS}")
    tensors = {_plain_name(name): t for name, t in read_header(folder / _TENSORS)[0].items()}
    _check_fields(fields, config)
    version = _version(config, tensors)
    settings, names = _layout(fields, config, version)
    specs, arrays = _specs(config), {}
    for path, modules in names.items():
        shape, setting = _at(specs, path.split("/")).shape, settings[path]
        for module, layer in modules.items():
            for name, (suffix, wanted, order) in _tensors(setting, path, shape, layer).items():
                stored = tensors.pop(f"{module}{suffix}", None)
                if stored is None:
                    raise ValueError(f"{folder}: the tensor {_PREFIX}{module}{suffix} is missing")
                value = np.asarray(stored.read()).astype(np.float32)
                if value.shape != wanted:
                    raise ValueError(f"{folder}: {_PREFIX}{module}{suffix}: expected {wanted}, got {value.shape}")
                value = value.transpose(order)
                if layer is None:
                    arrays[path, name] = value.reshape(_full_shape(setting, shape, name))
                    continue
                full = _full_shape(setting, shape, name)
                own = arrays.setdefault((path, name), np.zeros(full, np.float32))
                own[(layer, *(slice(0, n) for n in value.shape))] = value
    for name in [n for n in tensors if n.endswith(".base_layer.weight") or without_effect(n.split(".lora_")[0])]:
        del tensors[name]
    if tensors:
        raise ValueError(f"{folder}: tensors that no target has: {[_PREFIX + name for name in sorted(tensors)][:5]}")
    trainable: dict = {}
    for (path, name), value in arrays.items():
        node = trainable
        for part in path.split("/"):
            node = node.setdefault(part, {})
        node[name] = jnp.asarray(value)
    return PeftAdapter(trainable, settings, fields)


def save_peft_adapter(
    folder: str | os.PathLike,
    config: Config,
    trainable: PyTree,
    settings: Mapping[str, Any],
    *,
    base_model: str = "",
    fields: Mapping[str, Any] | None = None,
    names: str = "v5",
) -> None:
    """Writes a folder that PEFT reads.

    The folder appears when all is written: whatever goes wrong before, a full disk among it, leaves an older one as it
    was.

    Args:
      folder: Where to write; made where there is none.  An adapter in it is replaced, its other files stay.
      config: The model.
      trainable: Adapters of its parameters.
      settings: Their rules, LoRA, DoRA or Full only.
      base_model: Name or folder of the checkpoint that the adapter belongs to.
      fields: Those of an adapter that was read, to be written as they were; made from the settings by default.
      names: "v5" for the paths that ViT, DeiT and Swin have on transformers 5, "v4" for those on 4; fields that were
        read name the paths of one of them.

    Raises:
      ValueError: A setting has no counterpart in PEFT, LoRA and DoRA, two kinds of scale or several dropouts are mixed,
        or the fields are not those of these adapters.
      OSError: Writing failed.
    """
    chosen = settings_of(trainable, settings)
    made = fields or _fields(config, chosen, base_model, names)
    _check_fields(made, config)
    expected, modules_of = _layout(made, config, names)
    specs, tensors = _specs(config), {}
    if expected.keys() != chosen.keys():
        raise ValueError(f"fields: mean {sorted(expected)}, the adapters are of {sorted(chosen)}")
    for path, setting in chosen.items():
        if isinstance(setting, LoRA | DoRA) and (type(setting), setting.rank, setting.scale) != (
            type(expected[path]),
            expected[path].rank,
            expected[path].scale,
        ):
            raise ValueError(f"fields: mean {expected[path]} for {path}, the adapter is {setting}")
    for path, modules in modules_of.items():
        shape, own = _at(specs, path.split("/")).shape, _at(trainable, path.split("/"))
        for module, layer in modules.items():
            for name, (suffix, stored, order) in _tensors(expected[path], path, shape, layer).items():
                value = np.asarray(own[name] if layer is None else own[name][layer], np.float32)
                size = tuple(stored[axis] for axis in order)
                value = value.reshape(size) if layer is None else value[tuple(slice(0, n) for n in size)]
                tensors[f"{_PREFIX}{module}{suffix}"] = np.ascontiguousarray(value.transpose(np.argsort(order)))
    tensors = dict(sorted(tensors.items()))
    shapes = {name: (t.shape, t.dtype) for name, t in tensors.items()}
    with replacing(pathlib.Path(folder), _is_adapter_file) as new:
        write_safetensors(new / _TENSORS, shapes, tensors.values())
        (new / _CONFIG).write_text(json.dumps(dict(made), indent=2, sort_keys=True) + "\n")


def _is_adapter_file(name: str) -> bool:
    # An older pickled adapter would be read by nobody, and be another one.
    return name in (_CONFIG, _TENSORS, "adapter_model.bin")


def peft_fields(
    config: CausalLMConfig, trainable: PyTree, settings: Mapping[str, Any], *, base_model: str = ""
) -> dict[str, Any]:
    """Makes the fields of ``adapter_config.json``, and so finds out whether PEFT has a counterpart of adapters.

    Args:
      config: The model.
      trainable: Adapters of its parameters, of arrays or of shapes.
      settings: Their rules.
      base_model: Name or folder of the checkpoint that the adapter belongs to.

    Raises:
      ValueError: See :func:`save_peft_adapter`.
    """
    fields = _fields(config, settings_of(trainable, settings), base_model)
    _check_fields(fields, config)
    _layout(fields, config)
    return fields


def _plain_name(name: str) -> str:
    if not name.startswith(_PREFIX):
        raise ValueError(f"{name}: lacks the prefix {_PREFIX!r}; PEFT would load nothing in silence")
    name = name.removeprefix(_PREFIX).replace(".default", "")
    return name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")


def _check_fields(fields: Mapping[str, Any], config: Config) -> None:
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"peft_type: expected 'LORA', got {fields.get('peft_type')!r}")
    if missing := [name for name in ("r", "lora_alpha") if fields.get(name) is None]:
        raise ValueError(f"{_CONFIG}: lacks {missing}")
    if asked := [name for name in _REFUSED if fields.get(name)]:
        raise ValueError(f"{_CONFIG}: {asked} change the forward pass and are not supported")
    if fields.get("bias", "none") != "none":
        raise ValueError(f"bias: expected 'none', got {fields['bias']!r}")
    start = fields.get("init_lora_weights", True)
    if not isinstance(start, bool) and start != "gaussian":
        raise ValueError(f"init_lora_weights: {start!r} also changes the base weights, and is not supported")


def _specs(config: Config) -> PyTree:
    return causal_lm_specs(config) if isinstance(config, CausalLMConfig) else vision_adapter_specs(config)


def _places(config: Config, names: str) -> dict[str, Place]:
    return module_places(config) if isinstance(config, CausalLMConfig) else vision_adapter_names(config, names)


def _version(config: Config, tensors: Iterable[str]) -> str:
    """By which version's paths a file names its modules; by those of either one where they agree."""
    own = _places(config, "v4").keys() - _places(config, "v5").keys()
    return "v4" if any(name.startswith(tuple(own)) for name in tensors) else "v5"


def _layout(fields: Mapping[str, Any], config: Config, names_of: str = "v5") -> tuple[dict[str, Any], dict[str, dict]]:
    """Setting of each path, and its modules with their layers."""
    places = {m: p for m, p in _places(config, names_of).items() if _leaf(config, p) is not None}
    linear = [m for m, p in places.items() if p.path[-1] not in ("embed", "position", "conv")]
    if isinstance(config, CausalLMConfig):
        linear = [m for m in linear if places[m].path != ("head",)]
    method = DoRA if fields.get("use_dora") else LoRA
    ranks: dict[str, dict] = {}
    names: dict[str, dict] = {}
    for module in match_modules(fields, places, linear=linear):
        place = places[module]
        if place.path == ("embed",) and config.tied:
            raise ValueError("target_modules: the embedding is tied to the head, which PEFT leaves without the update")
        path = "/".join((*place.path, _leaf(config, place)))
        ranks.setdefault(path, {})[place.layer] = rank_and_alpha(fields, module)
        names.setdefault(path, {})[module] = place.layer
    settings = {}
    for path, own in ranks.items():
        shape = _at(_specs(config), path.split("/")).shape
        layers = [None] if None in own else range(shape[0])
        rank = tuple(own[i][0] if i in own else 0 for i in layers)
        alpha = tuple(own[i][1] if i in own else fields["lora_alpha"] for i in layers)
        rank = rank[0] if len(set(rank)) == 1 else rank
        alpha = alpha[0] if len(set(alpha)) == 1 else alpha
        settings[path] = method(
            rank,
            alpha,
            rslora=bool(fields.get("use_rslora")),
            dropout=fields.get("lora_dropout") or 0.0,
            window=len(shape) - 2 if None in own else 0,
        )
    for saved in fields.get("modules_to_save") or ():
        # A saved module may hold others: the classifier of a residual network is a sequence with one linear map.
        found = [m for m in places if m == saved or m.endswith(f".{saved}") or m.startswith(f"{saved}.")]
        if not found or any(places[m].layer is not None for m in found):
            raise ValueError(
                f"modules_to_save: {saved!r} is none of {[m for m, p in places.items() if p.layer is None]}"
            )
        for module in found:
            parts = _at(_specs(config), places[module].path)
            for name in [name for name in (_leaf(config, places[module]), "bias") if name in parts]:
                path = "/".join((*places[module].path, name))
                settings[path], names[path] = Full(), {module: None}
    return settings, names


def _leaf(config: Config, place: Place) -> str | None:
    parts = _at(_specs(config), place.path)
    return next((name for name in ("kernel", "embedding") if name in parts), None)


def _tensors(setting: Any, path: str, shape: tuple[int, ...], layer: int | None) -> dict[str, tuple]:
    """Our arrays of one module: name in the file, shape there, and which axis there each axis here is."""
    if path.endswith("/bias"):
        return {"full": (".bias", shape, (0,))}
    *window, rows, columns = shape if layer is None else shape[1:]
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


def _full_shape(setting: Any, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Shape of one of our arrays of a weight, over all its layers."""
    if name == "full":
        return shape
    *lead, rows, columns = shape
    rank = max(setting.rank) if isinstance(setting.rank, tuple) else setting.rank
    window = getattr(setting, "window", 0)
    inner = lead[: len(lead) - window]
    return {"a": (*lead, rows, rank), "b": (*inner, rank, columns), "magnitude": (*inner, columns)}[name]


def _fields(config: Config, chosen: Mapping[str, Any], base_model: str, names_of: str = "v5") -> dict[str, Any]:
    """The config of adapters that were made here: modules by their whole paths, ranks of their own as patterns."""
    adapted = {path: s for path, s in chosen.items() if isinstance(s, LoRA | DoRA)}
    if strange := [f"{path}: {s}" for path, s in chosen.items() if not isinstance(s, LoRA | DoRA | Full)]:
        raise ValueError(f"settings: without a counterpart in PEFT: {strange}")
    if changed := [path for path, s in adapted.items() if not s.keeps_base]:
        raise ValueError(f"settings: {changed} belong to changed base weights, which PEFT would not have; merge them")
    if len({(type(s), s.rslora) for s in adapted.values()}) != 1:
        raise ValueError("settings: PEFT has LoRA or DoRA, and one kind of scale, in one folder; got a mixture or none")
    if len({s.dropout for s in adapted.values()}) != 1:
        raise ValueError("settings: PEFT has one dropout in a folder; got several")
    first = next(iter(adapted.values()))
    names = {(("/".join((*p.path, _leaf(config, p) or "")), p.layer)): m for m, p in _places(config, names_of).items()}
    targets, ranks, alphas, saved = [], {}, {}, []
    for (path, layer), module in names.items():
        setting = chosen.get(path)
        if isinstance(setting, Full):
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
    escaped = {m: m.replace(".", r"\.") for m in targets}
    return {
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
    }


def _at(tree: PyTree, path) -> Any:
    for key in path:
        tree = tree[key]
    return tree
