"""Decoupling of hidden states from a dominant domain (arXiv 2508.12803).

The maths are in :mod:`subspace_jax.losses.decoupling`, where language models find them too: ``finetune`` has them as
the fields ``decoupling``.
"""

from subspace_jax.linalg import principal_angles as subspace_angles
from subspace_jax.losses.decoupling import (
    DecouplerState,
    OnlineDecoupler,
    ProbeState,
    VariationalProbeParams,
    average_subspace,
    clip_variances,
    codelength,
    decoupling_penalty,
    dominant_subspace,
    fit_probe,
    init_variational_probe,
    posterior,
    probe_kl,
    probe_logits,
    probe_loss,
    project_out,
)
from subspace_jax.represent.decoupling_probe.evaluate import DomainDistances, domain_codelengths, domain_distances

__all__ = [
    "DecouplerState",
    "DomainDistances",
    "OnlineDecoupler",
    "ProbeState",
    "VariationalProbeParams",
    "average_subspace",
    "clip_variances",
    "codelength",
    "decoupling_penalty",
    "domain_codelengths",
    "domain_distances",
    "dominant_subspace",
    "fit_probe",
    "init_variational_probe",
    "posterior",
    "probe_kl",
    "probe_logits",
    "probe_loss",
    "project_out",
    "subspace_angles",
]


def __dir__():
    return __all__
