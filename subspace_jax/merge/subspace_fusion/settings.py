"""How folders are merged."""

import math
from typing import Literal, NamedTuple, get_args

from subspace_jax.merge.subspace_fusion import statistics, ties

Rule = Literal["average", "task-arithmetic", "ties", "fisher", "regmean"]


class MergeSettings(NamedTuple):
    """How folders are merged.

    Attributes:
      rule: The rule.
      lam: Coefficients of task vectors, one for each model; for TIES one number.
      keep: Of :func:`ties_merge`.
      combine: Of :func:`ties_merge`.
      normalize: Of :func:`fisher_merge`.
      alpha: Of :func:`regmean_merge`.
      damping: Of :func:`regmean_merge`.
    """

    rule: Rule = "average"
    lam: tuple[float, ...] = (0.3,)
    keep: float = 0.2
    combine: ties.Combine = "sum"
    normalize: bool = True
    alpha: float = 0.95
    damping: float = 0.0


def checked(settings: MergeSettings, count: int, *, base: bool) -> MergeSettings:
    """The settings with a coefficient for each of so many models; ValueError where they can't serve."""
    if settings.rule not in get_args(Rule):
        raise ValueError(f"--method: expected one of {', '.join(get_args(Rule))}, got {settings.rule}")
    if not count:
        raise ValueError("--models: expected at least one folder, got none")
    ties.check_ties(settings.keep, settings.combine)
    if settings.rule in ("task-arithmetic", "ties") and not base:
        raise ValueError(f"--base: expected the model that all were fine-tuned from, for --method {settings.rule}")
    statistics.check_regmean(settings.alpha, settings.damping)
    expected = 1 if settings.rule == "ties" else count
    if len(settings.lam) not in (1, expected) or not all(map(math.isfinite, settings.lam)):
        some = "a finite number" if expected == 1 else f"a finite number, or {expected}, one for each model"
        raise ValueError(f"--lam: expected {some}, got {' '.join(map(str, settings.lam))}")
    return settings._replace(lam=settings.lam * (expected // len(settings.lam)))
