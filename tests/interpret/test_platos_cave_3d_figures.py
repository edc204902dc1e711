"""Figures of alignment in a subspace: halves of digits, two text encoders, and shapes with their descriptions."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, metrics, represent
from subspace_jax.cli.main import main
from subspace_jax.data import text
from subspace_jax.interpret import platos_cave_3d as platos
from subspace_jax.interpret.platos_cave_3d import data

pytestmark = pytest.mark.slow

MODELS = pathlib.Path(__file__).parents[2] / "work" / "models"
ANCHORS, QUERIES, DRAWS = 1200, 300, 3


def test_digit_halves_find_each_other_in_the_subspace(record_property):
    """1,200 anchors, 300 queries, mean of three draws; a ridge of 1e-3 of the largest eigenvalue."""
    found = {}
    for seed in range(DRAWS):
        x, y = data.digit_halves(seed)
        queries = slice(ANCHORS, ANCHORS + QUERIES)
        for name, k, method in (("k50", 50, "affine"), ("k5", 5, "affine"), ("local_cka", 50, "local-cka")):
            report = platos.align(x[:ANCHORS], y[:ANCHORS], x[queries], y[queries], k, method, reg=1e-3)
            values = {
                f"{name}_matching": report.matching,
                f"{name}_top_1": report.retrieval[0],
                f"{name}_top_5": report.retrieval[1],
                f"{name}_full_matching": report.full_matching,
                f"{name}_full_top_1": report.full_retrieval[0],
                f"{name}_full_top_5": report.full_retrieval[1],
                f"{name}_rho": jnp.mean(report.subspace.rho),
                f"{name}_held_out_rho": jnp.mean(report.held_out_rho),
            }
            for key, value in values.items():
                found.setdefault(key, []).append(float(value))
    means = {key: float(np.mean(values)) for key, values in found.items()}
    means["top_5_over_full"] = means["k50_top_5"] / means["k50_full_top_5"]
    for key, value in means.items():
        record_property(key, value)
    print(means)
    assert means["k50_top_5"] >= 0.5
    assert means["top_5_over_full"] >= 1.3
    assert means["k5_top_5"] < means["k50_top_5"]
    assert means["local_cka_top_5"] >= 1.3 * means["local_cka_full_top_5"]


def test_docstrings_of_two_encoders_find_each_other(tmp_path, record_property):
    """Docstrings of the standard library by MiniLM (x) and WordLlama (y): 400 held out, 300 and 1,600 anchors."""
    docstrings = text.docstrings()
    chosen = np.random.default_rng(0).permutation(len(docstrings))[:2000]
    for name, model in (("x", "minilm"), ("y", "wordllama")):
        if not (MODELS / model).is_dir():
            pytest.skip(f"needs `subspace-jax fetch {model}`")
        opened = represent.open_text_model(MODELS / model)
        features = represent.features_of_texts(opened, [docstrings[i] for i in chosen]).features
        np.save(tmp_path / f"{name}.npy", features)
    files = [f"--{name}={tmp_path / name}.npy" for name in "xy"]
    for anchors in (300, 1600):
        out = tmp_path / str(anchors)
        assert main(["align", "--quiet", *files, "--anchors", str(anchors), "--out", str(out)]) == 0
        result = json.loads((out / "result.json").read_text())
        print(anchors, result)
        for key, value in result.items():
            record_property(f"anchors{anchors}_{key}", value)
        assert result["top_1"] >= 0.7
        assert result["top_1"] > result["full_top_1"]
        assert result["rho"] > result["held_out_rho"] > 0.5


def test_descriptions_in_the_subspace_know_the_shape(record_property):
    """Distances of descriptions correlate more with Chamfer distances of their point clouds once they are projected."""
    clouds, words, _ = data.point_clouds(jax.random.key(0), 1600)
    powers = [(a, b, c) for a in range(0, 5, 2) for b in range(0, 5, 2) for c in range(0, 5, 2)]
    moments = jnp.stack(
        [jnp.mean(jnp.prod(clouds ** jnp.asarray(p, jnp.float32)[None, None], -1), -1) for p in powers[1:]], 1
    )
    report = platos.align(moments[:1400], words[:1400], moments[1400:], words[1400:], 6, reg=1e-4)
    first, second = np.triu_indices(200, 1)
    chamfer = jax.jit(jax.vmap(metrics.chamfer_distance))(clouds[1400 + first], clouds[1400 + second])

    def correlation(z):
        return float(platos.pearson(jnp.sqrt(linalg.pairwise_sq_distances(z, z))[first, second], jnp.sqrt(chamfer)))

    before, after = correlation(words[1400:]), correlation(platos.project_y(report.subspace, words[1400:]))
    record_property("chamfer_before", before)
    record_property("chamfer_after", after)
    record_property("shapes_top_5", float(report.retrieval[1]))
    print(before, after, report.retrieval, report.full_retrieval)
    assert after > before
