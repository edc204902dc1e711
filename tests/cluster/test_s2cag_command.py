"""The command that clusters the nodes of a graph."""

import json

import jax
import numpy as np
import pytest
import scipy.sparse as sp

from subspace_jax import data, metrics
from subspace_jax.cli.main import main
from subspace_jax.cluster.s2cag import run
from tests.cluster.graphs import block_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("graph")
    a, counts, labels = block_model(0, 20, 3, 36)
    edges = np.stack(sp.triu(a).nonzero(), axis=1)
    src, dst = edges.T
    np.savez(root / "graph.npz", edge_src=src, edge_dst=dst, features=counts, labels=labels)
    np.savez(root / "negative.npz", edge_src=src, edge_dst=dst, features=counts, edge_weight=-np.ones(len(src)))
    np.save(root / "short.npy", labels[1:])
    np.savetxt(root / "edges.csv", edges, fmt="%d", delimiter=",")
    np.save(root / "counts.npy", counts)
    np.save(root / "signed.npy", -counts)
    np.save(root / "zeros.npy", 0 * counts)
    np.save(root / "one.npy", counts[:, :1])
    one_way = sp.csr_array(sp.triu(a))
    parts = {"adj_data": one_way.data, "adj_indices": one_way.indices, "adj_indptr": one_way.indptr}
    np.savez(root / "one_way.npz", **parts, adj_shape=one_way.shape, attr_matrix=counts, labels=labels)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "source", "k"),
    [
        ("s2cag", ["--input={root}/graph.npz", "--alpha=1.2", "--iterations=20"], True),
        ("m-s2cag", ["--input={root}/edges.csv", "--attributes={root}/counts.npy", "--gamma=0.9"], True),
        ("s2cag", ["--input={root}/one_way.npz", "--rounding=kmeans"], False),
    ],
)
def test_cluster_finds_the_classes_of_a_graph_and_writes_report_and_picture(method, source, k, files, tmp_path, capsys):
    given = [text.format(root=files) for text in source] + ["--k=3"] * k + [f"--labels={files}/graph.npz"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main(["cluster", f"--method={method}", f"--out={tmp_path}", "--seeds=2", "--steps=3", *given]) == 0
    labels, report = np.load(tmp_path / "labels.npy"), json.loads((tmp_path / "clusters.json").read_text())
    assert (report["k"], report["chosen"], sum(report["sizes"])) == (3, not k, 60)
    assert metrics.clustering_accuracy(np.repeat([0, 1, 2], 20), labels) > 0.9
    assert report["scores"]["accuracy"][0] > 0.9
    assert len(report["cuts"]["modularity"]) == len(report["cuts"]["conductance"]) == 2
    assert min(report["cuts"]["modularity"]) > 0.3
    assert (tmp_path / "clusters.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "modularity of the graph 0." in printed
    assert "clusters.png: nodes by cluster, and the edges in blocks\n" in printed
    assert ("is not symmetric; each pair of nodes gets the larger" in printed) == ("one_way" in source[0])


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        ("input: {root}/none.npz: no such file", ["--input={root}/none.npz"]),
        ("{root}/negative.npz: expected edge weights of 0 or more", ["--input={root}/negative.npz"]),
        ("input: {root}/edges.csv: holds edges alone", ["--input={root}/edges.csv"]),
        ("--k: expected 1 to 35 for 60 nodes with 36 attributes in", ["--k=36"]),
        ("attributes: {root}/signed.npy: expected counts, got -", ["--attributes={root}/signed.npy"]),
        ("attributes: {root}/zeros.npy: expected attributes that are not all zero", ["--attributes={root}/zeros.npy"]),
        ("{root}/one.npy: expected two nodes and two attributes or more, got [60, 1]", ["--attributes={root}/one.npy"]),
        ("labels: {root}/short.npy: expected one for each of 60 vectors, got 59", ["--labels={root}/short.npy"]),
        ("--neighbors: is for tsc and spectral, not for s2cag", ["--neighbors=3"]),
        ("--gamma: is for lsr and lrr-l21 and ssc and m-s2cag, not for s2cag", ["--gamma=2"]),
        ("--split: is for --input tfds:NAME, not for s2cag", ["--split=train"]),
        ("--raw: is not for s2cag; --vectors takes attributes without tf-idf", ["--raw"]),
        ("alpha: expected more than 0, got 0.0", ["--alpha=0"]),
        ("rounding: expected one of snem-cpqr, snem, kmeans, got 'best'", ["--rounding=best"]),
        ("--attributes: is for s2cag and m-s2cag, not for tsc", ["--method=tsc", "--attributes=x.npy"]),
        ("--steps: is for s2cag and m-s2cag, not for tsc", ["--method=tsc", "--steps=2"]),
    ],
)  # fmt: skip
def test_cluster_refuses_graphs_that_can_not_serve_and_writes_nothing(error, arguments, files, tmp_path, capsys):
    given = [f"--input={files}/graph.npz", "--method=s2cag", *(text.format(root=files) for text in arguments)]
    assert main(["cluster", f"--out={tmp_path}/out", *given]) == 2
    assert error.format(root=files) in capsys.readouterr().err
    out = tmp_path / "out"
    assert not out.exists() or not list(out.iterdir())


def test_cluster_graph_needs_k_where_there_are_too_few_attributes():
    graph = data.Graph(data.as_adjacency(np.ones((5, 5)) - np.eye(5)), np.eye(5, 3) + 1.0, False)
    with pytest.raises(ValueError, match="k: expected a number of clusters: 5 nodes with 3 attributes tell none"):
        run.cluster_graph(graph, None)
