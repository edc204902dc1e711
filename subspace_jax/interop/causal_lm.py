"""Causal language models from Hugging Face checkpoint folders, straight onto devices."""

import functools
import itertools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from subspace_jax.interop.hf_config import read_config
from subspace_jax.interop.names import TensorName, is_buffer, tensor_names
from subspace_jax.interop.safetensors_io import StoredTensor, open_folder
from subspace_jax.nn import CausalLM, CausalLMConfig, causal_lm_axes, causal_lm_shapes, causal_lm_specs

PyTree = Any
Path = tuple[str, ...]
Shardings = PyTree | Callable[[PyTree, PyTree], PyTree]

CHUNK_BYTES = 32 * 2**20


def load_causal_lm(
    folder: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> tuple[CausalLMConfig, PyTree]:
    """Reads a checkpoint folder of GPT-2, Llama, Mistral or Qwen2 straight onto devices.

    Files are mapped, and each process reads the slices of its own devices only.  What it holds at a time, beside the
    arrays themselves, is one device's share of one table, or of the layers of a kernel that take 32 MiB.

    Args:
      folder: Has ``config.json`` and ``model.safetensors``, or shards and ``model.safetensors.index.json``.
      shardings: Tree of shardings with the layout of the parameters, or a function ``(shapes, axes) -> shardings``
        such as ``lambda shapes, axes: train.param_shardings(shapes, axes, mesh)``; all on one device by default.
      dtype: Type of the parameters; the one in the files by default.

    Returns:
      The config, and the parameters as :func:`subspace_jax.nn.causal_lm_specs` lays them out.

    Raises:
      ValueError: The architecture is not supported, weights are pickled, tensors are missing, unexpected or of
        the wrong shape, or a file is damaged or cut off.
      FileNotFoundError: The folder or a file is not there.
    """
    config = read_config(folder)
    tensors = tensor_names(config)
    stored = _match(pathlib.Path(folder), config, tensors, open_folder(folder))
    shapes = causal_lm_shapes(config)
    if callable(shardings):
        shardings = shardings(shapes, causal_lm_axes(config))
    elif shardings is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, shapes)

    pieces: dict[Path, list[tuple[TensorName, StoredTensor]]] = {}
    for tensor in tensors:
        pieces.setdefault(tensor.place.path, []).append((tensor, stored[tensor.name]))

    def read(path, shape: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        own = pieces[tuple(entry.key for entry in path)]
        return _place(own, shape.shape, sharding, _common_dtype(own) if dtype is None else np.dtype(dtype))

    return config, jax.tree_util.tree_map_with_path(read, shapes, shardings)


def from_pretrained(
    folder: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> CausalLM:
    """Reads a checkpoint folder as a module; see :func:`load_causal_lm`."""
    return CausalLM(*load_causal_lm(folder, shardings=shardings, dtype=dtype))


def _match(
    folder: pathlib.Path, config: CausalLMConfig, tensors: list[TensorName], stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Finds every tensor that the model needs, and refuses files that hold fewer, more, or others."""
    if config.family == "gpt2" and not any(name.startswith("transformer.") for name in stored):
        # The first files were those of the bare decoder.
        stored = {name if name.startswith("lm_head.") else f"transformer.{name}": t for name, t in stored.items()}
    stored = {name: t for name, t in stored.items() if not is_buffer(name)}
    if config.tied:
        stored.pop("lm_head.weight", None)
    expected = {tensor.name for tensor in tensors}
    missing, unexpected = sorted(expected - stored.keys()), sorted(stored.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the weights are not those of a {config.family!r} with {config.num_layers} layers; "
            f"missing: {some(missing)}; unexpected: {some(unexpected)}"
        )
    specs, wrong = causal_lm_specs(config), []
    for tensor in tensors:
        shape = stored_shape(specs, tensor)
        if stored[tensor.name].shape != shape:
            wrong.append(f"{tensor.name}: expected {shape} from config.json, got {stored[tensor.name].shape}")
        if not jnp.issubdtype(stored[tensor.name].dtype, jnp.floating):
            wrong.append(f"{tensor.name}: expected floating point, got {stored[tensor.name].dtype}")
    if wrong:
        raise ValueError(f"{folder}: {'; '.join(wrong[:8])}{f' and {len(wrong) - 8} more' if len(wrong) > 8 else ''}")
    return stored


def some(names: list[str]) -> str:
    """Shows the first few of many names."""
    return f"{names[:8]}{f' and {len(names) - 8} more' if len(names) > 8 else ''}" if names else "none"


def stored_shape(specs: PyTree, tensor: TensorName) -> tuple[int, ...]:
    """The shape of a tensor in a checkpoint."""
    spec = specs
    for key in tensor.place.path:
        spec = spec[key]
    shape = spec.shape if tensor.place.layer is None else spec.shape[1:]
    return shape[::-1] if tensor.transposed else shape


def _common_dtype(pieces: list[tuple[TensorName, StoredTensor]]) -> np.dtype:
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(jnp.result_type(*{stored.dtype for _, stored in pieces}))


def _place(
    pieces: list[tuple[TensorName, StoredTensor]], shape: tuple[int, ...], sharding: Sharding, dtype: np.dtype
) -> jax.Array:
    """Reads one parameter; a large stack comes to the devices a few layers at a time."""
    stacked, share = pieces[0][0].place.layer is not None, sharding.shard_shape(shape)
    nbytes = int(np.prod(share, dtype=np.int64)) * dtype.itemsize
    layers = shape[0]
    if not stacked or nbytes <= CHUNK_BYTES or share[0] != layers:
        return _place_whole(pieces, shape, sharding, dtype)
    count = max(n for n in range(1, layers + 1) if layers % n == 0 and (n == 1 or n * nbytes <= CHUNK_BYTES * layers))
    array = jnp.zeros(shape, dtype, device=sharding)
    for start in range(0, layers, count):
        chunk = _place_whole(pieces[start : start + count], (count, *shape[1:]), sharding, dtype)
        array = jax.block_until_ready(_insert(array, chunk, start))
    return jax.device_put(array, sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(array: jax.Array, chunk: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, chunk, start, 0)


def _place_whole(
    pieces: list[tuple[TensorName, StoredTensor]], shape: tuple[int, ...], sharding: Sharding, dtype: np.dtype
) -> jax.Array:
    """Reads share by share: the host holds one share at a time, not those of all its devices."""
    holders: dict[tuple, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shares = {}
    for bounds, devices in holders.items():
        share = _read_share(pieces, tuple(slice(*b) for b in bounds), dtype)
        for device in devices:
            shares[device] = jax.device_put(share, SingleDeviceSharding(device))
        jax.block_until_ready([shares[device] for device in devices])
    # The order of the map is that in which JAX keeps the devices of a sharding.
    return jax.make_array_from_single_device_arrays(
        shape, sharding, [shares[device] for device in sharding.addressable_devices_indices_map(shape)]
    )


def _read_share(pieces: list[tuple[TensorName, StoredTensor]], index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
    share = np.empty([s.stop - s.start for s in index], dtype)
    stacked = pieces[0][0].place.layer is not None
    inner = index[1:] if stacked else index
    for i, (tensor, stored) in enumerate(pieces):
        target = share
        if stacked:
            if not index[0].start <= i < index[0].stop:
                continue
            target = share[i - index[0].start]
        source = stored.read(inner[::-1] if tensor.transposed else inner)
        _copy(target, source.T if tensor.transposed else source)
    return share


def _copy(target: np.ndarray, source: np.ndarray, tile: int = 256) -> None:
    """Copies in tiles: a transposed matrix read row by row would visit every page of the file once for each row."""
    if target.ndim < 2:
        target[...] = source
        return
    for i, j in itertools.product(range(0, target.shape[0], tile), range(0, target.shape[1], tile)):
        target[i : i + tile, j : j + tile] = source[i : i + tile, j : j + tile]
