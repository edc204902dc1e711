"""Parameters read from tensors in files: each process reads the slices of its own devices, one shard at a time."""

import functools
import itertools
import os
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from subspace_jax.interop.safetensors_io import StoredTensor, some
from subspace_jax.interop.tensors import Path, PyTree, TensorLayout, TensorName, axis_order, stored_shape
from subspace_jax.nn.params import spec_axes, spec_shapes

Shardings = PyTree | Callable[[PyTree, PyTree], PyTree]
Pieces = list[tuple[TensorName, StoredTensor]]

CHUNK_BYTES = 32 * 2**20
DECODED_BYTES = 8 * 2**20


def read_params(
    layout: TensorLayout,
    stored: Mapping[str, StoredTensor],
    *,
    shardings: Shardings | None = None,
    dtype: DTypeLike | None = None,
) -> PyTree:
    """Reads every parameter directly onto its devices.

    Args:
      layout: The parameters, and the tensors of the checkpoint.
      stored: The tensors of the files, by name.
      shardings: Tree of shardings with the structure of the parameters, or a function ``(shapes, axes) -> shardings``;
        all on one device by default.
      dtype: Dtype of the parameters; the one in the files by default.
    """
    shapes = spec_shapes(layout.specs)
    if callable(shardings):
        shardings = shardings(shapes, spec_axes(layout.specs))
    elif shardings is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, shapes)

    pieces: dict[Path, Pieces] = {}
    for tensor in layout.tensors:
        pieces.setdefault(tensor.place.path, []).append((tensor, stored[tensor.name]))

    def read(path, shape: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        own = pieces[tuple(entry.key for entry in path)]
        return _place(own, shape.shape, sharding, _common_dtype(own) if dtype is None else np.dtype(dtype))

    return jax.tree_util.tree_map_with_path(read, shapes, shardings)


def check_depth(folder: str | os.PathLike, layers: int, stored: Mapping[str, StoredTensor]) -> None:
    """Raises ValueError for more layers than tensors, before the names of all tensors are listed."""
    if layers > len(stored):
        raise ValueError(f"{folder}: config.json says {layers} layers, the weights have {len(stored)} tensors")


def match_tensors(
    folder: str | os.PathLike, what: str, layout: TensorLayout, stored: Mapping[str, StoredTensor]
) -> None:
    """Checks that files hold exactly the tensors of a model.

    Args:
      folder: The checkpoint, for the message.
      what: The model, for the message.
      layout: Its parameters and tensors.
      stored: The tensors of the files, by name.

    Raises:
      ValueError: Tensors are missing or unexpected, of another shape, or not floating point; the message names them.
    """
    expected = {tensor.name for tensor in layout.tensors}
    missing, unexpected = sorted(expected - stored.keys()), sorted(stored.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the weights are not those of {what}; missing: {some(missing)}; unexpected: {some(unexpected)}"
        )
    wrong, source = [], "config.json" if os.path.isdir(folder) else "the metadata"
    for tensor in layout.tensors:
        found, shape = stored[tensor.name], stored_shape(layout.specs, tensor)
        if found.shape != shape:
            wrong.append(f"{tensor.name}: expected {shape} from {source}, got {found.shape}")
        if not jnp.issubdtype(found.dtype, jnp.floating):
            wrong.append(f"{tensor.name}: expected floating point, got {found.dtype}")
    wrong = list(dict.fromkeys(wrong))
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong[:8])}{f' and {len(wrong) - 8} more' if len(wrong) > 8 else ''}")


def _common_dtype(pieces: Pieces) -> np.dtype:
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(jnp.result_type(*{stored.dtype for _, stored in pieces}))


def _place(pieces: Pieces, shape: tuple[int, ...], sharding: Sharding, dtype: np.dtype) -> jax.Array:
    """Reads one parameter; a large stack is read a few layers at a time."""
    stacked, shard = pieces[0][0].place.layer is not None, sharding.shard_shape(shape)
    nbytes = int(np.prod(shard, dtype=np.int64)) * dtype.itemsize
    if not stacked or nbytes <= CHUNK_BYTES or shard[0] != shape[0]:
        return _place_at_once(pieces, shape, sharding, dtype)
    layers = shape[0]
    count = max(n for n in range(1, layers + 1) if layers % n == 0 and (n == 1 or n * nbytes <= CHUNK_BYTES * layers))
    array = jnp.zeros(shape, dtype, device=sharding)
    for start in range(0, layers, count):
        chunk = _place_at_once(pieces[start : start + count], (count, *shape[1:]), sharding, dtype)
        array = jax.block_until_ready(_insert(array, chunk, start))
    return jax.device_put(array, sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(array: jax.Array, chunk: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, chunk, start, 0)


def _place_at_once(pieces: Pieces, shape: tuple[int, ...], sharding: Sharding, dtype: np.dtype) -> jax.Array:
    """Reads shard by shard: the host holds one shard at a time, not those of all its devices."""
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = {}
    for bounds, devices in holders.items():
        shard = _read_shard(pieces, shape, tuple(slice(*b) for b in bounds), dtype)
        for device in devices:
            shards[device] = jax.device_put(shard, SingleDeviceSharding(device))
        jax.block_until_ready([shards[device] for device in devices])
    # The map has the order in which JAX keeps the devices of a sharding.
    return jax.make_array_from_single_device_arrays(
        shape, sharding, [shards[device] for device in sharding.addressable_devices_indices_map(shape)]
    )


def _read_shard(pieces: Pieces, shape: tuple[int, ...], index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    shard = np.empty([s.stop - s.start for s in index], dtype)
    if pieces[0][0].place.layer is None:
        _fill(shard, *pieces[0], shape, index)
        return shard
    for i in range(index[0].start, index[0].stop):
        # A view, even of a scalar.
        target = shard[i - index[0].start : i - index[0].start + 1].reshape(shard.shape[1:])
        _fill(target, *pieces[i], shape[1:], index[1:])
    return shard


def _fill(
    target: np.ndarray, tensor: TensorName, stored: StoredTensor, shape: tuple[int, ...], index: tuple[slice, ...]
) -> None:
    """Copies the part of a tensor for ``index`` of the array of one layer, some rows at a time: they may be decoded."""
    if tensor.shape is not None or not index:
        _copy(target, _read_part(tensor, stored, shape, index))
        return
    axis = axis_order(tensor, len(index)).index(0)
    rows, nbytes = index[axis], target.size * stored.dtype.itemsize
    step = max(1, (rows.stop - rows.start) * DECODED_BYTES // max(1, nbytes))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        place = (*(slice(None),) * axis, slice(start - rows.start, stop - rows.start))
        part = _read_part(tensor, stored, shape, (*index[:axis], slice(start, stop), *index[axis + 1 :]))
        _copy(target[place], part)


def _read_part(
    tensor: TensorName, stored: StoredTensor, shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """Maps the part of a tensor for ``index`` of the array of one layer."""
    number, count = tensor.part
    order = axis_order(tensor, len(stored.shape))
    rows = stored.shape[0] // count if stored.shape else 0
    if tensor.shape is not None:
        # Reshaped tensors are tokens, positions and patch kernels, and small.
        block = stored.read((slice(number * rows, (number + 1) * rows),) if stored.shape else ())
        return np.asarray(block).transpose(order).reshape(shape)[index]
    found = [index[order.index(axis)] for axis in range(len(order))]
    if found:
        found[0] = slice(found[0].start + number * rows, found[0].stop + number * rows)
    return np.asarray(stored.read(tuple(found))).transpose(order)


def _copy(target: np.ndarray, source: np.ndarray, tile: int = 256) -> None:
    """Copies in tiles: a transposed matrix read row by row would touch every page of the file once for each row."""
    if target.ndim < 2:
        target[...] = source
        return
    for i, j in itertools.product(range(0, target.shape[0], tile), range(0, target.shape[1], tile)):
        target[i : i + tile, j : j + tile] = source[i : i + tile, j : j + tile]
