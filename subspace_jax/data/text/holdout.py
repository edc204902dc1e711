"""A share of the examples held out for evaluation."""

import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

from subspace_jax.data.text.conversations import Conversation
from subspace_jax.data.text.records import Completion

Example = TypeVar("Example", Completion, Conversation)


def hold_out(examples: Sequence[Example], share: float, *, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Splits examples into those to train on and those held out.

    The split depends on the seed and on what the examples hold, not on their order: the share is of different examples,
    in the order of a hash, and equal ones are on the same side.

    Args:
      examples: The examples.
      share: Of the different examples, above 0 and below 1; at least one is held out.
      seed: Another seed holds out others.

    Returns:
      Those to train on and those held out, each in the order given.

    Raises:
      ValueError: ``share`` is out of range, or no example is left to train on.
    """
    if not 0 < share < 1:
        raise ValueError(f"holdout: expected a share above 0 and below 1, got {share}")
    keys = [_key(example, seed) for example in examples]
    different = sorted(set(keys))
    count = max(1, round(share * len(different)))
    if count >= len(different):
        repeats = len(keys) - len(different)
        raise ValueError(
            f"holdout: a share of {share} of {len(different)} different examples leaves none to train on"
            + (f"; {repeats} more repeat them, and equal examples are on the same side" if repeats else "")
        )
    held = set(different[:count])
    parts = [], []
    for example, key in zip(examples, keys, strict=True):
        parts[key in held].append(example)
    return parts


def count_different(examples: Sequence[Example]) -> int:
    """Returns the number of examples without those that repeat another one."""
    return len({_key(example, 0) for example in examples})


def _key(example: Example, seed: int) -> bytes:
    parts = example[:2] if isinstance(example, Conversation) else example
    text = json.dumps([seed, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
