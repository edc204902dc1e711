"""Rows of a weight per chunk, by the published rule."""

_MIB = 1 << 20


def norm_chunk_size(
    out_size: int, in_size: int, rank: int, itemsize: int, budget_bytes: int = 256 * _MIB, align: int = 64
) -> int:
    """Returns the rows of one chunk of the factored norm, such that float32 copies fit into a budget.

    Source: arXiv 2603.22276, by its code.

    Args:
      out_size: Output features.
      in_size: Input features.
      rank: Rank of the update.
      itemsize: Bytes of an element of the type of computation.
      budget_bytes: From 16 MiB to 65536 MiB.
      align: A chunk above this is rounded down to a multiple of it; 1 for none.

    Returns:
      A number from 1 to ``in_size``.

    Raises:
      TypeError: ``budget_bytes`` is no integer.
      ValueError: It is out of range, or a size is not positive.
    """
    check_budget(budget_bytes)
    if min(out_size, in_size, rank, itemsize, align) < 1:
        raise ValueError(
            "out_size, in_size, rank, itemsize, align: expected positive numbers, got "
            f"{(out_size, in_size, rank, itemsize, align)}"
        )
    constant = (out_size * rank + rank * rank) * itemsize
    for_a_row = (out_size + rank) * itemsize
    if constant + for_a_row * in_size <= budget_bytes:
        return in_size
    if budget_bytes <= constant:
        return 1
    chunk = min(max((budget_bytes - constant) // for_a_row, 1), in_size)
    return chunk - chunk % align if chunk > align else chunk


def check_budget(budget_bytes: int) -> None:
    """Raises unless a budget is an integer from 16 MiB to 65536 MiB."""
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int):
        raise TypeError(f"budget_bytes: expected an integer, got {budget_bytes!r}")
    if not 16 * _MIB <= budget_bytes <= 65536 * _MIB:
        raise ValueError(f"budget_bytes: expected {16 * _MIB} (16 MiB) to {65536 * _MIB}, got {budget_bytes}")
