"""Inputs of the kernel tests."""

import numpy as np


def ones(shape, dtype=np.float32):
    """An array of NumPy, for lists of cases: JAX would compile it while tests are collected."""
    return np.ones(shape, dtype)
