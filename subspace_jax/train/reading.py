"""Reading what may be damaged, or fail for a moment: the two are told apart, and all processes find the same."""

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
    """A file of a checkpoint is not there, or holds other bytes than were written."""


class CheckpointMismatchError(ValueError):
    """The checkpoint holds another model than the one that asks for it; the message lists what differs."""


def together(action: Callable[[], T], what: str, *, verified: bool = False) -> T:
    """Does something on every process; where it fails on one, the same kind of error is raised on all.

    Args:
      action: What to do; it is tried again where it can't read.
      what: What it is, for the message.
      verified: Whether all bytes are known to be those that were written, so that no error tells of damage.

    Raises:
      DamagedError: What is read is damaged.
      OSError: It can't be read.
    """
    result = error = None
    try:
        result = retried(action, every=verified)
    except CheckpointMismatchError:  # the same on all processes
        raise
    except Exception as failed:  # whatever a damaged file makes the readers below raise
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
    """Does something, and does it again after a pause where it can't read; ``every``: where it fails in any way."""
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
    """Whether something holds on all processes, so that they go on together."""
    return fact if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(fact))))


def _may_pass(error: Exception | None) -> bool:
    """Whether an error is one of reading, which tells nothing of what is there."""
    return isinstance(error, OSError) and not isinstance(error, _TELLING)


def first_line(error: BaseException) -> str:
    """Returns what an error says in its first line, or its name where it says nothing."""
    return next((line for line in str(error).strip().split("\n") if line), type(error).__name__)[:300]
