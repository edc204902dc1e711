"""What is shown while a plan is made: a moving line on a terminal, elsewhere a line every half a minute."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from subspace_jax.train.progress import LINE_EVERY


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Shows on standard error what is being done, and for how long.

    Args:
      text: What is done within the context, such as "v5e:2x2: compiling step".
    """
    with _moving(text) if sys.stderr.isatty() else _lines(text):
        yield


@contextlib.contextmanager
def _moving(text: str) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(text, total=None)
        yield


@contextlib.contextmanager
def _lines(text: str) -> Iterator[None]:
    done, began, stream = threading.Event(), time.monotonic(), sys.stderr

    def repeat() -> None:
        while not done.wait(LINE_EVERY):
            print(f"{text}, {time.monotonic() - began:.0f} s", file=stream, flush=True)

    print(f"{text} …", file=stream, flush=True)
    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
