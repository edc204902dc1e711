"""Files beside the weights in a Hugging Face folder, to copy to a folder made from it."""

import fnmatch
import os
from pathlib import Path

from subspace_jax.interop import gguf

_OF_THE_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
)
_OF_THE_MODEL = ("generation_config.json", "*processor_config.json")


def side_files(
    folder: str | os.PathLike = "", tokenizer: str | os.PathLike = "", *, adapter: bool = False
) -> dict[str, Path | str]:
    """Finds the files to copy to a folder made from another one.

    These are the files of the tokenizer (``tokenizer.json`` and its settings, sentencepiece models, vocabularies, added
    and special tokens, chat templates), ``generation_config.json`` and settings of processors.

    Args:
      folder: Hugging Face folder of the model, its GGUF file, or "" for a model trained from scratch.
      tokenizer: File or folder of another tokenizer, "bytes" for none, or "" for that of the model.
      adapter: Whether the new folder is that of an adapter, which has no generation config.

    Returns:
      Name in the new folder to file; to text where a GGUF file holds the tokenizer, see
      :func:`subspace_jax.interop.gguf.tokenizer_files`.
    """
    found = {}
    where = Path(tokenizer or folder or "bytes")
    if gguf.is_gguf(where):
        found |= gguf.tokenizer_files(where)
    elif tokenizer != "bytes" and (tokenizer or folder):
        found |= _matching(where if where.is_dir() else where.parent, _OF_THE_TOKENIZER)
        if where.is_file():
            found["tokenizer.json"] = where
    model = Path(folder) if folder else where
    return found if adapter or not model.is_dir() else found | _matching(model, _OF_THE_MODEL)


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    names = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    files = {file.relative_to(folder).as_posix(): file for file in names if file.is_file()}
    return {name: file for name, file in files.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
