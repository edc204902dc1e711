"""Strict settings for every test: 8 CPU devices, no silent dtype or rank promotion, a persistent compilation cache."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# With the default scheduler, devices may run the collectives of a scan and those beside it in different orders; under
# load one run in eight then waits for ever.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_cpu_enable_concurrency_optimized_scheduler=false", os.environ.get("XLA_FLAGS", "")]
).strip()

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "subspace_jax" / "xla"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

GOLDEN = pathlib.Path(__file__).parent / "golden"


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
