"""The golden Llama, and a batch of its tokens."""

import pathlib

import numpy as np
import pytest

LLAMA = pathlib.Path(__file__).parents[1] / "golden" / "interop" / "llama"


@pytest.fixture(scope="module")
def batch():
    with np.load(LLAMA / "io.npz") as io:
        tokens = io["input_ids"].astype(np.int32)
    inputs = tokens[:, :-1]
    return {
        "inputs": inputs,
        "labels": tokens[:, 1:],
        "weights": np.ones(inputs.shape, np.float32),
        "segment_ids": np.ones(inputs.shape, np.int32),
        "positions": np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape),
    }
