"""One run in a folder: a lock that says who holds it, and that a killed process leaves free.

The kernel gives a lock of ``fcntl`` back when its process ends, however that is.  What the file says besides (host,
process, since when) names the holder, and decides on disks where such locks do nothing: a process of this machine
either lives or not, and one of another machine touches the file every few seconds as long as it does.
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
_ENDING = 3.0  # seconds that a process which was killed may take to be gone
_SILENT = 35.0  # seconds without a touch after which the process of another machine counts as gone
_held: set[Path] = set()
_guard = threading.Lock()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for a run as long as the context lasts; of several processes the first does, for all.

    Args:
      folder: The folder of the run; it is there.

    Raises:
      OSError: Another run holds it; the message says which, and since when.
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
        # Locks of fcntl belong to the process, and closing the file anywhere in it would give one back.
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
        except FileNotFoundError:  # the run before ended just now, and took its file along
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a file that is gone by now


def _lock(descriptor: int) -> bool:
    """Whether no other process has the lock; True as well on disks that know no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        log.warning("workdir: %s knows no locks; two runs that begin in the same second are not kept apart.", error)
    return True


def _lives(path: Path, descriptor: int) -> bool:
    """Whether the process that the file names lives, as far as can be told."""
    holder, own = _holder(descriptor), _own()
    if not holder or (holder["host"], holder["pid"]) == (own["host"], own["pid"]):
        return False
    if holder["host"] == own["host"]:
        return _begun(holder["pid"]) is not None and _begun(holder["pid"]) == holder["begun"]
    log.warning(
        "workdir: %s was held by process %s on %s; waiting %.0f s for a sign of it.",
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
    """What the file says, or None where it says nothing that can be understood."""
    try:
        found = json.loads(os.pread(descriptor, 10_000, 0))
        return found if isinstance(found["pid"], int) and {"host", "begun", "since"} <= found.keys() else None
    except (ValueError, TypeError, KeyError):
        return None


def _own() -> dict[str, Any]:
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "begun": _begun(os.getpid()), "since": now}


def _begun(pid: int) -> str | None:
    """When a process began, in ticks since this machine did, so that a number given anew shows; None: it has ended."""
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
