"""Tensors of a GGUF file, not read yet."""

from dataclasses import dataclass

import numpy as np

from subspace_jax.interop.gguf.blocks import BlockType
from subspace_jax.interop.safetensors_io import StoredTensor


@dataclass(frozen=True)
class BlockTensor(StoredTensor):
    """A tensor whose rows are sequences of blocks, which are decoded on access.

    ``shape`` is row-major, ``[out, in]`` of a matrix; GGUF files list the sizes in reverse.

    Attributes:
      block: Type of its blocks.
      heads: Number of heads between whose halves the rows alternate: the rotary order of llama.cpp.  Rows are read in
        the order of Hugging Face, one half of a head after the other; 0 where they are stored so.
    """

    block: BlockType
    heads: int = 0

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns the part at ``index``; blocks beside it are not decoded.

        Plain floating point is memory-mapped without a copy, unless rows alternate.

        Args:
          index: Slices of step 1, at most one for each axis.
        """
        index = (*index, *(slice(None) for _ in self.shape[len(index) :]))
        rows = self._rows(index[0])
        if self.block.decode is None:
            return super().read()[(rows, *index[1:])]
        if len(self.shape) == 1:
            return self._decoded(slice(None), slice(None))[rows]
        return self._decoded((rows, *index[1:-1]), index[-1])

    def _rows(self, rows: slice) -> slice | np.ndarray:
        if not self.heads:
            return rows
        order = np.arange(self.shape[0]).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
        return order[rows]

    def _decoded(self, leading: tuple | slice, columns: slice) -> np.ndarray:
        *outer, width = self.shape
        start, stop, _ = columns.indices(width)
        first, last = start // self.block.size, -(-stop // self.block.size)
        shape = (*outer, width // self.block.size, self.block.nbytes)
        blocks = np.memmap(self.file, np.uint8, "r", self.offset, shape)[leading][..., first:last, :]
        with np.errstate(invalid="ignore", over="ignore"):  # scales of a damaged file
            numbers = self.block.decode(np.asarray(blocks).reshape(-1, self.block.nbytes))
        numbers = numbers.reshape(*blocks.shape[:-2], (last - first) * self.block.size)
        return numbers[..., start - first * self.block.size : stop - first * self.block.size]
