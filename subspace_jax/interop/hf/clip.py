"""CLIP and SigLIP with both towers, from Hugging Face's checkpoint folders and to them."""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jax.typing import DTypeLike

from subspace_jax.interop.hf import vit_names as vision_transformer_names
from subspace_jax.interop.hf.causal_lm_write import SHARD_BYTES, write_checkpoint
from subspace_jax.interop.hf.config_fields import MAX_LAYERS, integer, naming, number, read_fields, word
from subspace_jax.interop.hf.names import Place, TensorName
from subspace_jax.interop.hf.vit_config import activation_from_hf, activation_to_hf, tower_fields
from subspace_jax.interop.hf.vit_names import TOWER_LAYERS, table_tensors
from subspace_jax.interop.placing import Shardings, check_depth, match_tensors, read_params
from subspace_jax.interop.safetensors_io import open_folder
from subspace_jax.nn.models.clip.dual_tower import DualTowerConfig, dual_tower_specs
from subspace_jax.nn.models.clip.text_tower import TextTowerConfig, text_tower_specs

PyTree = Any

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
    **TOWER_LAYERS,
    "norm": "final_layer_norm",
    "head": "head",
    "embed/embedding": ("embeddings.token_embedding.weight", 0),
    "position/embedding": ("embeddings.position_embedding.weight", 0),
}
# The first checkpoints name a wrong end token; what ends their texts is the largest one.
_OLD_END = 2


def dual_config_from_hf(fields: Mapping[str, Any]) -> DualTowerConfig:
    """Turns the fields of a ``config.json`` of CLIP or SigLIP into a config; what is absent has its type's default.

    Raises:
      ValueError: The model type is another, or the fields contradict one another.
    """
    kind = word(fields, "model_type", None, _TEXT)
    vision = vision_transformer_names.config_from_hf({**fields, "architectures": None})
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


def dual_config_to_hf(config: DualTowerConfig, dtype: str = "float32") -> dict[str, Any]:
    """Turns a config into the fields of a ``config.json``.

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
    vision = vision_transformer_names.config_to_hf(config.vision, dtype)
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
    again = dual_config_from_hf(fields)
    if again != config:
        differs = [f"{part}.{k}" for part in ("vision", "text") for k in vars(getattr(config, part))]
        differs = [k for k in differs if _field(config, k) != _field(again, k)] or ["projection_size, biased"]
        raise ValueError(f"a checkpoint of {kind!r} can't express this config: {differs}")
    return fields


def dual_tensor_names(config: DualTowerConfig) -> list[TensorName]:
    """Lists every tensor of a checkpoint with both towers, with its place here."""
    kind = config.vision.family
    tensors = [_below("vision", t) for t in vision_transformer_names.tensor_names(config.vision)]
    table = {path: _prefixed("text_model.", stored) for path, stored in _TEXT_NAMES.items()}
    tensors += [_below("text", t) for t in table_tensors(text_tower_specs(config.text), table, f"{kind!r}")]
    if config.projection_size:
        for ours, theirs in (("image_projection", "visual_projection"), ("text_projection", "text_projection")):
            tensors.append(TensorName(f"{theirs}.weight", Place((ours, "kernel")), True))
    shape = (1,) if config.biased else ()
    order = tuple(range(len(shape)))
    names = {"scale": "logit_scale", "bias": "logit_bias"}
    for ours in dual_tower_specs(config)["similarity"]:
        tensors.append(TensorName(names[ours], Place(("similarity", ours)), False, order, shape))
    return tensors


def load_dual(
    path: str | os.PathLike, dtype: DTypeLike | None = None, shardings: Shardings | None = None
) -> tuple[DualTowerConfig, PyTree]:
    """Reads a checkpoint folder of CLIP or SigLIP with both towers straight onto devices.

    Args:
      path: Has ``config.json`` and ``model.safetensors``, or shards and their index.
      dtype: Type of the parameters; the one in the files by default.
      shardings: As of :func:`load_vision`.

    Returns:
      The config, and the parameters as :func:`subspace_jax.nn.dual_tower_specs` lays them out.

    Raises:
      ValueError: The model type is not supported (SigLIP 2 of variable resolution among them), weights are pickled,
        tensors are missing, unexpected or of the wrong shape, or a file is damaged.
      FileNotFoundError: The folder or a file is not there.
    """
    fields = read_fields(path)
    with naming(pathlib.Path(path) / "config.json"):
        config = dual_config_from_hf(fields)
    stored = {k: t for k, t in open_folder(path).items() if not k.endswith("embeddings.position_ids")}
    check_depth(path, config.vision.num_layers + config.text.num_layers, stored)
    specs, tensors = dual_tower_specs(config), dual_tensor_names(config)
    match_tensors(path, f"a {config.vision.family!r} of this config", specs, tensors, stored)
    return config, read_params(specs, tensors, stored, shardings=shardings, dtype=dtype)


def save_dual(
    path: str | os.PathLike,
    config: DualTowerConfig,
    params: PyTree,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder that :func:`load_dual` and Hugging Face transformers read; see :func:`save_vision`."""
    tensors = sorted(dual_tensor_names(config), key=lambda t: (t.name, t.part))
    fields = functools.partial(dual_config_to_hf, config)
    specs = dual_tower_specs(config)
    write_checkpoint(path, fields, specs, tensors, params, shard_bytes=shard_bytes, overwrite=overwrite)


def _below(tower: str, tensor: TensorName) -> TensorName:
    place = Place((tower, *tensor.place.path), tensor.place.layer)
    return TensorName(tensor.name, place, tensor.transposed, tensor.order, tensor.shape, tensor.part)


def _prefixed(prefix: str, stored: Any) -> Any:
    return (prefix + stored[0], *stored[1:]) if isinstance(stored, tuple) else prefix + stored


def _field(config: DualTowerConfig, name: str) -> Any:
    part, name = name.split(".")
    return getattr(getattr(config, part), name)
