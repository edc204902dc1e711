"""What the tests of the commands share."""

import jax
import pytest


@pytest.fixture(scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        yield
