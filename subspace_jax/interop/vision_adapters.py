"""PEFT's paths of the weights of vision models that adapters go to, and their places here."""

import re

from subspace_jax.interop.dual_tower import dual_tensor_names
from subspace_jax.interop.names import Place
from subspace_jax.interop.vision_transformer_names import tensor_names
from subspace_jax.nn.dual_tower import DualTowerConfig
from subspace_jax.nn.vision_transformer_config import VisionTransformerConfig

# Files keep the names that transformers 4 had in memory; transformers 5 has these.
_NEW_ATTENTION = (
    (re.compile(r"\.attention\.attention\.query$"), ".attention.q_proj"),
    (re.compile(r"\.attention\.attention\.key$"), ".attention.k_proj"),
    (re.compile(r"\.attention\.attention\.value$"), ".attention.v_proj"),
    (re.compile(r"\.attention\.output\.dense$"), ".attention.o_proj"),
)
_NEW = (
    *_NEW_ATTENTION,
    (re.compile(r"(^|\.)encoder\.layer\."), r"\1layers."),
    (re.compile(r"\.intermediate\.dense$"), ".mlp.fc1"),
    (re.compile(r"\.output\.dense$"), ".mlp.fc2"),
)
_RENAMED = {"vit": _NEW, "deit": _NEW, "dinov2": (*_NEW_ATTENTION, (re.compile(r"\.weights_out$"), ".down_proj"))}


def vision_adapter_names(config: VisionTransformerConfig | DualTowerConfig, names: str = "v5") -> dict[str, Place]:
    """Maps PEFT's path of every linear map in a vision model or in dual towers to its place here; one to one.

    ``"vit.layers.3.attention.q_proj"`` is at ``Place(("layers", "attn", "q"), 3)``.  Left out is what PEFT can't adapt:
    convolutions, tensors that several linear maps share, and the output of SigLIP's pooling attention, on which an
    adapter of PEFT has no effect.

    Args:
      config: The model.
      names: "v5", the paths on transformers 5, or "v4", those of adapters made with transformers 4, which differ for
        ViT, DeiT and DINOv2.

    Raises:
      ValueError: ``names`` is neither.
    """
    if names not in ("v4", "v5"):
        raise ValueError(f"names: expected 'v4' or 'v5', got {names!r}")
    if isinstance(config, DualTowerConfig):
        tensors, patterns = dual_tensor_names(config), ()
    else:
        tensors = tensor_names(config, "timm" if config.architecture else "hf")
        patterns = _RENAMED.get(config.family, ()) if names == "v5" and not config.architecture else ()
    places = {}
    for tensor in tensors:
        module = tensor.name.removesuffix(".weight")
        # Transformers 5 takes the two halves of DINOv2's gated perceptron apart.
        if patterns and module.endswith(".weights_in"):
            module = module.replace("weights_in", ("gate_proj", "up_proj")[tensor.part[0]])
        elif tensor.part != (0, 1) or without_effect(module):
            continue
        for pattern, name in patterns:
            module = pattern.sub(name, module)
        if tensor.place.path[-1] == "kernel" and tensor.order is None:
            places[module] = Place(tensor.place.path[:-1], tensor.place.layer)
    return places


def without_effect(module: str) -> bool:
    """Whether a module is one on which an adapter of PEFT has no effect: the attention there reads its bare weight."""
    return module.endswith("head.attention.out_proj")
