"""CLIP and SigLIP with both towers in the files of Hugging Face transformers."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jax.typing import DTypeLike

from subspace_jax.interop.config_fields import MAX_LAYERS, integer, naming, number, read_fields, word
from subspace_jax.interop.hf import vit
from subspace_jax.interop.hf.vit_config import activation_from_hf, activation_to_hf, tower_fields
from subspace_jax.interop.reading import Shardings, check_depth, match_tensors, read_params
from subspace_jax.interop.safetensors_io import open_folder
from subspace_jax.interop.tensors import Place, PyTree, TensorLayout, TensorName
from subspace_jax.interop.vision_tensors import table_tensors
from subspace_jax.interop.writing import SHARD_BYTES, write_checkpoint
from subspace_jax.nn.models.clip.dual_tower import DualTowerConfig, dual_tower_specs
from subspace_jax.nn.models.clip.text_tower import TextTowerConfig, text_tower_specs

_TEXT = {
    "clip": {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
        "eos_token_id": 49407,
    },
    "siglip": {
        "vocab_size": 32000,
        "max_position_embeddings": 64,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "eos_token_id": 1,
    },
}
_TEXT_NAMES = {
    **vit.TOWER_LAYERS,
    "norm": "final_layer_norm",
    "head": "head",
    "embed/embedding": ("embeddings.token_embedding.weight", 0),
    "position/embedding": ("embeddings.position_embedding.weight", 0),
}
# The first checkpoints name a wrong end token; their texts end with the largest token.
_OLD_END = 2


def dual_config_from_fields(fields: Mapping[str, Any]) -> DualTowerConfig:
    """Converts the fields of ``config.json`` to a config; absent ones have the defaults of the model type.

    Raises:
      ValueError: The model type is not CLIP or SigLIP, or the fields contradict one another.
    """
    kind = word(fields, "model_type", None, _TEXT)
    vision = vit.config_from_fields({**fields, "architectures": None})
    own = tower_fields({"text_config": None, **fields}, "text", _TEXT[kind])
    clip = kind == "clip"
    with naming("text_config"):
        width, end = integer(own, "hidden_size"), integer(own, "eos_token_id", least=0)
        text = TextTowerConfig(
            vocab_size=integer(own, "vocab_size"),
            max_length=integer(own, "max_position_embeddings"),
            width=width,
            num_layers=integer(own, "num_hidden_layers", most=MAX_LAYERS),
            num_heads=integer(own, "num_attention_heads"),
            mlp_size=integer(own, "intermediate_size"),
            norm_eps=number(own, "layer_norm_eps", least=0, most=1),
            activation=activation_from_hf(own),
            causal=clip,
            pool=("largest" if end == _OLD_END else "end") if clip else "last",
            end_token=end,
            head_size=0 if clip else width if own.get("projection_size") is None else integer(own, "projection_size"),
        )
    return DualTowerConfig(vision, text, integer(fields, "projection_dim", 512) if clip else 0, biased=not clip)


def dual_fields_from_config(config: DualTowerConfig, dtype: str = "float32") -> dict[str, Any]:
    """Converts a config to the fields of ``config.json``.

    Raises:
      ValueError: Neither CLIP nor SigLIP can express the model.
    """
    text, kind = config.text, config.vision.family
    own = {
        "model_type": f"{kind}_text_model",
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.max_length,
        "hidden_size": text.width,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "intermediate_size": text.mlp_size,
        "layer_norm_eps": text.norm_eps,
        "hidden_act": activation_to_hf(text.activation),
        "eos_token_id": text.end_token,
    }
    vision = vit.fields_from_config(config.vision, dtype)
    fields = {
        "model_type": kind,
        "architectures": ["CLIPModel" if kind == "clip" else "SiglipModel"],
        "dtype": dtype,
        "torch_dtype": dtype,
        "vision_config": {k: v for k, v in vision.items() if k not in ("architectures", "dtype", "torch_dtype")},
        "text_config": own,
    }
    if kind == "clip":
        own["projection_dim"] = fields["vision_config"]["projection_dim"] = config.projection_size
        fields["projection_dim"] = config.projection_size
    else:
        own["projection_size"] = text.head_size
    again = dual_config_from_fields(fields)
    if again != config:
        differs = [f"{part}.{k}" for part in ("vision", "text") for k in vars(getattr(config, part))]
        differs = [k for k in differs if _field(config, k) != _field(again, k)] or ["projection_size, biased"]
        raise ValueError(f"a checkpoint of {kind!r} can't express this config: {differs}")
    return fields


def dual_tensor_layout(config: DualTowerConfig) -> TensorLayout:
    """Returns the parameters with the tensors of a checkpoint with both towers."""
    specs = dual_tower_specs(config)
    tensors = [_below("vision", t) for t in vit.tensor_layout(config.vision).tensors]
    table = vit.with_prefix(_TEXT_NAMES, "text_model.")
    text = table_tensors(text_tower_specs(config.text), table, f"{config.vision.family!r}")
    tensors += [_below("text", t) for t in text]
    if config.projection_size:
        for ours, theirs in (("image_projection", "visual_projection"), ("text_projection", "text_projection")):
            tensors.append(TensorName(f"{theirs}.weight", Place((ours, "kernel")), True))
    shape = (1,) if config.biased else ()
    names = {"scale": "logit_scale", "bias": "logit_bias"}
    for ours in specs["similarity"]:
        tensors.append(TensorName(names[ours], Place(("similarity", ours)), False, tuple(range(len(shape))), shape))
    return TensorLayout(specs, tensors)


def load_dual(
    path: str | os.PathLike, dtype: DTypeLike | None = None, shardings: Shardings | None = None
) -> tuple[DualTowerConfig, PyTree]:
    """Reads a checkpoint folder of CLIP or SigLIP, with both towers, directly onto devices.

    Args:
      path: Has ``config.json`` and ``model.safetensors``, or shards and their index.
      dtype: Dtype of the parameters; the one in the files by default.
      shardings: See :func:`load_vision`.

    Returns:
      The config, and the parameters as :func:`subspace_jax.nn.dual_tower_specs` lays them out.

    Raises:
      ValueError: The model type is not supported (SigLIP 2 of variable resolution among them), weights are pickled,
        tensors are missing, unexpected or of the wrong shape, or a file is damaged.
      FileNotFoundError: The folder or a file is not there.
    """
    fields = read_fields(path)
    with naming(pathlib.Path(path) / "config.json"):
        config = dual_config_from_fields(fields)
    stored = {k: t for k, t in open_folder(path).items() if not k.endswith("embeddings.position_ids")}
    check_depth(path, config.vision.num_layers + config.text.num_layers, stored)
    layout = dual_tensor_layout(config)
    match_tensors(path, f"a {config.vision.family!r} of this config", layout, stored)
    return config, read_params(layout, stored, shardings=shardings, dtype=dtype)


def save_dual(
    path: str | os.PathLike,
    config: DualTowerConfig,
    params: PyTree,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder that :func:`load_dual` and Hugging Face transformers read; see :func:`save_vision`."""
    fields = functools.partial(dual_fields_from_config, config)
    layout = dual_tensor_layout(config).sorted()
    write_checkpoint(path, fields, layout, params, shard_bytes=shard_bytes, overwrite=overwrite)


def _below(tower: str, tensor: TensorName) -> TensorName:
    return dataclasses.replace(tensor, place=Place((tower, *tensor.place.path), tensor.place.layer))


def _field(config: DualTowerConfig, name: str) -> Any:
    part, name = name.split(".")
    return getattr(getattr(config, part), name)
