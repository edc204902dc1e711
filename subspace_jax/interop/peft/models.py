"""The modules of a model that PEFT adapts: their paths there, and their places in the parameters."""

import contextlib
import re
from collections.abc import Mapping
from typing import NamedTuple

from subspace_jax.interop import hf, timm
from subspace_jax.interop.hf.causal_lm_names import module_places
from subspace_jax.interop.hf.clip import dual_tensor_layout
from subspace_jax.interop.peft.rules import match_modules
from subspace_jax.interop.tensors import Path, Place, PyTree, TensorLayout, at
from subspace_jax.nn import CausalLMConfig, causal_lm_specs
from subspace_jax.nn.models.clip.dual_tower import DualTowerConfig
from subspace_jax.nn.models.resnet.config import ResNetConfig
from subspace_jax.nn.models.swin.config import SwinConfig
from subspace_jax.nn.models.vit.config import VisionTransformerConfig

VisionConfig = VisionTransformerConfig | SwinConfig | ResNetConfig | DualTowerConfig
Config = CausalLMConfig | VisionConfig

VERSIONS = ("v4", "v5")
# Files have the names of transformers 4; transformers 5 has these in memory.
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


class PeftModel(NamedTuple):
    """A model as PEFT sees it.

    Attributes:
      specs: Nested dict of :class:`subspace_jax.nn.ParamSpec`.
      places: Path of each module to its place in ``specs``; one to one.
      language: Whether it is a causal language model.
      tied: Whether the head is the embedding table.
      fan_in_fan_out: Whether linear layers are stored as ``[in, out]``.
    """

    specs: PyTree
    places: Mapping[str, Place]
    language: bool = False
    tied: bool = False
    fan_in_fan_out: bool = False

    def weight_of(self, place: Place) -> str | None:
        """Returns the name of the weight of a module that may be adapted, or None."""
        return next((name for name in ("kernel", "embedding") if name in at(self.specs, place.path)), None)


def peft_model(config: Config, version: str = "v5") -> PeftModel:
    """Returns the modules of a model that adapters go to.

    Args:
      config: The model.
      version: See ``names`` of :func:`vision_adapter_names`.
    """
    if isinstance(config, CausalLMConfig):
        gpt2 = config.family == "gpt2"
        return PeftModel(causal_lm_specs(config), module_places(config), True, config.tied, gpt2)
    layout, patterns = _vision_layout(config, version)
    return PeftModel(layout.specs, _vision_places(config, layout, patterns))


def linear_modules(model: PeftModel) -> list[str]:
    """Returns the modules of "all-linear": linear layers, without the head of a language model."""
    others = ("embed", "position", "conv", *(("head",) if model.language else ()))
    return [m for m, p in model.places.items() if model.weight_of(p) is not None and p.path[-1] not in others]


def target_rules(config: Config, target: str) -> list[str]:
    r"""Returns the weights that a name of PEFT means: ``["layers/attn/q/kernel"]`` for ``"q_proj"``.

    Args:
      config: The model.
      target: An entry of PEFT's ``target_modules``, such as ``"q_proj"``, "all-linear", or a regular expression of the
        full paths of modules, such as ``r".*\.(q|v)_proj"``.

    Returns:
      The paths of the weights, rules for :func:`subspace_jax.adapters.init`; empty if PEFT finds no module.

    Raises:
      ValueError: Only some of the layers of a weight are meant.
    """
    model = peft_model(config)
    places = {m: p for m, p in model.places.items() if model.weight_of(p) is not None}
    modules, layers = [], {}
    for targets in ([target], target):
        if not modules:
            with contextlib.suppress(ValueError):  # nothing is found, or the text is no regular expression
                modules = match_modules({"target_modules": targets}, places, linear=linear_modules(model))
    for place in map(places.__getitem__, modules):
        layers.setdefault("/".join((*place.path, model.weight_of(place))), []).append(place.layer)
    for path, own in layers.items():
        if None not in own and len(own) < (count := at(model.specs, path.split("/")).shape[0]):
            raise ValueError(f"{target!r} means {len(own)} of the {count} layers of {path}; expected all of them")
    return list(layers)


def target_names(config: Config) -> list[str]:
    """Returns the last parts of the names of the modules that PEFT adapts, such as ``"q_proj"``."""
    model = peft_model(config)
    return sorted({m.rpartition(".")[2] for m, p in model.places.items() if model.weight_of(p) is not None})


def vision_adapter_names(config: VisionConfig, names: str = "v5") -> dict[str, Place]:
    """Maps the path of every module that PEFT adapts in a vision model or in dual towers to its place; one to one.

    ``"vit.layers.3.attention.q_proj"`` maps to ``Place(("layers", "attn", "q"), 3)``.  These are the linear layers, and
    the convolutions of residual networks without groups.  Not included are tensors that several linear layers share,
    patch embeddings, which are linear layers here, and the output of SigLIP's pooling attention, on which an adapter
    of PEFT has no effect.

    Args:
      config: The model.
      names: "v5", the paths of transformers 5, or "v4", those of adapters made with transformers 4, which differ for
        ViT, DeiT, DINOv2 and Swin.

    Raises:
      ValueError: ``names`` is neither.
    """
    if names not in VERSIONS:
        raise ValueError(f"names: expected 'v4' or 'v5', got {names!r}")
    return _vision_places(config, *_vision_layout(config, names))


def without_effect(module: str) -> bool:
    """Whether an adapter of PEFT has no effect on a module, as the attention there reads its weight directly."""
    return module.endswith("head.attention.out_proj")


def _vision_layout(config: VisionConfig, version: str) -> tuple[TensorLayout, tuple]:
    """Returns the tensors of a model, and the patterns by which their names change to those of its modules."""
    if isinstance(config, DualTowerConfig):
        return dual_tensor_layout(config), ()
    library = getattr(config, "convention", "timm" if config.architecture else "hf")
    if isinstance(config, SwinConfig):
        return (hf.swin.tensor_layout(config, version) if library == "hf" else timm.swin.tensor_layout(config)), ()
    family = "resnet" if isinstance(config, ResNetConfig) else "vit"
    renamed = _RENAMED.get(getattr(config, "family", ""), ()) if (library, version) == ("hf", "v5") else ()
    return getattr({"hf": hf, "timm": timm}[library], family).tensor_layout(config), renamed


def _vision_places(config: VisionConfig, layout: TensorLayout, patterns: tuple) -> dict[str, Place]:
    places = {}
    for tensor in layout.tensors:
        module = tensor.name.removesuffix(".weight")
        # Transformers 5 splits the two halves of DINOv2's gated MLP.
        if patterns and module.endswith(".weights_in"):
            module = module.replace("weights_in", ("gate_proj", "up_proj")[tensor.part[0]])
        elif tensor.part != (0, 1) or without_effect(module):
            continue
        for pattern, name in patterns:
            module = pattern.sub(name, module)
        # A reshaped kernel is that of a patch embedding.
        patches = tensor.order is not None and tensor.shape is not None
        if tensor.place.path[-1] == "kernel" and not patches and not _has_groups(config, tensor.place.path):
            places[module] = Place(tensor.place.path[:-1], tensor.place.layer)
    return places


def _has_groups(config: VisionConfig, path: Path) -> bool:
    """Whether a kernel is that of a convolution with groups, for which PEFT's factors have another meaning."""
    grouped = getattr(config, "groups", 1) > 1 and path[1].startswith("stage")
    return grouped and path[-3] == "layer1"
