"""PEFT's paths of the weights of vision models that adapters go to, and their places here."""

import re
from types import ModuleType
from typing import Any

from subspace_jax.interop.hf import resnet_names, swin_names
from subspace_jax.interop.hf import vit_names as vision_transformer_names
from subspace_jax.interop.hf.clip import dual_tensor_names
from subspace_jax.interop.hf.names import Place
from subspace_jax.nn.models.clip.dual_tower import DualTowerConfig, dual_tower_specs
from subspace_jax.nn.models.resnet.config import ResNetConfig
from subspace_jax.nn.models.swin.config import SwinConfig
from subspace_jax.nn.models.vit.config import VisionTransformerConfig

VisionConfig = VisionTransformerConfig | SwinConfig | ResNetConfig | DualTowerConfig

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


def vision_adapter_specs(config: VisionConfig) -> Any:
    """Describes the arrays that the places of :func:`vision_adapter_names` are among, as ``load_vision`` gives them."""
    if isinstance(config, DualTowerConfig):
        return dual_tower_specs(config)
    return _family(config).specs(config)


def vision_adapter_names(config: VisionConfig, names: str = "v5") -> dict[str, Place]:
    """Maps PEFT's path of what it adapts in a vision model or in dual towers to its place here; one to one.

    ``"vit.layers.3.attention.q_proj"`` is at ``Place(("layers", "attn", "q"), 3)``.  That is every linear map, and of
    residual networks the convolutions without groups.  Left out are tensors that several linear maps share, patch
    embeddings, which are no convolutions here, and the output of SigLIP's pooling attention, on which an adapter of
    PEFT has no effect.

    Args:
      config: The model.
      names: "v5", the paths on transformers 5, or "v4", those of adapters made with transformers 4, which differ for
        ViT, DeiT, DINOv2 and Swin.

    Raises:
      ValueError: ``names`` is neither.
    """
    if names not in ("v4", "v5"):
        raise ValueError(f"names: expected 'v4' or 'v5', got {names!r}")
    patterns = ()
    if isinstance(config, DualTowerConfig):
        tensors = dual_tensor_names(config)
    else:
        layout = getattr(config, "convention", "timm" if config.architecture else "hf")
        if layout == "hf" and names == "v5":
            patterns = _RENAMED.get(getattr(config, "family", ""), ())
            layout = "hf_v5" if isinstance(config, SwinConfig) else layout
        tensors = _family(config).tensor_names(config, layout)
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
        # A kernel that is stored in another shape is that of a patch embedding.
        patches = tensor.order is not None and tensor.shape is not None
        if tensor.place.path[-1] == "kernel" and not patches and not _has_groups(config, tensor.place.path):
            places[module] = Place(tensor.place.path[:-1], tensor.place.layer)
    return places


def _family(config: VisionTransformerConfig | SwinConfig | ResNetConfig) -> ModuleType:
    families = {SwinConfig: swin_names, ResNetConfig: resnet_names}
    return families.get(type(config), vision_transformer_names)


def _has_groups(config: VisionConfig, path: tuple[str, ...]) -> bool:
    """Whether a kernel is that of a convolution with groups, to which PEFT and we would put different factors."""
    grouped = getattr(config, "groups", 1) > 1 and path[1].startswith("stage")
    return grouped and path[-3] == "layer1"


def without_effect(module: str) -> bool:
    """Whether a module is one on which an adapter of PEFT has no effect: the attention there reads its bare weight."""
    return module.endswith("head.attention.out_proj")
