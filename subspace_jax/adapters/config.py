"""The base class of adapter configs: what an adapter method defines for one weight."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

Arrays = dict[str, jax.Array]

_NO_WEIGHTS = ("scale", "bias")


class LowRankUpdate(NamedTuple):
    """What an adapter makes of a weight W: ``(W + a b) diag(gain)``, or ``W + a b`` without a gain.

    Attributes:
      a: ``[..., rows, r]``; the rows of a convolution's kernel are those of its window and inputs.
      b: ``[..., r, out]``.
      gain: ``[..., out]``, or None.
    """

    a: jax.Array
    b: jax.Array
    gain: jax.Array | None = None


class AdapterConfig:
    """Config of an adapter: how it is initialized, bound, merged and sharded.

    Subclasses are frozen dataclasses that define :meth:`initialize`, :meth:`bind`, :meth:`axes` and :meth:`unmerge`,
    and override the defaults below where they differ; :class:`LoRA` is an example.

    Attributes:
      labels: Label of each trained array, for :func:`subspace_jax.adapters.label_fn`.
      roles: Role of trained arrays in a task, "no_decay" or "probe"; see :func:`subspace_jax.adapters.roles`.
      trains_weight: Whether the parameter itself trains, and not an update of it.
      quantizable_base: Whether the frozen part may be quantized, see :func:`subspace_jax.adapters.quantize`.
      per_example: Whether :func:`subspace_jax.adapters.bind_multi_adapter` serves it.
      keeps_base: Whether the frozen part is the weight itself; otherwise the adapter needs
        :func:`subspace_jax.adapters.prepare`.
      changes_base: Whether the weight of the frozen part differs from that of the model.
      dropout: Probability with which the adapter drops an input feature in training.
      rank: Rank of the update, None where it has none.
    """

    labels: ClassVar[Mapping[str, str]] = {}
    roles: ClassVar[Mapping[str, str]] = {}
    trains_weight: ClassVar[bool] = False
    quantizable_base: ClassVar[bool] = True
    per_example = False
    keeps_base = True
    changes_base = False
    dropout = 0.0
    rank: Any

    @property
    def method(self) -> str:
        """Name of the method, for tables."""
        return type(self).__name__

    def admits(self, path: str, ndim: int) -> bool:
        """Whether the adapter may be on a parameter, given its path and number of axes."""
        return ndim >= 2 and path.split("/")[-1] not in _NO_WEIGHTS

    def initialize(
        self, key: jax.Array, w: jax.Array, *, table: bool = False, gradient: jax.Array | None = None
    ) -> tuple[Any, Arrays]:
        """Draws the adapter of one weight.

        Args:
          key: Random key.
          w: The weight ``[..., in, out]``.
          table: Whether it is an embedding table.
          gradient: Gradient of the loss with respect to the weight, if there is one.

        Returns:
          The frozen part, and the trained arrays by name.
        """
        raise NotImplementedError(f"{type(self).__name__}.initialize")

    def bind(self, base: Any, arrays: Arrays, key: jax.Array | None = None) -> Any:
        """Returns the adapted weight; ``key`` is given where ``dropout`` is positive and the model trains."""
        raise NotImplementedError(f"{type(self).__name__}.bind")

    def axes(self, names: P) -> tuple[Any, dict[str, P]]:
        """Returns the logical axes of the frozen part and of the trained arrays, from those of the weight."""
        raise NotImplementedError(f"{type(self).__name__}.axes")

    def unmerge(self, merged: jax.Array, arrays: Arrays, kept: Any) -> Any:
        """Returns the frozen part from the merged weight; ``kept`` is what :meth:`merge_state` returned."""
        raise NotImplementedError(f"{type(self).__name__}.unmerge")

    def merge_state(self, base: Any, arrays: Arrays) -> Any:
        """Returns what :meth:`unmerge` needs besides the merged weight; None by default."""
        del base, arrays

    def start_state(self, base: Any, arrays: Arrays) -> Arrays:
        """Returns what restores the frozen part from the weight; works on logical axes too.

        A run that reads the weights from a folder keeps these arrays in its checkpoints.  Empty where ``keeps_base``.
        """
        del base, arrays
        return {}

    def restore_base(self, w: jax.Array, start: Arrays) -> jax.Array:
        """Returns the array of the frozen part, from the weight and :meth:`start_state`."""
        del start
        return w

    def attach_start(self, w: jax.Array, start: Arrays) -> Any:
        """Returns the frozen part, from its array and :meth:`start_state`."""
        del start
        return w

    def low_rank_update(self, base: Any, arrays: Arrays) -> LowRankUpdate:
        """Returns what becomes of the weight of the frozen part, which only methods with a gain read.

        Raises:
          ValueError: The update is not of low rank.
        """
        raise ValueError(f"{self} has no low-rank update")

    def update_rank(self, arrays: Arrays) -> int | tuple[int, ...]:
        """Returns the rank of :meth:`low_rank_update`; a tuple has one for each layer, where lower ones are padded."""
        del arrays
        return self.rank

    @staticmethod
    def combine(
        configs: Sequence["AdapterConfig"], arrays: Sequence[Arrays], weights: Sequence[ArrayLike]
    ) -> tuple["AdapterConfig", Arrays]:
        """Returns the weighted sum of adapters of one weight, all of this class."""
        raise ValueError(f"only LoRA, or one linear SVFit, can be added up; got {list(configs)}")

    def peft_fields(self) -> dict[str, Any] | None:
        """Returns the fields of PEFT's ``LoraConfig`` for the same layer; None where PEFT has none."""
        return None
