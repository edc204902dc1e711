"""Tests of the profiler, which ``test_metrics_log.py`` runs in a process of its own."""

import optax
import pytest

from .common import Interrupted, breaking, regression


def trace_files(folder):
    return list((folder / "profile").rglob("*.xplane.pb"))


def test_a_run_is_traced_from_the_step_that_was_asked_for(fit, tmp_path):
    task, data = regression()
    fit(task, optax.sgd(0.05), data, num_steps=3, workdir=tmp_path / "end", profile_at=2)
    assert len(trace_files(tmp_path / "end")) == 1
    # A run that goes on after that step has nothing to trace, nor has one that ends before it.
    fit(task, optax.sgd(0.05), data, num_steps=8, workdir=tmp_path / "end", profile_at=2)
    assert len(trace_files(tmp_path / "end")) == 1
    fit(task, optax.sgd(0.05), data, num_steps=2, workdir=tmp_path / "before", profile_at=50)
    assert not trace_files(tmp_path / "before")


def test_an_interrupted_trace_does_not_keep_the_next_one_from_starting(fit, tmp_path):
    task, data = regression()
    with pytest.raises(Interrupted):
        fit(task, optax.sgd(0.05), breaking(data, 3), num_steps=8, workdir=tmp_path / "a", profile_at=2)
    fit(task, optax.sgd(0.05), data, num_steps=2, workdir=tmp_path / "b", profile_at=1)
    assert trace_files(tmp_path / "b")
