"""Problems on which compressions can be judged exactly."""

from typing import NamedTuple

import numpy as np


class Planted(NamedTuple):
    """A kernel whose columns lie in a union of subspaces.

    Attributes:
      x: Calibration inputs ``[N, d1]``, correlated by a random mixing matrix.
      w: Kernel ``[d1, d2]``.
    """

    x: np.ndarray
    w: np.ndarray


def planted_union(
    seed: int, *, d1: int = 32, d2: int = 256, subspaces: int = 8, dimension: int = 4, inputs: int = 512
) -> Planted:
    """Draws columns from random subspaces, each a random orthonormal basis times normal coefficients.

    Args:
      seed: Seed of everything.
      d1: Inputs of the kernel.
      d2: Its outputs.
      subspaces: Number of subspaces.
      dimension: Their dimension.
      inputs: Number of calibration inputs.
    """
    rng = np.random.default_rng(seed)
    bases = [np.linalg.qr(rng.standard_normal((d1, dimension)))[0] for _ in range(subspaces)]
    columns = [bases[rng.integers(subspaces)] @ rng.standard_normal(dimension) for _ in range(d2)]
    x = rng.standard_normal((inputs, d1)) @ rng.standard_normal((d1, d1))
    return Planted(x, np.stack(columns, axis=1))


class DigitsLayer(NamedTuple):
    """The hidden layer of a perceptron trained on handwritten digits.

    Attributes:
      w: Its kernel ``[128, 128]``.
      calibration: Inputs of the layer for the first 256 training images.
      held_out: Those of 600 test images.
    """

    w: np.ndarray
    calibration: np.ndarray
    held_out: np.ndarray


def digits_layer() -> DigitsLayer:
    """Trains scikit-learn's perceptron 64-128-128-10 on its digits, seed 0, and returns its second layer."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier

    images, labels = load_digits(return_X_y=True)
    train, test, labels, _ = train_test_split(images / 16, labels, test_size=600, stratify=labels, random_state=0)
    fitted = MLPClassifier((128, 128), random_state=0).fit(train, labels)

    def inputs(images):
        return np.maximum(images @ fitted.coefs_[0] + fitted.intercepts_[0], 0)

    return DigitsLayer(fitted.coefs_[1], inputs(train[:256]), inputs(test))
