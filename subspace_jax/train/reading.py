"""Reads of checkpoints: damage is told apart from transient errors, and all processes agree on which it is."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSES = (0.2, 1.0, 3.0)  # seconds before a read that failed is tried again
_TELLING = FileNotFoundError | NotADirectoryError | IsADirectoryError


class DamagedError(ValueError):
    """A file of a checkpoint is missing, or holds other bytes than were written."""


class CheckpointMismatchError(ValueError):
    """The checkpoint holds another model than expected; the message lists the differences."""


def together(action: Callable[[], T], what: str, *, verified: bool = False) -> T:
    """Runs an action on every process; where it fails on one, all raise the same kind of error.

    Args:
      action: The action; it is retried after an error of reading.
      what: What it does, for the message.
      verified: Whether the bytes are already known to be intact, so that no error means damage.

    Raises:
      DamagedError: The files are damaged.
      OSError: They can't be read.
    """
    result = error = None
    try:
        result = retried(action, every=verified)
    except CheckpointMismatchError:  # the same on all processes
        raise
    except Exception as failed:  # a damaged file may raise anything in the readers
        error = failed
    damaged = isinstance(error, DamagedError) or not (verified or _may_pass(error))
    read = on_every_process(error is None or damaged)
    if on_every_process(error is None):
        return result
    reason = "found by another process" if error is None else first_line(error)
    if read:
        raise DamagedError(reason) from error
    raise OSError(
        f"checkpoints: can't {what} ({reason}); nothing is changed: start again, or move it elsewhere to go on without"
    ) from error


def retried(action: Callable[[], T], *, every: bool = False) -> T:
    """Runs an action, and retries it after an error of reading, or after any error where ``every`` is true."""
    for pause in _PAUSES:
        try:
            return action()
        except (CheckpointMismatchError, DamagedError):
            raise
        except Exception as error:
            if not (every or _may_pass(error)):
                raise
            log.warning("Trying again in %g s: %s", pause, first_line(error))
            time.sleep(pause)
    return action()


def on_every_process(fact: bool) -> bool:
    """Returns whether a fact holds on all processes."""
    return fact if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(fact))))


def _may_pass(error: Exception | None) -> bool:
    """Whether an error is one of reading, which says nothing about the content."""
    return isinstance(error, OSError) and not isinstance(error, _TELLING)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where there is none."""
    return next((line for line in str(error).strip().split("\n") if line), type(error).__name__)[:300]
