"""Special tokens of a Hugging Face folder: start, end, padding, and added tokens; and its chat template."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from subspace_jax.data.json_object import read_json_object

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# Defaults of the classes of transformers.
_DEFAULT_NAMES = {
    "GPT2Tokenizer": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>"},
    "CodeLlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>"},
}
_CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}
# Classes that add a start token where tokenizer.json has no post-processor.
_OPENING_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


def read_settings(folder: Path, known: Callable[[str], bool]) -> dict[str, Any]:
    """Reads the settings of a tokenizer besides ``tokenizer.json``.

    Args:
      folder: May hold ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``.
      known: Whether the tokenizer has a token.

    Returns:
      The fields of the first, completed by the others: ``special_tokens_map.json`` overrides the config in folders of
      older versions of transformers (without ``added_tokens_decoder``), and is overridden by it otherwise;
      ``added_tokens`` is ``{id: token}``, and ``family`` the class by which transformers reads the folder, or None.

    Raises:
      ValueError: A file is no JSON object, or a field has the wrong type.
    """
    config, named, added = (
        read_json_object(file) if (file := folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    )
    decoder = config.get("added_tokens_decoder")
    settings = {**config, **named} if decoder is None else {**named, **config}
    model = read_json_object(file) if (file := folder / "config.json").is_file() else {}
    settings["tokenizer_class"] = settings.get("tokenizer_class") or model.get("tokenizer_class")
    family = _class_of(model.get("model_type"), settings["tokenizer_class"])
    settings = {name: token for name, token in _DEFAULT_NAMES.get(family, {}).items() if known(token)} | settings
    files = f"{folder}: tokenizer_config.json or special_tokens_map.json"
    for name in ("add_bos_token", "split_special_tokens", "add_prefix_space", "legacy"):
        if settings.get(name) not in (None, True, False):
            raise ValueError(f"{files}: {name}: expected true or false, got {str(settings[name])[:80]!r}")
    for name in _ROLES:
        if settings.get(name) is not None:
            _content(settings[name], f"{files}: {name}")
    for name in _LISTS:
        for token in _listed(settings, name):
            _content(token, f"{files}: {name}")
    settings["family"] = family
    settings["added_tokens"] = _added_tokens(folder, decoder, added)
    return settings


def _class_of(model_type: Any, name: Any) -> str | None:
    """Returns the class by which transformers reads a folder: the one it names, else that of the model's family."""
    if model_type == "qwen2" or (model_type == "gpt2" and name is None):
        return _CLASSES[model_type]
    if model_type == "mistral":
        return None
    return name.removesuffix("Fast") if isinstance(name, str) else None


def _added_tokens(folder: Path, decoder: Any, added: Mapping[str, Any]) -> dict[int, Any]:
    if decoder is None:
        for token, number in added.items():
            _content(token, f"{folder / 'added_tokens.json'}")
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ValueError(f"{folder / 'added_tokens.json'}: {token!r}: expected an id, got {number!r}")
        return {number: {"content": token} for token, number in added.items()}
    where = f"{folder / 'tokenizer_config.json'}: added_tokens_decoder"
    if not isinstance(decoder, dict) or not all(number.isdecimal() for number in decoder):
        raise ValueError(f"{where}: expected tokens by their ids, got {str(decoder)[:80]}")
    for number, token in decoder.items():
        _content(token, f"{where}: {number}")
    return {int(number): token for number, token in decoder.items()}


def _content(token: Any, where: str) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content or any("\ud800" <= c <= "\udfff" for c in content):
        raise ValueError(f"{where}: expected a token, got {str(token)[:80]!r}")
    return content


def role_of(settings: Mapping[str, Any], name: str) -> str | None:
    """Returns a token by its role, such as "eos_token"; the file may hold a string or an object."""
    token = settings.get(name)
    return None if token is None else _content(token, name)


def special_names(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yields the tokens that settings name as special, whatever their role."""
    for name in _ROLES:
        if (token := role_of(settings, name)) is not None:
            yield token
    for name in _LISTS:
        yield from (_content(token, name) for token in _listed(settings, name))


def _listed(settings: Mapping[str, Any], name: str) -> Iterator[Any]:
    tokens = settings.get(name) or ()
    for token in tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ():
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content:  # others are no tokens to transformers either
            yield token


def flags_of(token: Any) -> dict[str, bool]:
    """Returns how an added token is matched, as the arguments of ``tokenizers.AddedToken``."""
    given = token if isinstance(token, dict) else {}
    return {name: given[name] for name in _FLAGS if isinstance(given.get(name), bool)}


def opens_texts(settings: Mapping[str, Any]) -> bool:
    """Whether a tokenizer without a post-processor opens texts with the token that is named for it.

    ``add_bos_token`` decides where it is true or false.  Elsewhere the tokenizer's class does: Llama's and Gemma's do,
    GPT-2's, Qwen2's and those without a model of their own don't.  Where no class is named either, a token that is
    named opens texts.
    """
    wanted = settings.get("add_bos_token")
    if wanted is not None:
        return bool(wanted)
    name = settings.get("tokenizer_class")
    return not isinstance(name, str) or name.removesuffix("Fast") in _OPENING_CLASSES


def texts_by_role(settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the special tokens that have a role, as ``{"eos_token": "</s>"}``."""
    found = {name: role_of(settings, name) for name in _ROLES}
    return {name: token for name, token in found.items() if token is not None}


def chat_template_of(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Returns the chat template of a folder, or None.

    As in transformers, ``chat_template.jinja`` overrides the field of ``tokenizer_config.json``, which holds a template
    or several by name, of which the one named "default" counts.

    Raises:
      ValueError: A file is malformed.
    """
    if (file := folder / "chat_template.jinja").is_file():
        return read_template(file)
    stored = settings.get("chat_template")
    if isinstance(stored, list):
        named = [entry for entry in stored if isinstance(entry, dict) and entry.get("name") == "default"]
        stored = named[0].get("template") if named else None
    if stored is not None and not isinstance(stored, str):
        found = type(stored).__name__
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template: expected a template, got {found}")
    return stored


def read_template(file: Path) -> str:
    """Returns the text of a file with a template.

    Raises:
      ValueError: It is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected a Jinja template in UTF-8 ({error.reason})") from error
