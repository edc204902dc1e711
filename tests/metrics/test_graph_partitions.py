"""Modularity and conductance of partitions of a graph, beside networkx."""

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp

from subspace_jax import metrics

GRAPH = nx.les_miserables_graph()
ADJACENCY = nx.to_scipy_sparse_array(GRAPH, dtype=float)
LABELS = np.arange(GRAPH.number_of_nodes()) * 4 // GRAPH.number_of_nodes() + 7
PARTS = [{node for node, label in zip(GRAPH, LABELS, strict=True) if label == part} for part in range(7, 11)]


def test_graph_modularity_is_that_of_networkx():
    for resolution in (1.0, 0.5):
        expected = nx.community.modularity(GRAPH, PARTS, resolution=resolution)
        assert metrics.graph_modularity(ADJACENCY, LABELS, resolution) == pytest.approx(expected)


def test_graph_conductance_is_the_mean_of_networkx():
    expected = np.mean([nx.conductance(GRAPH, part, weight="weight") for part in PARTS])
    assert metrics.graph_conductance(ADJACENCY, LABELS) == pytest.approx(expected)


def test_graph_scores_leave_out_self_loops_and_hold_without_edges():
    loops = sp.csr_array(ADJACENCY + sp.eye_array(len(LABELS)))
    for score in (metrics.graph_modularity, metrics.graph_conductance):
        assert score(loops, LABELS) == pytest.approx(score(ADJACENCY, LABELS))
        assert score(sp.csr_array((3, 3)), np.arange(3)) == 0
    assert metrics.graph_conductance(ADJACENCY, np.zeros(len(LABELS), int)) == 0


def test_graph_scores_refuse_labels_of_another_length():
    for score in (metrics.graph_modularity, metrics.graph_conductance):
        with pytest.raises(ValueError, match=r"labels: expected one of each node of adjacency \[77, 77\], got \[76\]"):
            score(ADJACENCY, LABELS[1:])
