"""The TFDS set ``digits``, made from the 1797 handwritten digits that come with scikit-learn.

It is prepared offline and without TensorFlow.  Three things make that possible: the files are array_record, images
are handed to TFDS as Pillow images (arrays would be encoded by TensorFlow), and the builder has no code path (TFDS
would look there for checksums of downloads, by way of a package that it does not install).
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

__all__ = ["Digits", "prepare_digits"]

NUM_TRAIN = 1200


class Digits(tfds.core.GeneratorBasedBuilder):
    """1797 images of handwritten digits, 8x8 pixels from 0 to 16, in ten classes.

    The 1797 examples are put in the order ``np.random.RandomState(0).permutation(1797)`` (the legacy generator, whose
    numbers NumPy has frozen); the split ``train`` is the first 1200 of them and ``test`` the other 597, each stored
    in that order.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998, as bundled with scikit-learn.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="8x8 images of handwritten digits, pixels 0 to 16, from scikit-learn; 1200 train, 597 test.",
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8, encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        order = np.random.RandomState(0).permutation(1797)
        return {
            "train": self._generate_examples(order[:NUM_TRAIN]),
            "test": self._generate_examples(order[NUM_TRAIN:]),
        }

    def _generate_examples(self, rows: np.ndarray) -> Iterator[tuple[int, dict[str, object]]]:
        digits = load_digits()
        images = digits.images.astype(np.uint8)
        for key, row in enumerate(rows):
            yield key, {"image": Image.fromarray(images[row]), "label": int(digits.target[row])}


def prepare_digits(data_dir: str | Path) -> Path:
    """Writes the set ``digits`` below a folder, unless it is there already; takes about a second.

    The files appear all at once, by a rename, so that several processes may prepare into one folder at a time.

    Args:
      data_dir: The folder of all TFDS sets; made when it is not there.

    Returns:
      The folder of the set.

    Raises:
      OSError: ``data_dir`` can't be written.
      ValueError: ``data_dir`` is a URL.
    """
    if "://" in str(data_dir):
        raise ValueError(f"data_dir: the set digits needs a folder of this machine, got {data_dir}")
    data_dir = Path(data_dir)
    there = data_dir / Digits.name / str(Digits.VERSION)
    if there.exists():
        return there
    try:
        there.parent.mkdir(parents=True, exist_ok=True)
        # A folder of our own rather than the one that TFDS would pick: its name comes from Python's global generator,
        # so that two processes with equal seeds would write into the same one.
        with tempfile.TemporaryDirectory(prefix="incomplete.", dir=there.parent) as scratch:
            builder = Digits(data_dir=scratch, file_format="array_record")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                builder.download_and_prepare()
            try:
                os.rename(builder.data_dir, there)
            except OSError:
                if not there.exists():  # else another process was faster
                    raise
    except OSError as error:
        raise OSError(
            error.errno, f"data_dir: can't write the set digits below {data_dir}: {error.strerror}"
        ) from error
    return there
