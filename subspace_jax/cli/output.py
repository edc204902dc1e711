"""What commands write: standard output, where a closed pipe ends no run, and folders that get all files or none."""

import contextlib
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

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


@contextlib.contextmanager
def all_or_nothing(out: Path) -> Iterator[Path]:
    """Yields a folder in ``out`` whose files and folders are moved there once all are written, pages last.

    A run that fails so leaves nothing, and one that is killed a folder that the next run removes.
    """
    from subspace_jax.train.lock import locked

    folder = out / "unfinished"
    with locked(out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
            for path in sorted(folder.iterdir(), key=lambda path: path.suffix == ".html"):
                if path.is_dir():
                    shutil.rmtree(out / path.name, ignore_errors=True)
                path.replace(out / path.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


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
