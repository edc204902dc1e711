"""Updates of a model on disk: tuned folders and PEFT adapters, matched with the weights of the base."""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from subspace_jax.interop import StoredTensor, open_folder, rank_and_alpha
from subspace_jax.interop.hf.causal_lm_names import is_buffer
from subspace_jax.interop.peft.adapter import tensors_by_name
from subspace_jax.interop.peft.config import CONFIG, TENSORS, check_fields, read_fields
from subspace_jax.interpret.inspector.changes import Change, LowRankChange, StoredChange

_LISTED = 5
_FACTOR = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)$")
_COPY = re.compile(r"\.(base_layer|original_module)\.weight$")
_SAVED = re.compile(r"(\.modules_to_save|\.base_layer)?\.(weight|bias)$")


class Update(NamedTuple):
    """An update of a model.

    Attributes:
      label: Name of it, for tables.
      source: Its folder.
      changes: Weight of the base to what becomes of it; weights that an adapter leaves alone are not there.
    """

    label: str
    source: str
    changes: dict[str, Change]


def open_base(folder: str | os.PathLike) -> dict[str, StoredTensor]:
    """Opens the weights of a folder: its floating-point tensors, without buffers, by name.

    Raises:
      FileNotFoundError: The folder or a file of it does not exist.
      ValueError: A file is damaged or pickled, or there are no weights.
    """
    folder = pathlib.Path(folder).expanduser()
    if (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: is an adapter; expected the folder of a model, and adapters after it")
    tensors = {n: t for n, t in open_folder(folder).items() if _is_weight(n, t)}
    if not tensors:
        raise ValueError(f"{folder}: has no floating-point weights")
    return tensors


def _is_weight(name: str, tensor: StoredTensor) -> bool:
    return jnp.issubdtype(tensor.dtype, jnp.floating) and not is_buffer(name) and 0 not in tensor.shape


def open_updates(base: Mapping[str, StoredTensor], sources: list[str]) -> list[Update]:
    """Opens tuned folders and adapters, and matches them with the base.

    Args:
      base: Weights of the base.
      sources: Folders of models, or of PEFT adapters.

    Raises:
      FileNotFoundError: A folder or file does not exist.
      ValueError: A folder is of another architecture, an adapter does not fit the base, or a file is damaged.
    """
    labels = _labels(sources)
    opened = []
    for label, source in zip(labels, sources, strict=True):
        folder = pathlib.Path(source).expanduser()
        is_adapter = (folder / CONFIG).is_file() or (folder / "adapter" / CONFIG).is_file()
        changes = (_adapter_changes if is_adapter else _folder_changes)(base, folder)
        opened.append(Update(label, str(source), changes))
    return opened


def _labels(sources: list[str]) -> list[str]:
    """The shortest ends of the paths that differ."""
    paths = [pathlib.Path(source).expanduser().absolute() for source in sources]
    if twice := [source for source, path in zip(sources, paths, strict=True) if paths.count(path) > 1]:
        raise ValueError(f"expected each update once, got {twice[0]} twice")
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        labels = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def _folder_changes(base: Mapping[str, StoredTensor], folder: pathlib.Path) -> dict[str, Change]:
    tuned = open_base(folder)
    own, theirs = ({_plain(name): name for name in tensors} for tensors in (base, tuned))
    missing = [own[name] for name in sorted(own.keys() - theirs.keys()) if not _is_copy(base, own[name])]
    extra = [theirs[name] for name in sorted(theirs.keys() - own.keys()) if not _is_copy(tuned, theirs[name])]
    both = [name for name in own if name in theirs]
    differ = [name for name in both if base[own[name]].shape != tuned[theirs[name]].shape]
    if missing or extra or differ:
        shapes = [f"{own[n]} {list(base[own[n]].shape)} -> {list(tuned[theirs[n]].shape)}" for n in differ]
        parts = (("missing", missing), ("not in the base", extra), ("of another shape", shapes))
        told = "; ".join(f"{what}: {_some(names)}" for what, names in parts if names)
        raise ValueError(f"{folder}: expected the weights of the base; {told}")
    return {own[name]: StoredChange(base[own[name]], tuned[theirs[name]]) for name in both}


def _plain(name: str) -> str:
    """A name without the prefix that GPT-2 has in some files and not in others."""
    return name.removeprefix("transformer.")


def _is_copy(tensors: Mapping[str, StoredTensor], name: str) -> bool:
    """Whether a tensor equals another of its folder, as the head of a tied model does that is stored too."""
    mine = tensors[name]
    return any(n != name and t.shape == mine.shape and mine.equals(t) for n, t in tensors.items())


def _some(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _adapter_changes(base: Mapping[str, StoredTensor], folder: pathlib.Path) -> dict[str, Change]:
    fields = read_fields(folder)
    try:
        check_fields(fields)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    file = folder / TENSORS
    if not file.exists():
        if (folder / "adapter_model.bin").exists():
            raise ValueError(f"{folder}: adapter_model.bin is pickled, and reading it may run any code; convert it")
        raise FileNotFoundError(f"{folder}: has no {TENSORS}")
    factors: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for name, tensor in tensors_by_name(file).items():
        if match := _FACTOR.search(name):
            factors.setdefault(name[: match.start()], {})[match[1]] = tensor
        elif not _COPY.search(name):
            whole[_SAVED.sub(r".\2", name)] = tensor
    if unknown := sorted(name for name in whole if not name.endswith((".weight", ".bias"))):
        raise ValueError(f"{file}: tensors that are no part of LoRA or DoRA: {_some(unknown)}")
    at = {module: _base_name(base, f"{module}.weight") for module in factors}
    at |= {name: _base_name(base, name) for name in whole}
    if lost := sorted(name for name, found in at.items() if found is None):
        raise ValueError(f"{file}: the base has no weights for {_some(lost)}; it has {_some(sorted(base))}")
    changes: dict[str, Change] = {}
    for name, tensor in whole.items():
        if tensor.shape != base[at[name]].shape:
            raise ValueError(
                f"{file}: {tensor.name}: expected the shape of the base's {at[name]}, "
                f"{list(base[at[name]].shape)}, got {list(tensor.shape)}"
            )
        changes[at[name]] = StoredChange(base[at[name]], tensor)
    for module, own in factors.items():
        changes[at[module]] = _factors_of(file, fields, module, own, base[at[module]])
    return {name: changes[name] for name in base if name in changes}


def _base_name(base: Mapping[str, StoredTensor], name: str) -> str | None:
    """Name in the base of a weight of an adapter: the same, or the one with its end; of a tied head the table."""
    if name in base:
        return name
    found = [other for other in base if name.endswith(f".{other}") or other.endswith(f".{name}")]
    if not found and name == "lm_head.weight":
        found = [other for other in base if other.endswith(("embed_tokens.weight", "wte.weight"))]
    return found[0] if len(found) == 1 else None


def _factors_of(
    file: pathlib.Path, fields: Mapping, module: str, own: Mapping[str, StoredTensor], base: StoredTensor
) -> LowRankChange:
    """The factors of a module in the orientation of the base's weight."""
    table = "lora_embedding_A" in own
    names = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
    if lacks := [name for name in names if name not in own]:
        raise ValueError(f"{file}: {module}: has no {lacks[0]}")
    a, b = (_finite(own[name]) for name in names)
    rank, alpha = rank_and_alpha(fields, module)
    # A convolution's factors are kernels: [r, in, *window] and [out, r, 1, 1].
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    left, right = (a.T, b.T) if table or (fields.get("fan_in_fan_out") and len(base.shape) == 2) else (b, a)
    flat = (base.shape[0], int(np.prod(base.shape[1:])))
    if (left.shape[0], right.shape[1]) != flat or left.shape[1] != right.shape[0] or len(a) != rank:
        raise ValueError(
            f"{file}: {module}: expected factors of rank {rank} for the base's {base.name} {list(base.shape)}, "
            f"got {list(own[names[0]].shape)} and {list(own[names[1]].shape)}"
        )
    scale = alpha / (np.sqrt(rank) if fields.get("use_rslora") else rank)
    magnitude = own.get("lora_magnitude_vector")
    if magnitude is not None:
        magnitude = _finite(magnitude).reshape(-1)
        if len(magnitude) != len(b):
            raise ValueError(f"{file}: {module}: expected {len(b)} norms, got {len(magnitude)}")
    return LowRankChange(base, np.ascontiguousarray(left * np.float32(scale)), right, magnitude, left is not b)


def _finite(tensor: StoredTensor) -> np.ndarray:
    value = np.asarray(tensor.read()).astype(np.float32)
    if not np.isfinite(value).all():
        raise ValueError(f"{tensor.file}: {tensor.name}: expected finite factors, got NaN or infinity")
    return value
