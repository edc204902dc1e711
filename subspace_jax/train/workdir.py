"""The folder of a run: files are replaced atomically, and lost checkpoints are noticed."""

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
WANDB_ID = "wandb_id.txt"
_OF_A_RUN = ("checkpoints", "metrics.jsonl", "tensorboard", "curves.png", "config.json", "profile", _MARK, WANDB_ID)


def writable_folder(path: str | Path) -> Path:
    """Makes a folder and tests that it can be written, before work starts.

    Args:
      path: The folder.

    Returns:
      Its absolute path.

    Raises:
      ValueError: The path is empty.
      OSError: It can't be made or written.
    """
    if not str(path):
        raise ValueError("workdir: expected a folder, got an empty path")
    folder = Path(path).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"can't write to the folder {folder} ({os.strerror(error.errno or 0)})") from error
    return folder


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds the name of a file to the errors of writing it, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, f"can't write {path} ({error.strerror or error})") from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Replaces a file atomically: yields a temporary path that is renamed to ``path`` once it is on disk.

    Args:
      path: The file; a link or a device (``/dev/stdout``) is written in place.

    Raises:
      OSError: It can't be written; ``path`` is named, and unchanged.
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
    """Records the step of a complete checkpoint, so that its loss is noticed."""
    with replacing(workdir / _MARK) as partial:
        partial.write_text(json.dumps({"step": step}) + "\n")


def unmark_saved(workdir: Path) -> None:
    """Undoes :func:`mark_saved`, before checkpoints are deleted on purpose."""
    (workdir / _MARK).unlink(missing_ok=True)


def check_never_saved(workdir: Path) -> None:
    """Raises FileNotFoundError for a folder without checkpoints that once held some."""
    # A run of an earlier version left no mark, but plotted its curves after its last checkpoint.
    if (workdir / _MARK).exists() or ((workdir / "curves.png").exists() and (workdir / "metrics.jsonl").exists()):
        raise FileNotFoundError(
            f"workdir: the checkpoints of the run in {workdir} are gone; put them back into checkpoints/, or start "
            "from scratch by --restart (restart=True), which keeps the files in a folder earlier.N"
        )


def warn_of_lost(workdir: Path, steps: Sequence[int]) -> None:
    """Warns where the newest checkpoint is gone and older ones, of these steps, remain."""
    try:
        step = int(json.loads((workdir / _MARK).read_bytes())["step"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # no mark, or an invalid one
        return
    if steps and step > max(steps):
        log.warning("The checkpoint of step %d is gone from %s; resuming from an earlier one.", step, workdir)


def set_aside(workdir: Path) -> None:
    """Moves the files of a run into a folder ``earlier.1``, or the first free number."""
    there = [workdir / name for name in _OF_A_RUN if (workdir / name).exists()]
    if not there:
        return
    earlier = next(folder for i in itertools.count(1) if not (folder := workdir / f"earlier.{i}").exists())
    earlier.mkdir()
    for path in there:
        path.rename(earlier / path.name)
    log.warning("Starting from scratch; the files of the previous run in %s are now in %s.", workdir, earlier)
