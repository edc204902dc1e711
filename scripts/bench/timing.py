"""Times of calls that take turns, and the rates of the machine that they are held against."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    least_seconds: float = 0.02,
    of: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Median seconds of each call, or what ``of`` makes of them, over rounds in which all take turns.

    What else the machine does so meets all alike.  A call may return before its work is done: short ones are made in
    bursts of at least ``least_seconds`` that are waited for at the end, as a program that keeps a device busy makes
    them.
    """
    bursts = {}
    for name, call in calls.items():
        wait(call())
        start = time.perf_counter()
        wait(call())
        bursts[name] = max(1, min(1000, round(least_seconds / (time.perf_counter() - start))))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(bursts[name]):
                out = call()
            wait(out)
            times[name].append((time.perf_counter() - start) / bursts[name])
    return {name: of(values) for name, values in times.items()}


def wait(out: Any) -> None:
    """Waits for JAX arrays, or for what PyTorch does on a GPU."""
    if type(out).__module__.startswith("torch"):
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
    else:
        jax.block_until_ready(out)


def copy_rate(rounds: int = 5) -> float:
    """Bytes per second, read and written, of a large elementwise operation."""
    x = jnp.zeros((2**28 if on_accelerator() else 2**24,), jnp.float32)
    negative = jax.jit(jnp.negative)
    return 2 * x.nbytes / in_turns({"copy": lambda: negative(x)}, rounds)["copy"]


def matmul_rate(dtype: jax.typing.DTypeLike, rounds: int = 5) -> float:
    """Operations per second of a large square product."""
    n = 8192 if on_accelerator() else 1024
    x = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(jnp.dot)
    return 2 * n**3 / in_turns({"matmul": lambda: product(x, x)}, rounds)["matmul"]


def on_accelerator() -> bool:
    """Whether JAX's default device is something else than a CPU."""
    return jax.default_backend() != "cpu"


def device_name() -> str:
    """The device, in words."""
    device = jax.devices()[0]
    return f"{device.device_kind} x {jax.device_count()}" if on_accelerator() else f"CPU, {platform.machine()}"


def file_label() -> str:
    """The device, as part of a file name."""
    return jax.devices()[0].device_kind.lower().replace(" ", "_") if on_accelerator() else "cpu"
