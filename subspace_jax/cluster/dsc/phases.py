"""Deep subspace clustering as three tasks of the train loop (arXiv 2504.18179)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from subspace_jax import train
from subspace_jax.cluster.dsc import core
from subspace_jax.cluster.dsc.evaluate import Clusters
from subspace_jax.cluster.dsc.model import ConvAutoencoder


class ExpressionOptions(NamedTuple):
    """What there is to choose about self-expression.

    Attributes:
      num_examples: Examples, ``n``.
      num_rows: Examples of a batch with its padding, ``m``.
      num_clusters: Clusters.
      keep: Coefficients of an example that count, see :func:`subspace_jax.cluster.dsc.column_affinity`.
      zero_diag: Whether no example may express itself.
      l2_coef: Weight of the squares of coefficients.
      weight: Weight of the structured norm.
      track_coef: Whether the relative change of the coefficients is a metric; takes a copy of them.
      start: Returns coefficients ``[n, n]`` to start from; None for the constant 1e-8.
    """

    num_examples: int
    num_rows: int
    num_clusters: int
    keep: int
    zero_diag: bool = False
    l2_coef: float = 0.0
    weight: float = 10.0
    track_coef: bool = False
    start: Callable[[], np.ndarray] | None = None


class Autoencoding(train.Task):
    """The first phase: the autoencoder alone.

    A batch is the whole set: ``inputs [m, height, width, channels]`` float32 and ``mask [m]``, see
    :func:`subspace_jax.train.whole_set_data`.

    Args:
      make: Builds the module from a key.
      pretrain: "reconstruction" or "distances", the loss; the latter leaves the decoder as it is.
    """

    splittable = False

    def __init__(self, make: Callable[[jax.Array], ConvAutoencoder], pretrain: str = "reconstruction"):
        self._make, self._pretrain = make, pretrain
        self._graph, (self._axes, _) = train.split_module(make)

    def init(self, key):
        """Returns the parameters of the autoencoder, and no variables."""
        return train.module_arrays(self._make(key))[0], {}

    def axes(self):
        """Returns the logical axis names: nothing is sharded."""
        return self._axes, {}

    def module(self, params) -> ConvAutoencoder:
        """Returns the module with these parameters."""
        return nnx.merge(self._graph, params, {})

    def loss(self, params, variables, batch, *, key, step):
        """Returns the loss of all examples."""
        del key, step
        x, mask = batch["inputs"], batch["mask"]
        x_hat, layers = self.module(params)(x)
        if self._pretrain == "distances":
            return core.distance_preserving_loss((x, *layers), mask), (variables, {})
        real = mask.reshape(-1, 1, 1, 1)
        return core.reconstruction_loss(x * real, x_hat * real), (variables, {})

    def evaluators(self):
        """Returns none."""
        return {}


class SelfExpression(train.Task):
    """The second phase: every layer is expressed by itself with the same ``C``, which is learned with the encoder.

    ``C [m, m]`` and its optimizer state are sharded by rows; rows and columns of padding stay 0.  Batches: see
    :class:`Autoencoding`; those of evaluation may have ``labels``.

    Args:
      encoder: The first phase, whose autoencoder this one goes on with.
      options: What there is to choose.
    """

    splittable = False
    ungathered = ("coef", "previous")

    def __init__(self, encoder: Autoencoding, options: ExpressionOptions):
        self._encoder, self.options = encoder, options

    def init(self, key):
        """Returns the autoencoder and the constant coefficients."""
        m, n = self.options.num_rows, self.options.num_examples
        real = jnp.arange(m) < n
        coef = jnp.where(real[:, None] & real[None], jnp.float32(1e-8), jnp.float32(0))
        return {"autoencoder": self._encoder.init(key)[0], "coef": coef}, self._tracked()

    def axes(self):
        """Returns the logical axis names: coefficients go with the examples that they are of."""
        variables = jax.tree.map(lambda x: P(*(None,) * x.ndim), jax.eval_shape(self.init, jax.random.key(0))[1])
        if "previous" in variables:
            variables["previous"] = P("batch", None)
        return {"autoencoder": self._encoder.axes()[0], "coef": P("batch", None)}, variables

    def enter(self, state: train.TrainState, at: train.At):
        """Returns the pretrained autoencoder and the first coefficients; for ``Phase.enter``."""
        del at
        coef = self.init(jax.random.key(0))[0]["coef"]
        if self.options.start is not None:
            n = self.options.num_examples
            coef = coef.at[:n, :n].set(jnp.asarray(self.options.start(), jnp.float32))
        return {"autoencoder": state.params, "coef": coef}, self._tracked(), None

    def layers(self, params, batch) -> list[jax.Array]:
        """Returns the input and the output of every layer of the encoder, ``[m, p_l]`` each, 0 for padding."""
        x = batch["inputs"]
        layers = (x, *self.module(params).encode(x))
        return [v * batch["mask"][:, None] for v in core.flattened(layers)]

    def loss(self, params, variables, batch, *, key, step):
        """Returns what self-expression leaves of all layers."""
        del key, step
        coef = params["coef"]
        used = jnp.where(jnp.eye(coef.shape[0], dtype=bool), 0, coef) if self.options.zero_diag else coef
        loss = core.self_expression_loss(used, self.layers(params, batch))
        if self.options.l2_coef:
            loss = loss + self.options.l2_coef * jnp.sum(jnp.square(coef))
        variables, change = self._moved(coef, variables)
        return loss, (variables, change)

    def evaluators(self):
        """Returns "clusters" at the end of the phase: labels, and scores where there are true ones."""
        return {"clusters": Clusters(self)}

    def module(self, params) -> ConvAutoencoder:
        """Returns the autoencoder with these parameters."""
        return self._encoder.module(params["autoencoder"])

    def _tracked(self):
        m = self.options.num_rows
        return {"previous": jnp.zeros((m, m), jnp.float32)} if self.options.track_coef else {}

    def _moved(self, coef, variables):
        """Variables with these coefficients, and their relative change by the last step as a metric."""
        if not self.options.track_coef:
            return variables, {}
        before = variables["previous"]
        size = jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(before))), jnp.finfo(jnp.float32).tiny)
        # Rounded, that of the first step may be infinite, which would count as a step that failed.
        change = jnp.minimum(jnp.sqrt(jnp.sum(jnp.square(coef - before))) / size, 1.0)
        return {**variables, "previous": jax.lax.stop_gradient(coef)}, {"coef_change": change}


class Structured(SelfExpression):
    """The third phase: the structured norm of entries of ``C`` between clusters; labels come from the host.

    The encoder rests, so that ``tx`` is ``{"coef": ...}``.  The optimizer's state of ``C`` goes on from the phase
    before.

    Arguments: see :class:`SelfExpression`.
    """

    def init(self, key):
        """Returns what the second phase does, and labels of no cluster."""
        params, variables = super().init(key)
        labels = jnp.full(self.options.num_rows, -1, jnp.int32)
        return params, {**variables, "labels": labels, "repeats": jnp.zeros((), jnp.int32)}

    def enter(self, state: train.TrainState, at: train.At):
        """Returns the parameters as they are, fresh variables, and the optimizer's state of ``C``."""
        del at
        _, variables = self.init(jax.random.key(0))

        def has_coef(node):
            return isinstance(node, dict) and "coef" in node

        own = jax.tree.map(lambda node: node["coef"] if has_coef(node) else node, state.opt_state, is_leaf=has_coef)
        if "previous" in variables:
            variables["previous"] = state.variables["previous"]
        return state.params, variables, {"coef": own}

    def refresh(self, state: train.TrainState, at: train.At) -> train.TrainState:
        """Clusters the coefficients, and counts how often the labels stayed the same; for ``Phase.refresh``."""
        labels = at.host(
            functools.partial(_host_labels, options=self.options), jax.random.key_data(at.key), state.params["coef"]
        )
        old = state.variables
        repeats = jnp.where(jnp.all(labels == old["labels"]), old["repeats"] + 1, 0).astype(jnp.int32)
        return dataclasses.replace(state, variables={**old, "labels": jnp.asarray(labels), "repeats": repeats})

    def loss(self, params, variables, batch, *, key, step):
        """Returns the weighted norm, and how often the labels stayed the same."""
        del batch, key, step
        coef = params["coef"]
        loss = self.options.weight * core.subspace_structured_loss(coef, variables["labels"])
        variables, change = self._moved(coef, variables)
        return loss, (variables, {**change, "repeats": variables["repeats"].astype(jnp.float32)})


def _host_labels(key: np.ndarray, coef: np.ndarray, *, options: ExpressionOptions) -> np.ndarray:
    """Host code: the cluster of each example, -1 for padding."""
    n = options.num_examples
    labels = core.coefficient_labels(
        jax.random.wrap_key_data(key), coef[:n, :n], num_clusters=options.num_clusters, keep=options.keep
    )
    return np.pad(np.asarray(labels), (0, len(coef) - n), constant_values=-1)
