"""How many atoms, coefficients and ranks a compression ratio leaves, and what they take."""

import math


def allocate(d1: int, d2: int, ratio: float, rho: float = 2.0, mask: bool = False) -> tuple[int, int]:
    """Returns atoms ``k`` and coefficients of a column ``s`` of a kernel (arXiv 2509.22075, section 3.3).

    ``k = floor((1 - ratio) d1 d2 / (d1 + d2 / rho))`` and ``s = floor(k / rho)``.

    Args:
      d1: Inputs of the kernel.
      d2: Outputs, of all kernels of a group.
      ratio: Share of the storage that is removed, in (0, 1).
      rho: Atoms for each coefficient, at least 1.  At 2, two bits of every coefficient hold its mask.
      mask: Whether the mask is stored beside coefficients of 16 bits.

    Raises:
      ValueError: A size or the ratio is out of range, or nothing is left of the kernel.

    Examples:
      >>> allocate(4096, 12288, 0.2)
      (3932, 1966)
    """
    _check(d1, d2, ratio)
    if not rho >= 1:
        raise ValueError(f"rho: expected at least 1, as a column has no more coefficients than atoms, got {rho}")
    k = math.floor(_left(d1 * d2, ratio) / (d1 + d2 / rho + (d2 / 16 if mask else 0)))
    s = math.floor(k / rho)
    if k < 1 or s < 1:
        raise ValueError(f"ratio: {ratio} leaves {k} atoms and {s} coefficients of a kernel {d1} x {d2}; expected less")
    return k, s


def allocate_rank(d1: int, d2: int, ratio: float, n_layers: int = 1) -> int:
    """Returns the rank of the same storage: ``floor((1 - ratio) m d1 d2 / (d1 + m d2))`` for ``m`` layers.

    Args:
      d1: Inputs of a kernel.
      d2: Its outputs.
      ratio: Share of the storage that is removed, in (0, 1).
      n_layers: Kernels that share the basis.

    Raises:
      ValueError: A size or the ratio is out of range, or no rank is left.
    """
    _check(d1, d2, ratio)
    rank = math.floor(_left(n_layers * d1 * d2, ratio) / (d1 + n_layers * d2))
    if rank < 1:
        raise ValueError(f"ratio: {ratio} leaves no rank of a kernel {d1} x {d2}; expected less")
    return rank


def storage_bits(d1: int, d2: int, k: int, s: int, truncated: int = 2) -> int:
    """Returns the bits of a dictionary and its coefficients: bfloat16, coefficients cut by some bits, and the mask.

    Args:
      d1: Inputs of the kernel.
      d2: Outputs, of all kernels of a group.
      k: Atoms.
      s: Coefficients of a column.
      truncated: Bits cut from each coefficient; 2 pays for the mask at ``k = 2 s``.

    Examples:
      >>> storage_bits(4096, 12288, 3932, 1966) / (16 * 4096 * 12288)
      0.799967447916666...
    """
    return 16 * d1 * k + (16 - truncated) * s * d2 + k * d2


def _left(size: int, ratio: float) -> float:
    return (1 - ratio) * size


def _check(d1: int, d2: int, ratio: float) -> None:
    if d1 < 1 or d2 < 1:
        raise ValueError(f"d1, d2: expected at least 1, got {d1} and {d2}")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: expected a share removed in (0, 1), got {ratio}")
