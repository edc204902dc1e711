import functools

import pytest

from subspace_jax import train
from subspace_jax.train import loop


@pytest.fixture
def fit(monkeypatch):
    """``train.fit`` for small runs: often due, and without the picture, which takes longer than the run."""
    monkeypatch.setattr(loop, "plot_curves", lambda *arguments: None)
    return functools.partial(train.fit, log_every=2, eval_every=4, checkpoint_every=3, progress=False)
