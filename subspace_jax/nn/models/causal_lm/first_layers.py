"""The first layers of a causal language model, for those who read its residual stream."""

import dataclasses
from typing import Any

import jax

from subspace_jax.nn.models.causal_lm.config import CausalLMConfig

PyTree = Any


def first_layers(config: CausalLMConfig, num_layers: int) -> CausalLMConfig:
    """Returns the config of a model that ends after some layers, without a head of its own.

    ``stream`` of its output is the residual stream after these layers of the whole model.

    Args:
      config: The model.
      num_layers: Layers to keep.

    Raises:
      ValueError: The model has fewer layers.
    """
    if not 1 <= num_layers <= config.num_layers:
        raise ValueError(f"num_layers: expected 1 to {config.num_layers}, the layers of the model, got {num_layers}")
    windows = None if config.windows is None else config.windows[:num_layers]
    return dataclasses.replace(config, num_layers=num_layers, windows=windows, tied=True)


def first_layer_params(params: PyTree, num_layers: int) -> PyTree:
    """Returns the parameters of :func:`first_layers`, out of those of the whole model with stacked layers.

    Args:
      params: Parameters as laid out by :func:`causal_lm_specs`.
      num_layers: Layers to keep.
    """
    kept = {name: x for name, x in params.items() if name != "head"}
    return {**kept, "layers": jax.tree.map(lambda x: x[:num_layers], params["layers"])}
