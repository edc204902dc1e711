"""Text examples from files and from TensorFlow Datasets."""

import contextlib
import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from subspace_jax.data.sources.tfds import default_data_dir, open_records
from subspace_jax.data.text.conversations import CONVERTED, Conversation, conversation_of


class Completion(NamedTuple):
    """A prompt and the completion to learn; plain text has an empty prompt."""

    prompt: str
    completion: str


class DomainCompletion(Completion):
    """A completion of a known domain, such as a dialect; it equals one of the same texts and another domain."""

    domain: str

    def __new__(cls, prompt: str, completion: str, domain: str):
        """Returns the completion."""
        self = super().__new__(cls, prompt, completion)
        self.domain = domain
        return self


class Passage(NamedTuple):
    """A text with the parts that the loss covers, as first character and end of each; nothing is added to it."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Choice(NamedTuple):
    """A question with options; ``label`` is the index of the correct one."""

    prompt: str
    options: tuple[str, ...]
    label: int


def read_texts(
    path: str | os.PathLike, *, prompt: str = "", completion: str = ""
) -> list[Completion] | list[Conversation]:
    """Reads ``.jsonl``, ``.parquet`` or plain-text files, in UTF-8 with or without a byte order mark.

    Rows with the field ``messages`` are conversations, those with ``prompt`` and ``completion`` pairs, and those with
    ``text`` plain texts.  Where several are there, the first of these counts; it is the same in all rows of a file.
    Where prompt and completion are lists of messages, each row is a conversation whose completion is learnt.  A text in
    the field ``domain`` makes a completion a :class:`DomainCompletion`.

    Args:
      path: The file.  Documents in plain text are separated by empty lines.
      prompt: Field of the prompt, where it has another name; "" for none.
      completion: Field of the text to learn; "text" beside a prompt, and otherwise recognised by default.

    Returns:
      The examples.

    Raises:
      FileNotFoundError: There is no such file; the message has similar names.
      ValueError: The file is empty, of another format (CSV, one JSON value, compressed) or not UTF-8, a line is no JSON
        object, a field is missing or no text, or messages are malformed.
      OSError: It can't be read.
      ImportError: A Parquet file needs the extra ``text``.
    """
    examples = list(_read(Path(path), prompt, completion))
    if not examples:
        raise ValueError(f"{path}: there is no text in it")
    return examples


def holds_conversations(path: str | os.PathLike, *, prompt: str = "", completion: str = "") -> bool:
    """Returns whether the rows of a file are conversations, by the first of them.

    Arguments and errors: see :func:`read_texts`.
    """
    with contextlib.closing(_read(Path(path), prompt, completion)) as examples:
        return isinstance(next(examples, None), Conversation)


def _read(file: Path, prompt: str, completion: str) -> Iterator[Completion | Conversation]:
    if not file.is_file():
        raise FileNotFoundError(f"{_no_file(file)}{near_names(file)}")
    suffix = file.suffix.lower()
    if suffix in _OTHER_KINDS:
        raise ValueError(f"{file}: expected a .jsonl, .parquet or plain-text file, got {suffix!r}")
    if suffix not in (".jsonl", ".parquet"):
        documents = [part.strip() for part in _plain_text(file).split("\n\n")]
        yield from (Completion("", text) for text in documents if text)
        return
    wanted = tuple(name for name in (prompt, completion or "text") if name) if prompt or completion else ()
    if suffix == ".jsonl":
        with file.open("rb") as lines:
            yield from _examples(json_rows(lines, str(file)), wanted)
    else:
        yield from _examples(_parquet(file, wanted), wanted)


def _examples(
    rows: Iterable[tuple[str, Mapping[str, Any]]], fields: tuple[str, ...]
) -> Iterator[Completion | Conversation]:
    chats = None
    for where, row in rows:
        fields = fields or _recognised(row, where)
        if chats is None:
            chats = fields == ("messages",) or any(isinstance(row.get(name), list) for name in fields)
        if chats:
            if absent := [name for name in fields if name not in row]:
                raise ValueError(f"{where}: no field {absent[0]!r}, which every row must have; there are {_shown(row)}")
            given = json.dumps([[row[name] for name in fields], row.get("tools")], ensure_ascii=False, default=str)
            _check_unicode(given, f"{where}: expected Unicode text")
            yield conversation_of(row, where, fields)
        else:
            prompt = _field(row, fields[0], where) if len(fields) > 1 else ""
            completion, domain = _field(row, fields[-1], where), row.get("domain")
            known = isinstance(domain, str) and domain
            yield DomainCompletion(prompt, completion, domain) if known else Completion(prompt, completion)


def _recognised(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Returns the fields of a row's kind, by the names of its fields."""
    for fields in (("messages",), ("prompt", "completion"), ("text",)):
        if all(name in names for name in fields):
            return fields
    foreign = any(all(name in names for name in fields) for fields in (("conversations",), ("instruction", "output")))
    raise ValueError(
        f"{where}: no field 'text'; there are {_shown(names)}; expected 'messages', or 'prompt' and 'completion', or "
        f"'text', or their names in data.prompt and data.completion{CONVERTED if foreign else ''}"
    )


_OTHER_KINDS = (".json", ".csv", ".tsv", ".arrow", ".feather", ".gz", ".zip", ".zst", ".xz", ".bz2")


def _no_file(file: Path) -> str:
    return f"expected a file of text, got the folder {file}" if file.is_dir() else f"no file {file}"


def near_names(path: str | os.PathLike) -> str:
    """Returns a hint at files with names similar to a missing one, or "" where there are none."""
    path = Path(path)
    try:
        names = os.listdir(path if path.is_dir() else path.parent)
    except OSError:
        return ""
    shown = sorted(names)[:3] if path.is_dir() else difflib.get_close_matches(path.name, names, n=3)
    if not shown:
        return ""
    return f"; it holds {', '.join(shown)}" if path.is_dir() else f"; did you mean {' or '.join(shown)}?"


def _plain_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise ValueError(f"{file}, line {line}: expected UTF-8 ({error.reason})") from error


def json_rows(lines: Iterable[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields file and line, and the object, of each line that is not empty.

    Args:
      lines: Lines of UTF-8, with or without a byte order mark.
      name: Name of the file.

    Raises:
      ValueError: A line is not UTF-8 or no JSON object.
    """
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        # Bytes that are not UTF-8 become lone surrogates, so that the message can name the place.
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")
        if not text.strip():
            continue
        _check_unicode(text, f"{where}: expected UTF-8")
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON object ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
        yield where, row


def _parquet(file: Path, names: tuple[str, ...]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Parquet files need pyarrow: pip install "subspace-jax[text]"') from error
    try:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as table:
            there = table.schema_arrow.names
            names = names or _recognised(there, str(file))
            if absent := [name for name in names if name not in there]:
                raise ValueError(f"{file}: no field {absent[0]!r}; there are {_shown(there)}")
            columns = list(dict.fromkeys([*names, *(name for name in ("tools", "domain") if name in there)]))
            number = 0
            for batch in table.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    yield f"{file}, row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{file}: it is no Parquet file, or a damaged one ({message})") from error


def _field(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise ValueError(f"{where}: no field {name!r}; there are {_shown(row)}")
    if not isinstance(row[name], str):
        raise ValueError(f"{where}: field {name!r}: expected text, got {type(row[name]).__name__}")
    _check_unicode(row[name], f"{where}: field {name!r}: expected Unicode text")
    return row[name]


def _shown(names: Iterable[str]) -> str:
    names = str(sorted(names))
    return names if len(names) < 200 else f"{names[:200]} ..."


def _check_unicode(text: str, expected: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{expected}, got {text[error.start]!r} at character {error.start}") from error


def tfds_texts(name: str, split: str, data_dir: str | None = None) -> list[Completion] | list[Choice]:
    """Reads a prepared text set of TensorFlow Datasets, without TensorFlow.

    ``gem/e2e_nlg``, ``e2e_cleaned`` and ``gsm8k`` give completions, ``ai2_arc`` and ``glue/*`` choices.

    Args:
      name: Name of the set, with its config and version where it has them.
      split: Split, such as "train" or "validation[:100]".
      data_dir: Folder of TFDS sets; :func:`subspace_jax.data.default_data_dir` by default.

    Returns:
      The examples.

    Raises:
      ValueError: It is none of these sets, its split is empty, or a record has an unexpected format.
      FileNotFoundError: It is not prepared.
    """
    mapping = mapping_of(name)
    try:
        records, info = open_records(name, split, data_dir)
    except FileNotFoundError as error:
        if "is not prepared under" in str(error):
            raise
        where = data_dir or default_data_dir()
        raise FileNotFoundError(
            f"the set {name!r} is not prepared under {where}, and the version of TFDS here can't prepare it"
        ) from error
    examples = []
    for number, record in enumerate(records):
        try:
            examples.append(mapping(record, info.features))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name}, split {split}, record {number}: it is not as expected of this set ({error!r})"
            ) from error
    if not examples:
        raise ValueError(f"split: {split!r} of {name!r} is empty")
    return examples


def mapping_of(name: str) -> Callable[[Mapping[str, Any], Any], Completion | Choice]:
    """Returns the function ``(record, features) -> example`` for a set of TensorFlow Datasets.

    Raises:
      ValueError: There is none; the message has similar names.
    """
    for known, mapping in _MAPPINGS.items():
        if name == known or name.startswith((f"{known}/", f"{known}:")):
            return mapping
    near = difflib.get_close_matches(name, _MAPPINGS, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"name: expected one of the sets {', '.join(sorted(_MAPPINGS))}, got {name!r}{hint}")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _gem_e2e(record, _):
    return Completion(f"{_text(record['meaning_representation'])} || ", _text(record["target"]))


def _e2e(record, _):
    # TFDS stores a table parsed from the meaning representation.
    table = record["input_text"]["table"]
    pairs = zip(table["column_header"], table["content"], strict=True)
    meaning = ", ".join(f"{_text(name)}[{_text(value)}]" for name, value in pairs)
    return Completion(f"{meaning} || ", _text(record["target_text"]))


def _gsm8k(record, _):
    return Completion(f"Question: {_text(record['question'])}\nAnswer: ", _text(record["answer"]))


def _arc(record, _):
    choices = record["choices"]
    label = [int(letter) for letter in choices["label"]].index(int(record["answerKey"]))
    return Choice(f"Question: {_text(record['question'])}\nAnswer: ", tuple(_text(t) for t in choices["text"]), label)


def _glue(record, features):
    names = [key for key in features if key not in ("idx", "label")]
    prompt = "\n".join(f"{key}: {_text(record[key])}" for key in names)
    return Choice(f"{prompt}\nlabel: ", tuple(features["label"].names), int(record["label"]))


_MAPPINGS = {"gem/e2e_nlg": _gem_e2e, "e2e_cleaned": _e2e, "gsm8k": _gsm8k, "ai2_arc": _arc, "glue": _glue}
