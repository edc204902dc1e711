"""Labels as they come out of files: what they must be before anything is sized by them."""

import numpy as np

# Without a number of classes, labels go up to this, or to twice as many as there are.
_FEW_CLASSES = 2**16


def count_classes(labels: np.ndarray, num_classes: int | None = None) -> int:
    """Returns the number of classes, the largest label plus 1 by default.

    Args:
      labels: ``[examples]`` integers.
      num_classes: What there are.

    Raises:
      ValueError: A label is no integer, negative, not below ``num_classes``, or, where this is not given, so large that
        hardly any class can have an example.
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
                "or say how many there are"
            )
        num_classes = largest + 1
    if least < 0 or largest >= num_classes:
        raise ValueError(f"labels: expected integers in 0 to {num_classes - 1}, got {least} to {largest}")
    return num_classes
