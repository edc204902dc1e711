"""Gram matrices of the inputs of a causal language model's kernels, over a pass of a text on a mesh."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from subspace_jax.linalg import GramState
from subspace_jax.nn import CausalLMConfig
from subspace_jax.nn.models.causal_lm.kernel_grams import Name, collect_grams
from subspace_jax.train.context import jit_on_mesh
from subspace_jax.train.sharding import batch_sharding, to_device

PyTree = Any
T = TypeVar("T")
_GRAM_BYTES = 2 * 2**30


def grams_of_model(
    config: CausalLMConfig,
    params: PyTree,
    names: Sequence[Name],
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    *,
    total: int | None = None,
    progress: bool = True,
) -> dict[Name, GramState]:
    """Sums the inputs of kernels over one pass of the text.

    A batch is summed in float32 on the devices, the batches in float64 on the host: Gram matrices have the square of
    the condition number of the activations, which exceeds what float32 holds.

    Args:
      config: The model.
      params: Its parameters, on the mesh.
      names: Layers and paths; kernels with equal inputs are named once; see
        :func:`subspace_jax.nn.models.causal_lm.kernel_grams.kernel_inputs`.
      batches: Batches of rows, whose size the mesh divides.
      mesh: The mesh.
      total: Number of batches, for the progress bar.
      progress: Whether there is one.

    Returns:
      Sums of float64 on the host, by name.

    Raises:
      ValueError: There is no batch, or an activation is not finite.
    """
    widths = {name: kernel_width(params, name) for name in names}
    whole = NamedSharding(mesh, P())

    def step(params, batch):
        return collect_grams(config, params, {name: GramState.zeros(d1) for name, d1 in widths.items()}, batch)

    step = jit_on_mesh(step, mesh, whole)
    rows, sums = batch_sharding(mesh), None
    for batch in tqdm(batches, "Gram matrices", total=total, unit="batch", disable=None if progress else True):
        new = jax.tree.map(lambda x: np.asarray(x, np.float64), step(params, to_device(batch, rows)))
        sums = new if sums is None else jax.tree.map(np.add, sums, new)
    if sums is None:
        raise ValueError("batches: expected at least one batch of text, got none")
    for (layer, path), state in sums.items():
        if not np.isfinite(state.gram).all():
            raise ValueError(f"layer {layer}, {path}: expected finite activations on the text, got others")
    return sums


def gram_groups(
    items: Iterable[T], inputs: Callable[[T], Sequence[Name]], width: Callable[[T], int]
) -> Iterator[list[T]]:
    """Splits what needs Gram matrices so that those of a group, float32 on the device and float64 on the host, fit.

    Args:
      items: What needs them, in order.
      inputs: The names of those that an item needs; several items may need the same.
      width: The width of the inputs of an item.

    Yields:
      Items whose Gram matrices take 2 GiB at most, or one item.
    """
    group, size, seen = [], 0, set()
    for item in items:
        each = 12 * width(item) ** 2
        new = each * len(set(inputs(item)) - seen)
        if group and size + new > _GRAM_BYTES:
            yield group
            group, size, seen = [], 0, set()
            new = each * len(inputs(item))
        group.append(item)
        seen.update(inputs(item))
        size += new
    if group:
        yield group


def kernel_width(params: PyTree, name: Name) -> int:
    """The width of the inputs of a kernel."""
    part, inner = name[1].split("/")
    return params["layers"][part][inner]["kernel"].shape[-2]
