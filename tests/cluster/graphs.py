"""Graphs for tests: random ones with planted classes, and real ones where the data are there."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

ROOT = Path(__file__).parents[2]
FOLDERS = [folder / "data" / "attributed_graphs" for folder in (ROOT / "work", ROOT.parent / "shared")]


def real_graph(name):
    """The path of a real graph; skips the test where it is not there."""
    for folder in FOLDERS:
        if (folder / f"{name}.npz").exists():
            return folder / f"{name}.npz"
    return pytest.skip(f"data/attributed_graphs/{name}.npz is not there")


def block_model(seed, each, k, d, within=0.3, between=0.03):
    """A stochastic block model with counts that depend on the class: adjacency, counts and labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(k), each)
    edges = np.triu(rng.random((k * each, k * each)) < np.where(labels[:, None] == labels, within, between), 1)
    rates = 0.4 + 1.2 * (np.arange(d) % k == labels[:, None])
    return sp.csr_array((edges | edges.T).astype(float)), rng.poisson(rates).astype(np.float32), labels
