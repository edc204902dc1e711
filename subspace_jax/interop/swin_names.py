"""Swin transformers in the files of Hugging Face transformers and of timm."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from subspace_jax.interop.names import Place
from subspace_jax.interop.resnet_names import num_labels
from subspace_jax.interop.vision_tensors import VisionTensor
from subspace_jax.nn import SwinConfig, swin_specs

LAYOUTS = ("hf", "hf_v5", "timm")

_FROM_HF_ACTIVATION = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Module of a block here, and there: in the files of transformers, in its memory since version 5, and in timm's files.
_BLOCK = {
    "norm1": ("layernorm_before", "layernorm_before", "norm1"),
    "attn/q": ("attention.self.query", "attention.q_proj", "attn.qkv"),
    "attn/k": ("attention.self.key", "attention.k_proj", "attn.qkv"),
    "attn/v": ("attention.self.value", "attention.v_proj", "attn.qkv"),
    "attn/relative_bias": ("attention.self", "attention.relative_position_bias", "attn"),
    "attn/out": ("attention.output.dense", "attention.o_proj", "attn.proj"),
    "norm2": ("layernorm_after", "layernorm_after", "norm2"),
    "mlp/up": ("intermediate.dense", "mlp.fc1", "mlp.fc1"),
    "mlp/down": ("output.dense", "mlp.fc2", "mlp.fc2"),
}
_TOP = {
    "patch_embed": ("swin.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    "embed_norm": ("swin.embeddings.norm", "patch_embed.norm"),
    "norm": ("swin.layernorm", "norm"),
    "head": ("classifier", "head.fc"),
}
_TIMM_HARMLESS = {
    "img_size",
    "patch_size",
    "embed_dim",
    "depths",
    "num_heads",
    "window_size",
    "mlp_ratio",
    "num_classes",
    "in_chans",
    "global_pool",
    "drop_rate",
    "drop_path_rate",
    "pretrained",
}


def config_from_hf(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> SwinConfig:
    """Turns the fields of a Hugging Face ``config.json`` into a config.

    The drop path rate of the file is that of its training, and is left out; ``config.replace`` sets another.

    Args:
      fields: The fields; absent ones have transformers' defaults.
      shapes: Shape of every tensor of the checkpoint, where known: without a classifier the config has no classes.

    Raises:
      ValueError: The model is not a Swin transformer of the first version, or its activation is not supported.
    """
    if fields.get("model_type") != "swin":
        raise ValueError(f"model_type: expected 'swin', got {fields.get('model_type')!r}")
    activation = fields.get("hidden_act", "gelu")
    if activation not in _FROM_HF_ACTIVATION:
        raise ValueError(f"hidden_act: expected one of {sorted(_FROM_HF_ACTIVATION)}, got {activation!r}")
    return SwinConfig(
        image_size=_pair(fields.get("image_size", 224), "image_size"),
        patch_size=_one(fields.get("patch_size", 4), "patch_size"),
        embed_dim=fields.get("embed_dim", 96),
        depths=tuple(fields.get("depths", (2, 2, 6, 2))),
        num_heads=tuple(fields.get("num_heads", (3, 6, 12, 24))),
        window=_one(fields.get("window_size", 7), "window_size"),
        mlp_ratio=fields.get("mlp_ratio", 4.0),
        norm_eps=fields.get("layer_norm_eps", 1e-5),
        activation=_FROM_HF_ACTIVATION[activation],
        qkv_bias=fields.get("qkv_bias", True),
        absolute_positions=fields.get("use_absolute_embeddings", False),
        num_classes=0 if shapes is not None and "classifier.weight" not in shapes else num_labels(fields),
        in_channels=fields.get("num_channels", 3),
        family="hf",
    )


def config_from_timm(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> SwinConfig:
    """Reads sizes off the tensors of a timm checkpoint, or of one of the authors' own files.

    Args:
      fields: The fields of its ``config.json``.
      shapes: Shape of every tensor.

    Raises:
      ValueError: The architecture is another one, ``model_args`` changes the forward pass, or the tensors are not those
        of a Swin transformer.
    """
    name = str(fields.get("architecture"))
    if not re.fullmatch(r"swin_(tiny|small|base|large)_patch\d+_window\d+_\d+", name):
        raise ValueError(
            f"architecture: {name!r} is not supported; expected a name such as 'swin_tiny_patch4_window7_224'"
        )
    arguments = fields.get("model_args") or {}
    if unknown := sorted(arguments.keys() - _TIMM_HARMLESS):
        raise ValueError(f"model_args: {unknown} may change what the model computes, and are not supported")
    if fields.get("global_pool", arguments.get("global_pool", "avg")) != "avg":
        raise ValueError(f"global_pool: expected 'avg', got {fields.get('global_pool')!r}")
    depths: dict[int, int] = {}
    for key in shapes:
        if found := re.fullmatch(r"layers\.(\d+)\.blocks\.(\d+)\.attn\.relative_position_bias_table", key):
            stage, index = (int(n) for n in found.groups())
            depths[stage] = max(depths.get(stage, 0), index + 1)
    needed = ["patch_embed.proj.weight", "layers.0.blocks.0.mlp.fc1.weight"]
    if not depths or sorted(depths) != list(range(len(depths))) or any(key not in shapes for key in needed):
        raise ValueError(f"architecture {name!r}: the tensors are not those of a Swin transformer; expected {needed}")
    tables = [shapes[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in range(len(depths))]
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    heads = [key for key in ("head.fc.weight", "head.weight") if key in shapes]
    size = arguments.get("img_size") or (fields.get("pretrained_cfg") or {}).get("input_size", (3, 224, 224))[1:]
    return SwinConfig(
        image_size=_pair(size, "img_size"),
        patch_size=patch,
        embed_dim=width,
        depths=tuple(depths[stage] for stage in range(len(depths))),
        num_heads=tuple(table[1] for table in tables),
        window=(math.isqrt(tables[0][0]) + 1) // 2,
        mlp_ratio=shapes["layers.0.blocks.0.mlp.fc1.weight"][0] / width,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in shapes,
        num_classes=shapes[heads[0]][0] if heads else 0,
        in_channels=channels,
        family="timm",
    )


def tensor_names(config: SwinConfig, layout: str | None = None) -> list[VisionTensor]:
    """Lists every tensor of a checkpoint, with its place here.

    Args:
      config: The model.
      layout: "hf", "timm", or "hf_v5" for the names that transformers 5 has in memory, which PEFT's adapters use;
        the family of the config by default.

    Raises:
      ValueError: The layout is unknown, or timm has no name for absolute positions.
    """
    layout = config.family if layout is None else layout
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    if layout == "timm" and config.absolute_positions:
        raise ValueError("layout: 'timm' can't express absolute positions")
    specs, timm = swin_specs(config), layout == "timm"
    tensors: list[VisionTensor] = []

    def module(name: str, *paths: str, kind: str = "linear") -> None:
        """Adds the tensors of one module there, the arrays of one or more modules here."""
        branch = specs
        for key in paths[0].split("/"):
            branch = branch[key]
        for leaf, spec in branch.items():
            own = kind if leaf == "kernel" else "same"
            shape = spec.shape
            if own == "patch":
                shape = (shape[1], config.in_channels, config.patch_size, config.patch_size)
            elif own == "linear":
                shape = shape[::-1]
            suffix = {"bias": "bias", "table": "relative_position_bias_table"}.get(leaf, "weight")
            places = tuple(Place((*path.split("/"), leaf)) for path in paths)
            stored = (shape[0] * len(paths), *shape[1:])
            tensors.append(VisionTensor(f"{name}.{suffix}", stored, places, own))

    top = {path: names[timm] for path, names in _TOP.items()}
    module(top["patch_embed"], "patch_embed", kind="patch")
    module(top["embed_norm"], "embed_norm")
    if config.absolute_positions:
        spec = specs["position"]["embedding"]
        place = Place(("position", "embedding"))
        tensors.append(VisionTensor("swin.embeddings.position_embeddings", (1, *spec.shape), (place,), "rows"))
    for stage, depth in enumerate(config.depths):
        root = f"layers.{stage}" if timm else f"swin.encoder.layers.{stage}"
        merge = (f"layers.{stage + 1}" if timm else root) + ".downsample"
        for block in range(depth):
            done = set()
            for path, names in _BLOCK.items():
                name = f"{root}.blocks.{block}.{names[LAYOUTS.index(layout)]}"
                paths = [f"stage{stage}/block{block}/{path}"]
                if name.endswith("attn.qkv"):
                    paths = [f"stage{stage}/block{block}/attn/{part}" for part in "qkv"]
                if name not in done:
                    module(name, *paths)
                done.add(name)
        if stage + 1 < len(config.depths):
            module(f"{merge}.norm", f"stage{stage}/merge/norm")
            module(f"{merge}.reduction", f"stage{stage}/merge/reduction")
    module(top["norm"], "norm")
    if config.num_classes:
        module(top["head"], "head")
    return tensors


def canonical_names(names: Iterable[str], layout: str) -> dict[str, str]:
    """Maps the names in a file to those of :func:`tensor_names`, and leaves out indices and masks.

    Of Hugging Face, both spellings are read, with and without the prefix ``swin.``; of timm, also the authors' own
    files, which count the mergings from 0 and call the head ``head``.

    Args:
      names: The names in the file.
      layout: "hf" or "timm".
    """
    names = [name for name in names if not name.endswith((".relative_position_index", ".attn_mask"))]
    if layout == "timm":
        authors = "layers.0.downsample.reduction.weight" in names
        return {name: _from_authors(name) if authors else name for name in names}
    bare = not any(name.startswith("swin.") for name in names)
    prefixed = {name: f"swin.{name}" if bare and not name.startswith("classifier.") else name for name in names}
    return {name: _old_spelling(full) for name, full in prefixed.items()}


def _from_authors(name: str) -> str:
    name = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)
    return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)


def _old_spelling(name: str) -> str:
    found = re.fullmatch(r"(swin\.encoder\.layers\.\d+\.blocks\.\d+)\.(.+)\.([^.]+)", name)
    if not found:
        return name
    old = {names[1]: names[0] for names in _BLOCK.values()}
    return f"{found[1]}.{old.get(found[2], found[2])}.{found[3]}"


def _pair(value: int | Iterable[int], name: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected one number or two, got {value}")
    return pair


def _one(value: int | Iterable[int], name: str) -> int:
    first, second = _pair(value, name)
    if first != second:
        raise ValueError(f"{name}: expected a square, got {value}")
    return first
