"""Examples of text from files and from TensorFlow Datasets."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from subspace_jax.data.sources import open_records


class Completion(NamedTuple):
    """A text of which the second part is to be learnt; a plain text has an empty prompt."""

    prompt: str
    completion: str


class Choice(NamedTuple):
    """A question with options, of which ``label`` is right."""

    prompt: str
    options: tuple[str, ...]
    label: int


def read_texts(path: str | os.PathLike, *, prompt: str = "", completion: str = "text") -> list[Completion]:
    """Reads ``.jsonl``, ``.parquet`` or plain-text files.

    Args:
      path: The file.  Plain text holds one document, or several with empty lines between.
      prompt: Field that holds the prompt, or "" for none.
      completion: Field that holds the text to be learnt.

    Returns:
      The examples.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: The file is empty, a line is no JSON object, or a field is missing or no text; line and field are
      named. ImportError: A Parquet file needs the extra ``text``.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    if file.suffix not in (".jsonl", ".parquet"):
        documents = [part.strip() for part in file.read_text(encoding="utf-8").split("\n\n")]
        examples = [Completion("", text) for text in documents if text]
    else:
        rows = _jsonl(file) if file.suffix == ".jsonl" else _parquet(file)
        examples = [
            Completion(_field(row, prompt, place) if prompt else "", _field(row, completion, place))
            for place, row in rows
        ]
    if not examples:
        raise ValueError(f"{file}: there is no text in it")
    return examples


def _jsonl(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: expected a JSON object ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
            yield place, row


def _parquet(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Parquet files need pyarrow: pip install "subspace-jax[text]"') from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield f"{file}, row {number}", row
                number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file}: it is no Parquet file ({error})") from error


def _field(row: Mapping[str, Any], name: str, place: str) -> str:
    if name not in row:
        raise ValueError(f"{place}: no field {name!r}; there are {sorted(row)}")
    if not isinstance(row[name], str):
        raise ValueError(f"{place}: field {name!r}: expected text, got {type(row[name]).__name__}")
    return row[name]


def tfds_texts(name: str, split: str, data_dir: str | None = None) -> list[Completion] | list[Choice]:
    """Reads a prepared text set of TensorFlow Datasets, without TensorFlow.

    ``gem/e2e_nlg``, ``e2e_cleaned`` and ``gsm8k`` give completions, ``ai2_arc`` and ``glue/*`` choices.

    Args:
      name: Name of the set, with its config and version where it has them.
      split: Split, such as "train" or "validation[:100]".
      data_dir: Folder of prepared sets; the usual place by default.

    Returns:
      The examples.

    Raises:
      ValueError: There is no mapping for the set.
      FileNotFoundError: It is not prepared.
    """
    mapping = mapping_of(name)
    records, info = open_records(name, split, data_dir)
    return [mapping(record, info.features) for record in records]


def mapping_of(name: str) -> Callable[[Mapping[str, Any], Any], Completion | Choice]:
    """Returns the function ``(record, features) -> example`` for a set of TensorFlow Datasets."""
    for known, mapping in _MAPPINGS.items():
        if name == known or name.startswith((f"{known}/", f"{known}:")):
            return mapping
    raise ValueError(f"name: no mapping for {name!r}; there are mappings for {sorted(_MAPPINGS)}")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _gem_e2e(record, _):
    return Completion(f"{_text(record['meaning_representation'])} || ", _text(record["target"]))


def _e2e(record, _):
    # TFDS keeps the table that was parsed from the meaning representation.
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
