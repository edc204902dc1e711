"""Accuracies that Grassmann class representation reaches on synthetic data and digits."""

import numpy as np
import pytest

from subspace_jax import train

# Whole trainings; the quick run sees the digits through `scripts/demo.py`.
pytestmark = pytest.mark.slow


def accuracy(config, seed, tmp_path, *settings):
    config = train.override(train.load_config(config), [f"seed={seed}", *settings])
    return train.run(config, tmp_path / f"{config.model.head}{config.model.dims}_{seed}", progress=False).metrics[
        "accuracy"
    ]


def test_subspaces_of_dimension_4_classify_a_union_of_subspaces_and_vectors_do_not(tmp_path, configs):
    settings = ["train.eval_every=300", "train.checkpoint_every=300"]
    wide, narrow = (
        [accuracy(f"{configs}/gcr/synthetic.py:{k}", seed, tmp_path, *settings) for seed in range(3)]
        for k in ("k4", "k1")
    )
    assert min(wide) >= 0.94
    assert np.mean(wide) - np.mean(narrow) >= 0.25


def test_digits_reach_97_percent_over_three_seeds(tmp_path, configs):
    settings = ["train.eval_every=1080", "train.checkpoint_every=1080"]
    runs = [accuracy(f"{configs}/gcr/digits.py:k8", seed, tmp_path, *settings) for seed in range(3)]
    assert np.mean(runs) >= 0.97
