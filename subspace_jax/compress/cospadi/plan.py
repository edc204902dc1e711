"""Which kernels of a language model are compressed together, and by how much."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from subspace_jax import nn
from subspace_jax.compress.cospadi.sizes import allocate, allocate_rank
from subspace_jax.nn.models.causal_lm.kernel_grams import Name, kernel_inputs

METHODS = ("cospadi", "svd-llm", "asvd", "svd", "basis-sharing")


class Unit(NamedTuple):
    """Kernels that are compressed together.

    Attributes:
      path: Path of the kernel in a layer, such as "attn/q".
      layers: The layers.
      source: Path of the first kernel with the same inputs.
      ratio: Share of the storage that is removed.
    """

    path: str
    layers: tuple[int, ...]
    source: str
    ratio: float

    @property
    def name(self) -> str:
        """Name of the unit's file."""
        return f"layer{'-'.join(f'{layer:03d}' for layer in self.layers)}.{self.path.replace('/', '.')}"

    @property
    def inputs(self) -> list[Name]:
        """The kernels at which its inputs are observed."""
        return [(layer, self.source) for layer in self.layers]


def plan_units(
    config: nn.CausalLMConfig, method: str, ratio: float, rules: Mapping[str, float] | None = None, share: int = 1
) -> list[Unit]:
    """Lists the kernels of the layers in their order; embeddings and head stay as they are.

    Args:
      config: The model.
      method: One of :data:`METHODS`.
      ratio: Share of the storage that is removed from every kernel, in (0, 1).
      rules: Other ratios, by regular expressions of which the last that is found in ``layers/LAYER/PATH`` counts, such
        as ``{"mlp/down": 0.1, r"layers/[0-3]/": 0.05}``; 0 keeps a kernel, in all layers.
      share: Consecutive layers that share a dictionary or basis, where a kernel reads the residual stream (arXiv
        2410.03765); for "cospadi" and "basis-sharing".

    Raises:
      ValueError: A name is unknown, a rule matches nothing, layers that share have different ratios, some layers of a
        kernel are kept and others not, or nothing is left of a kernel.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if share < 1 or (share > 1 and method not in ("cospadi", "basis-sharing")):
        raise ValueError(f"share: expected 1 layer, or more for 'cospadi' and 'basis-sharing', got {share}")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: expected a share removed in (0, 1), got {ratio}")
    units, used = [], set()
    for path, source in kernel_inputs(config).items():
        ratios = [_ratio_of(f"layers/{i}/{path}", ratio, rules or {}, used) for i in range(config.num_layers)]
        if not all(ratios):
            if any(ratios):
                raise ValueError(f"rules: expected {path} kept in all layers or in none, got the ratios {ratios}")
            continue
        together = share if path not in ("attn/out", "mlp/down") else 1
        for first in range(0, config.num_layers, together):
            layers = tuple(range(first, min(first + together, config.num_layers)))
            if len({ratios[i] for i in layers}) > 1:
                raise ValueError(f"rules: layers {layers} share {path}; expected one ratio, got {ratios}")
            units.append(Unit(path, layers, source, ratios[first]))
    if strays := [rule for rule in rules or {} if rule not in used]:
        raise ValueError(f"rules: no kernel such as layers/0/attn/out matches {strays}")
    if not units:
        raise ValueError("rules: keep all kernels; expected some to compress")
    for unit in units:
        _check_left(config, method, unit)
    return sorted(units, key=lambda unit: unit.layers)


def kernel_shape(config: nn.CausalLMConfig, path: str) -> tuple[int, int]:
    """Returns inputs and outputs of the kernel at a path of a layer."""
    spec = nn.causal_lm_specs(config)["layers"]
    for key in (*path.split("/"), "kernel"):
        spec = spec[key]
    return spec.shape[1:]


def _ratio_of(name: str, ratio: float, rules: Mapping[str, float], used: set[str]) -> float:
    for rule, other in rules.items():
        if re.search(rule, name):
            if not 0 <= other < 1:
                raise ValueError(f"rules: expected a share removed in [0, 1) for {rule!r}, got {other}")
            used.add(rule)
            ratio = other
    return ratio


def _check_left(config: nn.CausalLMConfig, method: str, unit: Unit) -> None:
    d1, d2 = kernel_shape(config, unit.path)
    try:
        if method == "cospadi":
            allocate(d1, d2 * len(unit.layers), unit.ratio)
        else:
            allocate_rank(d1, d2, unit.ratio, len(unit.layers))
    except ValueError as error:
        raise ValueError(f"{unit.path}: {error}") from error
