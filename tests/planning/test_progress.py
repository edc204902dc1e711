"""What is shown while a plan is made."""

import io
import re
import sys
import time

from subspace_jax import planning
from subspace_jax.planning import progress


def test_waiting_prints_lines_where_standard_error_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.01)
    with planning.waiting("v5e:2x2: compiling step"):
        time.sleep(0.1)
    captured = capsys.readouterr()
    first, second, *_ = captured.err.splitlines()
    assert first == "v5e:2x2: compiling step …"
    assert second == "v5e:2x2: compiling step, 0 s"
    assert captured.out == ""


def test_waiting_moves_on_a_terminal_and_leaves_no_line(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with planning.waiting("v5e:2x2: compiling step [a]"):
        time.sleep(0.3)
    written = stream.getvalue()
    assert re.search(r"v5e:2x2: compiling step \[a\] \S*0:00:00", written)
    assert written.endswith("\x1b[2K")  # the line is erased
