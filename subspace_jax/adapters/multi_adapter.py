"""Several adapters on one model: selected by each example of a batch, or added up."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from subspace_jax import linalg, nn
from subspace_jax.adapters.api import PyTree, Rules, bases_of, replace_at, settings_of
from subspace_jax.adapters.config import AdapterConfig, Arrays
from subspace_jax.adapters.rules import adapters_of, insert
from subspace_jax.adapters.structured import StructuredWeight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MultiAdapterWeight(StructuredWeight):
    """A frozen weight with several updates, of which each example of a batch selects one.

    Attributes:
      base: ``[..., in, out]``.
      a: ``[..., n, in, r]``.
      b: ``[..., n, r, out]``, times its scale.
      indices: ``[..., batch]``, the update of each example; -1 for none.
      gain: ``[..., n, out]``, magnitude over norm of DoRA, otherwise None.
    """

    base: jax.Array | StructuredWeight
    a: jax.Array
    b: jax.Array
    indices: jax.Array
    gain: jax.Array | None = None

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W`` for ``x [batch, ..., in]``, with the W of each example."""
        self._check(x, "x")
        inner = jnp.einsum("z...i,zir->z...r", x, self._selected(self.a, x.dtype))
        return self._joined(
            nn.linear(x, self.base), jnp.einsum("z...r,zro->z...o", inner, self._selected(self.b, x.dtype))
        )

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens ``[batch, ...]``, with the update of each example."""
        self._check(tokens, "tokens")
        which = jnp.broadcast_to(self.indices.reshape(-1, *(1,) * (tokens.ndim - 1)), tokens.shape)
        inner = self.a.at[which, tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        inner = jnp.where((which < 0)[..., None], 0, inner).astype(dtype)
        update = jnp.einsum("z...r,zro->z...o", inner, self._selected(self.b, dtype))
        return self._joined(nn.embed(tokens, self.base, dtype), update)

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T`` for ``x [batch, ..., out]``, with the W of each example."""
        self._check(x, "x")
        if self.gain is not None:
            gains = self._gains(x.ndim)
            x = (x.astype(gains.dtype) * gains).astype(x.dtype)
        inner = jnp.einsum("z...o,zro->z...r", x, self._selected(self.b, x.dtype))
        return nn.unembed(x, self.base) + jnp.einsum("z...r,zir->z...i", inner, self._selected(self.a, x.dtype))

    def _selected(self, stack: jax.Array, dtype: DTypeLike) -> jax.Array:
        """The entry of a stack for each example: NaN for an index out of range, zeros for -1."""
        selected = stack.at[self.indices].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        none = (self.indices < 0).reshape(-1, *(1,) * (stack.ndim - 1))
        return jnp.where(none, 0, selected).astype(dtype)

    def _gains(self, ndim: int) -> jax.Array:
        gains = self._selected(self.gain, self.gain.dtype)
        gains = jnp.where((self.indices < 0)[:, None], 1, gains)
        return jnp.expand_dims(gains, tuple(range(1, ndim - 1)))

    def _joined(self, base: jax.Array, update: jax.Array) -> jax.Array:
        if self.gain is None:
            return base + update
        # As in kernels.dora_compose: accurate for a gain near 1, and exact for 1.
        gains = self._gains(base.ndim)
        wide, own = base.astype(gains.dtype), update.astype(gains.dtype)
        return (wide + ((gains - 1) * wide + gains * own)).astype(base.dtype)

    def _check(self, x: jax.Array, name: str) -> None:
        if x.ndim < 1 or x.shape[:1] != self.indices.shape:
            raise ValueError(
                f"{name}: expected [{self.indices.shape[0]}, ...] for indices {self.indices.shape}, got {x.shape}"
            )


def bind_multi_adapter(
    params: PyTree, trainables: Sequence[PyTree], settings: Rules | Sequence[Rules], indices: jax.Array
) -> PyTree:
    """Binds several adapters at once; each example of a batch selects its own, to serve many users.

    The frozen matmul is computed once for the batch; the factors of each example are gathered, and the updates are two
    batched matmuls.  This holds the factors of all n adapters, and computes the norms of DoRA: bind once, and set the
    indices of each batch by :func:`with_adapter_indices`.

    Adapters may differ in rank, in alpha and, for LoRA, in the weights that they name; factors are padded with zeros.

    Args:
      params: The frozen tree.
      trainables: Adapters of :func:`init`, LoRA or DoRA.
      settings: Their rules: one mapping for all, or one for each.
      indices: Integers ``[batch]``, the adapter of each example: from 0, or -1 for the model without one.  An index out
        of range gives NaN.

    Returns:
      ``params`` with structured weights, for activations ``[batch, ...]``.

    Raises:
      ValueError: There are no adapters, methods differ on one weight or are neither LoRA nor DoRA of a matrix or table,
        or :func:`bind` would raise.
      TypeError: ``indices`` are not integers.
    """
    each = _rules_of(trainables, settings)
    if not jnp.issubdtype(indices.dtype, jnp.integer) or indices.ndim != 1:
        raise TypeError(f"indices: expected integers [batch], got {indices.dtype}{indices.shape}")
    found = [_parts(trainable, own) for trainable, own in zip(trainables, each, strict=True)]
    at, new = bases_of(params), {}
    for path in dict.fromkeys(path for parts in found for path in parts):
        if path not in at:
            raise ValueError(f"params: have no weights for the adapters [{path!r}]")
        new[path] = _stacked(path, at[path], [parts.get(path) for parts in found], indices)
    return replace_at(params, new)


def with_adapter_indices(params: PyTree, indices: jax.Array) -> PyTree:
    """Replaces the indices of bound parameters by those of another batch.

    Args:
      params: Parameters of :func:`bind_multi_adapter`.
      indices: Integers ``[batch]``, see there; the batch size may differ.

    Returns:
      ``params`` with these indices.

    Raises:
      ValueError: ``params`` have no weight with several adapters.
    """

    def put(x):
        if not _is_multi(x):
            return x
        return replace(x, indices=jnp.broadcast_to(indices, (*x.indices.shape[:-1], *indices.shape)))

    if not any(map(_is_multi, jax.tree.leaves(params, is_leaf=_is_multi))):
        raise ValueError("params: expected those of bind_multi_adapter, got none of its weights")
    return jax.tree.map(put, params, is_leaf=_is_multi)


def combine(
    trainables: Sequence[PyTree], settings: Rules | Sequence[Rules], weights: Sequence[ArrayLike]
) -> tuple[PyTree, Rules]:
    """Returns the weighted sum of adapters: its update of every weight is the sum of theirs, exactly.

    Ranks add up for LoRA, whose factors are concatenated; for SVFit the changes of the singular values are added, so
    that all have to be of one prepared tree.  DoRA is not linear in its arrays: merge it instead.

    Args:
      trainables: Adapters.
      settings: Their rules: one mapping for all, or one for each.
      weights: A number for each, of any sign.

    Returns:
      The combined adapter, and its rules.

    Raises:
      ValueError: There are no adapters, as many weights are not given, or a method is not linear.
    """
    each = _rules_of(trainables, settings)
    if len(weights) != len(trainables):
        raise ValueError(f"weights: expected {len(trainables)}, one for each adapter, got {len(weights)}")
    found = [_parts(trainable, own) for trainable, own in zip(trainables, each, strict=True)]
    combined: dict[str, Any] = {}
    rules: dict[re.Pattern, Any] = {}
    for path in dict.fromkeys(path for parts in found for path in parts):
        own = [(*parts[path], w) for parts, w in zip(found, weights, strict=True) if path in parts]
        configs, arrays, numbers = zip(*own, strict=True)
        kinds = {type(config) for config in configs}
        method = kinds.pop() if len(kinds) == 1 else AdapterConfig
        try:
            config, made = method.combine(configs, arrays, numbers)
        except ValueError as error:
            raise ValueError(f"settings: {path}: {error}") from error
        insert(combined, path, made)
        rules[re.compile(re.escape(path))] = config
    return combined, rules


def _is_multi(x: Any) -> bool:
    return isinstance(x, MultiAdapterWeight)


def _rules_of(trainables: Sequence[PyTree], settings: Rules | Sequence[Rules]) -> Sequence[Rules]:
    if not trainables:
        raise ValueError("trainables: expected at least one adapter, got none")
    each = settings if isinstance(settings, Sequence) else [settings] * len(trainables)
    if len(each) != len(trainables):
        raise ValueError(f"settings: expected one for all or {len(trainables)}, got {len(each)}")
    return each


def _parts(trainable: PyTree, settings: Rules) -> dict[str, tuple[AdapterConfig, Arrays]]:
    arrays = adapters_of(trainable)
    return {path: (config, arrays[path]) for path, config in settings_of(trainable, settings).items()}


def _stacked(
    path: str, base: Any, parts: Sequence[tuple[AdapterConfig, Arrays] | None], indices: jax.Array
) -> MultiAdapterWeight:
    """Stacks the factors of adapters of one weight, None for an adapter that does not name it."""
    refused = [config for config, _ in filter(None, parts) if not config.per_example]
    if refused:
        raise ValueError(
            f"settings: {path}: expected LoRA or DoRA of a matrix or table; {refused[0]} can't be selected by example"
        )
    factors = [None if part is None else part[0].low_rank_update(base, part[1]) for part in parts]
    gains = [None if own is None else own.gain for own in factors]
    if any(g is None for g in gains) and any(g is not None for g in gains):
        named = ["none" if part is None else part[0].method for part in parts]
        raise ValueError(
            f"settings: {path}: DoRA can't be mixed with LoRA, or with an adapter that does not name this weight; got "
            f"{named}"
        )
    lead, (inputs, outputs) = base.shape[:-2], base.shape[-2:]
    width = max(own.a.shape[-1] for own in factors if own is not None)
    dtype = linalg.working_dtype(base)

    def padded(x: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
        if x is None:
            return jnp.zeros((*lead, *shape), dtype)
        short = [(0, wanted - size) for wanted, size in zip(shape, x.shape[-2:], strict=True)]
        return jnp.pad(x.astype(dtype), [(0, 0)] * len(lead) + short)

    # Behind the axes of stacked layers, over which a scan goes.
    a = jnp.stack([padded(own and own.a, (inputs, width)) for own in factors], len(lead))
    b = jnp.stack([padded(own and own.b, (width, outputs)) for own in factors], len(lead))
    gain = None if gains[0] is None else jnp.stack(gains, len(lead))
    return MultiAdapterWeight(base, a, b, jnp.broadcast_to(indices, (*lead, *indices.shape)), gain)
