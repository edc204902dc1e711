import errno
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.image
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from tensorboardX.proto import event_pb2

from subspace_jax import train

from .common import Regression, arrays, data_of, regression, run_of


def test_rows_are_written_at_once_and_read_back(tmp_path):
    log = train.MetricsLog(tmp_path)
    log.write(1, "train", {"loss": 0.5})
    log.write(2, "eval", {"loss": 0.25, "accuracy": 1.0})
    expected = [
        {"step": 1, "split": "train", "loss": 0.5},
        {"step": 2, "split": "eval", "loss": 0.25, "accuracy": 1.0},
    ]
    assert train.read_metrics(log.path) == expected  # before it is closed
    log.close()


def test_rows_after_the_step_of_the_resume_are_dropped(tmp_path):
    log = train.MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(step, "train", {"loss": float(step)})
    log.close()
    before = log.path.read_text().splitlines(keepends=True)
    again = train.MetricsLog(tmp_path, start_step=3)
    assert log.path.read_text() == "".join(before[:3])
    again.write(4, "train", {"loss": 9.0})
    again.close()
    assert [row["loss"] for row in train.read_metrics(log.path)] == [1, 2, 3, 9]
    train.MetricsLog(tmp_path).close()
    assert train.read_metrics(log.path) == []


def test_a_torn_last_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "split": "train", "loss": 0.5}\n{"step": 2, "split": "tr')
    assert [row["step"] for row in train.read_metrics(path)] == [1]
    train.MetricsLog(tmp_path, start_step=5).close()
    assert path.read_text() == '{"step": 1, "split": "train", "loss": 0.5}\n'
    assert train.read_metrics(tmp_path / "none.jsonl") == []


BAD_LINES = [
    b"garbage",
    b"\xff\x00",
    b"null",
    b"[1]",
    b'{"step": "3", "split": "train"}',
    b'{"step": null, "split": "train", "loss": 1}',
    b'{"step": 3, "split": 1}',
    b'{"step": 3, "split": "train", "loss": "low"}',
]


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_line_that_is_no_row_is_named_and_kept_while_the_other_rows_go_on(bad, tmp_path, caplog):
    path, row = tmp_path / "metrics.jsonl", b'{"step": 1, "split": "train", "loss": null}\n'
    content = row + bad + b"\n" + row
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}:2: expected"):
        train.read_metrics(path)
    for name in ("metrics.damaged.jsonl", "metrics.damaged2.jsonl"):
        path.write_bytes(content)
        train.MetricsLog(tmp_path, start_step=1).close()
        assert f"{path}:2: expected" in caplog.text
        assert path.read_bytes() == 2 * row
        assert (tmp_path / name).read_bytes() == content


def test_what_stands_in_the_place_of_the_files_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    for start_step in (0, 1):
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            train.MetricsLog(tmp_path, start_step=start_step)
    (tmp_path / "metrics.jsonl").rmdir()
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(OSError, match="tensorboard"):
        train.MetricsLog(tmp_path)


def test_a_full_disk_is_named_with_the_file(tmp_path):
    log = train.MetricsLog(tmp_path)
    log._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match=r"can't write .*metrics.jsonl \(No space left on device\)"):
        log.write(1, "train", {"loss": 1.0})
    with pytest.raises(OSError, match=r"can't write .*metrics.jsonl"):
        log.close()
    log = train.MetricsLog(tmp_path)
    log._board._writer._py_recordio_writer._writer = open("/dev/full", "wb")  # noqa: SIM115
    log.write(1, "train", {"loss": 1.0})
    with pytest.raises(OSError, match=r"can't write .*tensorboard \(No space left on device\)"):
        log.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_file_that_is_not_whole_takes_no_place(number, tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with (
        pytest.raises(OSError, match=rf"can't write {path} \({os.strerror(number)}\)"),
        train.replacing(path) as partial,
    ):
        partial.write_text("half")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("curves.png", "before")]


def test_replacing_writes_through_links_and_to_what_is_no_file(tmp_path):
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to("file")
    with train.replacing(tmp_path / "link") as partial:
        partial.write_text("after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "after"
    with train.replacing("/dev/null") as partial:
        partial.write_text("nowhere")


def test_what_is_not_finite_is_null_in_strict_json(tmp_path):
    log = train.MetricsLog(tmp_path)
    log.write(1, "train", {"loss": math.nan, "grad_norm": math.inf, "skipped": 1.0})
    log.close()

    def refuse(constant):
        raise AssertionError(constant)

    row = json.loads(log.path.read_text(), parse_constant=refuse)
    assert row == {"step": 1, "split": "train", "loss": None, "grad_norm": None, "skipped": 1.0}


def test_curves_are_a_picture_also_of_numbers_that_are_not_finite(tmp_path):
    log = train.MetricsLog(tmp_path)
    for step, loss in enumerate([1.0, math.nan, 0.5]):
        log.write(step, "train", {"loss": loss, "accuracy": 0.1 * step})
        log.write(step, "eval", {"loss": loss, "accuracy": 0.1 * step})
    log.close()
    train.plot_curves({"a": log.path, "b": log.path}, tmp_path / "curves.png")
    picture = matplotlib.image.imread(tmp_path / "curves.png")
    assert picture.shape[:2] > (300, 600)
    assert np.ptp(picture[..., :3]) > 0.5
    train.plot_curves({"empty": tmp_path / "none.jsonl"}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def drawn(monkeypatch, *rows):
    """Draws the curves of rows (step, split, values), and returns the visible panels of the figure."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    with tempfile.TemporaryDirectory() as folder:
        log = train.MetricsLog(folder)
        for row in rows:
            log.write(*row)
        log.close()
        train.plot_curves({"run": log.path}, f"{folder}/curves.png")
    return [axis for axis in figures[0].axes if axis.get_visible()]


def test_plot_curves_has_training_and_evaluation_in_one_panel_and_no_flat_ones(monkeypatch):
    values = {"grad_norm": 1.0, "skipped": 0.0, "loss": 1.0, "accuracy": 0.5}
    panels = drawn(
        monkeypatch,
        *((step, "train", {**values, "loss": 1 / step, "grad_norm": step}) for step in range(1, 101)),
        (100, "eval", {"loss": 0.5, "accuracy": 0.75}),
        (100, "eval", {"loss": 0.5, "top_5": 1.0}),
    )
    labels = [(axis.get_xlabel(), axis.get_ylabel()) for axis in panels]
    assert labels == [("step", name) for name in ("loss", "accuracy", "top 5", "grad norm")]
    train_line, eval_line = panels[0].get_lines()
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["train", "eval"]
    assert (train_line.get_marker(), eval_line.get_marker()) == ("", "o")  # a single evaluation is a point
    assert len(panels[2].get_lines()) == 1


def test_plot_curves_has_a_panel_for_each_phase_and_metric(monkeypatch):
    panels = drawn(
        monkeypatch,
        *((step, f"{phase}/train", {"loss": step}) for phase in ("first", "second") for step in (1, 2)),
        (2, "first/eval", {"loss": 0.5}),
    )
    assert [axis.get_title() for axis in panels] == ["first", "second"]
    assert [len(axis.get_lines()) for axis in panels] == [2, 1]


def test_a_run_draws_its_curves_and_shows_its_progress(tmp_path, capsys):
    task, data = regression()
    train.fit(run_of(task, optax.sgd(0.05), data, num_steps=4, workdir=tmp_path, progress=True))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().err
    assert "step 4/4  loss " in shown


@pytest.mark.slow
def test_skipped_steps_are_reported_once_and_training_goes_on(fit, tmp_path, caplog):
    rows = arrays(64)
    rows["inputs"][5] = np.nan
    data = data_of(rows, arrays(16))
    result = fit(Regression(), optax.sgd(0.05), data, num_steps=4, workdir=tmp_path, log_every=1)
    assert int(result.state.skipped) == 1  # one of the four batches of an epoch
    assert np.isfinite(result.metrics["loss"])
    warnings = [record.message for record in caplog.records if "not finite" in record.message]
    assert len(warnings) == 1
    assert "1 steps were skipped" in warnings[0]
    rows = [row for row in train.read_metrics(tmp_path / "metrics.jsonl") if row["split"] == "train"]
    assert [row["loss"] is None for row in rows].count(True) == 1
    assert rows[-1]["skipped"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a_run_is_traced", "an_interrupted_trace"])
def test_the_profiler_traces_where_it_is_asked_to(name):
    # In a process of its own: a profiler session brings down one in which libtpu has compiled a program.
    file = Path(__file__).parent / "profiling.py"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", name, str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def events(path):
    """Reads a file of records: the length, its checksum, the event, its checksum."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def scalars(path):
    return [(event.step, value.simple_value) for event in events(path) for value in event.summary.value]


def test_tensorboard_shows_a_resumed_run_without_gap_or_overlap(tmp_path):
    log = train.MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(step, "train", {"loss": float(step)})
    log.close()
    again = train.MetricsLog(tmp_path, start_step=3)
    for step in (4, 5):
        again.write(step, "train", {"loss": 10.0 + step})
    again.close()
    first, second = (next((tmp_path / "tensorboard").glob(f"*.{step}")) for step in (0, 3))
    assert [value for value in scalars(first) if value[0] < 4] == [(1, 1), (2, 2), (3, 3)]
    assert scalars(second) == [(4, 14), (5, 15)]
    # TensorBoard forgets what it read from the first file of this step and later ones.
    (start,) = [event for event in events(second) if event.HasField("session_log")]
    assert (start.session_log.status, start.step) == (event_pb2.SessionLog.START, 4)
