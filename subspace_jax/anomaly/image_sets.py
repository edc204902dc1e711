"""Folders of normal and test images, with labels and masks where there are some: the layouts of MVTec-AD and VisA."""

import csv
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from subspace_jax.data import image_files

_NORMAL = frozenset({"good", "normal", "ok"})
_SPLIT = pathlib.Path("split_csv") / "1cls.csv"


class TestImage(NamedTuple):
    """An image to score.

    Attributes:
      path: Its file.
      name: Its path in the folder of test images.
      label: 1 where it is known to be anomalous, 0 where it is known to be normal, None where neither.
      mask: File of the mask of an anomalous one, or None.
    """

    path: pathlib.Path
    name: str
    label: int | None
    mask: pathlib.Path | None


class Category(NamedTuple):
    """Images of one kind of object.

    Attributes:
      name: Its name.
      normal: Files of normal images, to fit to.
      test: Images to score.
    """

    name: str
    normal: list[pathlib.Path]
    test: list[TestImage]


def open_category(
    normal: str | os.PathLike, test: str | os.PathLike, masks: str | os.PathLike | None = None, name: str = ""
) -> Category:
    """Opens folders of normal and of test images.

    Folders in ``test`` named good, normal or ok hold normal images, and other folders then anomalous ones; of images
    beside these folders nothing is known unless they have a mask.  A mask lies in the same place below ``masks`` as its
    image below ``test``, and is named as it is, or with ``_mask`` after it; without labels by folders an image with a
    mask is anomalous and one without is normal.

    Args:
      normal: Folder of normal images.
      test: Folder of images to score.
      masks: Folder of masks; ``ground_truth`` beside a ``test`` of that name where there is one.
      name: Name of the category; that of the folder above ``test`` in the layout of MVTec-AD, or of ``test``.

    Returns:
      The images, in the order of their paths.

    Raises:
      FileNotFoundError: A folder does not exist.
      ValueError: A folder has no images, or a mask no image.
    """
    folder = pathlib.Path(test).expanduser()
    files, fitted = image_files(folder), image_files(normal)
    beside = folder.parent / "ground_truth"
    if masks is None and folder.name == "test" and beside.is_dir():
        masks = beside
    found = {} if masks is None else _masks_of(files, folder, pathlib.Path(masks).expanduser())
    by_folder = any(_kind(path, folder) in _NORMAL for path in files)
    images = []
    for path in files:
        label = None
        if by_folder:
            label = int(_kind(path, folder) not in _NORMAL) if path.parent != folder or path in found else None
        elif masks is not None:
            label = int(path in found)
        images.append(TestImage(path, path.relative_to(folder).as_posix(), label, found.get(path)))
    mvtec = folder.name == "test" and folder.absolute().parent.name
    return Category(name or mvtec or folder.absolute().name, fitted, images)


def open_categories(root: str | os.PathLike, names: Sequence[str] = ()) -> list[Category]:
    """Opens all categories of a data set in the layout of MVTec-AD or VisA, or one category of MVTec-AD.

    MVTec-AD: ``CATEGORY/train/good``, ``CATEGORY/test/KIND``, ``CATEGORY/ground_truth/KIND``.  VisA:
    ``CATEGORY/Data/Images/Normal`` and so on, with the split of ``split_csv/1cls.csv``.

    Args:
      root: The folder.
      names: Names of categories; all by default.

    Returns:
      The categories in the order of their names.

    Raises:
      FileNotFoundError: There is no such folder, or it lacks a file that the split names.
      ValueError: It has neither layout, or lacks a category.
    """
    root = pathlib.Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"data: there is no folder {root}")
    if (root / _SPLIT).is_file():
        found = _visa(root)
    elif (root / "train" / "good").is_dir():
        found = {root.absolute().name: root}
    else:
        found = {path.name: path for path in sorted(root.iterdir()) if (path / "train" / "good").is_dir()}
    if not found:
        raise ValueError(f"data: {root}: expected CATEGORY/train/good (MVTec-AD) or {_SPLIT} (VisA), found neither")
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"categories: expected some of {', '.join(found)} of {root}, got {missing[0]!r}")
    chosen = {name: found[name] for name in names or found}
    return [
        value if isinstance(value, Category) else open_category(value / "train" / "good", value / "test", name=name)
        for name, value in chosen.items()
    ]


def _kind(path: pathlib.Path, folder: pathlib.Path) -> str:
    """Name of the first folder below ``folder`` that a file lies in; empty where there is none."""
    parts = path.relative_to(folder).parts
    return parts[0].lower() if len(parts) > 1 else ""


def _masks_of(
    files: Sequence[pathlib.Path], folder: pathlib.Path, masks: pathlib.Path
) -> dict[pathlib.Path, pathlib.Path]:
    images: dict[str, pathlib.Path] = {}
    for path in files:
        images[path.relative_to(folder).with_suffix("").as_posix()] = path
    found = {}
    for mask in image_files(masks):
        own = mask.relative_to(masks).with_suffix("").as_posix()
        image = images.get(own) or images.get(own.removesuffix("_mask"))
        if image is None:
            raise ValueError(f"masks: {mask}: there is no image {own.removesuffix('_mask')} in {folder}")
        found[image] = mask
    return found


def _visa(root: pathlib.Path) -> dict[str, Category]:
    found: dict[str, Category] = {}
    fields = ("object", "split", "label", "image", "mask")
    with (root / _SPLIT).open(newline="") as file:
        rows = csv.DictReader(file)
        if missing := set(fields) - set(rows.fieldnames or ()):
            raise ValueError(
                f"data: {root / _SPLIT}: expected the columns {', '.join(fields)}; lacks {sorted(missing)}"
            )
        for number, row in enumerate(rows, 2):
            path = root / row["image"]
            mask = root / row["mask"] if row["mask"] else None
            for needed in (path, mask):
                if needed is not None and not needed.is_file():
                    raise FileNotFoundError(f"data: {root / _SPLIT}, line {number}: there is no {needed}")
            own = found.setdefault(row["object"], Category(row["object"], [], []))
            if row["split"] == "train":
                own.normal.append(path)
            else:
                label = int(row["label"].lower() not in _NORMAL)
                own.test.append(TestImage(path, f"{path.parent.name}/{path.name}", label, mask))
    return dict(sorted(found.items()))
