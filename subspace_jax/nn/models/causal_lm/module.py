"""Causal language models as a Flax module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from subspace_jax.nn.models.causal_lm.config import CausalLMConfig
from subspace_jax.nn.models.causal_lm.model import causal_lm_apply
from subspace_jax.nn.models.causal_lm.params import causal_lm_axes, causal_lm_init

PyTree = Any


class CausalLM(nnx.Module):
    """A causal language model that holds its parameters; all else is :func:`causal_lm_apply`.

    Args:
      config: The model.
      params: Its parameters; drawn from ``rngs`` where None.
      param_dtype: Type of drawn parameters.
      rngs: Source of randomness; its ``params`` stream is used.

    Raises:
      ValueError: Neither ``params`` nor ``rngs`` is given.
    """

    def __init__(
        self,
        config: CausalLMConfig,
        params: PyTree | None = None,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if params is None:
            if rngs is None:
                raise ValueError("CausalLM: expected params, or rngs to draw them from")
            params = causal_lm_init(rngs.params(), config, param_dtype)
        self.config = config
        for name, part in params.items():
            setattr(self, name, variables_of(part, causal_lm_axes(config)[name]))

    @property
    def params(self) -> PyTree:
        """The parameters, as :func:`causal_lm_apply` takes them."""
        names = ("embed", "position", "layers", "norm", "head")
        return {name: arrays_of(getattr(self, name)) for name in names if hasattr(self, name)}

    def __call__(self, tokens: jax.Array, **options) -> jax.Array:
        """Returns the logits ``[batch, length, vocab]`` of tokens ``[batch, length]``, with its options."""
        return causal_lm_apply(self.config, self.params, tokens, **options).logits


def variables_of(tree: PyTree, axes: PyTree) -> PyTree:
    """Wraps the arrays of nested dicts as parameters with their logical axes."""
    if isinstance(tree, dict):
        return nnx.Dict({name: variables_of(part, axes[name]) for name, part in tree.items()})
    return nnx.Param(tree, axes=tuple(axes))


def arrays_of(tree: PyTree) -> PyTree:
    """The inverse of :func:`variables_of`."""
    if isinstance(tree, nnx.Variable):
        return tree.get_value()
    return {name: arrays_of(part) for name, part in tree.items()}
