"""Weights of an ONNX file: its initializers, and from them the backbone of DINOv2.

An ONNX file is one message of Protocol Buffers.  Of its graph only initializers and the names of nodes are read;
tensors stay in the file until they are needed, as those of safetensors do.
"""

import math
import mmap
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from subspace_jax.interop.config_fields import MAX_SIZE, naming, shown
from subspace_jax.interop.safetensors_io import StoredTensor
from subspace_jax.interop.tensors import PyTree
from subspace_jax.interop.vision import load_dino_params
from subspace_jax.nn import VisionTransformerConfig

# Numbers of the fields that are read, by message, and of the data types; see onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_KIND = 1, 3, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_FLOATS, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 4, 8, 9
_DTYPES = {1: np.dtype("<f4"), 7: np.dtype("<i8"), 10: np.dtype("<f2"), 11: np.dtype("<f8")}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_AXES = 16


class OnnxNode(NamedTuple):
    """A node of a graph.

    Attributes:
      kind: Its operator, such as "MatMul".
      name: Its name, a path of modules: ``/encoder/layer.0/mlp/fc1/MatMul``.
      inputs: Names of its inputs.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]


class OnnxGraph(NamedTuple):
    """What :func:`read_onnx` finds.

    Attributes:
      initializers: Tensors by name, not read yet.
      nodes: The nodes in the order of the file.
    """

    initializers: dict[str, StoredTensor]
    nodes: list[OnnxNode]


def read_onnx(file: str | os.PathLike) -> OnnxGraph:
    """Reads the initializers and nodes of an ONNX file.

    Initializers of other types than float16, float32, float64 and int64, and those that are not stored as bytes, are
    left out.

    Args:
      file: An ``.onnx`` file.

    Returns:
      The graph.

    Raises:
      ValueError: The file is no ONNX model, is truncated, or a tensor has other bytes than its shape needs.
      OSError: The file can't be read.
    """
    file = pathlib.Path(file)
    if not file.stat().st_size:
        raise ValueError(f"{file}: not an ONNX file, or truncated: it is empty")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _graph(file, data)
        except _DamagedError as error:
            raise ValueError(f"{file}: not an ONNX file, or truncated: {error}") from error


def load_onnx_dinov2(
    file: str | os.PathLike, *, num_heads: int | None = None, dtype: DTypeLike | None = None
) -> tuple[VisionTransformerConfig, PyTree]:
    """Reads a DINOv2 backbone from an ONNX file, see :func:`dinov2_tensors`.

    Args:
      file: An ``.onnx`` file, exported from PyTorch, with the backbone under any prefix.
      num_heads: Number of heads, which the tensors don't show; ``d / 64`` by default, as in the published models.
      dtype: Dtype of the parameters; the one in the file by default.

    Returns:
      The config, and the parameters as :func:`subspace_jax.nn.vision_transformer_specs` lays them out.

    Raises:
      ValueError: The file is damaged, or holds no such backbone.
    """
    found = dinov2_tensors(file)
    with naming(file):
        patch = found["embeddings.patch_embeddings.projection.weight"]
        width, channels, side, _ = patch.shape
        patches = found["embeddings.position_embeddings"].shape[1] - 1
        grid = math.isqrt(patches)
        layers = sum(name.endswith(".norm1.weight") for name in found)
        up = found.get("encoder.layer.0.mlp.fc1.bias")
        if grid * grid != patches or up is None:
            raise ValueError("expected positions of a square grid, and perceptrons without a gate")
        config = VisionTransformerConfig(
            family="dinov2",
            image_size=(grid * side, grid * side),
            patch_size=side,
            width=width,
            num_layers=layers,
            num_heads=width // 64 if num_heads is None else num_heads,
            mlp_size=len(up),
            channels=channels,
            layer_scale=True,
        )
        return config, load_dino_params(found, config, dtype)


def dinov2_tensors(file: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns the tensors of a DINOv2 backbone in an ONNX file, by the names of Hugging Face's ``Dinov2Model``.

    An exporter folds transposed kernels and resampled positions into constants without a name.  A kernel has the path
    of its MatMul node, and is stored as ``[in, out]``; the positions of class token and patches are inputs of a Concat
    and of a Reshape node of the embeddings.

    Args:
      file: An ``.onnx`` file, exported from PyTorch, with the backbone under any prefix.

    Returns:
      Tensors as in the checkpoint of a ``Dinov2Model`` without mask token.

    Raises:
      ValueError: The file is damaged, or holds no such backbone.
    """
    graph = read_onnx(file)
    patch = "embeddings.patch_embeddings.projection.weight"
    prefix = next((name.removesuffix(patch) for name in graph.initializers if name.endswith(patch)), None)
    if prefix is None:
        raise ValueError(f"{file}: expected a DINOv2 backbone, whose patch embedding ends in {patch}; found none")
    found = {
        name.removeprefix(prefix): np.array(tensor.read())
        for name, tensor in graph.initializers.items()
        if name.startswith(prefix)
    }
    for node in graph.nodes:
        path = node.name.strip("/").replace("/", ".")
        if node.kind == "MatMul" and path.startswith(prefix) and node.inputs[-1] in graph.initializers:
            kernel = graph.initializers[node.inputs[-1]].read()
            found[path.removeprefix(prefix).removesuffix(".MatMul") + ".weight"] = np.ascontiguousarray(kernel.T)
    found["embeddings.position_embeddings"] = _positions(file, graph, prefix)
    return found


def _positions(file: str | os.PathLike, graph: OnnxGraph, prefix: str) -> np.ndarray:
    """Joins the positions of class token and patches, ``[1, 1, d]`` and ``[1, patches, d]``."""
    parts = []
    for kind in ("Concat", "Reshape"):
        inputs = (
            graph.initializers[node.inputs[0]]
            for node in graph.nodes
            if node.kind == kind
            and node.name.strip("/").replace("/", ".").startswith(f"{prefix}embeddings.")
            and node.inputs
            and node.inputs[0] in graph.initializers
        )
        parts += [tensor.read() for tensor in inputs if len(tensor.shape) == 3]
    if len(parts) != 2 or parts[0].shape[1] != 1 or parts[0].shape[2] != parts[1].shape[2]:
        shapes = [part.shape for part in parts]
        raise ValueError(f"{file}: expected positions [1, 1, d] and [1, patches, d] of the embeddings, found {shapes}")
    return np.concatenate(parts, axis=1)


class _DamagedError(ValueError):
    pass


Field = int | tuple[int, int]  # a number, or the range of its bytes


def _graph(file: pathlib.Path, data: mmap.mmap) -> OnnxGraph:
    graphs = [value for number, value in _fields(data, (0, len(data))) if number == _MODEL_GRAPH]
    if len(graphs) != 1 or isinstance(graphs[0], int):
        raise _DamagedError(f"expected one graph, found {len(graphs)}")
    tensors, nodes = {}, []
    for number, value in _fields(data, graphs[0]):
        if isinstance(value, int):
            continue
        if number == _GRAPH_NODE:
            nodes.append(_node(data, value))
        elif number == _GRAPH_INITIALIZER:
            tensor = _tensor(file, data, value)
            if tensor is not None:
                tensors[tensor.name] = tensor
    return OnnxGraph(tensors, nodes)


def _node(data: mmap.mmap, span: tuple[int, int]) -> OnnxNode:
    texts: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_NAME: [""], _NODE_KIND: [""]}
    for number, value in _fields(data, span):
        if number in texts:
            texts[number].append(_text(data, value))
    return OnnxNode(texts[_NODE_KIND][-1], texts[_NODE_NAME][-1], tuple(texts[_NODE_INPUT]))


def _tensor(file: pathlib.Path, data: mmap.mmap, span: tuple[int, int]) -> StoredTensor | None:
    shape, dtype, name, stored = [], None, "", None
    for number, value in _fields(data, span):
        if number == _TENSOR_DIMS:
            # One number a field, or several packed into one.
            shape += [value] if isinstance(value, int) else _varints(data, value)
        elif number == _TENSOR_TYPE:
            dtype = _DTYPES.get(value) if isinstance(value, int) else None
        elif number == _TENSOR_NAME:
            name = _text(data, value)
        elif number == _TENSOR_RAW or (number == _TENSOR_FLOATS and not isinstance(value, int)):
            stored = value
    if dtype is None or not isinstance(stored, tuple):
        return None
    if len(shape) > _MAX_AXES or any(size > MAX_SIZE for size in shape):
        raise _DamagedError(f"tensor {shown(name)} has the shape {shown(shape)}")
    tensor = StoredTensor(file, name, dtype, tuple(shape), stored[0])
    if tensor.nbytes != stored[1] - stored[0]:
        raise _DamagedError(
            f"tensor {shown(name)} of {dtype} {shape} needs {tensor.nbytes} bytes, has {stored[1] - stored[0]}"
        )
    return tensor


def _fields(data: mmap.mmap, span: tuple[int, int]) -> Iterator[tuple[int, Field]]:
    """Yields number and value of each field of a message; the value of a nested one is the range of its bytes."""
    at, end = span
    while at < end:
        key, at = _varint(data, at, end)
        kind, number = key & 7, key >> 3
        if kind == _VARINT:
            value, at = _varint(data, at, end)
            yield number, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at, end)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise _DamagedError(f"field {number} at byte {at} has the unknown kind {kind}")
        if length > end - at:
            raise _DamagedError(f"field {number} at byte {at} has {length} bytes, {end - at} are left")
        yield number, (at, at + length)
        at += length


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for i in range(10):
        if at + i >= end:
            break
        byte = data[at + i]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise _DamagedError(f"the number at byte {at} has no end")


def _varints(data: mmap.mmap, span: tuple[int, int]) -> list[int]:
    values, at = [], span[0]
    while at < span[1] and len(values) <= _MAX_AXES:
        value, at = _varint(data, at, span[1])
        values.append(value)
    return values


def _text(data: mmap.mmap, value: Field) -> str:
    if isinstance(value, int):
        raise _DamagedError("expected a text, found a number")
    try:
        return data[value[0] : value[1]].decode()
    except UnicodeDecodeError as error:
        raise _DamagedError("a name is not UTF-8") from error
