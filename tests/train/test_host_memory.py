"""Memory that a process keeps for its next step."""

import os
import platform
import subprocess
import sys

import pytest

from subspace_jax import train
from subspace_jax.train import host_memory

_STEPS = """
import resource
import sys

import jax
import jax.numpy as jnp

from subspace_jax import train

if sys.argv[1] == "kept":
    assert train.keep_freed_memory()
step = jax.jit(lambda x: jnp.sum(jnp.cumsum(x @ x[:, :64] @ x[:64], axis=0)))
x = jnp.ones((2048, 2048))
for i in range(80):
    if i == 40:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_later_steps_map_far_fewer_pages_where_freed_memory_is_kept():
    faults = {}
    for case in ("kept", "returned"):
        done = subprocess.run(
            [sys.executable, "-c", _STEPS, case],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        faults[case] = int(done.stdout.split()[-1])
    # A product of 16 MiB has 4096 pages, and there are 40 steps.  A pool may still grow by some.
    assert faults["returned"] > 40 * 4096 > 3 * faults["kept"]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not train.keep_freed_memory()


@pytest.mark.parametrize(
    ("platforms", "devices", "expected"),
    [("cpu", True, True), ("cuda", False, False), ("cuda,cpu", True, False), ("", False, True), ("", True, False)],
)
def test_only_cpus_where_jax_is_told_so_or_there_is_nothing_else(monkeypatch, tmp_path, platforms, devices, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    device = tmp_path / "nvidia0"
    if devices:
        device.touch()
    monkeypatch.setattr(host_memory, "_ACCELERATORS", (str(device),))
    assert train.only_cpus() == expected
