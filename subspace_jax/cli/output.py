"""What a command prints: no tracebacks, and nothing that ends a run where its reader is gone, such as ``head``."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator

READER_GONE_EXIT = 141  # as a shell tells of SIGPIPE


def quietly(command: Callable[[], int]) -> int:
    """Runs a command, and ends it where nobody reads its output any more, or this can't be written.

    Args:
      command: Returns the exit status.

    Returns:
      That status; 141 where the reader is gone, 2 where the output can't be written.
    """
    try:
        try:
            return command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _drop_the_rest()
        return READER_GONE_EXIT
    except OSError as error:
        _drop_the_rest()
        print(f"subspace-jax: can't write the output ({error.strerror or error})", file=sys.stderr)
        return 2


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Within it, a reader that goes away is not missed: what is written besides counts."""
    from subspace_jax.train.interruptions import Lasting

    with contextlib.redirect_stdout(Lasting(sys.stdout)), contextlib.redirect_stderr(Lasting(sys.stderr)):
        yield
    try:
        sys.stdout.flush()
    except OSError:
        _drop_the_rest()


def silence_threads() -> None:
    """Drops what the threads of Orbax tell of errors, with their tracebacks: they are raised as well."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.excepthook

    def hook(*error) -> None:
        if threading.current_thread() is threading.main_thread():
            before(*error)

    sys.excepthook = hook


def _drop_the_rest() -> None:
    """What is still in the buffer would end the interpreter with a message."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
