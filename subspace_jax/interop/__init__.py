"""Checkpoints of other libraries, read and written: folders of language and vision models, and adapters of PEFT."""

import subspace_jax._train_extra  # noqa: F401
from subspace_jax.interop import gguf
from subspace_jax.interop.compressed import (
    CompressedKernel,
    is_compressed,
    kernel_place,
    pack_coefficients,
    param_shapes_and_axes,
    save_compressed,
    unpack_coefficients,
)
from subspace_jax.interop.hf.bert import bert_config_from_hf, bert_config_to_hf, load_bert, save_bert
from subspace_jax.interop.hf.causal_lm import save_causal_lm, save_pretrained
from subspace_jax.interop.hf.causal_lm_config import config_from_hf, config_to_hf
from subspace_jax.interop.hf.causal_lm_names import module_names, module_places, tensor_names
from subspace_jax.interop.hf.clip import load_dual, save_dual
from subspace_jax.interop.hf.side_files import side_files
from subspace_jax.interop.hf.text_encoder import TextEncoder, load_text_encoder
from subspace_jax.interop.language import from_pretrained, load_causal_lm, read_config
from subspace_jax.interop.onnx import OnnxGraph, OnnxNode, load_onnx_dinov2, read_onnx
from subspace_jax.interop.packages import PACKAGES, Package, fetch_package, package_of
from subspace_jax.interop.peft.adapter import PeftAdapter, load_peft_adapter, peft_fields, save_peft_adapter
from subspace_jax.interop.peft.models import target_names, target_rules, vision_adapter_names
from subspace_jax.interop.peft.rules import match_modules, rank_and_alpha
from subspace_jax.interop.sae_lens import LinearSAE, load_sae, save_sae
from subspace_jax.interop.safetensors_io import StoredTensor, open_folder, read_header, write_safetensors
from subspace_jax.interop.tensors import Place, TensorLayout, TensorName
from subspace_jax.interop.vision import load_dino_params, load_vision, save_vision
from subspace_jax.interop.writing import write_side_files

__all__ = [
    "PACKAGES",
    "CompressedKernel",
    "LinearSAE",
    "OnnxGraph",
    "OnnxNode",
    "Package",
    "PeftAdapter",
    "Place",
    "StoredTensor",
    "TensorLayout",
    "TensorName",
    "TextEncoder",
    "bert_config_from_hf",
    "bert_config_to_hf",
    "config_from_hf",
    "config_to_hf",
    "fetch_package",
    "from_pretrained",
    "gguf",
    "is_compressed",
    "kernel_place",
    "load_bert",
    "load_causal_lm",
    "load_dino_params",
    "load_dual",
    "load_onnx_dinov2",
    "load_peft_adapter",
    "load_sae",
    "load_text_encoder",
    "load_vision",
    "match_modules",
    "module_names",
    "module_places",
    "open_folder",
    "pack_coefficients",
    "package_of",
    "param_shapes_and_axes",
    "peft_fields",
    "rank_and_alpha",
    "read_config",
    "read_header",
    "read_onnx",
    "save_bert",
    "save_causal_lm",
    "save_compressed",
    "save_dual",
    "save_peft_adapter",
    "save_pretrained",
    "save_sae",
    "save_vision",
    "side_files",
    "target_names",
    "target_rules",
    "tensor_names",
    "unpack_coefficients",
    "vision_adapter_names",
    "write_safetensors",
    "write_side_files",
]


def __dir__():
    return __all__
