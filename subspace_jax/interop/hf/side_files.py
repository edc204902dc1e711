"""Files beside the weights in a Hugging Face folder, which a folder made from it takes along."""

import fnmatch
import os
from pathlib import Path

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
) -> dict[str, Path]:
    """Finds the files that a folder made from another one takes along.

    These are the tokenizer's (``tokenizer.json`` and its settings, sentencepiece models, vocabularies, added and
    special tokens, chat templates), and the model's: ``generation_config.json`` and settings of processors.

    Args:
      folder: Hugging Face folder of the model, or "" where it began from random numbers.
      tokenizer: File or folder of another tokenizer, "bytes" for none, or "" for that of the model.
      adapter: Whether the new folder is that of an adapter, which has no generation of its own.

    Returns:
      Names in the new folder, and the files.
    """
    found = {}
    where = Path(tokenizer or folder or "bytes")
    if tokenizer != "bytes" and (tokenizer or folder):
        found |= _matching(where if where.is_dir() else where.parent, _OF_THE_TOKENIZER)
        if where.is_file():
            found["tokenizer.json"] = where
    model = Path(folder) if folder else where
    return found if adapter or not model.is_dir() else found | _matching(model, _OF_THE_MODEL)


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    names = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    files = {file.relative_to(folder).as_posix(): file for file in names if file.is_file()}
    return {name: file for name, file in files.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
