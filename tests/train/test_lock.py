"""One run in a folder: who is refused, and which locks are only left behind."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import pytest

from subspace_jax.train import lock

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
import pathlib, sys, time
from subspace_jax.train.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def left_behind(folder, **fields):
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "begun": "1", "since": "2026-01-01 00:00:00+00:00"}
    (folder / "run.lock").write_text(json.dumps(holder | fields))


def take(folder):
    with lock.locked(folder):
        return json.loads((folder / "run.lock").read_text())


def test_locked_refuses_another_process_by_name_until_that_is_killed(tmp_path, monkeypatch):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(lock, "_ENDING", 0.0)
    who = f"process {holder.pid} on {socket.gethostname()}, since 20.*; wait for that run or stop it"
    with pytest.raises(OSError, match=f"workdir: {tmp_path} is in use by {who}"):
        take(tmp_path)
    holder.send_signal(signal.SIGSTOP)  # it is alive all the same
    with pytest.raises(OSError, match="is in use by"):
        take(tmp_path)
    monkeypatch.setattr(lock, "_ENDING", 30.0)
    holder.kill()  # not waited for: a process that nobody has waited for yet still has its number
    assert take(tmp_path)["pid"] == os.getpid()
    holder.communicate()


def test_locked_leaves_nothing_behind_and_refuses_a_second_run_of_the_same_process(tmp_path):
    with lock.locked(tmp_path):
        with pytest.raises(OSError, match="is in use by another run of this process"):
            take(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"pid": 2**22 + 1},  # there is no such process
        {"pid": os.getppid()},  # the number was given to another one, which began later
        {"pid": "no number"},
        {"host": None, "pid": None},
    ],
)
def test_locked_takes_over_what_a_process_that_is_gone_left_behind(fields, tmp_path):
    left_behind(tmp_path, **fields)
    assert take(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"null", b"\xff\xfe", b"{"])
def test_locked_takes_over_a_file_that_names_nobody(content, tmp_path):
    (tmp_path / "run.lock").write_bytes(content)
    assert take(tmp_path)["pid"] == os.getpid()


def test_locked_refuses_a_live_process_also_where_the_disk_knows_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(lock.errno.ENOLCK, "no locks")))
    monkeypatch.setattr(lock, "_ENDING", 0.0)
    left_behind(tmp_path, pid=os.getppid(), begun=lock._begun(os.getppid()))
    with pytest.raises(OSError, match=f"is in use by process {os.getppid()}"):
        take(tmp_path)
    (tmp_path / "run.lock").unlink()
    assert take(tmp_path)["pid"] == os.getpid()


@pytest.mark.slow
def test_locked_waits_for_a_sign_of_a_process_on_another_machine(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "_SILENT", 0.1)
    monkeypatch.setattr(lock, "_ENDING", 0.0)
    left_behind(tmp_path, host="elsewhere")
    assert take(tmp_path)["host"] == socket.gethostname()
    assert "was held by process" in caplog.text
    monkeypatch.setattr(lock, "_SILENT", 20.0)
    left_behind(tmp_path, host="elsewhere")
    stop = threading.Event()

    def give_signs():
        while not stop.wait(0.05):
            os.utime(tmp_path / "run.lock")

    sign = threading.Thread(target=give_signs)
    sign.start()
    with pytest.raises(OSError, match=r"is in use by process .* on elsewhere"):
        take(tmp_path)
    stop.set()
    sign.join()


def test_a_run_touches_its_lock_as_long_as_it_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.01)
    with lock.locked(tmp_path):
        file = tmp_path / "run.lock"
        os.utime(file, (1, 1))
        touched = threading.Event()
        while file.stat().st_mtime < 2:
            assert not touched.wait(0.01)
