"""The TFDS set ``digits``: the 1797 handwritten digits bundled with scikit-learn.

It is prepared offline and without TensorFlow: the files are array_record, images are passed to TFDS as Pillow images
(arrays would be encoded by TensorFlow), and the builder has no code path (TFDS would search it for checksums, with a
package that it does not install).
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

    The order of the examples is ``np.random.RandomState(0).permutation(1797)`` (the legacy generator, which NumPy keeps
    stable); the split ``train`` is the first 1200 of them, ``test`` the other 597.

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
    """Writes the set ``digits`` unless it exists; takes about a second.

    The files are renamed into place, so that several processes may write to one folder.

    Args:
      data_dir: Folder of TFDS sets; created if missing.

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
        # Not the temporary folder of TFDS, whose name comes from Python's global generator: two processes with equal
        # seeds would write into the same one.
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
