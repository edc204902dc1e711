"""Layers as stacks along a leading axis, run by a scan, or as a tuple of layers.

A scan compiles one layer whatever the depth, and where weights are sharded it gathers one layer at a time.  It slices
a layer's weights out of the stack in every pass; a tuple avoids these copies, and its program grows with the depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.nn.layers.attention import attention

PyTree = Any

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclass(frozen=True)
class LayerOptions:
    """How the layers of a model run.

    Attributes:
      remat: What the backward pass stores of each layer: "none" leaves it to the compiler, "dots" stores the outputs of
        matmuls with kernels, "full" only the layer's input.
      on_layer: Applied to the parameters of one layer (without the leading axis) inside what ``remat`` recomputes.
        Sharded weights are gathered here: gathered before the scan, all layers would be replicated at once.
      on_stream: Applied to the residual stream ``[batch, length, d]`` before the first layer and after every layer,
        for sharding constraints.
      attend_with: Replaces :func:`attention`: a partial of it, or a function made by :func:`sequence_attention`.
      unroll: Stacked layers in one iteration of the scan.
      edit: ``(layer, change)``: the residual stream after that layer, counted from 0, is replaced by ``change`` of it,
        of the same shape and dtype; of causal language models only.

    Raises:
      ValueError: ``remat`` is unknown.
    """

    remat: str = "none"
    on_layer: Callable[[PyTree], PyTree] = lambda layer: layer
    on_stream: Callable[[jax.Array], jax.Array] = lambda x: x
    attend_with: Callable[..., jax.Array] = attention
    unroll: int = 1
    edit: tuple[int, Callable[[jax.Array], jax.Array]] | None = None

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"remat: expected one of {sorted(REMAT)}, got {self.remat!r}")


DEFAULT_OPTIONS = LayerOptions()


def unstack_layers(params: PyTree) -> PyTree:
    """Replaces stacks of layers by tuples of layers.

    Decoding is then faster, since a new token costs little but reading the weights; programs take longer to compile.
    The arrays are copied.

    Args:
      params: Nested dict; under each key ``"layers"`` is a tree of arrays ``[layers, ...]``, in which kernels may be
        structured.

    Returns:
      The same with tuples of trees under these keys; tuples stay as they are.

    Examples:
      >>> import jax
      >>> from subspace_jax import nn
      >>> config = nn.CausalLMConfig.tiny(num_layers=2)
      >>> params = nn.unstack_layers(nn.init_params(jax.random.key(0), config))
      >>> params["layers"][1]["mlp"]["up"]["kernel"].shape
      (128, 344)
    """

    def split(layers):
        if isinstance(layers, tuple):
            return layers
        depth = jax.tree.leaves(layers)[0].shape[0]
        return tuple(jax.tree.map(lambda x, i=i: x[i], layers) for i in range(depth))

    return _with_layers(split, params)


def stack_layers(params: PyTree) -> PyTree:
    """The inverse of :func:`unstack_layers`.

    Args:
      params: Nested dict with tuples of trees of one structure under keys ``"layers"``.

    Returns:
      The same with stacks; stacks stay as they are.
    """
    return _with_layers(lambda layers: _stacked(layers) if isinstance(layers, tuple) else layers, params)


def _stacked(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def _with_layers(change, params):
    if not isinstance(params, dict):
        return params
    return {key: change(x) if key == "layers" else _with_layers(change, x) for key, x in params.items()}


def run_layers(
    block: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    layers: PyTree,
    others: dict[str, jax.Array],
    options: LayerOptions,
) -> tuple[PyTree, PyTree]:
    """Runs a block for each layer, as ``jax.lax.scan`` does.

    Args:
      block: ``block(carry, params, others) -> (carry, output)`` for one layer.
      carry: State passed from layer to layer.
      layers: Stacked parameters, or a tuple of those of each layer.
      others: Further inputs of the layers, ``[layers, ...]``.
      options: ``remat``, ``on_layer`` and ``unroll`` are used here.

    Returns:
      The last carry, and the stacked outputs.
    """

    def one(carry, xs):
        params, others = xs
        return block(carry, options.on_layer(params), others)

    stacked = not isinstance(layers, tuple)
    if options.remat != "none":
        # A scan separates the passes, so that common subexpressions can't be merged.
        one = jax.checkpoint(one, policy=REMAT[options.remat], prevent_cse=not stacked)
    if stacked:
        return jax.lax.scan(one, carry, (layers, others), unroll=options.unroll)
    outputs = []
    for i, layer in enumerate(layers):
        carry, output = one(carry, (layer, jax.tree.map(lambda x, i=i: x[i], others)))
        outputs.append(output)
    return carry, _stacked(outputs)


def captured_states(capture: Sequence[int] | str, states: int) -> list[int]:
    """Returns the indices of the hidden states that ``capture`` asks for, ascending and without repetition.

    Raises:
      ValueError: An index is out of range, or a string is not "all".
    """
    if isinstance(capture, str):
        if capture != "all":
            raise ValueError(f"capture: expected indices or 'all', got {capture!r}")
        return list(range(states))
    if any(not -states <= i < states for i in capture):
        raise ValueError(f"capture: expected hidden states 0 to {states - 1}, got {tuple(capture)}")
    return sorted({int(i) % states for i in capture})
