"""What a run meets and how it ends then: a notice to leave, data that does not come, numbers that are not finite."""

import contextlib
import logging
import queue
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from subspace_jax.train.workdir import replacing

log = logging.getLogger(__name__)

PREEMPTED_EXIT = 75
NOT_FINITE_EXIT = 76
LOST_PROCESS_EXIT = 77


class Preempted(Exception):
    """The run was asked to leave by SIGTERM, saved its state and stopped; the same call goes on from there.

    Attributes:
      step: Step of the checkpoint.
    """

    def __init__(self, step: int, workdir: str | Path):
        super().__init__(f"stopped by SIGTERM after step {step}, which is saved in {workdir}")
        self.step = step


class NotFiniteError(ArithmeticError):
    """Steps in a row gave a loss or a gradient that is not finite; the message says where the last batch lies."""


class Lasting:
    """A stream of text that nobody may be reading any more: then what is written is dropped.

    It equals what it wraps, so that a progress bar makes way for messages on the same stream.

    Args:
      stream: Where the text goes, such as ``sys.stderr``, which may be a pipe to ``head``, or a file on a full disk.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __eq__(self, other: object) -> bool:
        return self._stream == getattr(other, "_stream", other)

    def __hash__(self) -> int:
        return hash(self._stream)

    def write(self, text: str) -> int:
        """Writes, or does nothing."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, or does nothing."""
        with contextlib.suppress(OSError):
            self._stream.flush()


class Notice:
    """Whether the run was asked to leave, and at which step all processes do so together.

    In a run of one process SIGTERM sets a flag, as long as the context lasts and where the main thread runs it.  With
    several, ``jax.distributed`` has its own handler, and agrees on a step.
    """

    def __init__(self):
        self._came = threading.Event()

    @contextlib.contextmanager
    def listen(self) -> Iterator["Notice"]:
        """Listens within the context."""
        alone = not jax.distributed.is_initialized()
        if not alone or threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self._came.set())
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)

    def came(self, step: int) -> bool:
        """Whether all leave after this step; with several processes to be asked at every step by each of them."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._came.is_set()


class Timed:
    """An iterator whose next item has to come within a time.

    Args:
      items: The iterator; a thread of its own asks it for one item at a time, and only when it is asked for here.
      timeout: Seconds; 0 waits for ever, without a thread.
      name: What the items are, for the message.
    """

    def __init__(self, items: Iterator[Any], timeout: float, name: str):
        self._items, self._timeout, self._name = items, timeout, name
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._given: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> "Timed":
        return self

    def __next__(self) -> Any:
        if not self._timeout:
            return next(self._items)
        if self._thread is None:
            # A daemon: a source that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._asked.put(True)
        try:
            item, error = self._given.get(timeout=self._timeout)
        except queue.Empty:
            raise TimeoutError(
                f"data: the {self._name} gave nothing for {self._timeout:g} s (train.data_timeout); the run can go on "
                "from its last checkpoint"
            ) from None
        if error is not None:
            raise error
        return item

    def close(self) -> None:
        """Lets the thread end."""
        self._asked.put(False)

    def _work(self) -> None:
        while self._asked.get():
            try:
                self._given.put((next(self._items), None))
            except BaseException as error:  # whatever it is, it belongs to who asked
                self._given.put((None, error))


class FiniteWatch:
    """Stops a run all of whose last steps were skipped.

    Args:
      limit: Steps in a row; 0 never stops.  Looked at every ``limit`` steps, so that devices are not waited for in
        between: a run stops after ``limit`` to ``2 limit - 1`` of them.
      skipped: Steps that were skipped before.
      workdir: Where the last batch is written.
    """

    def __init__(self, limit: int, skipped: int, workdir: str | Path):
        self._limit, self._before, self._workdir = limit, skipped, Path(workdir)
        self._seen = 0

    def look(self, step: int, skipped: jax.Array, batch: Mapping[str, np.ndarray]) -> None:
        """Counts a step.

        Args:
          step: Its number.
          skipped: The count of the step's metrics.
          batch: The rows that this process gave.

        Raises:
          NotFiniteError: The last ``limit`` steps were all skipped.
        """
        self._seen += 1
        if not self._limit or self._seen % self._limit:
            return
        count = int(skipped)
        if count - self._before >= self._limit:
            file = self._workdir / f"not_finite_{step}_{jax.process_index()}.npz"
            with replacing(file) as partial:
                np.savez(partial, **{name: np.asarray(rows) for name, rows in batch.items()})
            raise NotFiniteError(
                f"loss, gradient or update of {self._limit} steps in a row up to step {step} was not finite "
                f"(train.max_skipped); the last batch is in {file}, and the parameters are those before these steps"
            )
        self._before = count
