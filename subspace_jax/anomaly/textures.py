"""Photographs of textures with pasted defects: data to try anomaly detection on, from scikit-image."""

import os
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

TEXTURES = ("brick", "grass", "gravel")


class TextureSet(NamedTuple):
    """Crops of a texture.

    Attributes:
      normal: uint8 ``[crops, side, side, 3]`` of the upper half of the photograph.
      test: ``[crops, side, side, 3]`` of the lower half, the first half of them without a defect.
      masks: ``[crops, side, side]`` bool.
      labels: ``[crops]``, 1 for those with a defect.
    """

    normal: np.ndarray
    test: np.ndarray
    masks: np.ndarray
    labels: np.ndarray


def load_texture(name: str) -> np.ndarray:
    """Returns a photograph of scikit-image, uint8 ``[512, 512]``: "brick", "grass" or "gravel".

    Raises:
      ValueError: The name is unknown.
      ImportError: scikit-image is not installed; the message has the command.
    """
    if name not in TEXTURES:
        raise ValueError(f"name: expected one of {TEXTURES}, got {name!r}")
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError("scikit-image is not installed: pip install 'subspace-jax[real]'") from error
    return np.asarray(getattr(data, name)())


def texture_set(
    name: str,
    defect: str = "noise",
    *,
    num_normal: int = 8,
    num_test: int = 32,
    side: int = 224,
    radius: int = 12,
    seed: int = 0,
) -> TextureSet:
    """Draws crops of a texture, half of the test crops with a disc of something else.

    Args:
      name: "brick", "grass" or "gravel".
      defect: "noise" (uniform) or the name of another texture.
      num_normal: Normal crops.
      num_test: Test crops, an even number.
      side: Side of a crop in pixels, at most 256.
      radius: Of a disc, in pixels.
      seed: Seed of positions and noise.

    Returns:
      The crops.

    Raises:
      ValueError: A name is unknown, or a size out of range.
    """
    if not 2 * radius + 2 < side <= 256 or num_normal < 1 or num_test < 2:
        raise ValueError(f"side: expected more than a disc of radius {radius} and at most 256 pixels, got {side}")
    photo = load_texture(name)
    other = None if defect == "noise" else load_texture(defect)
    rng = np.random.default_rng(seed)

    def crop(of: np.ndarray, top: int, bottom: int) -> np.ndarray:
        y, x = rng.integers(top, bottom - side + 1), rng.integers(0, of.shape[1] - side + 1)
        return of[y : y + side, x : x + side]

    half = photo.shape[0] // 2
    normal = np.stack([crop(photo, 0, half) for _ in range(num_normal)])
    test = np.stack([crop(photo, half, photo.shape[0]) for _ in range(num_test)])
    labels = (np.arange(num_test) >= num_test // 2).astype(np.int32)
    rows, columns = np.mgrid[:side, :side]
    masks = np.zeros(test.shape, bool)
    for i in np.flatnonzero(labels):
        y, x = rng.integers(radius + 1, side - radius - 1, 2)
        masks[i] = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        filling = rng.integers(0, 256, (side, side)) if other is None else crop(other, 0, other.shape[0])
        test[i] = np.where(masks[i], filling, test[i])
    rgb = [np.repeat(x[..., None], 3, axis=-1).astype(np.uint8) for x in (normal, test)]
    return TextureSet(*rgb, masks, labels)


def write_textures(folder: str | os.PathLike, *, num_normal: int = 8, num_test: int = 16, seed: int = 0) -> None:
    """Writes a data set in the layout of MVTec-AD: three textures, each with discs of noise and of another one.

    Args:
      folder: Where to; a folder for each texture.
      num_normal: Normal images of each to fit to.
      num_test: Test images of each texture and kind of defect, half of them without one.
      seed: Seed of positions and noise.

    Raises:
      ImportError: scikit-image is not installed; the message has the command.
    """
    folder = pathlib.Path(folder).expanduser()
    for i, name in enumerate(TEXTURES):
        for defect in ("noise", TEXTURES[i - 1]):
            drawn = texture_set(name, defect, num_normal=num_normal, num_test=num_test, seed=seed)
            kind = "noise" if defect == "noise" else "other_texture"
            good = 0 if defect == "noise" else num_test
            for number, image in enumerate(drawn.normal if defect == "noise" else ()):
                _write(folder / name / "train" / "good" / f"{number:03d}.png", image)
            for number, (image, mask, label) in enumerate(zip(drawn.test, drawn.masks, drawn.labels, strict=True)):
                own = f"{good + number:03d}.png"
                _write(folder / name / "test" / (kind if label else "good") / own, image)
                if label:
                    truth = folder / name / "ground_truth" / kind / f"{good + number:03d}_mask.png"
                    _write(truth, 255 * mask.astype(np.uint8))


def _write(path: pathlib.Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
