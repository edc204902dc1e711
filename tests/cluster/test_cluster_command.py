"""The command that clusters features."""

import json

import jax
import numpy as np
import pytest

from subspace_jax import metrics
from subspace_jax.cli.main import main
from tests.cluster.test_clustering_common import subspaces


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    x, y, _ = subspaces(1, 12, 2, 3, 20)
    np.savez(folder / "features.npz", features=(3 * x).astype(np.float16), labels=y + 5)
    np.save(folder / "nan.npy", np.where(np.arange(60)[:, None] == 7, np.nan, x).astype(np.float32))
    np.save(folder / "short.npy", y[:9])
    return folder


@pytest.mark.slow
def test_cluster_finds_subspaces_chooses_k_by_the_eigengap_and_writes_report_and_picture(files, tmp_path, capsys):
    arguments = ["cluster", f"--input={files}/features.npz", f"--labels={files}/features.npz", f"--out={tmp_path}"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main([*arguments, "--seeds=2", "--neighbors=15"]) == 0
    labels, report = np.load(tmp_path / "labels.npy"), json.loads((tmp_path / "clusters.json").read_text())
    assert (report["k"], report["chosen"], sum(report["sizes"])) == (3, True, 60)
    assert metrics.clustering_accuracy(np.repeat([0, 1, 2], 20), labels) == report["scores"]["accuracy"][0] > 0.9
    assert len(report["agreement"]) == 1
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] == report["scores"]["accuracy"][0]
    assert (tmp_path / "clusters.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "3 clusters, chosen by the eigengap, of 20 to 20 items" in printed
    assert "labels.npy: the cluster of each item" in printed


@pytest.mark.slow
def test_cluster_runs_without_a_graph_and_without_labels(files, tmp_path):
    arguments = ["cluster", f"--input={files}/features.npz", f"--out={tmp_path}", "--seeds=1", "--k=3", "--raw"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main([*arguments, "--method=k-subspaces", "--dim=2"]) == 0
    assert "scores" not in json.loads((tmp_path / "clusters.json").read_text())


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        ("{root}/nan.npy: expected finite vectors, got NaN or infinity in 1: vector 7", ["--input={root}/nan.npy"]),
        ("input: {root}/none.npy: no such file", ["--input={root}/none.npy"]),
        ("--k: expected 1 to 60, the number of items in", ["--k=61"]),
        ("--k: expected 1 to 60, the number of items in", ["--k=0"]),
        ("--k: expected a number of clusters, for kmeans has no graph", ["--method=kmeans"]),
        ("--dim: is for k-subspaces, not for tsc", ["--dim=2"]),
        ("--neighbors: expected 1 or more, got 0", ["--neighbors=0"]),
        ("--dim: expected 1 to 12, the width of {root}/features.npz", ["--method=k-subspaces", "--k=3", "--dim=13"]),
        ("--seed: expected 0 to 4294967293, got -1", ["--seed=-1"]),
        ("--seeds: expected at least 1, got 0", ["--seeds=0"]),
        ("labels: {root}/short.npy: expected one for each of 60 vectors, got 9", ["--labels={root}/short.npy"]),
    ],
)  # fmt: skip
def test_cluster_refuses_what_can_not_serve_and_writes_nothing(error, arguments, files, tmp_path, capsys):
    given = [f"--input={files}/features.npz", *(text.format(root=files) for text in arguments)]
    assert main(["cluster", f"--out={tmp_path}/out", *given]) == 2
    assert error.format(root=files) in capsys.readouterr().err
    out = tmp_path / "out"
    assert not out.exists() or not list(out.iterdir())
