"""A learner that certifies its steps: shares and bounds as metrics, a guard, and what outputs really changed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import train
from subspace_jax.continual.certificate import (
    GUARDS,
    Ended,
    certify,
    end_task,
    init_certificate,
    input_moments,
    output_bounds,
)
from subspace_jax.continual.stream.batches import examples_of
from subspace_jax.continual.stream.body import Body, layer_inputs, plain
from subspace_jax.continual.stream.learner import StreamTask
from subspace_jax.continual.stream.setup import Setup
from subspace_jax.continual.stream.tasks import Examples
from subspace_jax.train.fields import check_at_least, check_choice

PyTree = Any


class CertificateSettings(NamedTuple):
    """Settings of a certificate.

    Attributes:
      rank: See :func:`subspace_jax.continual.certificate.init_certificate`.
      guard: See :func:`subspace_jax.continual.certificate.certify`.
      limit: Likewise.
    """

    rank: int = 32
    guard: str = "off"
    limit: float = 0.1


DEFAULTS = CertificateSettings()


class CertifiedTask(StreamTask):
    """A learner whose body is certified, see :mod:`subspace_jax.continual.certificate`.

    Metrics of a step have, for every task, ``share_T`` and ``bound_T`` of the step before it.

    Args:
      body: See :class:`StreamTask`.
      num_classes: Likewise.
      history_sizes: Columns of the history of each layer.
      settings: Settings.
      temperature: See :class:`StreamTask`.
    """

    def __init__(
        self,
        body: Body,
        num_classes: tuple[int, ...],
        history_sizes: Mapping[str, int],
        settings: CertificateSettings = DEFAULTS,
        *,
        temperature: float = 1.0,
    ):
        super().__init__(body, num_classes, temperature=temperature)
        self._sizes, self._settings = dict(history_sizes), settings
        self._ended = jax.jit(self._end)

    def init(self, key):
        """Returns a learner's start with an empty certificate."""
        params, variables = super().init(key)
        certificate = init_certificate(params["body"], self._sizes, self.num_tasks, self._settings.rank)
        previous = jax.tree.map(jnp.zeros_like, params["body"])
        return params, {**variables, "certificate": certificate, "previous": previous}

    def loss(self, params, variables, batch, *, key, step):
        """Returns a learner's loss, with what the step before it did as metrics."""
        loss, (variables, metrics) = super().loss(params, variables, batch, key=key, step=step)
        found = variables["certificate"]
        per_task = {
            f"{name}_{t}": getattr(found, name)[t] for name in ("share", "bound") for t in range(len(found.norm))
        }
        return loss, ({**variables, "previous": params["body"]}, {**metrics, **per_task})

    def after_update(self, params, variables, *, key, step):
        """Returns the certified step."""
        del key, step
        guard = {"guard": self._settings.guard, "limit": self._settings.limit}
        kernels, found = certify(
            variables["certificate"], variables["previous"], params["body"], self.body.gains, **guard
        )
        return {**params, "body": kernels}, {**variables, "certificate": found}

    def evaluators(self):
        """Returns "eval", and "drift": bounds beside measured changes, and what the guard did."""
        return {**super().evaluators(), "drift": Drift(self)}

    def ended(
        self, params: PyTree, variables: PyTree, inputs: np.ndarray, task: int, histories: Mapping[str, jax.Array]
    ) -> PyTree:
        """Returns the variables after the end of a task.

        Args:
          params: The parameters.
          variables: The variables.
          inputs: Examples of the task, from which moments are taken.
          task: Its position.
          histories: See :class:`subspace_jax.continual.certificate.Ended`.
        """
        at = jnp.asarray(task, jnp.int32)  # traced, so that all tasks share a compilation
        certificate = self._ended(variables["certificate"], params["body"], inputs, at, dict(histories))
        return {**variables, "certificate": certificate}

    def _end(self, certificate, kernels, inputs, task, histories):
        moments = input_moments(layer_inputs(self.body, kernels, inputs))
        features = self.body.apply(kernels, inputs, plain)
        norm = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(features), axis=-1)))
        return end_task(certificate, kernels, Ended(task, moments, norm, histories))


class Drift(train.Evaluator):
    """Changes of layer outputs for examples of earlier tasks since their ends, measured and bounded.

    ``measured_T``, ``bound_T`` and ``over_T``, their ratio, are of the features, the first two as shares of their norm.
    ``violations`` counts layers and tasks whose change is above the bound.  ``scaled`` and ``refused`` are steps of the
    guard.  It needs the set "probe": those examples whose moments are stored.

    Args:
      task: The learner.
    """

    sets, last = ("probe",), True

    def __init__(self, task: CertifiedTask):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns sums of squares over the examples of each task, and the bounds."""
        del key
        return train.gathered(self._task, self._sums)(*model, batch)

    def _sums(self, params, variables, batch):
        certificate, num_tasks = variables["certificate"], self._task.num_tasks
        now = self._outputs(params["body"], batch["inputs"])

        def of_task(anchor):
            return jnp.stack([_squares(x - y) for x, y in zip(now, self._outputs(*anchor), strict=True)], axis=-1)

        def one(t):
            kernels = {name: layer.anchor[t] for name, layer in certificate.layers.items()}
            own = (batch["task"] == t).astype(jnp.float32) * batch["mask"]
            return jnp.sum(of_task((kernels, batch["inputs"])) * own[:, None], axis=0), jnp.sum(own)

        squares, count = jax.lax.map(one, jnp.arange(num_tasks, dtype=jnp.int32))
        kept = {name: getattr(certificate, name) for name in ("known", "norm", "scaled", "refused")}
        bounds = output_bounds(certificate, params["body"], self._task.body.gains)
        means = jax.tree.map(lambda x: x.astype(jnp.float32), {**kept, "bounds": bounds, "batches": jnp.ones(())})
        return {"squares": squares, "count": count, **means}

    def _outputs(self, kernels, inputs):
        """Outputs of each layer, and the features."""
        found = []

        def linear(name, x, kernel):
            found.append(plain(name, x, kernel))
            return found[-1]

        features = self._task.body.apply(kernels, inputs, linear)
        return [*found, features]

    def finish(self, probe):
        """Returns scalars, and the arrays ``measured`` and ``bounds [tasks, layers + 1]``, of root mean squares."""
        batches = float(probe["batches"])
        known, norm, bounds = (np.asarray(probe[name]) / batches for name in ("known", "norm", "bounds"))
        measured = np.sqrt(probe["squares"] / np.maximum(probe["count"], 1)[:, None]) * known[:, None]
        found = {"violations": float(np.sum(measured > bounds))}
        for t in np.flatnonzero(known):
            shares = {"measured": measured[t, -1] / norm[t], "bound": bounds[t, -1] / norm[t]}
            if measured[t, -1] > 0:
                shares["over"] = bounds[t, -1] / measured[t, -1]
            found |= {f"{name}_{t}": float(x) for name, x in shares.items()}
        guarded = {name: float(probe[name]) / batches for name in ("scaled", "refused")}
        return {**found, **guarded, "measured": measured, "bounds": bounds}


def _squares(x: jax.Array) -> jax.Array:
    """The squared norm of each example ``[batch]``."""
    return jnp.sum(jnp.square(x.reshape(x.shape[0], -1)), axis=-1)


def certified_learner(setup: Setup, history_sizes: Mapping[str, int]) -> StreamTask:
    """Returns the learner of a config: certified where ``model.certificate.on``.

    Args:
      setup: The setup.
      history_sizes: Columns of the history of each layer.

    Raises:
      ValueError: A field of the certificate can't serve.
    """
    fields, classes = setup.config.model, setup.stream.num_classes
    if not fields.certificate.on:
        return StreamTask(setup.body, classes, temperature=fields.temperature)
    settings = CertificateSettings(fields.certificate.rank, fields.certificate.guard, fields.certificate.limit)
    check_choice("model.certificate.guard", settings.guard, GUARDS)
    check_at_least("model.certificate.rank", settings.rank, 1)
    check_at_least("model.certificate.limit", settings.limit, 0, above=True)
    return CertifiedTask(setup.body, classes, history_sizes, settings, temperature=fields.temperature)


def probe_sets(setup: Setup) -> dict[str, Examples]:
    """Returns the set "probe" of a certificate: the samples of all tasks; none without a certificate."""
    if not setup.config.model.certificate.on:
        return {}
    tasks = range(len(setup.stream))
    found = [{name: x for name, x in setup.samples(t).items() if name != "task"} for t in tasks]
    return {"probe": examples_of(found, list(tasks))}
