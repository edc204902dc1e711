"""Strict settings for every test: no silent dtype or rank promotion, a persistent compilation cache, one CPU device.

Tests that shard are marked ``eight_devices`` and run in processes of eight: ``pytest --cpu-devices 8``.
"""

import collections
import gc
import itertools
import os
import pathlib
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# With the default scheduler, devices may run the collectives of a scan and those beside it in different orders; under
# load one run in eight then waits for ever.  And eight devices on two busy cores may not meet within 40 seconds, after
# which XLA ends the process.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        "--xla_cpu_collective_call_terminate_timeout_seconds=300",
        os.environ.get("XLA_FLAGS", ""),
    ]
).strip()

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many small objects that live on: by default a twentieth of the time goes into looking for garbage.
gc.set_threshold(100_000, 20, 100)
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "subspace_jax" / "xla"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

GOLDEN = pathlib.Path(__file__).parent / "golden"


def pytest_addoption(parser):
    parser.addoption(
        "--cpu-devices",
        type=int,
        default=1,
        choices=(1, 8),
        help="CPU devices of each process: 8 runs the tests marked eight_devices, 1 (the default) all others",
    )
    parser.addoption(
        "--share-per-file",
        type=float,
        help="share of the processor time of all tests that one file may take; a file that takes more fails the run",
    )


def pytest_configure(config):
    jax.config.update("jax_num_cpu_devices", config.getoption("--cpu-devices"))


def pytest_ignore_collect(collection_path, config):
    """Passes over files without tests for eight devices, whose import takes longer than a look into them."""
    if config.getoption("--cpu-devices") == 8 and collection_path.name.startswith("test_"):
        text = collection_path.read_text()
        return None if "eight_devices" in text or "TaskContract" in text else True
    return None


def pytest_collection_modifyitems(config, items):
    """Keeps the tests that are for processes of this many devices."""
    sharded = config.getoption("--cpu-devices") == 8
    other = [item for item in items if (item.get_closest_marker("eight_devices") is not None) != sharded]
    if other:
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if (item.get_closest_marker("eight_devices") is not None) == sharded]


_seconds = collections.Counter()  # processor time of the tests of each file, summed where reports come together


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    item.began = time.process_time()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    now = time.process_time()
    report.processor_seconds, item.began = now - item.began, now
    return report


def pytest_runtest_logreport(report):
    _seconds[report.nodeid.partition("::")[0]] += getattr(report, "processor_seconds", 0.0)


def pytest_sessionfinish(session):
    share = session.config.getoption("--share-per-file")
    if share and max(_seconds.values(), default=0.0) > share * _seconds.total():
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter, config):
    """Prints, after all else, the files that take longest, and those that take too long."""
    yield
    share = config.getoption("--share-per-file")
    if share is None:
        return
    total = _seconds.total()
    terminalreporter.section("processor time of files")
    terminalreporter.write_line(f"{total:6.1f} s  in all")
    for name, seconds in reversed(_seconds.most_common(15)):
        excess = f": more than {share:.1%} of all, mark some of its tests slow" if seconds > share * total else ""
        terminalreporter.write_line(f"{seconds:6.1f} s  {name}{excess}")


# A process may have 65,530 memory mappings on Linux, and a compiled function takes about 15: without this, a worker
# that has run a thousand tests dies.
_MAPS = pathlib.Path("/proc/self/maps")
_MANY = 50_000
_LOOK_EVERY = 20
_tests_run = itertools.count(1)


def pytest_runtest_teardown():
    """Drops compiled functions where there are many."""
    if next(_tests_run) % _LOOK_EVERY == 0 and _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def configs():
    """The folder of configs."""
    return pathlib.Path(__file__).parents[1] / "configs"


@pytest.fixture
def x64():
    """Runs the test with 64-bit types, as the golden vectors need."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def golden():
    """Loads ``tests/golden/<name>.npz`` as a dict of arrays."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as archive:
            return dict(archive)

    return load


@pytest.fixture
def record_property(record_property):
    """Records numbers of any library as floats, for workers send reports as plain Python objects alone."""
    return lambda name, value: record_property(name, value if isinstance(value, str) else float(value))
