"""What a stream of tasks has learnt, and how its experts are chosen."""

from collections.abc import Mapping
from typing import NamedTuple

import jax

from subspace_jax.continual.igsp.core import Router
from subspace_jax.continual.igsp.pool import ExpertPool
from subspace_jax.continual.igsp.stats import TaskStats


class Site(NamedTuple):
    """Kernels of one shape that experts run beside, one in each of some layers.

    Attributes:
      layers: Number of layers.
      d_in: Features of the input.
      d_out: Features of the output.
      routed: Whether the router reads the input; otherwise all examples of a task have the same probabilities.
    """

    layers: int
    d_in: int
    d_out: int
    routed: bool = True


class ExpertSettings(NamedTuple):
    """How experts are added, used and pruned.

    Attributes:
      max_experts: Slots of the pool of each layer.
      rank: Rank of an expert.
      candidates: Experts that a task adds to each layer before pruning.
      scale: Factor of all experts.
      penalty: Weight of the mean probability of candidates in the first phase.
      complement: Weight of the share of candidates outside the historical subspace, in the first phase.
      tau: Threshold of pruning, see :func:`prune_pool`.
      relative: See there.
      prune_historical: Whether a task also leaves out historical experts below the threshold; otherwise it uses all.
      window: Steps over which routing is averaged.
      tolerance: Change of the mean routing below which a window is calm; 0 for a first phase of fixed length.
      calm_windows: Calm windows in a row that end the first phase.
      energy: Energy of the historical subspace, see :func:`historical_basis`.
      max_rank: See there; 0 for no limit.
    """

    max_experts: int = 22
    rank: int = 8
    candidates: int = 2
    scale: float = 1.0
    penalty: float = 0.02
    complement: float = 0.0
    tau: float = 0.5
    relative: bool = True
    prune_historical: bool = True
    window: int = 20
    tolerance: float = 0.01
    calm_windows: int = 2
    energy: float = 0.95
    max_rank: int = 0


class ContinualState(NamedTuple):
    """What a stream has learnt; arrays have layers in front, by site.

    Attributes:
      pool: :class:`ExpertPool` of each site.
      routers: :class:`Router` of each site, of all tasks: ``[layers, tasks, ...]``.
      masks: ``[layers, tasks, experts]`` of each site, the experts that each task uses.
      task_stats: See :class:`TaskStats`.
    """

    pool: Mapping[str, ExpertPool]
    routers: Mapping[str, Router]
    masks: Mapping[str, jax.Array]
    task_stats: TaskStats
