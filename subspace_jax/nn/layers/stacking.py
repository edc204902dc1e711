"""Layers one after the other: stacked along an axis that a loop runs over, or each for itself.

A loop is compiled once, whatever the depth, and where weights are split over devices it gathers one layer at a time.
But it takes a layer's weights out of the stack, and on CPUs that is a copy of each, in every pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def unstack_layers(params: PyTree) -> PyTree:
    """Parameters with a tuple of layers in place of stacks: what a model on a CPU is fastest with.

    Reading a prompt gains little, and a new token much, which costs little but reading weights.  Programs grow with the
    depth, and so does the time to compile them.  All is copied: drop the stacks soon.  On CPUs ``remat`` saves nothing
    then: the compiler finds what is made again to be there already.

    Args:
      params: Nested dict; under each key ``"layers"`` is a tree of arrays ``[layers, ...]``, structured kernels among
        them.

    Returns:
      The same with tuples of trees under these keys; where there is a tuple already it stays.

    Examples:
      >>> import jax
      >>> from subspace_jax import nn
      >>> config = nn.CausalLMConfig.tiny(num_layers=2)
      >>> params = nn.unstack_layers(nn.causal_lm_init(jax.random.key(0), config))
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
      params: Nested dict with tuples of like trees under keys ``"layers"``.

    Returns:
      The same with stacks; where there are stacks already they stay.
    """
    return _with_layers(lambda layers: _stacked(layers) if isinstance(layers, tuple) else layers, params)


def _stacked(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def _with_layers(change, params):
    if not isinstance(params, dict):
        return params
    return {key: change(x) if key == "layers" else _with_layers(change, x) for key, x in params.items()}


def run_layers(
    block: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree,
    layers: PyTree,
    others: dict[str, jax.Array],
    *,
    remat: str,
    unroll: int = 1,
) -> tuple[PyTree, PyTree]:
    """Runs a block for each layer, as ``jax.lax.scan`` does.

    Args:
      block: ``block(carry, xs) -> (carry, kept)``; ``xs["params"]`` are the layer's parameters.
      carry: What goes from layer to layer.
      layers: Stacked parameters, or a tuple of those of each layer.
      others: What else is in ``xs``, ``[layers, ...]``.
      remat: A key of ``REMAT``: what the backward pass finds of each layer.
      unroll: Stacked layers in one turn of the loop.

    Returns:
      The last carry, and what was kept, stacked.
    """
    stacked = not isinstance(layers, tuple)
    if remat != "none":
        # A loop keeps the two passes apart, so that nothing has to prevent their being merged.
        block = jax.checkpoint(block, policy=REMAT[remat], prevent_cse=not stacked)
    if stacked:
        return jax.lax.scan(block, carry, {"params": layers, **others}, unroll=unroll)
    kept = []
    for i, layer in enumerate(layers):
        carry, new = block(carry, {"params": layer, **jax.tree.map(lambda x, i=i: x[i], others)})
        kept.append(new)
    return carry, _stacked(kept)
