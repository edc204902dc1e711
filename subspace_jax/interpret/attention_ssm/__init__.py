"""Attention and state-space layers as one class of maps: operators, their rank, and gradients (arXiv 2512.15115)."""

from subspace_jax.interpret.attention_ssm.conversion import heads_from_lags, heads_from_ssm
from subspace_jax.interpret.attention_ssm.gradients import (
    AttentionHead,
    GradientDecay,
    attention_jacobian,
    causal_attention,
    gradient_decay,
    gradient_profile,
    highway_input,
)
from subspace_jax.interpret.attention_ssm.heads import HeadBank, Modes, apply_heads, coefficients_of
from subspace_jax.interpret.attention_ssm.language_model import LayerMeasure, layer_factors, measure_layers
from subspace_jax.interpret.attention_ssm.model import FactorizedAttention
from subspace_jax.interpret.attention_ssm.rank import (
    Factors,
    RankReport,
    effective_jacobian,
    factored_interaction_rank,
    interaction_operator,
    interaction_rank,
    truncated_heads_error,
)
from subspace_jax.interpret.attention_ssm.ssm import (
    LinearSSM,
    hippo_legs,
    lag_operators,
    spectral_radius,
    ssm_associative_scan,
    ssm_convolve,
    ssm_decay_bound,
    ssm_scan,
)

__all__ = [
    "AttentionHead",
    "FactorizedAttention",
    "Factors",
    "GradientDecay",
    "HeadBank",
    "LayerMeasure",
    "LinearSSM",
    "Modes",
    "RankReport",
    "apply_heads",
    "attention_jacobian",
    "causal_attention",
    "coefficients_of",
    "effective_jacobian",
    "factored_interaction_rank",
    "gradient_decay",
    "gradient_profile",
    "heads_from_lags",
    "heads_from_ssm",
    "highway_input",
    "hippo_legs",
    "interaction_operator",
    "interaction_rank",
    "lag_operators",
    "layer_factors",
    "measure_layers",
    "spectral_radius",
    "ssm_associative_scan",
    "ssm_convolve",
    "ssm_decay_bound",
    "ssm_scan",
    "truncated_heads_error",
]


def __dir__():
    return __all__
