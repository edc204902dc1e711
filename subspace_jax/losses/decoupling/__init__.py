"""Decoupling of hidden states from the subspace that tells a domain (arXiv 2508.12803)."""

from subspace_jax.losses.decoupling.online import DecouplerState, OnlineDecoupler
from subspace_jax.losses.decoupling.penalty import decoupling_penalty, project_out
from subspace_jax.losses.decoupling.probe import (
    ProbeState,
    VariationalProbeParams,
    clip_variances,
    codelength,
    fit_probe,
    init_variational_probe,
    posterior,
    probe_kl,
    probe_logits,
    probe_loss,
)
from subspace_jax.losses.decoupling.subspace import average_subspace, dominant_subspace

__all__ = [
    "DecouplerState",
    "OnlineDecoupler",
    "ProbeState",
    "VariationalProbeParams",
    "average_subspace",
    "clip_variances",
    "codelength",
    "decoupling_penalty",
    "dominant_subspace",
    "fit_probe",
    "init_variational_probe",
    "posterior",
    "probe_kl",
    "probe_logits",
    "probe_loss",
    "project_out",
]
