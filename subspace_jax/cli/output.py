"""Standard output of the commands: no tracebacks, and a closed pipe ends no run."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator

CLOSED_PIPE_EXIT = 141  # as shells report SIGPIPE


def quietly(command: Callable[[], int]) -> int:
    """Runs a command, and ends it where its output is closed or can't be written.

    Args:
      command: Returns the exit status.

    Returns:
      That status; 141 where standard output is a closed pipe, 2 where it can't be written.
    """
    try:
        try:
            return command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _drop_the_rest()
        return CLOSED_PIPE_EXIT
    except OSError as error:
        _drop_the_rest()
        print(f"subspace-jax: can't write the output ({error.strerror or error})", file=sys.stderr)
        return 2


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Within it, writing to a closed pipe is ignored: the files of a run matter more than its output."""
    from subspace_jax.train.interruptions import Lasting

    with contextlib.redirect_stdout(Lasting(sys.stdout)), contextlib.redirect_stderr(Lasting(sys.stderr)):
        yield
    try:
        sys.stdout.flush()
    except OSError:
        _drop_the_rest()


def log_to_stderr() -> None:
    """Shows messages of this library as they are, and warnings and errors as such."""

    class Format(logging.Formatter):
        def format(self, record):
            text = super().format(record)
            return text if record.levelno <= logging.INFO else f"{record.levelname}: {text}"

    handler = logging.StreamHandler()
    handler.setFormatter(Format())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("subspace_jax").setLevel(logging.INFO)


def silence_threads() -> None:
    """Silences tracebacks of Orbax's threads, whose errors are raised in the main thread too."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = sys.excepthook

    def hook(*error) -> None:
        if threading.current_thread() is threading.main_thread():
            before(*error)

    sys.excepthook = hook


def _drop_the_rest() -> None:
    """Redirects standard output to the null device; the rest of the buffer would end the interpreter with a message."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
