"""Checkpoints of other libraries, in and out: Hugging Face folders of causal language models."""

from subspace_jax.interop.causal_lm import from_pretrained, load_causal_lm
from subspace_jax.interop.causal_lm_write import save_causal_lm, save_pretrained
from subspace_jax.interop.hf_config import config_from_hf, config_to_hf, read_config
from subspace_jax.interop.names import Place, TensorName, module_names, module_places, tensor_names
from subspace_jax.interop.safetensors_io import StoredTensor, open_folder, read_header, write_safetensors

__all__ = [
    "Place",
    "StoredTensor",
    "TensorName",
    "config_from_hf",
    "config_to_hf",
    "from_pretrained",
    "load_causal_lm",
    "module_names",
    "module_places",
    "open_folder",
    "read_config",
    "read_header",
    "save_causal_lm",
    "save_pretrained",
    "tensor_names",
    "write_safetensors",
]
