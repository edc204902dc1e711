"""Rows of tokens from texts: padded, packed, or one for each option of a question.

Rows are dicts of arrays ``[rows, length]`` for :func:`subspace_jax.data.train_batches` and :func:`eval_batches`:

- ``inputs`` int32, tokens;
- ``labels`` int32, the next token at each position;
- ``weights`` float32, 1 where the loss counts and 0 elsewhere;
- ``segment_ids`` int32, number of the text in its row, from 1; 0 for padding;
- ``positions`` int32, position in the text, from 0;
- ``domains`` int32, where :func:`pack_rows` is given their names: that of the text, -1 for padding.
"""

import bisect
import logging
from collections.abc import Iterable, Sequence

import numpy as np

from subspace_jax.data.text.records import Choice, Completion, Passage
from subspace_jax.data.text.tokenizers import Tokenizer

log = logging.getLogger(__name__)

Rows = dict[str, np.ndarray]


def encode(example: Completion | Passage, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of an example, and the mask of the loss.

    Args:
      example: Prompt and completion, encoded as one text between start and end tokens, or a passage, to which none are
        added.  A token with both the end of the prompt and the first character of the completion (" A" after
        "Answer: ") belongs to the completion, as in transformers, and one with any character of a span to the span.
      tokenizer: The tokenizer.

    Returns:
      Tokens ``[n]`` int32, and the mask ``[n]`` bool, True for the completion and the end token, or for the spans.
    """
    if isinstance(example, Passage):
        return _encode_passage(example, tokenizer)
    prompt, completion = tokenizer.encode_pair(example.prompt, example.completion)
    given = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + prompt
    targets = completion + ([] if tokenizer.eos_id is None else [tokenizer.eos_id])
    tokens = np.array(given + targets, np.int32)
    return tokens, np.arange(len(tokens)) >= len(given)


def _encode_passage(passage: Passage, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    tokens, offsets = tokenizer.encode_with_offsets(passage.text)
    first, end = np.array(offsets, np.int64).reshape(-1, 2).T
    in_loss = np.zeros(len(tokens), bool)
    for start, stop in passage.spans:
        in_loss |= (first < stop) & (end > start)
    return np.array(tokens, np.int32), in_loss


def pad_rows(
    examples: Iterable[Completion | Passage], tokenizer: Tokenizer, length: int, *, truncate: bool = False
) -> Rows:
    """Returns one row for each example, padded at the end.

    Args:
      examples: The examples.
      tokenizer: The tokenizer.
      length: Length of a row in tokens.
      truncate: Whether to truncate longer texts; otherwise they raise.

    Raises:
      ValueError: There is no example, or one does not fit.
    """
    pieces = _pieces(examples, tokenizer, length, "cut" if truncate else "refuse")
    return _fill([[piece] for piece in pieces], length, tokenizer)


def pack_rows(
    examples: Iterable[Completion | Passage],
    tokenizer: Tokenizer,
    length: int,
    *,
    truncation: str = "split",
    domains: Sequence[str] = (),
) -> Rows:
    """Packs several texts into a row by best-fit decreasing.

    Texts of a row don't attend to each other if the model is given ``segment_ids``.  The packing is a function of the
    lengths alone; n texts take ``n log n`` steps.

    Args:
      examples: The examples.
      tokenizer: The tokenizer.
      length: Length of a row in tokens.
      truncation: Treatment of texts longer than a row: "split" makes several texts of each, "cut" drops their ends,
        "refuse" raises.
      domains: Names of the domains of the examples, each a :class:`DomainCompletion` then: the rows get the field
        ``domains``.

    Raises:
      ValueError: There is no example, one does not fit or is of another domain, or ``truncation`` is unknown.
    """
    pieces = _pieces(examples, tokenizer, length, truncation, domains)
    sizes = [len(tokens) - 1 for tokens, _, _ in pieces]
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # rows by their number of free positions
    left_sizes: list[int] = []  # the keys of open_rows, in order
    for i in sorted(range(len(pieces)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(left_sizes, sizes[i])
        if at == len(left_sizes):
            row, left = len(rows), length
            rows.append([])
        else:
            left = left_sizes[at]
            row = open_rows[left].pop()
            if not open_rows[left]:
                del open_rows[left], left_sizes[at]
        rows[row].append(i)
        left -= sizes[i]
        if left and left not in open_rows:
            bisect.insort(left_sizes, left)
            open_rows[left] = []
        if left:
            open_rows[left].append(row)
    return _fill([[pieces[i] for i in sorted(row)] for row in rows], length, tokenizer, bool(domains))


def choice_rows(examples: Sequence[Choice], tokenizer: Tokenizer, length: int) -> Rows:
    """Returns one row for each option of each question, to compare options by their likelihood.

    Trailing spaces of a prompt become part of every option, as in the LM Evaluation Harness: a tokenizer may join them
    with some options only, and likelihoods are comparable only for the same prompt.

    Args:
      examples: The questions.
      tokenizer: The tokenizer.
      length: Length of a row in tokens.

    Returns:
      Rows as of :func:`pad_rows`, with further fields ``[rows]``: ``question`` and ``option`` int32, ``is_answer``
      float32; see :func:`subspace_jax.metrics.choice_accuracy`.

    Raises:
      ValueError: There is no question, one does not fit into a row, has no options or no correct one, or an option has
        no token after the first of the text.
    """
    texts, columns = [], []
    for number, choice in enumerate(examples):
        if not 0 <= choice.label < len(choice.options):
            raise ValueError(f"question {number}: label {choice.label} is none of its {len(choice.options)} options")
        prompt = choice.prompt.rstrip()
        for i, option in enumerate(choice.options):
            texts.append(Completion(prompt, choice.prompt[len(prompt) :] + option))
            columns.append((number, i, i == choice.label))
    for text, (number, i, _) in zip(texts, columns, strict=True):
        # Rows without a loss are dropped, which would shift the others.
        if tokenizer.eos_id is None and not encode(text, tokenizer)[1][1:].any():
            raise ValueError(f"question {number}: option {i} has no token after the first one of the text")
    rows = pad_rows(texts, tokenizer, length)
    question, option, right = (np.array(column) for column in zip(*columns, strict=True))
    return rows | {
        "question": question.astype(np.int32),
        "option": option.astype(np.int32),
        "is_answer": right.astype(np.float32),
    }


def _pieces(examples, tokenizer, length, truncation, domains=()) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Returns encoded texts of at most ``length + 1`` tokens, the last of which is a label only, and their domains."""
    if length < 1:
        raise ValueError(f"length: expected at least 1 token, got {length}")
    if truncation not in ("split", "cut", "refuse"):
        raise ValueError(f"truncation: expected 'split', 'cut' or 'refuse', got {truncation!r}")
    pieces, split, left_out, labels = [], 0, 0, {name: i for i, name in enumerate(domains)}
    for number, example in enumerate(examples):
        tokens, in_loss = encode(example, tokenizer)
        name = getattr(example, "domain", None)
        if domains and name not in labels:
            raise ValueError(f"example {number}: expected one of the domains {tuple(domains)}, got {name!r}")
        domain = labels[name] if domains else -1
        if len(tokens) > length + 1 and truncation == "refuse":
            raise ValueError(f"example {number}: {len(tokens) - 1} tokens, a row has {length}")
        starts = range(0, max(len(tokens) - 1, 0), length) if truncation == "split" else range(min(len(tokens) - 1, 1))
        split += len(starts) > 1
        for start in starts:
            part = slice(start, start + length + 1)
            if in_loss[part][1:].any():
                pieces.append((tokens[part], in_loss[part], domain))
            else:
                left_out += len(starts) > 1
    if not pieces:
        raise ValueError("examples: no token has a loss")
    if left_out:
        log.warning(
            "%d of %d examples are longer than a row of %d tokens and were split; %d of their pieces have no loss, "
            "such as prompts apart from their replies, and are left out",
            split,
            number + 1,
            length,
            left_out,
        )
    return pieces


def _fill(rows, length: int, tokenizer: Tokenizer, with_domains: bool = False) -> Rows:
    shape = (len(rows), length)
    out = {
        "inputs": np.full(shape, tokenizer.pad_id, np.int32),
        "labels": np.full(shape, tokenizer.pad_id, np.int32),
        "weights": np.zeros(shape, np.float32),
        "segment_ids": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        **({"domains": np.full(shape, -1, np.int32)} if with_domains else {}),
    }
    for r, row in enumerate(rows):
        start = 0
        for segment, (tokens, in_loss, domain) in enumerate(row, start=1):
            size = len(tokens) - 1
            span = (r, slice(start, start + size))
            out["inputs"][span], out["labels"][span] = tokens[:-1], tokens[1:]
            out["weights"][span] = in_loss[1:]
            out["segment_ids"][span], out["positions"][span] = segment, np.arange(size)
            if with_domains:
                out["domains"][span] = domain
            start += size
    return out
