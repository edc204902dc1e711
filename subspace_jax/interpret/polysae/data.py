"""Activations whose features and interactions are known."""

from typing import NamedTuple

import numpy as np

PAIRS = ((0, 1), (2, 3), (4, 5))
_ACTIVE, _STRENGTH = 0.3, 1.5


class Planted(NamedTuple):
    """Planted activations.

    Attributes:
      inputs: Activations, ``[examples, d]`` float32.
      codes: Their true codes, ``[examples, m]`` float32.
    """

    inputs: np.ndarray
    codes: np.ndarray


def planted_pairs(
    seed: int, examples: int, d_in: int = 16, d_sae: int = 12, pairs: tuple[tuple[int, int], ...] = PAIRS
) -> Planted:
    """Draws ``x = sum_i z_i d_i + 1.5 sum_pairs z_i z_j b_ij``.

    Features are active with probability 0.3, and are 0.5 to 1.5 then; entries of ``d_i`` and ``b_ij`` are normal with
    variance ``1 / d_in``.  The truth is known: which pairs interact, and the part that no linear decoder explains.

    Args:
      seed: Seed of all draws.
      examples: Number of examples.
      d_in: Width of the activations.
      d_sae: Number of features.
      pairs: Features that interact.
    """
    rng = np.random.default_rng(seed)
    singles, products = (rng.standard_normal((n, d_in)) / np.sqrt(d_in) for n in (d_sae, len(pairs)))
    z = (rng.random((examples, d_sae)) < _ACTIVE) * (0.5 + rng.random((examples, d_sae)))
    both = np.stack([z[:, i] * z[:, j] for i, j in pairs], axis=1)
    x = z @ singles + _STRENGTH * both @ products
    return Planted(x.astype(np.float32), z.astype(np.float32))
