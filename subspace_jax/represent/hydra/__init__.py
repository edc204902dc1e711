"""Hydra (SimLAP): contrastive learning of arbitrary class pairs in gated subspaces (arXiv 2410.18200)."""

from subspace_jax.represent.hydra.core import (
    HydraLoss,
    PairLabels,
    class_pair_gates,
    effective_rank,
    gate_penalty,
    gated_logits,
    hydra_loss,
    pair_gate,
    pair_masks,
    sample_near_partners,
    sample_partners,
)
from subspace_jax.represent.hydra.evaluate import class_gates_of_run, class_order, plot_class_gates
from subspace_jax.represent.hydra.model import HydraModel, OpenGate, PairGate, Perceptron, Projector
from subspace_jax.represent.hydra.task import HydraTask

__all__ = [
    "HydraLoss",
    "HydraModel",
    "HydraTask",
    "OpenGate",
    "PairGate",
    "PairLabels",
    "Perceptron",
    "Projector",
    "class_gates_of_run",
    "class_order",
    "class_pair_gates",
    "effective_rank",
    "gate_penalty",
    "gated_logits",
    "hydra_loss",
    "pair_gate",
    "pair_masks",
    "plot_class_gates",
    "sample_near_partners",
    "sample_partners",
]


def __dir__():
    return __all__
