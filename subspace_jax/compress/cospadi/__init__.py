"""CoSpaDi and the low-rank methods beside it: linear layers compressed by the error of their outputs.

"CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning", arXiv 2509.22075.
"""

from subspace_jax.compress.cospadi.core import (
    asvd_compress,
    basis_sharing_compress,
    compress,
    compress_group,
    svd_compress,
    svd_llm_compress,
)
from subspace_jax.compress.cospadi.folder import CompressReport, CompressSettings, compress_folder
from subspace_jax.compress.cospadi.gram import gram_factor
from subspace_jax.compress.cospadi.kernels import Learning, compress_kernels
from subspace_jax.compress.cospadi.params import compress_params
from subspace_jax.compress.cospadi.plan import METHODS, plan_units
from subspace_jax.compress.cospadi.report import summary_text, write_report
from subspace_jax.compress.cospadi.sizes import allocate, allocate_rank, storage_bits
from subspace_jax.linalg import (
    DictState,
    GramState,
    densify,
    fit_dictionary,
    ksvd_update,
    mod_update,
    omp,
    update_gram,
)
from subspace_jax.nn import LowRankFactor, SparseFactor, truncate_bf16
from subspace_jax.nn.models.causal_lm.kernel_grams import collect_grams, kernel_inputs
from subspace_jax.train.kernel_grams import grams_of_model

__all__ = [
    "METHODS",
    "CompressReport",
    "CompressSettings",
    "DictState",
    "GramState",
    "Learning",
    "LowRankFactor",
    "SparseFactor",
    "allocate",
    "allocate_rank",
    "asvd_compress",
    "basis_sharing_compress",
    "collect_grams",
    "compress",
    "compress_folder",
    "compress_group",
    "compress_kernels",
    "compress_params",
    "densify",
    "fit_dictionary",
    "gram_factor",
    "grams_of_model",
    "kernel_inputs",
    "ksvd_update",
    "mod_update",
    "omp",
    "plan_units",
    "storage_bits",
    "summary_text",
    "svd_compress",
    "svd_llm_compress",
    "truncate_bf16",
    "update_gram",
    "write_report",
]


def __dir__():
    return __all__
