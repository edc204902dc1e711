"""Checkpoints of other libraries, in and out: Hugging Face folders of causal language models and PEFT's adapters."""

from subspace_jax.interop.causal_lm import from_pretrained, load_causal_lm
from subspace_jax.interop.causal_lm_write import save_causal_lm, save_pretrained
from subspace_jax.interop.hf_config import config_from_hf, config_to_hf, read_config
from subspace_jax.interop.names import Place, TensorName, module_names, module_places, tensor_names
from subspace_jax.interop.peft import PeftAdapter, load_peft_adapter, peft_fields, save_peft_adapter
from subspace_jax.interop.peft_rules import match_modules, rank_and_alpha
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
    "load_peft_adapter",
    "match_modules",
    "module_names",
    "module_places",
    "open_folder",
    "peft_fields",
    "rank_and_alpha",
    "read_config",
    "read_header",
    "save_causal_lm",
    "save_peft_adapter",
    "save_pretrained",
    "tensor_names",
    "write_safetensors",
]
