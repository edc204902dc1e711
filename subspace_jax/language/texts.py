"""The texts of a run, as its config names them."""

import datetime
import difflib
import functools
import logging
import os
from pathlib import Path

from ml_collections import ConfigDict

from subspace_jax.data import text
from subspace_jax.data.text.conversations import ASSISTANT

log = logging.getLogger(__name__)

_INSTALLED = ("docstrings", "summaries", "dialects")  # what needs no file


def texts_of(
    config: ConfigDict, split: str, tokenizer: text.Tokenizer | None = None
) -> list[text.Completion] | list[text.Passage]:
    """Returns the examples of "train" or "eval" that a config asks for.

    ``data.source`` is "docstrings", "summaries", "dialects", a file or a TFDS set (with ``data.train_split`` and
    ``data.eval_split``).  The rows of a file are recognised by their fields, see
    :func:`subspace_jax.data.text.read_texts`; ``data.prompt`` and ``data.completion`` name others.
    ``data.evaluation`` is a second file for evaluation; or ``data.holdout`` is the share of the first one that is held
    out, by ``data.holdout_seed``, see :func:`subspace_jax.data.text.hold_out`.

    Conversations become text by ``data.chat_template``, a file, or the tokenizer's own template; to a template that
    prints the date it is ``data.date`` (year-month-day), so that a resumed run has the same texts.  See
    :meth:`subspace_jax.data.text.ChatTemplate.passages` for the loss.

    Empty completions and replies are kept, and a warning has their number; so has another one for repeated rows of a
    file of which a share is held out.

    Args:
      config: Config of a run.
      split: "train" or "eval".
      tokenizer: The run's, whose chat template is used; needed for conversations without ``data.chat_template``.

    Raises:
      ValueError: A file is malformed, a chat template is missing or raises, ``data.holdout`` does not serve, or there
        is neither a file nor a set of that name; near names are given.
      FileNotFoundError: A file or set is not there.
    """
    fields = config.data
    name = {"train": fields.train_split, "eval": fields.eval_split}[split]
    if split == "eval" and fields.evaluation and fields.evaluation == fields.source:
        log.warning("data.evaluation: %s is also what is trained on; data.holdout=0.05 holds out a part", fields.source)
    if fields.holdout and (fields.evaluation or fields.source in _INSTALLED):
        other = f"data.evaluation={fields.evaluation}" if fields.evaluation else f"the split of {fields.source!r}"
        raise ValueError(f"data.holdout: a share of {fields.holdout} is held out beside no other set, got {other}")
    if fields.source == "summaries":
        return text.function_summaries(split=name)
    if fields.source == "dialects":
        return text.dialects(split=name)
    if fields.source == "docstrings":
        return [text.Completion("", t) for t in text.docstrings(split=name)]
    source = fields.evaluation if split == "eval" and fields.evaluation else fields.source
    if _is_path(source):
        return _rendered(_of_file(fields, source, split), source, config, tokenizer)
    if fields.holdout:
        raise ValueError(f"data.holdout: expected a file to hold out a share of, got the set {source!r}, with splits")
    examples = text.tfds_texts(source, name, fields.data_dir or None)
    if not isinstance(examples[0], text.Completion):
        raise ValueError(f"data.source: {source!r} is a set of questions with options, which are no texts to train on")
    return examples


def trains_on_conversations(config: ConfigDict) -> bool:
    """Whether a run trains on conversations, as the first row of its file tells.

    Raises:
      ValueError: That row is malformed.
    """
    fields = config.data
    if fields.source in _INSTALLED or not Path(fields.source).is_file():
        return False
    return text.holds_conversations(fields.source, prompt=fields.prompt, completion=fields.completion)


def _of_file(fields: ConfigDict, source: str, split: str) -> list[text.Completion] | list[text.Conversation]:
    if split == "eval" and not fields.evaluation and not fields.holdout:
        raise ValueError(
            f"data.evaluation: expected a second file beside {fields.source}, got none; data.holdout=0.05 holds out a "
            "twentieth of its examples"
        )
    examples = text.read_texts(source, prompt=fields.prompt, completion=fields.completion)
    if split == "train" or not fields.holdout:  # the file is read for either split
        _warn_of_empty(examples, source)
    if not fields.holdout:
        return examples
    try:
        train, held = text.hold_out(examples, fields.holdout, seed=fields.holdout_seed)
    except ValueError as error:
        raise ValueError(f"data.{error}") from error
    if split == "train":
        _warn_of_repeats(examples, len(held), source)
    return train if split == "train" else held


def _warn_of_empty(examples: list[text.Completion] | list[text.Conversation], source: str) -> None:
    where = [place for example in examples for said, place in _learnt(example, source) if not said.strip()]
    if where:
        count = sum(len(_learnt(example, source)) for example in examples)
        what = "replies" if isinstance(examples[0], text.Conversation) else "completions"
        _warn_once(
            f"{len(where)} of {count} {what} are empty, the first in {where[0]}; from these the model learns to say "
            "nothing"
        )


def _learnt(example: text.Completion | text.Conversation, source: str) -> list[tuple[str, str]]:
    """Returns the texts that the loss covers, and the place of each for a message."""
    if isinstance(example, text.Completion):
        return [(example.completion, source)]
    replies = [message for message in example.messages[example.prompt_length :] if message["role"] == ASSISTANT]
    return [(message.get("content", ""), example.where) for message in replies if not message.get("tool_calls")]


def _warn_of_repeats(examples: list[text.Completion] | list[text.Conversation], held: int, source: str) -> None:
    different = text.count_different(examples)
    if different < len(examples):
        _warn_once(
            f"data.holdout: {len(examples) - different} of the {len(examples)} examples of {source} repeat others; "
            f"equal ones stay together, so that {held} examples ({100 * held / len(examples):.1f} %) are held out"
        )


@functools.cache
def _warn_once(message: str) -> None:
    """Warns unless it has already: the texts of a run are read again for its export."""
    log.warning("%s", message)


def _rendered(examples, source: str, config: ConfigDict, tokenizer: text.Tokenizer | None):
    if not isinstance(examples[0], text.Conversation):
        return examples
    fields = config.data
    try:
        date = datetime.date.fromisoformat(fields.date)
    except ValueError as error:
        raise ValueError(f"data.date: expected a date such as 2026-01-31, got {fields.date!r}") from error
    tokenizer = text.ByteTokenizer() if tokenizer is None else tokenizer
    template = text.load_chat_template(tokenizer, fields.chat_template, date=date)
    if template is None:
        raise ValueError(
            f"data.chat_template: {source} holds conversations, and the tokenizer has no chat template; expected a "
            "file with one (Jinja)"
        )
    return [passage for conversation in examples for passage in template.passages(conversation)]


def _is_path(source: str) -> bool:
    """Whether a name means a file, there or not, rather than a set of TFDS, whose suffix is that of a version."""
    if Path(source).is_file():
        return True
    try:
        text.mapping_of(source)
    except ValueError as error:
        suffix = Path(source).suffix[1:2]
        if Path(source).is_dir() or suffix.isalpha() or source.startswith((".", "~", os.sep)):
            return True
        files = [path.name for path in Path().iterdir() if path.is_file()]
        near = difflib.get_close_matches(source, [*_INSTALLED, *files], n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        expected = str(error).removeprefix("name: ")
        raise ValueError(f"data: there is no file {source!r}, and no set with that name ({expected}){hint}") from error
    return False
