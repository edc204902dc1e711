"""Tensors of checkpoints: the array of a parameter tree that each belongs to, and how it is laid out."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

PyTree = Any
Path = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """The array of a module or of a tensor in a parameter tree.

    Attributes:
      path: Keys of the nested dict; of a module ``("layers", "attn", "q")``, of a tensor one key more.
      layer: Index along the leading axis of a stacked array; None for an array that is not stacked.
    """

    path: Path
    layer: int | None = None


@dataclass(frozen=True)
class TensorName:
    """A tensor of a checkpoint.

    Attributes:
      name: Its name in the checkpoint.
      place: Its array in the parameter tree.
      transposed: Whether it is stored as ``[out, in]``.
      order: The axis of the stored tensor for each axis of the array, where they are permuted otherwise; ``(2, 3, 1,
        0)`` for a convolution's kernel.
      shape: Shape of the stored tensor, where it is not that of the permuted array: the array is then the stored tensor
        with its axes in ``order``, reshaped.
      part: ``(i, n)`` where the array is the ``i``-th of ``n`` equal blocks of rows of a stored tensor, which several
        arrays share.
    """

    name: str
    place: Place
    transposed: bool
    order: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    part: tuple[int, int] = (0, 1)


class TensorLayout(NamedTuple):
    """The parameters of a model, and the tensors of a checkpoint of it.

    Attributes:
      specs: Nested dict of :class:`subspace_jax.nn.ParamSpec`.
      tensors: The tensors; those of a stacked array in the order of its layers.
    """

    specs: PyTree
    tensors: list[TensorName]

    def sorted(self) -> "TensorLayout":
        """Returns the layout with the tensors in the order of their names, parts of one in their order."""
        return self._replace(tensors=sorted(self.tensors, key=lambda t: (t.name, t.part)))


def at(tree: PyTree, path: Path) -> Any:
    """Returns the node of a nested dict at a path."""
    for key in path:
        tree = tree[key]
    return tree


def stored_shape(specs: PyTree, tensor: TensorName) -> tuple[int, ...]:
    """Returns the shape of a tensor in a checkpoint, including the parts of other arrays."""
    spec = at(specs, tensor.place.path)
    block = _block_shape(tensor, spec.shape if tensor.place.layer is None else spec.shape[1:])
    return (tensor.part[1] * block[0], *block[1:]) if block else block


def to_stored(tensor: TensorName, value: np.ndarray) -> np.ndarray:
    """Converts an array of one layer to the tensor of a checkpoint, or to its part of one."""
    block = _block_shape(tensor, value.shape)
    order = axis_order(tensor, len(block))
    return value.reshape([block[axis] for axis in order]).transpose(np.argsort(order) if order else ())


def axis_order(tensor: TensorName, ndim: int) -> tuple[int, ...]:
    """Returns the axis of the stored tensor for each axis of the array."""
    if tensor.order is not None:
        return tensor.order
    return tuple(range(ndim))[::-1] if tensor.transposed else tuple(range(ndim))


def _block_shape(tensor: TensorName, own: tuple[int, ...]) -> tuple[int, ...]:
    if tensor.shape is not None:
        return tensor.shape
    order = axis_order(tensor, len(own))
    return tuple(own[order.index(axis)] for axis in range(len(own)))
