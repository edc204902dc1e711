"""Methods that cluster."""

from subspace_jax.methods.records import Figure, Method, train

_MLC = train("cluster/mlc_digits")
_DSC, _FIRST = train("cluster/dsc_digits"), train("cluster/dsc_digits:first")
_MNIST = train("cluster/dsc_mnist") + " --config.data.num_examples=500"
_COMMAND = "python -m pytest tests/cluster/test_clustering_figures.py"
_GRAPHS = "python -m pytest tests/cluster/test_s2cag_figures.py"


def _scored(name: str, metric: str, at_least: float | None = None, at_most: float | None = None) -> Figure:
    command = f"{_COMMAND} -k {metric.split('_')[0]}"
    return Figure(name, command, metric, at_least=at_least, at_most=at_most, seeds=(0,))


_REAL = {
    "mnist": ("MNIST's 5,000", ("kmeans", "tsc", "spectral", "lsr", "lrr", "omp")),
    "pines": ("Indian Pines", ("kmeans", "tsc", "spectral", "lsr", "lrr", "omp")),
}
_SHORT = {"kmeans": "k-means", "spectral": "spectral", "omp": "SSC-OMP"}
_SCORES = {"accuracy": "accuracy", "nmi": "NMI", "ari": "adjusted Rand index"}


def _real_figures() -> tuple[Figure, ...]:
    return tuple(
        _scored(f"{title}, {_SHORT.get(method, method.upper())}: {text}, mean of 3 seeds", f"{data}_{method}_{score}")
        for data, (title, methods) in _REAL.items()
        for method in methods
        for score, text in _SCORES.items()
    )


def _on_graph(name: str, metric: str, at_least: float | None = None) -> Figure:
    return Figure(name, f"{_GRAPHS} -k {metric.split('_')[0]}", metric, at_least=at_least, seeds=(0,))


METHODS = (
    Method(
        name="clustering-common",
        area="cluster",
        title="Classical subspace clustering",
        paper="",
        arxiv=(),
        summary=(
            "Clusters points that lie near a union of subspaces: k-subspaces; sparse, least-squares and low-rank "
            "self-expression; thresholding; and spectral clustering of what they find.  Beside them k-means, and the "
            "scores by which clusterings are compared."
        ),
        module="subspace_jax.cluster.classical",
        configs=(),
        command="subspace-jax cluster --input features.npy --k 10 --out work/clusters",
        figures=(
            _scored("accuracy of TSC on digits, mean of 3 seeds", "digits_tsc_accuracy", at_least=0.85),
            _scored("its NMI", "digits_tsc_nmi", at_least=0.88),
            _scored("accuracy of k-means on digits", "digits_kmeans_accuracy", at_least=0.74, at_most=0.83),
            _scored("of LSR", "digits_lsr_accuracy"),
            _scored("of SSC-OMP, which fails on raw digits", "digits_omp_accuracy"),
            *_real_figures(),
        ),
    ),
    Method(
        name="dsc",
        area="cluster",
        title="Deep subspace clustering",
        paper="Label-independent hyperparameter-free self-supervised single-view deep subspace clustering",
        arxiv=("2504.18179",),
        summary=(
            "Clusters images that lie near a union of bent subspaces, without labels and without tuning: a "
            "convolutional autoencoder whose layers are all expressed by themselves with one matrix of coefficients, "
            "whose entries between clusters are then penalized; every phase ends by itself."
        ),
        module="subspace_jax.cluster.dsc",
        configs=("cluster/dsc_digits", "cluster/dsc_mnist"),
        command="subspace-jax cluster --input images.npy --method dsc --k 10 --keep 12 --out work/clusters",
        figures=(
            Figure("accuracy on 400 drawn digits minus that of k-means on pixels", _DSC, "gain", at_least=0.04),
            Figure("its accuracy", _DSC, "accuracy"),
            Figure("its NMI", _DSC, "nmi"),
            Figure("accuracy of k-means", _DSC, "kmeans_accuracy"),
            Figure("runs that end by themselves before the cap", _DSC, "stopped", at_least=1.0),
            Figure("accuracy on the first 40 digits of each class", _FIRST, "accuracy", at_least=0.85, seeds=(0,)),
            Figure("its NMI there", _FIRST, "nmi", at_least=0.83, seeds=(0,)),
            Figure("accuracy of k-means there", _FIRST, "kmeans_accuracy", seeds=(0,)),
            Figure("accuracy on 500 drawn digits of MNIST, on which it does not help", _MNIST, "accuracy", seeds=(0,)),
            Figure("NMI on MNIST", _MNIST, "nmi", seeds=(0,)),
            Figure("ARI on MNIST", _MNIST, "ari", seeds=(0,)),
            Figure("accuracy of k-means on MNIST", _MNIST, "kmeans_accuracy", seeds=(0,)),
            Figure("NMI of k-means on MNIST", _MNIST, "kmeans_nmi", seeds=(0,)),
            Figure("ARI of k-means on MNIST", _MNIST, "kmeans_ari", seeds=(0,)),
        ),
    ),
    Method(
        name="s2cag",
        area="cluster",
        title="S2CAG: subspace clustering of attributed graphs",
        paper="Spectral Subspace Clustering for Attributed Graphs",
        arxiv=("2411.11074",),
        summary=(
            "Clusters the nodes of a graph with attributes in time linear in the edges: attributes are smoothed over "
            "the graph, and the leading left singular vectors of the result, which solve a low-rank self-expression "
            "and minimize conductance (M-S2CAG: maximize modularity), are rounded to labels."
        ),
        module="subspace_jax.cluster.s2cag",
        configs=(),
        command="subspace-jax cluster --method s2cag --input graph.npz --k 3 --out work/s2cag",
        figures=(
            _on_graph("ACM, accuracy of S2CAG, mean of 3 seeds", "acm_s2cag_accuracy", 0.93),
            _on_graph("ACM, accuracy of M-S2CAG", "acm_m_s2cag_accuracy", 0.933),
            _on_graph("ACM, NMI of M-S2CAG", "acm_m_s2cag_nmi", 0.75),
            _on_graph("ACM, accuracy of k-means of the attributes alone", "acm_kmeans_accuracy"),
            _on_graph("Citeseer, accuracy of S2CAG, mean of 3 seeds", "citeseer_s2cag_accuracy", 0.67),
            _on_graph("Citeseer, accuracy of M-S2CAG", "citeseer_m_s2cag_accuracy", 0.68),
            _on_graph("Citeseer, NMI of M-S2CAG", "citeseer_m_s2cag_nmi", 0.40),
            _on_graph("Citeseer, accuracy of k-means of the attributes alone", "citeseer_kmeans_accuracy"),
        ),
    ),
    Method(
        name="mlc",
        area="cluster",
        title="MLC: manifold linearizing and clustering",
        paper="Unsupervised Manifold Linearizing and Clustering",
        arxiv=("2301.01805",),
        summary=(
            "Learns features that lie near a union of orthogonal subspaces, one of each cluster, and the clusters, "
            "without labels.  It maximizes the coding rate of all features minus that of the features in a doubly "
            "stochastic membership of points in points, which is trained with them; the number of clusters is needed "
            "only when the memberships are clustered at the end."
        ),
        module="subspace_jax.cluster.mlc",
        configs=("cluster/mlc_digits", "cluster/mlc_mnist"),
        command="subspace-jax train --config cluster/mlc_digits --workdir work/mlc",
        figures=(
            Figure(
                "golden vectors of MLC, failed tests",
                "python -m pytest tests/cluster/test_mlc.py",
                "failures",
                at_most=0,
                seeds=(0,),
            ),
            Figure("accuracy of k-means on features of digits", _MLC, "clusters/kmeans_accuracy", at_least=0.88),
            Figure("what the second phase adds to it", _MLC, "kmeans_gain", at_least=0.0),
            Figure("its NMI", _MLC, "clusters/kmeans_nmi"),
            Figure("accuracy of spectral clustering of memberships", _MLC, "clusters/spectral_accuracy"),
        ),
    ),
)
