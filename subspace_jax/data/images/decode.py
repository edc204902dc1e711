"""Decoding of image files, their bytes and Pillow images to 8-bit RGB."""

import io
import os
import struct

import numpy as np
from PIL import ExifTags, Image

__all__ = ["check_pixels", "decode_image"]

# Raster formats with a signature; decoders of those without (TGA, PCD) accept damaged files of other formats.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF", "ICO")
# Pillow's own, for those who set `Image.MAX_IMAGE_PIXELS` to None.
_MOST_PIXELS = 89478485
_PLAIN_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
# For PNG with 2 or 4 bits per pixel, Pillow scales the pixels to 8 bits but not the transparent value.
_SPREAD = {"L;2": 85, "L;4": 17}
_UPRIGHT = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}


class _UnsupportedError(ValueError):
    """An undamaged image whose pixels have no well-defined 8-bit RGB values."""


def decode_image(source: bytes | str | os.PathLike | Image.Image) -> np.ndarray:
    """Decodes an image.

    Gray is repeated, and 16-bit gray is scaled to 8 bits; transparency is blended with white, transparent colors of
    palettes, gray and RGB included; the EXIF orientation is applied, as in transformers' ``load_image``; the first
    frame or page is decoded (the current one of a Pillow image).

    Args:
      source: The file, its bytes, or a Pillow image.  Files are of one of :data:`FORMATS`.

    Returns:
      uint8 ``[height, width, 3]``.

    Raises:
      OSError: There is no such file, or it is no image, damaged or truncated.
      ValueError: It has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, or pixels of unknown range: floating point,
        32-bit or signed integers, or 16-bit RGB with a transparent color.
      TypeError: ``source`` is none of these.
    """
    if isinstance(source, Image.Image):
        return _named(getattr(source, "filename", "") or "image", _to_rgb, source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _named("image", _from_file, io.BytesIO(source))
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source: expected a path, bytes or a Pillow image, got {type(source).__name__}")
    with open(source, "rb") as file:
        return _named(os.fspath(source), _from_file, file)


def check_pixels(height: int, width: int, what: str = "image") -> None:
    """Checks the number of pixels of an image.

    Raises:
      ValueError: It is 0, or above ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    most = Image.MAX_IMAGE_PIXELS or _MOST_PIXELS
    if not 0 < height * width <= most:
        raise _UnsupportedError(
            f"{what}: {width} x {height} pixels; expected at least one, and at most {most} (PIL.Image.MAX_IMAGE_PIXELS)"
        )


def _named(name: str, decode, source) -> np.ndarray:
    """Brings what Pillow raises, which of damaged files is a dozen kinds, to two, and names the file in it."""
    try:
        return decode(source)
    except _UnsupportedError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's: no such file, a failing disk
            raise
        why = " ".join(str(error).split())
        raise OSError(f"{name}: can't be read as an image: {type(error).__name__}: {why}") from error


def _from_file(file: io.BufferedIOBase) -> np.ndarray:
    with _open(file) as image:
        return _to_rgb(image)


def _open(file: io.BufferedIOBase) -> Image.Image:
    """Opens like ``Image.open``, which warns about large images, or raises before it returns the size."""
    Image.init()
    start, reasons = file.read(16), []
    for name in FORMATS:
        opener, accept = Image.OPEN.get(name, (None, lambda start: False))
        accepted = accept(start)
        if isinstance(accepted, str):  # what Pillow was built without
            reasons.append(accepted)
        elif accepted:
            file.seek(0)
            try:
                return opener(file, "")
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                reasons.append(f"{name}: {error}")
    raise Image.UnidentifiedImageError("; ".join(reasons) or f"expected one of {', '.join(FORMATS)}")


def _to_rgb(image: Image.Image) -> np.ndarray:
    check_pixels(image.height, image.width)
    # Known until the pixels are loaded.
    tiles = getattr(image, "tile", ())
    stored = tiles[0][3] if tiles else None
    image.load()
    # Pillow opens 16-bit PNM files, and did PNG files, in a mode of 32 bits, and spreads them over 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        pixels = _from_16_bits(image)
    else:
        pixels = _from_8_bits(image, stored)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation in range(2, 9) else pixels


def _from_16_bits(image: Image.Image) -> np.ndarray:
    """Pillow's own conversion clips at 255."""
    wide = np.asarray(image).astype(np.uint32)
    tags = image.tag_v2 if image.format == "TIFF" else {}
    largest = 4095 if tags.get(258) == (12,) else 65535  # bits per sample
    gray = (wide * 255 + largest // 2) // largest
    if tags.get(262) == 0:  # white is zero
        gray = 255 - gray
    transparent = image.info.get("transparency")
    gray = np.where(wide == transparent, 255, gray) if transparent is not None else gray
    return np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)


def _from_8_bits(image: Image.Image, stored: str | None) -> np.ndarray:
    if image.mode in ("La", "RGBa"):  # alpha is multiplied in
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        transparent = image.info.get("transparency")
        if transparent is not None and str(stored).startswith("RGB;16"):
            raise _UnsupportedError(
                "16-bit RGB with a transparent color is not supported: Pillow keeps 8 bits to tell it"
            )
        if isinstance(transparent, int) and stored in _SPREAD:
            image = image.copy()
            image.info["transparency"] = transparent * _SPREAD[stored]
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    elif image.mode not in _PLAIN_MODES:
        kinds = {"F": "floating-point", "I": "32-bit or signed integer"}
        raise _UnsupportedError(
            f"{kinds.get(image.mode, 'such')} pixels (Pillow mode {image.mode!r}) have no known range; convert them to "
            "8 or 16 bits first"
        )
    return np.array(image.convert("RGB"))
