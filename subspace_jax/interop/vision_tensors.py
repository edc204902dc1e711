"""Tensors of vision checkpoints: names, stored shapes, and the arrays of ours that they hold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from subspace_jax.interop.names import Place
from subspace_jax.interop.safetensors_io import StoredTensor

PyTree = Any


@dataclass(frozen=True)
class VisionTensor:
    """A tensor of a vision checkpoint, and how its numbers lie here.

    Attributes:
      name: Its name in the checkpoint.
      shape: Its shape there.
      places: Where it is here.  Several arrays of one shape are stacked along the first axis of the tensor, in this
        order (queries, keys and values that are stored as one).
      kind: "same"; "linear" for ``[out, in]``, here ``[in, out]``; "conv" for ``[out, in, kh, kw]``, here
        ``[kh, kw, in, out]``; "patch" for the same, here ``[kh kw in, out]``; "rows" for ``[1, n, d]``, here
        ``[n, d]``.
    """

    name: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    kind: str = "same"

    def to_ours(self, stored: np.ndarray) -> list[np.ndarray]:
        """Turns the stored tensor into our arrays, one for each place."""
        parts = np.split(stored, len(self.places)) if len(self.places) > 1 else [stored]
        if self.kind == "linear":
            return [part.T for part in parts]
        if self.kind == "rows":
            return [part[0] for part in parts]
        if self.kind in ("conv", "patch"):
            parts = [part.transpose(2, 3, 1, 0) for part in parts]
        if self.kind == "patch":
            parts = [part.reshape(-1, part.shape[-1]) for part in parts]
        return parts

    def from_ours(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of :meth:`to_ours`."""
        if self.kind == "linear":
            arrays = [array.T for array in arrays]
        if self.kind == "rows":
            arrays = [array[None] for array in arrays]
        if self.kind == "patch":
            _, channels, rows, columns = self.shape
            arrays = [array.reshape(rows, columns, channels, -1) for array in arrays]
        if self.kind in ("conv", "patch"):
            arrays = [array.transpose(3, 2, 0, 1) for array in arrays]
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]


def check_tensors(
    tensors: Sequence[VisionTensor], stored: Mapping[str, StoredTensor | np.ndarray], what: str = "the checkpoint"
) -> None:
    """Checks that a checkpoint holds the tensors of a model, and no others.

    Args:
      tensors: Those of the model.
      stored: Those of the checkpoint, by the same names.
      what: Name of the checkpoint, for messages.

    Raises:
      ValueError: Tensors are missing, unexpected or of another shape; the message lists the first of each.
    """
    expected = {tensor.name for tensor in tensors}
    missing, unexpected = sorted(expected - stored.keys()), sorted(stored.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"{what}: the weights are not those of this model; missing: {_some(missing)}; unexpected: "
            f"{_some(unexpected)}"
        )
    wrong = [
        f"{tensor.name}: expected {tensor.shape}, got {tuple(stored[tensor.name].shape)}"
        for tensor in tensors
        if tuple(stored[tensor.name].shape) != tensor.shape
    ]
    if wrong:
        raise ValueError(f"{what}: shapes are not those of this model: {_some(wrong)}")


def read_tensors(tensors: Sequence[VisionTensor], stored: Mapping[str, StoredTensor | np.ndarray]) -> PyTree:
    """Reads a checkpoint into a nested dict of NumPy arrays on the host.

    Args:
      tensors: The tensors of the model, none of them in a stack of layers.
      stored: Those of the checkpoint, by the same names.

    Returns:
      The arrays at the paths of their places.

    Raises:
      ValueError: What :func:`check_tensors` raises.
    """
    check_tensors(tensors, stored)
    tree: dict[str, Any] = {}
    for tensor in tensors:
        source = stored[tensor.name]
        source = source.read() if isinstance(source, StoredTensor) else source
        for place, array in zip(tensor.places, tensor.to_ours(source), strict=True):
            branch = tree
            for key in place.path[:-1]:
                branch = branch.setdefault(key, {})
            branch[place.path[-1]] = np.ascontiguousarray(array)
    return tree


def write_tensors(tensors: Sequence[VisionTensor], tree: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every tensor of a checkpoint by name, one at a time; the inverse of :func:`read_tensors`."""
    for tensor in tensors:
        arrays = []
        for place in tensor.places:
            branch = tree
            for key in place.path:
                branch = branch[key]
            arrays.append(np.asarray(branch))
        yield tensor.name, tensor.from_ours(arrays)


def _some(names: Sequence[str]) -> str:
    return f"{list(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}" if names else "none"
