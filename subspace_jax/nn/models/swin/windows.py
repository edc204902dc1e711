"""Index tables and masks of Swin's windows, constants computed in NumPy."""

import numpy as np

# Added to masked scores, as in training of the published models.
HIDDEN = -100.0


def relative_position_index(window: int) -> np.ndarray:
    """Returns the index into the bias table for each query and key of a window, ``[window^2, window^2]`` int32."""
    rows, columns = (part.reshape(-1) for part in np.indices((window, window)))
    down, right = (part[:, None] - part[None, :] + window - 1 for part in (rows, columns))
    return (down * (2 * window - 1) + right).astype(np.int32)


def shifted_window_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Returns the additive mask of shifted windows: -100 where query and key come from opposite edges.

    Args:
      height: Rows of the padded feature map, a multiple of ``window``.
      width: Columns of it, a multiple of ``window``.
      window: Side of a window.
      shift: Shift of the feature map, 1 to ``window - 1``.

    Returns:
      ``[windows, window^2, window^2]`` float32, query before key.
    """

    def regions(n: int) -> np.ndarray:
        i = np.arange(n)
        return (i >= n - window).astype(np.int32) + (i >= n - shift)

    labels = 3 * regions(height)[:, None] + regions(width)[None, :]
    labels = labels.reshape(height // window, window, width // window, window).swapaxes(1, 2).reshape(-1, window**2)
    return np.where(labels[:, :, None] != labels[:, None, :], HIDDEN, 0.0).astype(np.float32)
