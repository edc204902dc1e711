"""The configs of image preprocessing: Hugging Face's image processors, and timm's ``pretrained_cfg``."""

import difflib
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from subspace_jax.data.json_object import read_json_object

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_METHODS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def _defaults(size: Any, resample: int, crop: int | None, numbers: tuple, square: bool) -> dict[str, Any]:
    return {
        "do_resize": True,
        "size": size,
        "default_to_square": square,
        "resample": resample,
        "do_center_crop": crop is not None,
        "crop_size": crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": numbers[0],
        "image_std": numbers[1],
    }


# With ``default_to_square`` a bare integer as size means both sides, else the shorter one.
_PROCESSORS = {
    "CLIP": _defaults({"shortest_edge": 224}, 3, 224, _CLIP, False),
    "Bit": _defaults({"shortest_edge": 224}, 3, 224, _CLIP, False),
    "Siglip": _defaults({"height": 224, "width": 224}, 3, None, _HALF, False),
    "ViT": _defaults({"height": 224, "width": 224}, 2, None, _HALF, True),
    "DeiT": _defaults({"height": 256, "width": 256}, 3, 224, _HALF, True),
    "ConvNext": {**_defaults({"shortest_edge": 384}, 3, None, _HALF, False), "crop_pct": 224 / 256},
}
# Processors of models whose files name none, as in transformers.
_OF_MODELS = {
    "clip": "CLIP",
    "clip_vision_model": "CLIP",
    "convnext": "ConvNext",
    "deit": "DeiT",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
    "resnet": "ConvNext",
    "siglip": "Siglip",
    "siglip_vision_model": "Siglip",
    "swin": "ViT",
    "vit": "ViT",
}


def find_processor(path: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """Finds the config of the image processor in a folder, or reads a file.

    Returns:
      The file and its fields; the order of files is that of transformers, see :meth:`ImageProcessor.from_json`.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It holds no JSON object.
    """
    if not path.is_dir():
        return path, read_json_object(path)
    nested, config, old = (path / f"{name}.json" for name in ("processor_config", "config", "preprocessor_config"))
    if nested.exists() and (fields := read_json_object(nested)).get("image_processor") is not None:
        return nested, fields
    model = read_json_object(config) if config.exists() else {}
    if "pretrained_cfg" in model:
        return config, model
    if not old.exists():
        raise FileNotFoundError(
            f"{old}: no such file, and neither {nested.name} nor a pretrained_cfg of timm in {config.name} says how "
            "images are preprocessed"
        )
    fields = read_json_object(old)
    if not any(fields.get(name) for name in ("image_processor_type", "feature_extractor_type")):
        kind = _OF_MODELS.get(str(model.get("model_type")))
        fields["image_processor_type"] = model.get("image_processor_type") or (kind and f"{kind}ImageProcessor")
    return old, fields


def processor_arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of :class:`subspace_jax.data.ImageProcessor` for a Hugging Face or timm config.

    Raises:
      ValueError: The processor or one of its steps is not supported, a field is misspelt, or a value is invalid.
    """
    if (nested := fields.get("image_processor")) is not None:
        return _of_hugging_face(_mapping("image_processor", nested))
    if "pretrained_cfg" in fields or "input_size" in fields:
        return _of_timm(_mapping("pretrained_cfg", fields.get("pretrained_cfg") or fields))
    return _of_hugging_face(fields)


def _of_hugging_face(fields: Mapping[str, Any]) -> dict[str, Any]:
    kind = fields.get("image_processor_type") or fields.get("feature_extractor_type")
    named = re.fullmatch(r"([A-Za-z]+?)(FeatureExtractor|ImageProcessor(Fast|Pil)?)", str(kind))
    if named is None or named[1] not in _PROCESSORS:
        raise ValueError(f"image_processor_type: {kind!r} is not supported; expected one of {sorted(_PROCESSORS)}")
    own = {**_PROCESSORS[named[1]], **fields}
    _refuse_unknown(own, _PROCESSORS[named[1]])
    for name in ("do_resize", "default_to_square", "do_center_crop", "do_rescale", "do_normalize"):
        if not isinstance(own[name], bool | None):  # transformers writes null for a disabled step
            raise ValueError(f"{name}: expected true or false, got {own[name]!r}")
    size = crop = None
    if own["do_center_crop"]:
        crop = _sides("crop_size", own["crop_size"], square=True)
        if not isinstance(crop, tuple):
            raise ValueError(f"crop_size: expected height and width, got {own['crop_size']!r}")
    if own["do_resize"]:
        size = _sides("size", own["size"], square=own["default_to_square"])
        if named[1] == "ConvNext":
            size, crop = _of_convnext(size, crop, _number("crop_pct", own["crop_pct"], above=0.01))
        if type(own["resample"]) is not int or own["resample"] not in _METHODS:
            raise ValueError(f"resample: expected one of {_METHODS}, got {own['resample']!r}")
    normal = own["do_normalize"]
    return {
        "size": size,
        "method": _METHODS[own["resample"]] if size else "nearest",
        "crop": crop,
        "scale": _number("rescale_factor", own["rescale_factor"], above=0) if own["do_rescale"] else 1.0,
        "mean": _channels("image_mean", own["image_mean"]) if normal else (0.0, 0.0, 0.0),
        "std": _channels("image_std", own["image_std"], above=0) if normal else (1.0, 1.0, 1.0),
    }


def _refuse_unknown(fields: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuses misspelt fields and unknown steps; other fields are ignored, as in transformers."""
    for name, value in fields.items():
        if name in known or name == "do_convert_rgb" or value in (None, False):
            continue
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise ValueError(f"{name}: {value!r} is not supported; did you mean {near[0]!r}?")
        if name.startswith(("do_", "use_")):
            raise ValueError(f"{name}: {value!r} is not supported, and may change the pixels")


def _of_convnext(size: Any, crop: tuple[int, int] | None, crop_pct: float) -> tuple[Any, tuple[int, int] | None]:
    """Sizes below 384 are cropped from a larger image, as in transformers."""
    if not isinstance(size, int):
        raise ValueError(f"size: expected the shortest_edge for a ConvNext processor, got {size}")
    if size >= 384:
        return (size, size), crop
    if crop not in (None, (size, size)):
        raise ValueError(f"crop_size: a crop after that of {size} x {size} is not supported, got {crop}")
    return int(size / crop_pct), (size, size)


def _of_timm(fields: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": _IMAGENET[0],
        "std": _IMAGENET[1],
    }
    own |= {name: value for name, value in fields.items() if value is not None}
    if "input_size" not in own:
        raise ValueError("input_size: missing from timm's pretrained_cfg")
    shape = own["input_size"]
    if not isinstance(shape, (list, tuple)) or len(shape) != 3 or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError(f"input_size: expected channels, height and width, got {shape!r}")
    if shape[0] != 3:
        raise ValueError(f"input_size: expected 3 channels, got {shape}")
    if own["interpolation"] not in _METHODS.values():
        raise ValueError(f"interpolation: expected one of {list(_METHODS.values())}, got {own['interpolation']!r}")
    height, width = shape[1:]
    crop_pct = _number("crop_pct", own["crop_pct"], above=0.01)
    scaled = math.floor(height / crop_pct), math.floor(width / crop_pct)
    if own["crop_mode"] == "squash":
        size: tuple[int, int] | int = scaled
    elif own["crop_mode"] == "center" and height == width:
        size = scaled[0]
    else:
        raise ValueError(f"crop_mode: {own['crop_mode']!r} is not supported for images of {height} x {width}")
    return {
        "size": size,
        "method": own["interpolation"],
        "crop": (height, width),
        "crop_rounding": "even",
        "mean": _channels("mean", _repeated(own["mean"])),
        "std": _channels("std", _repeated(own["std"]), above=0),
    }


def _repeated(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected an object, got {value!r}")
    return value


def _number(name: str, value: Any, above: float = -math.inf) -> float:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not (above < value and abs(value) < 3e38):  # the largest float32
        what = "a finite number" if above == -math.inf else f"a finite number above {above}"
        raise ValueError(f"{name}: expected {what}, got {value!r}")
    return float(value)


def _channels(name: str, value: Any, above: float = -math.inf) -> tuple[float, ...]:
    values = value if isinstance(value, (list, tuple)) else [value] * 3
    if len(values) != 3:
        raise ValueError(f"{name}: expected a number for each of 3 channels, got {value!r}")
    return tuple(_number(name, x, above) for x in values)


def _sides(name: str, value: Any, square: bool) -> tuple[int, int] | int:
    """Returns height and width, or the length of the shorter side."""
    if isinstance(value, Mapping):
        sides = {key: side for key, side in value.items() if side is not None}
        if set(sides) not in ({"height", "width"}, {"shortest_edge"}):
            raise ValueError(f"{name}: expected height and width, or shortest_edge alone; got {dict(value)}")
        values = [sides[key] for key in ("height", "width", "shortest_edge") if key in sides]
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        values = list(value)
    else:
        values = [value, value] if square else [value]
    if any(type(side) is not int or side < 1 for side in values):
        raise ValueError(f"{name}: expected whole numbers of pixels, at least 1, got {value!r}")
    return tuple(values) if len(values) == 2 else values[0]
