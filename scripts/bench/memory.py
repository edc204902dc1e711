"""Peak memory of one call, in a process that does nothing else.

Neither side of a benchmark is imported here: the process would count the other one's libraries.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

# The settings of docs/start.md: freed memory stays with the process.
_KEEP_FREED = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}


def in_own_process(script, *words):
    """Runs ``script --worker *words``, which ends with :func:`report`; returns the two peaks, bytes."""
    command = [sys.executable, script, "--worker", *map(str, words)]
    done = subprocess.run(command, env=os.environ | _KEEP_FREED, capture_output=True, text=True, check=False)
    if done.returncode:
        what = ", ".join(map(str, words[:2]))
        raise SystemExit(f"{what}: the process that measures memory failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(call, side, times=2):
    """Prints the peak of this process over some calls, and over as many later ones; of a GPU, what was in use there.

    Args:
      call: What to make.
      side: The module of the side, which has ``wait`` and ``device_peak``.
      times: How many calls.
    """
    for _ in range(times):
        side.wait(call())
    peak = resident_peak()
    reset = _reset_resident_peak()
    for _ in range(times):
        side.wait(call())
    later = resident_peak() if reset else None
    device = side.device_peak()
    print(json.dumps({"peak": peak, "later": later} if device is None else {"peak": device, "later": device}))


def resident_peak():
    """Of this process alone: what getrusage tells includes the parent's at the time of the fork."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def _reset_resident_peak():
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
