"""The network: backbone, projector, gate and online probe, as Flax NNX modules (arXiv 2410.18200)."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from subspace_jax import nn
from subspace_jax.represent.hydra.core import pair_gate


class Perceptron(nnx.Module):
    """Linear layers with batch normalization and a ReLU between them.

    Args:
      in_features: Width of a flattened input.
      features: Widths of the layers, at least one; the last is the feature width.
      rngs: Random number generators; the ``params`` stream is used.
    """

    def __init__(self, in_features: int, features: Sequence[int], *, rngs: nnx.Rngs):
        widths = (in_features, *features)
        self.layers = nnx.List(nn.Linear(m, n, rngs=rngs) for m, n in itertools.pairwise(widths))
        self.norms = nnx.List(nn.BatchNorm(width) for width in features[:-1])
        self.out_features = widths[-1]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, ...]`` to features ``[batch, out_features]``."""
        x = self.layers[0](x.reshape(x.shape[0], -1))
        for norm, layer in zip(self.norms, self.layers[1:], strict=True):
            x = layer(jax.nn.relu(norm(x)))
        return x


class Projector(nnx.Module):
    """From features to the space in which pairs are compared: linear, batch norm, ReLU, linear, layer norm.

    Args:
      in_features: Width of the features.
      hidden: Width of the hidden layer.
      out: Width of the projections.
      rngs: Random number generators; the ``params`` stream is used.
    """

    def __init__(self, in_features: int, hidden: int = 2048, out: int = 256, *, rngs: nnx.Rngs):
        self.hidden = nn.Linear(in_features, hidden, rngs=rngs)
        self.norm = nn.BatchNorm(hidden)
        self.out = nn.Linear(hidden, out, axes=("mlp", "embed"), use_bias=False, rngs=rngs)
        self.scale, self.bias = nnx.Param(jnp.ones(out)), nnx.Param(jnp.zeros(out))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, in_features]`` to ``[batch, out]``."""
        x = self.out(jax.nn.relu(self.norm(self.hidden(x))))
        return nn.layer_norm(x, self.scale.get_value(), self.bias.get_value(), 1e-5)


class PairGate(nnx.Module):
    """The feature filter, see :func:`subspace_jax.represent.hydra.pair_gate`; a new module is in evaluation mode.

    Args:
      num_classes: Number of classes.
      features: Width of the projections.
      embed_dim: Width of the table of classes, whose entries start as N(0, 1).
      hidden: Width of the hidden layer.
      fuse: See :func:`subspace_jax.represent.hydra.pair_gate`.
      rngs: Random number generators; the ``params`` stream is used.
    """

    def __init__(
        self,
        num_classes: int,
        features: int,
        embed_dim: int = 512,
        hidden: int = 1024,
        fuse: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (num_classes, embed_dim), jnp.float32))
        self.norm1, self.norm2 = nn.BatchNorm(embed_dim), nn.BatchNorm(hidden)
        self.dense1 = nn.Linear(embed_dim, hidden, axes=(None, None), rngs=rngs)
        self.dense2 = nn.Linear(hidden, features, axes=(None, None), rngs=rngs)
        self.fuse = fuse

    def __call__(self, first: jax.Array, second: jax.Array | None = None) -> jax.Array:
        """Maps classes of anchors and partners, ``[batch]`` integers, to gates ``[batch, features]`` in (0, 1)."""
        _, params, statistics = nnx.split(self, nnx.Param, nnx.BatchStat)
        arrays = nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)
        train = not self.norm1.use_running_average
        gate, new = pair_gate(*arrays, first, second, fuse=self.fuse, train=train)
        if train:
            nnx.update(self, new)
        return gate


class OpenGate(nnx.Module):
    """All ones, for any pair: contrastive learning without a filter.

    Args:
      features: Width of the projections.
    """

    def __init__(self, features: int):
        self.features = features

    def __call__(self, first: jax.Array, second: jax.Array | None = None) -> jax.Array:
        """Returns ones ``[batch, features]``."""
        del second
        return jnp.ones((*first.shape, self.features))


class HydraModel(nnx.Module):
    """Backbone, projector, gate, online probe, and the numbers of the loss; a new module is in evaluation mode.

    Args:
      backbone: Module from inputs ``[batch, ...]`` to features ``[batch, out_features]``, a number it has as attribute.
      projector: Module from features to projections ``[batch, d]``.
      gate: :class:`PairGate` or :class:`OpenGate`.
      num_classes: Number of classes of the probe.
      temperature: Where the temperature, which is trained, starts.
      alpha: Where the factor of the repulsion in the full space starts, which is trained; 0 for none.
      rngs: Random number generators; the ``params`` stream is used.

    Raises:
      ValueError: A number is out of range.
    """

    def __init__(
        self,
        backbone: nnx.Module,
        projector: nnx.Module,
        gate: nnx.Module,
        *,
        num_classes: int,
        temperature: float = 0.1,
        alpha: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha: expected at least 0, got {alpha}")
        self.backbone, self.projector, self.gate = backbone, projector, gate
        self.probe = nn.SoftmaxHead(backbone.out_features, num_classes, rngs=rngs)
        self.log_scale = nnx.Param(jnp.full((), -math.log(temperature), jnp.float32))
        if alpha:
            self.alpha = nnx.Param(jnp.full((), alpha, jnp.float32))
