"""What `subspace-jax cluster` reads: a file of features, a folder of images, or a set of TensorFlow Datasets."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PIXELS = 32  # side of images that are compared without a model
_TFDS = "tfds:"


class Found(NamedTuple):
    """Features, and what is known of their items.

    Attributes:
      x: ``[n, features]`` float32.
      labels: True labels ``[n]``, or None.
      names: Names of images in files, or none.
      image: The pixels of an item by its number, or None.
      images: ``[n, height, width, channels]`` float32 for methods that take them, or None.
    """

    x: Any
    labels: Any = None
    names: tuple[str, ...] = ()
    image: Callable[[int], Any] | None = None
    images: Any = None


class Items(NamedTuple):
    """Items to cluster, whose features are not read yet.

    Attributes:
      count: How many.
      width: Of the features; None before a model has made them.
      read: Returns what is found.
    """

    count: int
    width: int | None
    read: Callable[[], Found]


def add_input(parser: argparse.ArgumentParser) -> None:
    """Adds what there is to cluster."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", metavar="FILE|tfds:NAME", help="features of items, .npy or .npz, or a set of images")
    what.add_argument("--images", metavar="DIR", help="images, at any depth; folders in it are true labels, for scores")
    parser.add_argument(
        "--backbone",
        metavar="DIR|NAME",
        help=f"of images: a model's folder, or dinov2-small (default: {PIXELS}^2 pixels)",
    )
    parser.add_argument("--split", metavar="NAME", help="of tfds:NAME, such as train[:1000] (default: train)")


def open_items(args: argparse.Namespace) -> Items:
    """Opens what there is to cluster.

    Raises:
      FileNotFoundError: There is no such file, folder, prepared set or model.
      ValueError: It holds no features or images, or an argument is for another input.
    """
    from subspace_jax import data

    name = args.input or ""
    if args.split is not None and not name.startswith(_TFDS):
        raise ValueError("--split: is for --input tfds:NAME")
    if args.images is None and not name.startswith(_TFDS):
        if args.backbone is not None:
            raise ValueError("--backbone: is for images, by --images DIR or --input tfds:NAME")
        source = data.open_vectors("input", name)
        return Items(*source.shape, lambda: Found(source.read()))
    model = None if args.backbone is None else _model_folder(args.backbone)
    if args.images is None:
        images, names, labelled = data.image_set(name.removeprefix(_TFDS), args.split or "train"), (), True
    else:
        images, names, labelled = _folder(Path(args.images).expanduser())
    return Items(len(images), None, lambda: _features(images, names, labelled, model))


def _model_folder(name: str) -> str:
    import os

    from subspace_jax import interop
    from subspace_jax.cli import shared

    package = interop.PACKAGES.get(name)
    folder = package.folder if package and not os.path.isdir(name) else name
    shared.check_model_folder(folder, "--backbone")
    return folder


def _folder(folder: Path):
    """Images of a folder, their names, and whether each lies in one of two or more folders, which are labels then."""
    from subspace_jax import data

    files = data.image_files(folder)
    parts = [path.relative_to(folder).parts for path in files]
    classes = sorted({own[0] for own in parts})
    labelled = len(classes) > 1 and all(len(own) > 1 for own in parts)

    def read(i: int):
        return data.decode_image(files[i]), classes.index(parts[i][0]) if labelled else 0

    images = data.Images(str(folder), len(files), read, lambda i: str(files[i]), classes, "skip")
    names = [path.relative_to(folder).as_posix() for path in files if str(path) not in images.unreadable]
    return images, tuple(names), labelled


def _features(images, names, labelled: bool, model: str | None) -> Found:
    import numpy as np

    from subspace_jax import represent

    if images.unreadable:
        some = ", ".join(list(images.unreadable)[:5]) + " ..." * (len(images.unreadable) > 5)
        count = f"{len(images.unreadable)} file{'s' * (len(images.unreadable) > 1)}"
        print(f"Skipped {count} that can't be read: {some}", flush=True)
    if model is None:
        x, labels = _pixels(images)
    else:
        opened = represent.open_feature_model(model, resample=True)
        found = represent.features_of_images(opened, images, batch_size=16, progress=True)
        x, labels = found.features, found.labels
    # One class alone tells nothing.
    known = labels if labelled and len(np.unique(labels)) > 1 else None
    return Found(x, known, names, lambda i: images[i]["inputs"])


def _pixels(images):
    import numpy as np
    from tqdm.auto import tqdm

    from subspace_jax import data

    x = np.empty((len(images), PIXELS * PIXELS * 3), np.float32)
    labels = np.empty(len(images), np.int32)
    for i in tqdm(range(len(images)), desc="pixels", unit="image", disable=None, delay=2):
        example = images[i]
        x[i] = data.resize(example["inputs"], (PIXELS, PIXELS), "bilinear").reshape(-1) / np.float32(255)
        labels[i] = example["labels"]
    return x, labels
