"""The command on folders that PEFT wrote, and on runs."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, interop
from subspace_jax.cli.main import main

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
BASE, PEFT = GOLDEN / "interop" / "llama", GOLDEN / "peft" / "llama"
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def params():
    return interop.load_causal_lm(BASE, dtype=jnp.float32)


def update(folder):
    """What an adapter adds to each weight."""
    config, weights = params()
    own = interop.load_peft_adapter(folder, config)
    made = adapters.materialize(weights, own.trainable, own.settings)
    return jax.tree.map(lambda x, y: np.asarray(x, np.float64) - np.asarray(y, np.float64), made, weights)


def command(out, *names, **options):
    given = [text for name, value in options.items() for text in (f"--{name}", *map(str, np.atleast_1d(value)))]
    folders = [str(PEFT / name) for name in names]
    return main(["merge-adapters", "--quiet", "--adapters", *folders, "--base", str(BASE), "--out", str(out), *given])


def assert_sum(out, names, weights):
    updates = [update(PEFT / name) for name in names]
    wanted = jax.tree.map(lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)), *updates)
    for got, expected in zip(jax.tree.leaves(update(out)), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected)


def test_merge_adapters_of_lora_rslora_and_patterns_writes_a_folder_that_adds_their_weighted_updates(tmp_path, capsys):
    names, weights = ("lora_patterns", "rslora", "lora_layers"), (0.5, -0.25, 1.0)
    assert command(tmp_path / "out", *names, weights=weights) == 0
    assert_sum(tmp_path / "out", names, weights)
    assert "Relative error of the update of all weights" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["kind"] == "LoRA"
    assert report["error"] < 1e-6
    ranks = {(own["weight"], own["layer"]): own["rank"] for own in report["matrices"]}
    assert ranks[("layers/attn/q/kernel", 1)] == 2 + 4
    assert ranks[("layers/attn/v/kernel", 0)] == 0
    assert (tmp_path / "out" / "merge_report.png").stat().st_size > 1000
