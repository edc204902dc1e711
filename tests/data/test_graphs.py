"""Graphs as users have them, and their files."""

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp

from subspace_jax import data

EDGES = np.asarray([[0, 1], [1, 2], [3, 4]])
DENSE = np.zeros((6, 6))
DENSE[EDGES[:, 0], EDGES[:, 1]] = DENSE[EDGES[:, 1], EDGES[:, 0]] = 1
COUNTS = np.arange(18, dtype=np.float32).reshape(6, 3)


def test_as_adjacency_takes_sparse_dense_and_networkx():
    graph = nx.Graph()
    graph.add_nodes_from(range(6))
    graph.add_edges_from(EDGES.tolist())
    for adj in (DENSE, sp.coo_matrix(DENSE), sp.csr_array(DENSE), graph):
        found = data.as_adjacency(adj)
        assert isinstance(found, sp.csr_array)
        np.testing.assert_array_equal(found.toarray(), DENSE)
    graph[0][1]["weight"] = 2.5
    assert data.as_adjacency(graph)[1, 0] == 2.5


def test_as_adjacency_says_that_it_makes_a_graph_symmetric():
    with pytest.warns(UserWarning, match="adj: is not symmetric; each pair of nodes gets the larger"):
        found = data.as_adjacency(np.triu(DENSE) * 2 + np.tril(DENSE))
    np.testing.assert_array_equal(found.toarray(), 2 * DENSE)


@pytest.mark.parametrize(
    ("adj", "error"),
    [
        (DENSE[:3], r"adj: expected an adjacency \[n, n\], got shape \(3, 6\)"),
        (DENSE * -1, r"expected edge weights of 0 or more, finite, got -1.0 of nodes 0 and 1"),
        (sp.csr_array(DENSE * np.nan), "expected edge weights of 0 or more, finite, got nan"),
        (np.zeros((0, 0)), r"adj: expected an adjacency \[n, n\], got shape \(0, 0\)"),
        (nx.Graph(), "adj: expected a graph with nodes, got one without"),
    ],
)
def test_as_adjacency_refuses_what_is_none(adj, error):
    with pytest.raises(ValueError, match=error):
        data.as_adjacency(adj)


def csr(prefix, matrix):
    found = sp.csr_array(matrix)
    parts = {"data": found.data, "indices": found.indices, "indptr": found.indptr, "shape": found.shape}
    return {f"{prefix}_{name}": part for name, part in parts.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("graphs")
    src, dst = EDGES.astype(np.uint16).T
    edges = {"edge_src": src, "edge_dst": dst, "labels": np.arange(6)}
    np.savez(root / "features.npz", **edges, features=COUNTS)
    feat = csr("feat", COUNTS)
    np.savez(
        root / "csr.npz", **edges, **{f"feat_{part}": feat[f"feat_{part}"] for part in ("indptr", "indices", "data")},
        n_features=np.int32(3),
    )  # fmt: skip
    np.savez(root / "adj.npz", **csr("adj", DENSE), **csr("attr", COUNTS))
    np.savez(root / "one_way.npz", **csr("adj", np.triu(DENSE)), **csr("attr", COUNTS))
    np.savez(root / "loops.npz", **edges, features=COUNTS, self_loops=np.asarray([5]), edge_weight=np.ones(3))
    np.savez(root / "bare.npz", **edges)
    np.savez(root / "other.npz", x=COUNTS)
    np.savez(root / "far.npz", edge_src=src, edge_dst=dst + 3, features=COUNTS)
    np.savez(root / "nan.npz", **edges, features=np.where(COUNTS == 7, np.nan, COUNTS))
    np.savez(root / "negative.npz", **edges, features=COUNTS, edge_weight=-np.ones(3))
    sp.save_npz(root / "scipy.npz", sp.csr_array(DENSE))
    sp.save_npz(root / "attributes.npz", sp.csr_array(COUNTS))
    np.save(root / "attributes.npy", COUNTS)
    np.save(root / "short.npy", COUNTS[:5])
    np.save(root / "text.npy", np.asarray([["a"]]))
    (root / "edges.csv").write_text("source,target\n0,1\n1,2\n1,0\n3,4\n")
    (root / "weights.csv").write_text("0,1,2.0\n1,2,2.0\n3,4,2.0\n")
    (root / "wrong.csv").write_text("source,target\n0,1\n1.5,2\n")
    (root / "text.csv").write_text("0,1\n1,b\n")
    (root / "one.csv").write_text("0\n1\n")
    (root / "negative.csv").write_text("0,1,1\n\n# none\n1,2,-1\n")
    (root / "unknown.csv").write_text("a,b,weight\n0,1,1\n1,2,nan\n")
    (root / "latin.csv").write_bytes("Strasse \u00e4,b\n0,1\n".encode("latin-1"))
    (root / "uneven.csv").write_text("0,1,1\n1,2\n")
    (root / "no.npz").write_text("no archive")
    np.save(root / "empty.npy", np.zeros((0, 3)))
    (root / "nothing.csv").write_text("")
    (root / "marked.csv").write_text("\ufeff0,1\n1,2\n3,4\n", encoding="utf-8")
    (root / "broken.npz").write_bytes(b"PK\x03\x04")
    return root


@pytest.mark.parametrize(
    ("name", "attributes", "scale"),
    [
        ("features.npz", None, 1),
        ("csr.npz", None, 1),
        ("adj.npz", None, 1),
        ("one_way.npz", None, 1),
        ("bare.npz", "attributes.npy", 1),
        ("scipy.npz", "attributes.npz", 1),
        ("edges.csv", "attributes.npy", 1),
        ("weights.csv", "attributes.npy", 2),
        ("marked.csv", "attributes.npy", 1),
    ],
)
def test_read_graph_reads_every_form(name, attributes, scale, files):
    found = data.read_graph(files / name, None if attributes is None else files / attributes)
    np.testing.assert_array_equal(found.adjacency.toarray(), scale * DENSE)
    values = found.attributes
    np.testing.assert_array_equal(values.toarray() if sp.issparse(values) else values, COUNTS)
    assert found.symmetrized == (name == "one_way.npz")


def test_read_graph_keeps_self_loops(files):
    assert data.read_graph(files / "loops.npz").adjacency.diagonal().tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("name", "attributes", "error"),
    [
        ("none.npz", None, "input: .*none.npz: no such file"),
        ("features.npz", "none.npy", "attributes: .*none.npy: no such file"),
        ("attributes.npy", None, r"expected a file that ends in \.npz or \.csv"),
        ("bare.npz", None, "bare.npz: holds no attributes; expected features or feat_"),
        ("scipy.npz", None, "scipy.npz: holds no attributes"),
        ("edges.csv", None, "edges.csv: holds edges alone; expected a file of attributes"),
        ("other.npz", None, r"other.npz: expected edge_src and edge_dst, adj_\*, .*, got x"),
        ("far.npz", None, r"far.npz: expected nodes 0 to 5, got \[3, 7\] in edge 2"),
        ("nan.npz", None, "nan.npz: holds NaN or infinity"),
        ("negative.npz", None, "negative.npz: expected edge weights of 0 or more, got -1.0"),
        ("broken.npz", None, "broken.npz: can't be read as a graph"),
        ("scipy.npz", "short.npy", r"short.npy: expected attributes \[6, d\] of the graph's nodes, got \[5, 3\]"),
        ("scipy.npz", "text.npy", r"text.npy: expected numbers \[n, d\], got <U1 \[1, 1\]"),
        ("wrong.csv", "attributes.npy", r"wrong.csv: expected whole numbers of nodes, got \[1.5, 2.0\] in line 3"),
        ("text.csv", "attributes.npy", "text.csv: can't be read as edges: could not convert string 'b'"),
        ("one.csv", "attributes.npy", "one.csv: expected lines node,node or node,node,weight, got 1 numbers a line"),
        ("negative.csv", "attributes.npy", r"expected finite weights of 0 or more, got \[1.0, 2.0, -1.0\] in line 4"),
        ("unknown.csv", "attributes.npy", r"expected finite weights of 0 or more, got \[1.0, 2.0, nan\] in line 3"),
        ("latin.csv", "attributes.npy", "latin.csv: can't be read as edges: 'utf-8' codec"),
        ("uneven.csv", "attributes.npy", "uneven.csv: can't be read as edges: .* from 3 to 2 at row 2$"),
        ("no.npz", "attributes.npy", "no.npz: can't be read as a graph: it is no archive"),
        ("edges.csv", "empty.npy", r"empty.npy: expected numbers \[n, d\], got float64 \[0, 3\]"),
        ("nothing.csv", "attributes.npy", "nothing.csv: expected lines node,node or node,node,weight, got no edge"),
        ("edges.csv", "edges.csv", r"attributes: expected a file that ends in \.npy or \.npz, got .*edges.csv"),
    ],
)  # fmt: skip
def test_read_graph_refuses_what_is_no_graph(name, attributes, error, files):
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        data.read_graph(files / name, None if attributes is None else files / attributes)
