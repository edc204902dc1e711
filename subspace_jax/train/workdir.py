"""The folder of a run: its files appear when they are whole, and a run that is gone from it is missed."""

import contextlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

_MARK = "newest_checkpoint.json"
_OF_A_RUN = ("checkpoints", "metrics.jsonl", "tensorboard", "curves.png", "config.json", "profile", _MARK)


def writable_folder(path: str | Path) -> Path:
    """Makes a folder and tries it, before work starts whose result could not be kept.

    Args:
      path: The folder.

    Returns:
      Its absolute path.

    Raises:
      ValueError: The path is empty.
      OSError: It can't be made, or nothing can be written there.
    """
    if not str(path):
        raise ValueError("workdir: expected a folder, got an empty path")
    folder = Path(path).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"workdir: can't write to {folder} ({os.strerror(error.errno or 0)})") from error
    return folder


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Names a file in the errors of writing it: those of a full disk name none."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, f"can't write {path} ({error.strerror or error})") from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a file to write that takes another's place when it is whole and on disk; else it is removed.

    Args:
      path: The file whose place it takes; a link, or what is no file (``/dev/stdout``), is given as it is.

    Raises:
      OSError: It can't be written; ``path`` is named, and is as it was.
    """
    path = Path(path)
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial{path.suffix}")
    with naming(path):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            yield path
            return
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def mark_saved(workdir: Path, step: int) -> None:
    """Notes that a checkpoint is whole, so that it is missed where it is gone."""
    with replacing(workdir / _MARK) as partial:
        partial.write_text(json.dumps({"step": step}) + "\n")


def unmark_saved(workdir: Path) -> None:
    """Takes back :func:`mark_saved`, before checkpoints are deleted that are not needed any more."""
    (workdir / _MARK).unlink(missing_ok=True)


def check_never_saved(workdir: Path) -> None:
    """Refuses a folder without checkpoints that once held some; raises FileNotFoundError."""
    # A run of an earlier version left no mark, but drew its curves after its last checkpoint.
    if (workdir / _MARK).exists() or ((workdir / "curves.png").exists() and (workdir / "metrics.jsonl").exists()):
        raise FileNotFoundError(
            f"workdir: the checkpoints of the run in {workdir} are gone; put them back into checkpoints/, or start "
            "anew by --restart (restart=True), which keeps what is there in a folder earlier.N"
        )


def warn_of_lost(workdir: Path, steps: Sequence[int]) -> None:
    """Warns where the newest checkpoint is gone and older ones, of these steps, are there."""
    try:
        step = int(json.loads((workdir / _MARK).read_bytes())["step"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # no mark, or one that tells nothing
        return
    if steps and step > max(steps):
        log.warning("The checkpoint of step %d is gone from %s; going on from an earlier one.", step, workdir)


def set_aside(workdir: Path) -> None:
    """Moves what a run has left into a folder ``earlier.1``, or the first number that is free."""
    there = [workdir / name for name in _OF_A_RUN if (workdir / name).exists()]
    if not there:
        return
    earlier = next(folder for i in itertools.count(1) if not (folder := workdir / f"earlier.{i}").exists())
    earlier.mkdir()
    for path in there:
        path.rename(earlier / path.name)
    log.warning("Starting anew; what the run before had left in %s is in %s.", workdir, earlier)
