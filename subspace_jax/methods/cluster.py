"""Methods that cluster."""

from subspace_jax.methods.records import Figure, Method

_COMMAND = "python -m pytest tests/cluster/test_clustering_figures.py"


def _scored(name: str, metric: str, at_least: float | None = None, at_most: float | None = None) -> Figure:
    command = f"{_COMMAND} -k {metric.split('_')[0]}"
    return Figure(name, command, metric, at_least=at_least, at_most=at_most, seeds=(0,))


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
            _scored("accuracy of TSC on 5,000 digits of MNIST, mean of 3 seeds", "mnist_tsc_accuracy"),
            _scored("of k-means on the same", "mnist_kmeans_accuracy"),
        ),
    ),
)
