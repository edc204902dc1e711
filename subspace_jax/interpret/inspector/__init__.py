"""What a fine-tuning or an adapter changed in a model: ranks, directions and intruder dimensions of each weight."""

from subspace_jax.interpret.inspector.core import (
    Intruders,
    UpdateSpectrum,
    cosine_bound,
    decompose_update,
    decompose_weight,
    intruder_dimensions,
    rounding_floor,
    update_spectrum,
)
from subspace_jax.interpret.inspector.matrix import Decomposition, Rows, decompose, decompose_product
from subspace_jax.interpret.inspector.report import output_files, to_html, to_json, to_text, write_report
from subspace_jax.interpret.inspector.study import Directions, Inspection, Overlaps, WeightChange, inspect_updates

__all__ = [
    "Decomposition",
    "Directions",
    "Inspection",
    "Intruders",
    "Overlaps",
    "Rows",
    "UpdateSpectrum",
    "WeightChange",
    "cosine_bound",
    "decompose",
    "decompose_product",
    "decompose_update",
    "decompose_weight",
    "inspect_updates",
    "intruder_dimensions",
    "output_files",
    "rounding_floor",
    "to_html",
    "to_json",
    "to_text",
    "update_spectrum",
    "write_report",
]
