"""Several adapters on one model: chosen by each row of a batch, or added up."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from subspace_jax import linalg, nn
from subspace_jax.adapters.api import PyTree, Rules, bases_of, replace_at, settings_of
from subspace_jax.adapters.dora import DoRA
from subspace_jax.adapters.lora import LoRA
from subspace_jax.adapters.quantized import Int8Weight
from subspace_jax.adapters.rules import adapters_of, insert
from subspace_jax.adapters.svfit import SVFit


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MultiWeight:
    """A frozen weight with several updates, of which each row of a batch takes one.

    Attributes:
      base: ``[..., in, out]``.
      a: ``[..., n, in, r]``.
      b: ``[..., n, r, out]``, times its scale.
      rows: ``[..., batch]``, which update each row takes; -1 for none.
      gain: ``[..., n, out]``, magnitude over norm where updates are DoRA's, otherwise None.
    """

    base: jax.Array | Int8Weight
    a: jax.Array
    b: jax.Array
    rows: jax.Array
    gain: jax.Array | None = None

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W`` for ``x [batch, ..., in]``, with the W of each row."""
        self._check(x, "x")
        inner = jnp.einsum("z...i,zir->z...r", x, self._taken(self.a, x.dtype))
        return self._joined(
            nn.linear(x, self.base), jnp.einsum("z...r,zro->z...o", inner, self._taken(self.b, x.dtype))
        )

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens ``[batch, ...]``, each with the update of its row of the batch."""
        self._check(tokens, "tokens")
        which = jnp.broadcast_to(self.rows.reshape(-1, *(1,) * (tokens.ndim - 1)), tokens.shape)
        inner = self.a.at[which, tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        # A row without an adapter looks into none.
        inner = jnp.where((which < 0)[..., None], 0, inner).astype(dtype)
        update = jnp.einsum("z...r,zro->z...o", inner, self._taken(self.b, dtype))
        return self._joined(nn.embed(tokens, self.base, dtype), update)

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T`` for ``x [batch, ..., out]``, with the W of each row."""
        self._check(x, "x")
        if self.gain is not None:
            gains = self._gains(x.ndim)
            x = (x.astype(gains.dtype) * gains).astype(x.dtype)
        inner = jnp.einsum("z...o,zro->z...r", x, self._taken(self.b, x.dtype))
        return nn.unembed(x, self.base) + jnp.einsum("z...r,zir->z...i", inner, self._taken(self.a, x.dtype))

    def _taken(self, stack: jax.Array, dtype: DTypeLike) -> jax.Array:
        """What each row takes of a stack: NaN for an adapter that isn't there, zeros for none."""
        taken = stack.at[self.rows].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        none = (self.rows < 0).reshape(-1, *(1,) * (stack.ndim - 1))
        return jnp.where(none, 0, taken).astype(dtype)

    def _gains(self, ndim: int) -> jax.Array:
        gains = self._taken(self.gain, self.gain.dtype)
        gains = jnp.where((self.rows < 0)[:, None], 1, gains)
        return jnp.expand_dims(gains, tuple(range(1, ndim - 1)))

    def _joined(self, base: jax.Array, update: jax.Array) -> jax.Array:
        if self.gain is None:
            return base + update
        # As DoRA composes: nothing is lost where the gain is near 1, and nothing changes where it is 1.
        gains = self._gains(base.ndim)
        wide, own = base.astype(gains.dtype), update.astype(gains.dtype)
        return (wide + ((gains - 1) * wide + gains * own)).astype(base.dtype)

    def _check(self, x: jax.Array, name: str) -> None:
        if x.ndim < 1 or x.shape[:1] != self.rows.shape:
            raise ValueError(f"{name}: expected [{self.rows.shape[0]}, ...] for rows {self.rows.shape}, got {x.shape}")


def bind_many(
    params: PyTree, trainables: Sequence[PyTree], settings: Rules | Sequence[Rules], rows: jax.Array
) -> PyTree:
    """Puts several adapters into a model at once, each row of a batch with its own: for serving many users.

    The frozen product is made once for the whole batch; each row's factors are gathered, and the updates of all rows
    are two batched products.  For n adapters this holds n times their factors, and DoRA's norms are computed here: bind
    once, and give each batch its rows by :func:`with_rows`.

    Adapters may differ in rank, in alpha and, for LoRA, in which weights they name; factors are filled up with zeros.

    Args:
      params: The frozen tree.
      trainables: Adapters, LoRA or DoRA, of :func:`init`.
      settings: Their rules: one for all, or one for each.
      rows: Integers ``[batch]``, which adapter each row takes: from 0, or -1 for the model without one.  An adapter
        that isn't there gives NaN.

    Returns:
      ``params`` with structured weights, for activations ``[batch, ...]``.

    Raises:
      ValueError: There are no adapters, methods differ on one weight or are neither LoRA nor DoRA of a matrix or table,
        or :func:`bind` would raise.
      TypeError: ``rows`` are not integers.
    """
    each = _rules_of(trainables, settings)
    if not jnp.issubdtype(rows.dtype, jnp.integer) or rows.ndim != 1:
        raise TypeError(f"rows: expected integers [batch], got {rows.dtype}{rows.shape}")
    found = [_parts(trainable, own) for trainable, own in zip(trainables, each, strict=True)]
    at, new = bases_of(params), {}
    for path in dict.fromkeys(path for parts in found for path in parts):
        if path not in at:
            raise ValueError(f"params: have no weights for the adapters [{path!r}]")
        new[path] = _stacked(path, at[path], [parts.get(path) for parts in found], rows)
    return replace_at(params, new)


def with_rows(params: PyTree, rows: jax.Array) -> PyTree:
    """Gives bound parameters the rows of another batch.

    Args:
      params: Of :func:`bind_many`.
      rows: Integers ``[batch]``, see there; the size of the batch may be another.

    Returns:
      ``params`` with these rows.

    Raises:
      ValueError: There is no weight with several adapters in them.
    """

    def put(x):
        if not _is_many(x):
            return x
        return replace(x, rows=jnp.broadcast_to(rows, (*x.rows.shape[:-1], *rows.shape)))

    if not any(map(_is_many, jax.tree.leaves(params, is_leaf=_is_many))):
        raise ValueError("params: expected those of bind_many, got none of its weights")
    return jax.tree.map(put, params, is_leaf=_is_many)


def combine(
    trainables: Sequence[PyTree], settings: Rules | Sequence[Rules], weights: Sequence[ArrayLike]
) -> tuple[PyTree, Rules]:
    """Adds adapters up, each times a number: its update of every weight is that sum, exactly.

    Ranks add up for LoRA, whose factors are put side by side; of SVFit the changes of the singular values are added,
    so all have to be of one prepared tree.  DoRA is not linear in its arrays: merge it instead.

    Args:
      trainables: Adapters.
      settings: Their rules: one for all, or one for each.
      weights: A number for each, of any sign.

    Returns:
      The combined adapter, and its rules.

    Raises:
      ValueError: There are no adapters, numbers are not as many, or a method can't be added up.
    """
    each = _rules_of(trainables, settings)
    if len(weights) != len(trainables):
        raise ValueError(f"weights: expected {len(trainables)}, one for each adapter, got {len(weights)}")
    found = [_parts(trainable, own) for trainable, own in zip(trainables, each, strict=True)]
    combined: dict[str, Any] = {}
    rules: dict[re.Pattern, Any] = {}
    for path in dict.fromkeys(path for parts in found for path in parts):
        own = [(*parts[path], w) for parts, w in zip(found, weights, strict=True) if path in parts]
        chosen = [setting for setting, _, _ in own]
        if all(isinstance(s, SVFit) and s.param == "linear" for s in chosen) and len(set(chosen)) == 1:
            arrays = {"delta": sum(jnp.asarray(w, x["delta"].dtype) * x["delta"] for _, x, w in own)}
            setting = chosen[0]
        elif all(isinstance(s, LoRA) for s in chosen) and len({(s.window, s.groups) for s in chosen}) == 1:
            if chosen[0].groups > 1:
                raise ValueError(f"settings: {path}: updates of grouped convolutions can't be put side by side")
            # What is kept of each scale goes into b, so that the sum has a scale of one.
            b = [jnp.asarray(w, x["b"].dtype) * _scaled(s, x["b"]) for s, x, w in own]
            arrays = {"a": jnp.concatenate([x["a"] for _, x, _ in own], -1), "b": jnp.concatenate(b, -2)}
            rank = arrays["a"].shape[-1]
            setting = LoRA(rank, float(rank), window=chosen[0].window)
        else:
            raise ValueError(f"settings: {path}: only LoRA, or one linear SVFit, can be added up; got {chosen}")
        insert(combined, path, arrays)
        rules[re.compile(re.escape(path))] = setting
    return combined, rules


def _is_many(x: Any) -> bool:
    return isinstance(x, MultiWeight)


def _rules_of(trainables: Sequence[PyTree], settings: Rules | Sequence[Rules]) -> Sequence[Rules]:
    if not trainables:
        raise ValueError("trainables: expected at least one adapter, got none")
    each = settings if isinstance(settings, Sequence) else [settings] * len(trainables)
    if len(each) != len(trainables):
        raise ValueError(f"settings: expected one for all or {len(trainables)}, got {len(each)}")
    return each


def _parts(trainable: PyTree, settings: Rules) -> dict[str, tuple[Any, dict[str, jax.Array]]]:
    arrays = adapters_of(trainable)
    return {path: (setting, arrays[path]) for path, setting in settings_of(trainable, settings).items()}


def _stacked(path: str, base: Any, parts: Sequence[tuple | None], rows: jax.Array) -> MultiWeight:
    _check_mixture(path, [None if part is None else part[0] for part in parts])
    lead, (inputs, outputs) = base.shape[:-2], base.shape[-2:]
    width = max(arrays["a"].shape[-1] for _, arrays in filter(None, parts))
    dtype = linalg.working_dtype(base)
    a, b, gains = [], [], []
    for part in parts:
        if part is None:
            a.append(jnp.zeros((*lead, inputs, width), dtype))
            b.append(jnp.zeros((*lead, width, outputs), dtype))
            continue
        setting, arrays = part
        short = width - arrays["a"].shape[-1]
        still = [(0, 0)] * len(lead)
        a.append(jnp.pad(arrays["a"].astype(dtype), [*still, (0, 0), (0, short)]))
        b.append(jnp.pad(_scaled(setting, arrays["b"]).astype(dtype), [*still, (0, short), (0, 0)]))
        if isinstance(setting, DoRA):
            gains.append(setting.bind(base, arrays).gain)
    # Behind the axes of stacked layers, over which a scan goes.
    a, b = (jnp.stack(x, len(lead)) for x in (a, b))
    gain = jnp.stack(gains, len(lead)) if gains else None
    return MultiWeight(base, a, b, jnp.broadcast_to(rows, (*lead, *rows.shape)), gain)


def _check_mixture(path: str, settings: Sequence[Any]) -> None:
    """Raises unless the rows of a batch can choose between these adapters of one weight, None for one without."""
    named = ["none" if s is None else type(s).__name__ for s in settings]
    windows = [i for i, s in enumerate(settings) if getattr(s, "window", 0)]
    refused = sorted(set(named) - {"LoRA", "DoRA", "none"})
    if windows:
        why = f"convolutions can't be chosen by row, as numbers {windows} are"
    elif refused:
        why = f"{' and '.join(refused)} can't be chosen by row"
    elif "DoRA" in named and set(named) != {"DoRA"}:
        why = "DoRA can't be mixed with LoRA, or with an adapter that leaves this weight out"
    else:
        return
    raise ValueError(
        f"settings: {path}: expected LoRA, or DoRA in every adapter, of a matrix or table; {why}; got {named}"
    )


def _scaled(setting: LoRA | DoRA, b: jax.Array) -> jax.Array:
    scale = jnp.asarray(setting.scale, b.dtype)
    return scale.reshape(*scale.shape, *(1,) * (b.ndim - scale.ndim)) * b if scale.ndim else scale * b
