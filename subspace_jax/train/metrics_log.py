"""Metrics of a run: a JSONL file and TensorBoard."""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from subspace_jax.train.workdir import naming, replacing

log = logging.getLogger(__name__)

_FLUSH_EVERY = 30.0  # seconds


class MetricsLog:
    """Writes rows of metrics to ``metrics.jsonl`` and to TensorBoard below ``tensorboard/``.

    On resume, rows after ``start_step`` are dropped, so that the file is that of an uninterrupted run.  A file with
    malformed lines is kept under another name.  Only process 0 writes.

    Args:
      workdir: Folder of the run.
      start_step: Step at which the run resumes.

    Raises:
      OSError: A file can't be read or written; it is named.
    """

    def __init__(self, workdir: str | Path, *, start_step: int = 0):
        self.path = Path(workdir) / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        rows, wrong = _parse(self.path) if start_step else ([], [])
        if wrong:
            names = (self.path.with_name(f"metrics.damaged{number}.jsonl") for number in ("", *range(2, 100)))
            aside = next(name for name in names if not name.exists())
            self.path.replace(aside)
            log.warning("%s; the file is kept as %s, and its other rows go on.", wrong[0], aside)
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= start_step))
        self._file = self.path.open("a", buffering=1)
        self._board = _TensorBoard(Path(workdir) / "tensorboard", start_step)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds a row: the metrics of one split at one step, with ``null`` for a value that is not finite.

        Raises:
          OSError: It can't be written; the file is named.
        """
        if not self._writes:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with naming(self.path):
            self._file.write(json.dumps({"step": step, "split": split, **finite}) + "\n")
        self._board.write(step, {f"{split}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Flushes and closes the files; raises OSError where it can't be written."""
        if self._writes:
            with naming(self.path):
                self._file.close()
            self._board.close()


class _TensorBoard:
    """Writes scalars to a folder of TensorBoard."""

    def __init__(self, folder: Path, start_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        self._folder, self._flushed = folder, time.monotonic()
        folder.mkdir(exist_ok=True)
        # The suffix tells apart files of runs that start in the same second.
        self._writer = EventsWriter(str(folder / "events"), f".{start_step}")
        # TensorBoard drops the events of earlier files from this step on.
        with naming(folder):
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=start_step + 1, session_log=start))
            self._writer.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with naming(self._folder):
            for name, value in values.items():
                summary = self._scalar(name, value)
                self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
            if time.monotonic() - self._flushed > _FLUSH_EVERY:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with naming(self._folder):
            self._writer.close()


def read_metrics(path: str | Path) -> list[dict[str, float | str | None]]:
    """Reads a ``metrics.jsonl``; an incomplete last line, which a killed run leaves, is ignored.

    Args:
      path: The file.

    Returns:
      The rows; an empty list where there is no file.

    Raises:
      ValueError: A line is not a row; file and line are named.
      OSError: It can't be read.
    """
    rows, wrong = _parse(Path(path))
    if wrong:
        raise ValueError(wrong[0])
    return rows


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the rows, and what is wrong with the other lines."""
    rows, wrong = [], []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number < len(lines) or line.endswith(b"\n"):
                wrong.append(f"{path}:{number}: expected a row of JSON, got {line[:40]!r}")
            continue
        if _is_row(row):
            rows.append(row)
        else:
            wrong.append(f"{path}:{number}: expected step, split and numbers by name, got {line[:80]!r}")
    return rows, wrong


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("split"), str):
        return False
    return all(value is None or type(value) in (int, float) for name, value in row.items() if name != "split")
