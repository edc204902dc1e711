"""Validation of class labels."""

import numpy as np

# Bound of labels whose number of classes is not given, or twice the number of classes that occur where this is more.
_FEW_CLASSES = 2**16


def count_classes(labels: np.ndarray, num_classes: int | None = None) -> int:
    """Returns the number of classes, the largest label plus 1 by default.

    Args:
      labels: ``[examples]`` integers.
      num_classes: Number of classes, if known.

    Raises:
      ValueError: A label is not an integer, is negative, or is not below ``num_classes``; or ``num_classes`` is not
        given and the largest label is far above the number of classes that occur.
    """
    if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: expected integers [examples], got {labels.dtype} {list(labels.shape)}")
    least, largest = int(labels.min()), int(labels.max())
    if num_classes is None:
        occurring = len(np.unique(labels))
        most = max(_FEW_CLASSES, 2 * occurring)
        if largest >= most:
            raise ValueError(
                f"labels: expected 0 to {most - 1} of {occurring} classes, got {largest}; number the classes from 0, "
                "or give the number of classes"
            )
        num_classes = largest + 1
    if least < 0 or largest >= num_classes:
        raise ValueError(f"labels: expected integers in 0 to {num_classes - 1}, got {least} to {largest}")
    return num_classes
