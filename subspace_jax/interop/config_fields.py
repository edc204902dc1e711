"""The fields of ``config.json``: type and range of each are checked before use."""

import contextlib
import os
import pathlib
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from subspace_jax.data.json_object import read_json_object

Fields = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

# Bounds that no model reaches, for what is built before the tensors are compared.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000
MAX_HEAD_DIM = 2**16
MAX_IMAGE = 2**14
_ABSENT = object()


def read_fields(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads the fields of ``config.json`` in the folder of a model.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no JSON object; the folder is the workdir of a run or an adapter; or the weights are in files of
        other names.
    """
    folder = pathlib.Path(folder)
    file = folder / "config.json"
    if folder.is_file():
        raise ValueError(f"{folder}: expected the folder of a Hugging Face or timm checkpoint, got a file")
    if not file.exists():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{folder}: this is a PEFT adapter; expected the folder of the model that it adapts")
        if not (folder / "checkpoints").is_dir():
            expected = "expected the folder of a Hugging Face or timm checkpoint"
            raise FileNotFoundError(f"{file}: no such file; {expected}{_models_in(folder)}")
        raise ValueError(_what_a_run_has(folder))
    fields = read_json_object(file)
    named = fields.keys() & {"model_type", "architecture"}
    if not named and ("task" in fields or (folder / "checkpoints").is_dir()):
        raise ValueError(_what_a_run_has(folder))
    if fields.get("transformers_weights") is not None:
        raise ValueError(
            f"{file}: transformers_weights: files of other names are not supported, got "
            f"{shown(fields['transformers_weights'])}"
        )
    return fields


def _models_in(folder: pathlib.Path) -> str:
    """Returns a hint at the models in a folder that is none itself, or at what it holds instead."""
    if not folder.is_dir():
        return ""
    # As in the cache of Hugging Face's hub.
    inner = (file.parent for pattern in ("*", "snapshots/*") for file in folder.glob(f"{pattern}/config.json"))
    if found := sorted(map(str, [*inner, *folder.glob("*.gguf")]))[:3]:
        return f"; did you mean {' or '.join(found)}?"
    names = sorted(os.listdir(folder))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"; it holds {', '.join(names[:3])}{more}" if names else "; it is empty"


def _what_a_run_has(folder: pathlib.Path) -> str:
    if (folder / "model").is_dir():
        return f"{folder}: this is a run; its model is {folder / 'model'}"
    if (folder / "adapter").is_dir():
        return f"{folder}: this is a run that trained an adapter; expected a model, the adapter is {folder / 'adapter'}"
    return f"{folder}: this is a run without a folder of its model; expected that of a Hugging Face or timm checkpoint"


@contextlib.contextmanager
def naming(file: str | os.PathLike) -> Iterator[None]:
    """Prefixes the message of a ``ValueError`` with the name of a file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def shown(value: Any) -> str:
    """Returns the beginning of the representation of a value."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


def integer(fields: Fields, name: str, default: Any = _ABSENT, *, least: int = 1, most: int = MAX_SIZE) -> Any:
    """Returns an integer field in ``[least, most]``; ``default``, unchecked, where it is absent."""
    return checked_integer(name, fields.get(name), least, most) if default is _ABSENT or name in fields else default


def checked_integer(name: str, value: Any, least: int = 1, most: int = MAX_SIZE) -> int:
    """Returns the value; raises ``ValueError`` unless it is an integer in ``[least, most]``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = {0: "an integer of at least 0", 1: "a positive integer"}[least]
        raise ValueError(f"{name}: expected {kind}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name}: expected at most {most}, got {shown(value)}")
    return value


def integers(fields: Fields, name: str, default: tuple[int, ...], *, most: int = MAX_SIZE) -> tuple[int, ...]:
    """Returns a field with a list of positive integers, one for each stage of a network."""
    values = fields.get(name, default)
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= 32:
        raise ValueError(f"{name}: expected a list of positive integers, one for each stage, got {shown(values)}")
    return tuple(checked_integer(name, value, most=most) for value in values)


def pair(fields: Fields, name: str, default: Any, *, most: int = MAX_IMAGE) -> tuple[int, int]:
    """Returns a field with height and width, or one number for both."""
    value = fields.get(name, default)
    sides = value if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{name}: expected one number or two, got {shown(value)}")
    height, width = (checked_integer(name, side, most=most) for side in sides)
    return height, width


def square(fields: Fields, name: str, default: Any) -> int:
    """Returns a field with the side of a square, or two equal numbers."""
    height, width = pair(fields, name, default)
    if height != width:
        raise ValueError(f"{name}: expected a square, got {shown(fields[name])}")
    return height


def number(fields: Fields, name: str, default: Any = _ABSENT, *, least: float = 1e-6, most: float = 3e38) -> float:
    """Returns a number in ``[least, most]``, finite in float32 by default; ``default`` where it is absent."""
    value = fields.get(name) if default is _ABSENT else fields.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name}: expected a number in [{least}, {most}], got {shown(value)}")
    return float(value)


def flag(fields: Fields, name: str, default: bool) -> bool:
    """Returns a boolean field; null counts as absent where the default is false."""
    value = fields.get(name, default)
    if value is None and not default:
        return False
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected true or false, got {shown(value)}")
    return value


def word(fields: Fields, name: str, default: str | None, known: Collection[str]) -> str:
    """Returns a field that has one of the known values."""
    value = fields.get(name, default)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: {shown(value)} is not supported; expected one of {sorted(known)}")
    return value


def group(fields: Fields, name: str) -> dict[str, Any]:
    """Returns a field that is an object; empty where it is absent or null."""
    value = fields.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected an object, got {shown(value)}")
    return dict(value or {})


def num_labels(fields: Fields) -> int:
    """Returns the number of classes of a Hugging Face model: of ``id2label``, else ``num_labels``, else 2."""
    if fields.get("id2label") is not None:
        return len(group(fields, "id2label"))
    return integer(fields, "num_labels", 2, least=0)


def label_fields(count: int) -> dict[str, Any]:
    """Returns the fields of a Hugging Face config that name classes by their numbers."""
    names = {str(i): f"LABEL_{i}" for i in range(count)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}} if count else {}


def timm_image_size(fields: Fields) -> tuple[int, int] | None:
    """Returns height and width of the images in a ``config.json`` of timm, or None."""
    arguments, pretrained = group(fields, "model_args"), group(fields, "pretrained_cfg")
    if arguments.get("img_size") is not None:
        return pair(arguments, "img_size", None)
    size = pretrained.get("input_size")
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 3:
        raise ValueError(f"input_size: expected channels, height and width, got {shown(size)}")
    return pair({"input_size": size[1:]}, "input_size", None)


def check_timm_sizes(fields: Fields, mlp: tuple[int, int] | None = None, **found: Any) -> None:
    """Raises ValueError where sizes in a ``config.json`` of timm differ from those of the tensors.

    Args:
      fields: The fields.
      mlp: Width of the MLPs and of the model, for ``mlp_ratio``.
      **found: Sizes of the tensors, by the names of timm.
    """
    given = group(fields, "model_args")
    named = [(name, given[name]) for name in found if name in given]
    for name, value in [*named, ("num_classes", fields.get("num_classes", found["num_classes"]))]:
        expected = found[name]
        same = value == expected or value == list(expected if isinstance(expected, tuple) else [expected] * 2)
        if not same or isinstance(value, bool) != isinstance(expected, bool):
            raise ValueError(f"{name}: expected {expected}, which the tensors have, got {shown(value)}")
    if mlp is not None and abs(number(given, "mlp_ratio", mlp[0] / mlp[1]) * mlp[1] - mlp[0]) >= 1:
        raise ValueError(f"mlp_ratio: expected {mlp[0]} / {mlp[1]}, which the tensors have, got {given['mlp_ratio']}")


def dims(shapes: Shapes, name: str, count: int) -> tuple[int, ...]:
    """Returns the shape of a tensor; raises ValueError unless it has ``count`` axes, none of them empty."""
    shape = shapes[name]
    if len(shape) != count or 0 in shape:
        raise ValueError(f"{name}: expected a tensor with {count} axes, none of them empty, got {tuple(shape)}")
    return shape
