"""What may end a run early: preemption, data that does not come, steps that are not finite."""

import contextlib
import logging
import queue
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

log = logging.getLogger(__name__)

PREEMPTED_EXIT = 75
NOT_FINITE_EXIT = 76
LOST_PROCESS_EXIT = 77


class Preempted(Exception):
    """The run got SIGTERM, saved its state and stopped; the same call resumes from there.

    Attributes:
      step: Step of the checkpoint.
    """

    def __init__(self, step: int, workdir: str | Path):
        super().__init__(f"stopped by SIGTERM after step {step}, which is saved in {workdir}")
        self.step = step


class NotFiniteError(ArithmeticError):
    """Steps in a row gave a loss or a gradient that is not finite; the message names the file of the last batch."""


class Lasting:
    """A stream of text that may have no reader left: what is written is then dropped.

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


class Preemption:
    """Whether the run was asked to stop by SIGTERM, and at which step all processes do so together.

    In a run of one process the signal sets a flag, as long as the context lasts and where the main thread runs it.
    With several, ``jax.distributed`` has its own handler, and agrees on a step.
    """

    def __init__(self):
        self._requested = threading.Event()

    @contextlib.contextmanager
    def listen(self) -> Iterator["Preemption"]:
        """Listens within the context."""
        alone = not jax.distributed.is_initialized()
        if not alone or threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self._requested.set())
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)

    def requested(self, step: int) -> bool:
        """Whether all stop after this step; with several processes each of them asks at every step."""
        if jax.distributed.is_initialized():
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested.is_set()


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
