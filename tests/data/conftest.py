import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from subspace_jax import data


class TinyRgb(tfds.core.GeneratorBasedBuilder):
    """A stand-in for CIFAR-10: 20 training and 7 test images of random pixels."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(7)}

    def _generate_examples(self, count):
        pixels, labels = tiny_pixels(count)
        for i in range(count):
            yield i, {"id": str(i), "image": Image.fromarray(pixels[i]), "label": int(labels[i])}


def tiny_pixels(count):
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count)


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """A folder where tiny_rgb is prepared, and digits once a test asks for it."""
    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    TinyRgb(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(scope="session")
def digits(tfds_dir):
    return data.image_source("digits", "train", tfds_dir)


@pytest.fixture(scope="session")
def digit_arrays(digits):
    return data.load_arrays(digits)


@pytest.fixture
def numbered():
    """Makes a source whose inputs tell which example they are."""

    def make(count):
        return {"inputs": np.arange(count, dtype=np.float32)[:, None], "labels": np.arange(count, dtype=np.int32)}

    return make
