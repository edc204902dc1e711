"""A Flax NNX module for models of every family."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from subspace_jax.nn.families import family_of, init_params, param_axes

PyTree = Any


class Model(nnx.Module):
    """A model that holds its parameters, and of a ResNet or VGG its running statistics.

    Parameters are variables of type ``nnx.Param``, running statistics of type ``nnx.BatchStat``; both have their
    logical axis names as metadata ``axes``.  A new module is in evaluation mode; ``train()`` and ``eval()`` switch.  In
    training mode a call applies dropout and stochastic depth, and updates the running statistics in place.

    Args:
      config: Config of any model family.
      params: Its parameters; initialized from ``rngs`` where None.
      batch_stats: Its running statistics, together with ``params``.
      dtype: Dtype of the activations; None for the family's default.
      param_dtype: Dtype of initialized parameters.
      rngs: Random number generators; the ``params`` stream is used.

    Raises:
      ValueError: ``params`` or running statistics are missing.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from subspace_jax import nn
      >>> model = nn.Model(nn.CausalLMConfig.tiny(), rngs=nnx.Rngs(0))
      >>> model(jax.numpy.ones((2, 5), "int32")).logits.shape
      (2, 5, 256)
    """

    def __init__(
        self,
        config: Any,
        params: PyTree | None = None,
        batch_stats: PyTree | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        stateful = family_of(config).stateful
        if params is None:
            if rngs is None:
                raise ValueError("Model: expected params, or rngs to initialize them from")
            params = init_params(rngs.params(), config, param_dtype)
            params, batch_stats = params if stateful else (params, None)
        if stateful != (batch_stats is not None):
            raise ValueError(f"batch_stats: {type(config).__name__} {'needs' if stateful else 'has no'} them")
        self.config, self.dtype = config, dtype
        self.use_running_average = self.deterministic = True
        axes = param_axes(config)
        self.weights = _variables(params, axes[0] if stateful else axes, nnx.Param)
        if stateful:
            self.statistics = _variables(batch_stats, axes[1], nnx.BatchStat)

    @property
    def params(self) -> PyTree:
        """The parameters, as the family's function takes them."""
        return _arrays(self.weights)

    @property
    def batch_stats(self) -> PyTree:
        """The running statistics of a ResNet or VGG."""
        return _arrays(self.statistics)

    @property
    def out_features(self) -> int:
        """Width of the pooled features of a vision model."""
        return self.config.out_features

    def __call__(self, *inputs: jax.Array, **options: Any) -> Any:
        """Runs the model.

        Args:
          *inputs: Those of the family's function: ``tokens``, ``pixels``, or both.
          **options: Its keyword arguments.

        Returns:
          The output of the family's function.
        """
        family = family_of(self.config)
        if self.dtype is not None:
            options.setdefault("dtype", self.dtype)
        if family.vision:
            options.setdefault("train", not (self.deterministic and self.use_running_average))
        if not family.stateful:
            return family.apply(self.config, self.params, *inputs, **options)
        options.setdefault("frozen_stats", self.use_running_average)
        output = family.apply(self.config, self.params, self.batch_stats, *inputs, **options)
        if output.batch_stats is not None:
            nnx.update(self.statistics, output.batch_stats)
        return output


def _variables(tree: PyTree, axes: PyTree, kind: type[nnx.Variable]) -> PyTree:
    if isinstance(tree, dict):
        return nnx.Dict({name: _variables(part, axes[name], kind) for name, part in tree.items()})
    return kind(tree, axes=tuple(axes))


def _arrays(tree: PyTree) -> PyTree:
    if isinstance(tree, nnx.Variable):
        return tree.get_value()
    return {name: _arrays(part) for name, part in tree.items()}
