import pytest

from subspace_jax import train
from subspace_jax.train import loop

from .common import run_of


@pytest.fixture
def fit(monkeypatch):
    """Carries out a small run: often due, and without the picture, which takes longer than the run."""
    monkeypatch.setattr(loop, "plot_curves", lambda *arguments: None)

    def carry_out(task, tx, data, *, hooks=(), **fields):
        return train.fit(run_of(task, tx, data, **fields), hooks)

    return carry_out
