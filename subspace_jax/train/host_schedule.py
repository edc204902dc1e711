"""The learning rate on the host, for rows: nothing is compiled, and no device is waited for."""

import math
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from subspace_jax.train.phases import Phase, Row


def host_schedule(config: ConfigDict, num_steps: int) -> Callable[[int], float]:
    """Returns :func:`subspace_jax.train.make_schedule` as a function of Python numbers.

    Args:
      config: See there.
      num_steps: Length of the run.
    """
    peak, warmup, final = float(config.learning_rate), config.warmup_steps, config.final_scale
    rest = num_steps - warmup

    def rate(step: int) -> float:
        if step < warmup:
            return peak * step / warmup
        done = min((step - warmup) / rest, 1.0)
        if config.schedule == "cosine":
            return peak * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done)))
        if config.schedule == "linear":
            return peak * (1.0 + (final - 1.0) * done)
        if config.schedule == "step":
            return peak * 0.1 ** sum(step >= num_steps * tenths // 10 for tenths in (3, 6, 9))
        return peak

    return rate


def last_rate(phase: Phase, taken: int, skipped: int) -> dict[str, float]:
    """Returns ``learning_rate``, that of a phase's last update, or nothing where its schedule is not known.

    Args:
      phase: The phase.
      taken: Steps of the phase.
      skipped: Those of them that were skipped, which the optimizer does not count.
    """
    if phase.learning_rate is None:
        return {}
    return {"learning_rate": phase.learning_rate(max(taken - skipped - 1, 0))}


def skipped_before(phase: Phase, rows: Sequence[Row]) -> int:
    """Returns the skipped steps of earlier phases, from the rows of a run."""
    before = [row["skipped"] for row in rows if "skipped" in row and row["phase"] != phase.name]
    return int(before[-1]) if before else 0
