"""A lock on the folder of a run, which names its holder and is released when the holder is killed.

The kernel releases an ``fcntl`` lock when its process ends.  The file also holds host, process and start time: they
name the holder, and decide on file systems without such locks.  A process of this host is looked up; one of another
host touches the file every few seconds while it runs.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from subspace_jax.train.reading import on_every_process
from subspace_jax.train.workdir import naming

log = logging.getLogger(__name__)

_NAME = "run.lock"
_BEAT = 10.0  # seconds between two touches
_ENDING = 3.0  # seconds that a killed process may take to end
_SILENT = 35.0  # seconds without a touch after which a process of another host counts as ended
_held: set[Path] = set()
_guard = threading.Lock()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder while the context lasts; process 0 takes it for all processes.

    Args:
      folder: The folder of the run, which exists.

    Raises:
      OSError: Another run holds the lock; the message names it.
    """
    with contextlib.ExitStack() as held:
        refusal = None
        if jax.process_index() == 0:
            try:
                held.enter_context(_held_here(folder.resolve()))
            except OSError as error:
                refusal = error
        if not on_every_process(refusal is None):
            raise refusal or BlockingIOError(f"workdir: {folder} was refused to the first process; see what it says")
        yield


@contextlib.contextmanager
def _held_here(folder: Path) -> Iterator[None]:
    with _guard:
        # An fcntl lock belongs to the process: closing the file anywhere in it releases the lock.
        if folder in _held:
            raise BlockingIOError(f"workdir: {folder} is in use by another run of this process; take another folder")
        _held.add(folder)
    stop = threading.Event()
    try:
        descriptor = _acquire(folder / _NAME)
        beat = threading.Thread(target=_keep_touching, args=(descriptor, stop), daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            with contextlib.suppress(OSError):
                (folder / _NAME).unlink()
            os.close(descriptor)
    finally:
        with _guard:
            _held.discard(folder)


def _acquire(path: Path) -> int:
    deadline = time.monotonic() + _ENDING
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _lock(descriptor) or _lives(path, descriptor):
                if time.monotonic() > deadline:
                    raise BlockingIOError(_refusal(path, descriptor))
                os.close(descriptor)
                time.sleep(0.1)
                continue
            there = os.stat(path)
            if (there.st_dev, there.st_ino) == (os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino):
                with naming(path):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(_own()).encode(), 0)
                    os.fsync(descriptor)
                return descriptor
        except FileNotFoundError:  # the previous run has just ended and removed its file
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a file that was removed


def _lock(descriptor: int) -> bool:
    """Whether no other process has the lock; True on file systems without locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        log.warning("workdir: no file locks here (%s); two runs that start in the same second may clash.", error)
    return True


def _lives(path: Path, descriptor: int) -> bool:
    """Whether the process that the file names is running, as far as can be told."""
    holder, own = _holder(descriptor), _own()
    if not holder or (holder["host"], holder["pid"]) == (own["host"], own["pid"]):
        return False
    if holder["host"] == own["host"]:
        return _begun(holder["pid"]) is not None and _begun(holder["pid"]) == holder["begun"]
    log.warning(
        "workdir: %s was held by process %s on %s; waiting %.0f s to see whether it still runs.",
        path.parent,
        holder["pid"],
        holder["host"],
        _SILENT,
    )
    touched, deadline = os.stat(path).st_mtime_ns, time.monotonic() + _SILENT
    while time.monotonic() < deadline:
        time.sleep(min(1.0, _SILENT))
        if os.stat(path).st_mtime_ns != touched:
            return True
    return False


def _refusal(path: Path, descriptor: int) -> str:
    holder = _holder(descriptor)
    who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}" if holder else "another process"
    return f"workdir: {path.parent} is in use by {who}; wait for that run or stop it, or take another folder"


def _holder(descriptor: int) -> dict[str, Any] | None:
    """Returns the content of the file, or None where it is not valid."""
    try:
        found = json.loads(os.pread(descriptor, 10_000, 0))
        return found if isinstance(found["pid"], int) and {"host", "begun", "since"} <= found.keys() else None
    except (ValueError, TypeError, KeyError):
        return None


def _own() -> dict[str, Any]:
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "begun": _begun(os.getpid()), "since": now}


def _begun(pid: int) -> str | None:
    """Returns the start time of a process in ticks since boot, which reveals a reused id; None where it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]


def _keep_touching(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(_BEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)
