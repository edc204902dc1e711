"""Folders of compressed language models: kernels as dictionaries with sparse coefficients, or as low-rank factors.

Beside ``config.json``, which is that of the model with a field ``compression``, ``compressed.safetensors`` holds the
tensors that stayed as they were, by their Hugging Face names, and those of each compressed module ``m``: ``m.a`` and
``m.b``, or ``m.dictionary [d1, k]`` and ``m.coefficients [s, d2]``, all bfloat16.  A factor that modules share is
stored once, with the first of them.  The bits of a coefficient that compression clears hold the mask of the column: the
low bits of the ``i``-th coefficient are those of atoms ``2 i`` and ``2 i + 1``, and an atom beyond ``2 s`` is used if
the others are not enough.  Coefficients are in the order of their atoms.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding
from jax.typing import DTypeLike

from subspace_jax.interop.config_fields import naming, read_fields, shown
from subspace_jax.interop.hf.causal_lm import config_of_fields
from subspace_jax.interop.hf.causal_lm_config import config_to_hf
from subspace_jax.interop.hf.causal_lm_names import module_places, tensor_names
from subspace_jax.interop.reading import Shardings, match_tensors, read_params
from subspace_jax.interop.safetensors_io import StoredTensor, read_header, some, write_safetensors
from subspace_jax.interop.tensors import Place, PyTree, TensorLayout, at, stored_shape, to_stored
from subspace_jax.interop.writing import is_checkpoint_file, replacing, write_side_files
from subspace_jax.nn import CausalLMConfig, LowRankFactor, SparseFactor, causal_lm_specs

FILE = "compressed.safetensors"
_FIRST = {"sparse": "dictionary", "low_rank": "a"}
_SECOND = {"sparse": "coefficients", "low_rank": "b"}


class CompressedKernel(NamedTuple):
    """A compressed kernel of one layer, as it is stored.

    Attributes:
      kind: "sparse" or "low_rank".
      first: Dictionary ``[d1, k]``, or ``a [d1, r]``; bfloat16.
      second: Packed coefficients ``[s, d2]`` int16, see :func:`pack_coefficients`, or ``b [r, d2]`` bfloat16.
      shared_with: Module whose first factor this one shares; "" for its own.
    """

    kind: str
    first: np.ndarray
    second: np.ndarray
    shared_with: str = ""


def is_compressed(folder: str | os.PathLike) -> bool:
    """Whether a folder is one that :func:`save_compressed` has written."""
    return (pathlib.Path(folder) / FILE).is_file()


def pack_coefficients(values: np.ndarray, indices: np.ndarray, k: int) -> np.ndarray:
    """Packs coefficients of 14 bits and the mask of their atoms into words of 16 bits.

    Args:
      values: ``[s, d2]`` bfloat16 with the two lowest bits cleared, see :func:`subspace_jax.nn.truncate_bf16`.
      indices: ``[s, d2]``, ascending along the first axis.
      k: Number of atoms, at most ``2 s + 1``.

    Returns:
      ``[s, d2]`` int16.

    Raises:
      ValueError: There are more atoms, atoms are not ascending, or bits are not cleared.
    """
    s, columns = values.shape
    if k > 2 * s + 1:
        raise ValueError(f"k: the mask of {k} atoms needs more than the two bits of {s} coefficients; expected rho = 2")
    if s > 1 and not (np.diff(indices.astype(np.int64), axis=0) > 0).all():
        raise ValueError("indices: expected ascending atoms in each column")
    words = np.ascontiguousarray(values).view(np.uint16)
    if (words & 3).any():
        raise ValueError("values: expected the two lowest bits cleared")
    mask = np.zeros((k, columns), np.uint16)
    np.put_along_axis(mask, indices.astype(np.int64), 1, axis=0)
    mask = mask[: 2 * s].reshape(s, 2, columns) if k >= 2 * s else _padded(mask, 2 * s).reshape(s, 2, columns)
    return (words | mask[:, 0] | (mask[:, 1] << 1)).view(np.int16)


def unpack_coefficients(words: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of :func:`pack_coefficients`.

    Returns:
      Coefficients ``[s, d2]`` bfloat16, and their atoms, uint16 where these suffice, else int32.

    Raises:
      ValueError: A column has another number of atoms than coefficients.
    """
    s, columns = words.shape
    words = np.ascontiguousarray(words).view(np.uint16)
    mask = np.stack([words & 1, (words >> 1) & 1], axis=1).reshape(2 * s, columns)[:k].astype(bool)
    if k == 2 * s + 1:
        mask = np.concatenate([mask, mask.sum(axis=0, keepdims=True) == s - 1])
    if (mask.sum(axis=0) != s).any():
        raise ValueError(f"coefficients: expected masks of {s} atoms in each column, got others")
    indices = np.nonzero(mask.T)[1].reshape(columns, s).T
    values = (words & np.uint16(0xFFFC)).view(ml_dtypes.bfloat16)
    return values, np.ascontiguousarray(indices).astype(np.uint16 if k <= 2**16 else np.int32)


def _padded(mask: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([mask, np.zeros((rows - len(mask), mask.shape[1]), mask.dtype)])


def save_compressed(
    folder: str | os.PathLike,
    config: CausalLMConfig,
    params: PyTree,
    kernels: Mapping[str, CompressedKernel],
    about: Mapping[str, Any],
    *,
    side_files: Mapping[str, pathlib.Path | str] | None = None,
) -> int:
    """Writes a folder that :func:`subspace_jax.interop.load_causal_lm` reads.

    Args:
      folder: Folder to write; files in it that are no checkpoint's are kept.
      config: The model.
      params: Its parameters, stacked plain arrays.
      kernels: The compressed kernels by Hugging Face module, such as ``"model.layers.0.mlp.up_proj"``.
      about: What else the field ``compression`` of ``config.json`` says.
      side_files: Files to copy into the folder; see :func:`subspace_jax.interop.side_files`.

    Returns:
      Bytes of the weights.

    Raises:
      ValueError: A kernel is none of the model's.
      OSError: Writing failed.
    """
    specs, shapes, sources = causal_lm_specs(config), {}, {}
    weights = {tensor.name: tensor for tensor in tensor_names(config)}
    if strays := sorted(m for m in kernels if f"{m}.weight" not in weights):
        raise ValueError(f"kernels: no modules of this model: {some(strays)}")
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        if module in kernels and name.endswith(".weight"):
            kernel, names = kernels[module], _names(module, kernels[module].kind, kernels[module].shared_with)
            own = {names[1]: kernel.second} if kernel.shared_with else dict(zip(names, kernel[1:3], strict=True))
            shapes |= {key: (x.shape, x.dtype) for key, x in own.items()}
            sources |= own
            continue
        leaf = at(params, tensor.place.path)
        shapes[name] = stored_shape(specs, tensor), leaf.dtype
        sources[name] = tensor

    def fetch(source):
        if isinstance(source, np.ndarray):
            return source
        leaf = at(params, source.place.path)
        return to_stored(source, np.asarray(leaf if source.place.layer is None else leaf[source.place.layer]))

    record = {
        m: {"kind": x.kind, **({"shared_with": x.shared_with} if x.shared_with else {})} for m, x in kernels.items()
    }
    fields = config_to_hf(config, "bfloat16") | {"compression": {"version": 1, **about, "kernels": record}}
    folder = pathlib.Path(folder)
    with replacing(folder, is_checkpoint_file) as new:
        write_side_files(new, side_files or {})
        (new / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        write_safetensors(new / FILE, shapes, map(fetch, sources.values()))
    return sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())


def _names(module: str, kind: str, shared_with: str) -> tuple[str, str]:
    return f"{shared_with or module}.{_FIRST[kind]}", f"{module}.{_SECOND[kind]}"


def read_config(folder: str | os.PathLike) -> CausalLMConfig:
    """Reads the config of a compressed model."""
    return config_of_fields(folder)


def param_shapes_and_axes(folder: str | os.PathLike, dtype: DTypeLike | None = None) -> tuple[PyTree, PyTree]:
    """Returns the parameters of a compressed model as shapes, and their logical axes, both with structured kernels.

    Args:
      folder: The folder; only the headers of its files are read.
      dtype: Dtype of the parameters; the one in the files by default.

    Raises:
      ValueError: See :func:`load_causal_lm`.
    """
    opened = _open(folder)
    shapes, axes = _shapes(opened, dtype)
    return shapes, axes


def load_causal_lm(
    folder: str | os.PathLike, *, shardings: Shardings | None = None, dtype: DTypeLike | None = None
) -> tuple[CausalLMConfig, PyTree]:
    """Reads a compressed model; for the arguments see :func:`subspace_jax.interop.load_causal_lm`.

    Kernels are :class:`subspace_jax.nn.SparseFactor` or :class:`subspace_jax.nn.LowRankFactor`, stacked over layers and
    padded with zeros where these differ in size; a factor that layers share is there once for each.

    Raises:
      ValueError: Tensors are missing, unexpected or of the wrong shape, a file is damaged, or the layers of a kernel
        differ in kind.
      FileNotFoundError: The folder or a file does not exist.
    """
    opened = _open(folder)
    shapes, axes = _shapes(opened, dtype)
    if callable(shardings):
        shardings = shardings(shapes, axes)
    elif shardings is None:
        one = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, shapes)
    kept = _without(shardings, opened.kernels)
    params = read_params(opened.dense, opened.stored, shardings=kept, dtype=dtype)
    for path, modules in opened.kernels.items():
        shape, sharding = at(shapes, path), at(shardings, path)
        with naming(pathlib.Path(folder) / FILE):
            made = _stacked(opened, modules, shape)
        parent = params
        for key in path[:-1]:
            parent = parent.setdefault(key, {})
        parent[path[-1]] = jax.tree.map(jax.device_put, made, sharding)
    return opened.config, params


class _Opened(NamedTuple):
    """A folder whose headers are read: ``kernels`` has the modules of each compressed path, in the order of layers."""

    config: CausalLMConfig
    stored: dict[str, StoredTensor]
    dense: TensorLayout
    kernels: dict[tuple[str, ...], list[str]]
    record: Mapping[str, Mapping[str, str]]


def _open(folder: str | os.PathLike) -> _Opened:
    folder = pathlib.Path(folder)
    config, fields = config_of_fields(folder), read_fields(folder).get("compression")
    stored, _ = read_header(folder / FILE)
    record = fields.get("kernels") if isinstance(fields, Mapping) else None
    if not isinstance(record, Mapping) or not all(
        isinstance(x, Mapping) and x.get("kind") in _FIRST and isinstance(x.get("shared_with", ""), str)
        for x in record.values()
    ):
        raise ValueError(f"{folder}/config.json: compression: expected kernels with their kinds, got {shown(fields)}")
    places, kernels = module_places(config), {}
    for module in record:
        if module not in places:
            raise ValueError(f"{folder}/config.json: compression: {shown(module)} is no module of the model")
        place = places[module]
        kernels.setdefault((*place.path, "kernel"), {})[place.layer] = module
    for path, modules in kernels.items():
        kinds = {record[m]["kind"] for m in modules.values()}
        if len(modules) != config.num_layers or len(kinds) > 1:
            raise ValueError(f"{folder}/config.json: compression: expected {'/'.join(path)} of one kind in all layers")
    used = {name for m, x in record.items() for name in _names(m, x["kind"], x.get("shared_with", ""))}
    if missing := sorted(used - stored.keys()):
        raise ValueError(f"{folder / FILE}: missing tensors: {some(missing)}")
    tensors = [t for t in tensor_names(config) if t.place.path not in kernels]
    dense = TensorLayout(_without(causal_lm_specs(config), kernels), tensors)
    match_tensors(folder, "this compressed model", dense, {name: x for name, x in stored.items() if name not in used})
    ordered = {path: [modules[layer] for layer in sorted(modules)] for path, modules in kernels.items()}
    return _Opened(config, stored, dense, ordered, record)


def _tensors(opened: _Opened, module: str) -> tuple[StoredTensor, StoredTensor]:
    entry = opened.record[module]
    return tuple(opened.stored[name] for name in _names(module, entry["kind"], entry.get("shared_with", "")))


def _shapes(opened: _Opened, dtype: DTypeLike | None) -> tuple[PyTree, PyTree]:
    """Returns shapes and logical axes of all parameters."""
    specs = causal_lm_specs(opened.config)

    def build(tree, path):
        if isinstance(tree, dict):
            made = {key: build(part, (*path, key)) for key, part in tree.items()}
            return {key: x[0] for key, x in made.items()}, {key: x[1] for key, x in made.items()}
        if path not in opened.kernels:
            own = next(t for t in opened.dense.tensors if t.place.path == path)
            kept = opened.stored[own.name].dtype if dtype is None else dtype
            return jax.ShapeDtypeStruct(tree.shape, kept), P(*tree.axes)
        return _kernel_shapes(opened, tree, path, jnp.bfloat16 if dtype is None else dtype)

    return build(specs, ())


def _kernel_shapes(opened: _Opened, spec: Any, path: tuple[str, ...], dtype: DTypeLike):
    modules = opened.kernels[path]
    layers, d1, d2 = spec.shape
    found = [_tensors(opened, module) for module in modules]
    kind = opened.record[modules[0]]["kind"]
    for first, second in found:
        inner = first.shape[1:] if kind == "low_rank" else second.shape[:1]
        if len(first.shape) != 2 or first.shape[0] != d1 or second.shape != (*inner, d2):
            raise ValueError(
                f"{first.file}: {first.name} {first.shape} and {second.name} {second.shape} are no factors of a kernel "
                f"{(d1, d2)}"
            )
    width, height = max(x.shape[1] for x, _ in found), max(x.shape[0] for _, x in found)
    left, right = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((layers, d1, width), (layers, height, d2)))
    if kind == "low_rank":
        made = LowRankFactor(left, right)
    else:
        made = SparseFactor(left, right, jax.ShapeDtypeStruct(right.shape, jnp.uint16 if width <= 2**16 else jnp.int32))
    return made, made.axes(P(*spec.axes))


def _stacked(opened: _Opened, modules: list[str], shape: SparseFactor | LowRankFactor) -> SparseFactor | LowRankFactor:
    """Reads the kernels of all layers, padded; a padding coefficient is 0, of atoms that the column does not use."""
    made = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shape)
    for layer, module in enumerate(modules):
        first, second = (np.asarray(x.read()) for x in _tensors(opened, module))
        width, height = first.shape[1], second.shape[0]
        if isinstance(made, LowRankFactor):
            made.a[layer, :, :width], made.b[layer, :height] = first, second
            continue
        values, indices = unpack_coefficients(second, width)
        made.dictionary[layer, :, :width], made.values[layer, :height] = first, values
        made.indices[layer, :height] = indices
        if height < made.indices.shape[1]:
            made.indices[layer, height:] = _unused(indices, made.indices.shape[1] - height, made.dictionary.shape[2])
    return made


def _unused(indices: np.ndarray, count: int, k: int) -> np.ndarray:
    """Returns the first atoms ``[count, d2]`` that each column does not use."""
    mask = np.zeros((k, indices.shape[1]), bool)
    np.put_along_axis(mask, indices.astype(np.int64), True, axis=0)
    return np.argsort(mask, axis=0, kind="stable")[:count]


def _without(tree: PyTree, paths: Mapping[tuple[str, ...], Any], path: tuple[str, ...] = ()) -> PyTree:
    """Returns a nested dict without some leaves, and without what is then empty."""
    made = {}
    for key, part in tree.items():
        here = (*path, key)
        if here in paths:
            continue
        part = _without(part, paths, here) if isinstance(part, dict) else part
        if part != {}:
            made[key] = part
    return made


def kernel_place(config: CausalLMConfig, layer: int, path: str) -> str:
    """Returns the Hugging Face module of the kernel ``path``, such as "mlp/up", of a layer."""
    wanted = Place(("layers", *path.split("/")), layer)
    return next(module for module, place in module_places(config).items() if place == wanted)
