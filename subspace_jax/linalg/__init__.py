"""Numerical linear algebra of tall matrices and subspaces: arrays in, arrays out, broadcasting over leading axes."""

from subspace_jax.linalg._checks import check_finite, check_integer, is_here
from subspace_jax.linalg.angles import principal_angles, projector_distance
from subspace_jax.linalg.bases import orthonormality_error, random_orthonormal
from subspace_jax.linalg.canonical_correlation import CCAResult, cca, cca_from_covariance, whitened_columns
from subspace_jax.linalg.centering import centered_columns
from subspace_jax.linalg.dictionary_learning import (
    DictOptions,
    DictState,
    first_atoms,
    fit_dictionary,
    ksvd_update,
    mod_update,
)
from subspace_jax.linalg.eigenpairs import Eigenpairs, top_eigenpairs
from subspace_jax.linalg.expm import expm, expm_action
from subspace_jax.linalg.frequent_directions import (
    FDState,
    frequent_directions_init,
    frequent_directions_update,
)
from subspace_jax.linalg.gram_sums import GramState, update_gram
from subspace_jax.linalg.hadamard import fwht, hadamard_matrix
from subspace_jax.linalg.k_subspaces import KSubspaces, explained_energy, k_subspaces
from subspace_jax.linalg.kmeans import KMeans, kmeans
from subspace_jax.linalg.nearest import nearest_rows, pairwise_sq_distances
from subspace_jax.linalg.orthonormal import orthonormal_columns
from subspace_jax.linalg.pair_moments import PairMoments, merge_pair_moments, pair_moments, psum_pair_moments
from subspace_jax.linalg.pivoting import pivot_rows
from subspace_jax.linalg.polar import polar, polar_step
from subspace_jax.linalg.procrustes import orthogonal_procrustes
from subspace_jax.linalg.products import (
    broadcast_leading,
    eye_like,
    gram,
    nan_for_infinite,
    times,
    working_dtype,
)
from subspace_jax.linalg.qr import cholesky_qr, cholesky_qr2, positive_qr, shifted_cholesky_qr3
from subspace_jax.linalg.row_blocks import map_row_blocks
from subspace_jax.linalg.scaling import binary_scale, unit_vectors
from subspace_jax.linalg.self_expression import lrr, lsr
from subspace_jax.linalg.sinkhorn import SinkhornResult, alternating_potentials, check_sinkhorn, sinkhorn
from subspace_jax.linalg.skew import orthogonal_from_skew, project_to_lambda_ball
from subspace_jax.linalg.sparse_coding import code_error, densify, omp, omp_gram
from subspace_jax.linalg.sparse_rows import (
    SparseRows,
    dense_rows,
    sparse_times,
    sparse_transpose_times,
    top_entries,
)
from subspace_jax.linalg.spectral import arcsine_ratio, cos_sqrt, sinc_sqrt, singular, spectral, versine_sqrt
from subspace_jax.linalg.spectral_clustering import (
    SpectralClustering,
    SpectralEmbedding,
    affinity_product,
    eigengap,
    spectral_clustering,
    spectral_embedding,
)
from subspace_jax.linalg.stacks import of_each
from subspace_jax.linalg.subspace_overlap import (
    EnergyBasis,
    MSOResult,
    energy_basis,
    mode_subspace_overlap,
    subspace_overlap,
)
from subspace_jax.linalg.svd import canonical_signs, canonical_svd, product_svd, randomized_svd, subspace_iteration
from subspace_jax.linalg.tucker import hosvd, tucker_product
from subspace_jax.linalg.versine import versine_sinc_sqrt

__all__ = [
    "CCAResult",
    "DictOptions",
    "DictState",
    "Eigenpairs",
    "EnergyBasis",
    "FDState",
    "GramState",
    "KMeans",
    "KSubspaces",
    "MSOResult",
    "PairMoments",
    "SinkhornResult",
    "SparseRows",
    "SpectralClustering",
    "SpectralEmbedding",
    "affinity_product",
    "alternating_potentials",
    "arcsine_ratio",
    "binary_scale",
    "broadcast_leading",
    "canonical_signs",
    "canonical_svd",
    "cca",
    "cca_from_covariance",
    "centered_columns",
    "check_finite",
    "check_integer",
    "check_sinkhorn",
    "cholesky_qr",
    "cholesky_qr2",
    "code_error",
    "cos_sqrt",
    "dense_rows",
    "densify",
    "eigengap",
    "energy_basis",
    "explained_energy",
    "expm",
    "expm_action",
    "eye_like",
    "first_atoms",
    "fit_dictionary",
    "frequent_directions_init",
    "frequent_directions_update",
    "fwht",
    "gram",
    "hadamard_matrix",
    "hosvd",
    "is_here",
    "k_subspaces",
    "kmeans",
    "ksvd_update",
    "lrr",
    "lsr",
    "map_row_blocks",
    "merge_pair_moments",
    "mod_update",
    "mode_subspace_overlap",
    "nan_for_infinite",
    "nearest_rows",
    "of_each",
    "omp",
    "omp_gram",
    "orthogonal_from_skew",
    "orthogonal_procrustes",
    "orthonormal_columns",
    "orthonormality_error",
    "pair_moments",
    "pairwise_sq_distances",
    "pivot_rows",
    "polar",
    "polar_step",
    "positive_qr",
    "principal_angles",
    "product_svd",
    "project_to_lambda_ball",
    "projector_distance",
    "psum_pair_moments",
    "random_orthonormal",
    "randomized_svd",
    "shifted_cholesky_qr3",
    "sinc_sqrt",
    "singular",
    "sinkhorn",
    "sparse_times",
    "sparse_transpose_times",
    "spectral",
    "spectral_clustering",
    "spectral_embedding",
    "subspace_iteration",
    "subspace_overlap",
    "times",
    "top_eigenpairs",
    "top_entries",
    "tucker_product",
    "unit_vectors",
    "update_gram",
    "versine_sinc_sqrt",
    "versine_sqrt",
    "whitened_columns",
    "working_dtype",
]


def __dir__():
    return __all__
