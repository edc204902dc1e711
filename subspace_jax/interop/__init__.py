"""Checkpoints of other libraries, in and out: folders of language and vision models, and PEFT's adapters."""

from subspace_jax.interop.hf import resnet_names, swin_names
from subspace_jax.interop.hf.causal_lm import from_pretrained, load_causal_lm, read_config
from subspace_jax.interop.hf.causal_lm_config import config_from_hf, config_to_hf
from subspace_jax.interop.hf.causal_lm_write import save_causal_lm, save_pretrained
from subspace_jax.interop.hf.clip import load_dual, save_dual
from subspace_jax.interop.hf.names import Place, TensorName, module_names, module_places, tensor_names
from subspace_jax.interop.hf.side_files import side_files
from subspace_jax.interop.hf.vision import load_dino_params, load_vision, save_vision
from subspace_jax.interop.peft.adapter import PeftAdapter, load_peft_adapter, peft_fields, save_peft_adapter
from subspace_jax.interop.peft.rules import match_modules, rank_and_alpha
from subspace_jax.interop.peft.vision import vision_adapter_names
from subspace_jax.interop.safetensors_io import StoredTensor, open_folder, read_header, write_safetensors

__all__ = [
    "PeftAdapter",
    "Place",
    "StoredTensor",
    "TensorName",
    "config_from_hf",
    "config_to_hf",
    "from_pretrained",
    "load_causal_lm",
    "load_dino_params",
    "load_dual",
    "load_peft_adapter",
    "load_vision",
    "match_modules",
    "module_names",
    "module_places",
    "open_folder",
    "peft_fields",
    "rank_and_alpha",
    "read_config",
    "read_header",
    "resnet_names",
    "save_causal_lm",
    "save_dual",
    "save_peft_adapter",
    "save_pretrained",
    "save_vision",
    "side_files",
    "swin_names",
    "tensor_names",
    "vision_adapter_names",
    "write_safetensors",
]
