"""Few-shot adaptation of dual encoders on precomputed features (arXiv 2401.01736)."""

from subspace_jax.represent.few_shot_survey.bounds import best_alpha, domain_bound, mixture_bound, vc_width
from subspace_jax.represent.few_shot_survey.clip_adapter import ClipAdapter, Shots, fit_clip_adapter
from subspace_jax.represent.few_shot_survey.compare import (
    Comparison,
    DomainGap,
    FewShotRow,
    compare_few_shot,
    domain_gap,
    plot_few_shot,
)
from subspace_jax.represent.few_shot_survey.fitting import adamw_to_zero, batch_order, fit_steps, sgd_of_coop
from subspace_jax.represent.few_shot_survey.methods import METHODS
from subspace_jax.represent.few_shot_survey.probe import Probe, linear_probe, search_probe
from subspace_jax.represent.few_shot_survey.prompts import (
    CoOpPrompts,
    LowRank,
    assemble_prompts,
    fit_prompts,
    fit_residual,
    prompt_residual,
    start_residual,
)
from subspace_jax.represent.few_shot_survey.prototypes import class_prototypes, text_prototypes, zero_shot_logits
from subspace_jax.represent.few_shot_survey.sampling import sample_shots
from subspace_jax.represent.few_shot_survey.subspaces import Projection, cca_subspace, text_subspace
from subspace_jax.represent.few_shot_survey.tip_adapter import (
    TipCache,
    TipSearch,
    build_cache,
    fit_tip_f,
    search_tip,
    tip_grid,
    tip_logits,
)

__all__ = [
    "METHODS",
    "ClipAdapter",
    "CoOpPrompts",
    "Comparison",
    "DomainGap",
    "FewShotRow",
    "LowRank",
    "Probe",
    "Projection",
    "Shots",
    "TipCache",
    "TipSearch",
    "adamw_to_zero",
    "assemble_prompts",
    "batch_order",
    "best_alpha",
    "build_cache",
    "cca_subspace",
    "class_prototypes",
    "compare_few_shot",
    "domain_bound",
    "domain_gap",
    "fit_clip_adapter",
    "fit_prompts",
    "fit_residual",
    "fit_steps",
    "fit_tip_f",
    "linear_probe",
    "mixture_bound",
    "plot_few_shot",
    "prompt_residual",
    "sample_shots",
    "search_probe",
    "search_tip",
    "sgd_of_coop",
    "start_residual",
    "text_prototypes",
    "text_subspace",
    "tip_grid",
    "tip_logits",
    "vc_width",
    "zero_shot_logits",
]


def __dir__():
    return __all__
