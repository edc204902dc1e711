import jax
import pytest

from subspace_jax.train import loop


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No picture, which takes longer than a run; Optax raises float32 to int32 powers."""
    monkeypatch.setattr(loop, "plot_curves", lambda *arguments: None)
    with jax.numpy_dtype_promotion("standard"):
        yield
