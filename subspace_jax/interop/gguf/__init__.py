"""Models in GGUF files, the format of llama.cpp: read onto devices, or converted to a Hugging Face folder."""

from subspace_jax.interop.gguf.folder import to_folder
from subspace_jax.interop.gguf.format import Header, is_gguf, read_header
from subspace_jax.interop.gguf.models import load_causal_lm, read_config
from subspace_jax.interop.gguf.tokenizer import tokenizer, tokenizer_files

__all__ = [
    "Header",
    "is_gguf",
    "load_causal_lm",
    "read_config",
    "read_header",
    "to_folder",
    "tokenizer",
    "tokenizer_files",
]
