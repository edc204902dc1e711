"""A layer of factored attention that trains: softmax, linear, or by the lag alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from subspace_jax import nn
from subspace_jax.interpret.attention_ssm._checks import check_tokens
from subspace_jax.interpret.attention_ssm.heads import HeadBank, apply_heads
from subspace_jax.interpret.attention_ssm.rank import Factors
from subspace_jax.interpret.attention_ssm.ssm import einsum
from subspace_jax.linalg import working_dtype

KINDS = ("softmax", "linear", "toeplitz")
_CHUNK = 128


class FactorizedAttention(nnx.Module):
    """Attention ``y_i = sum_h sum_j f_h(i, j) V_h x_j`` with an operator ``V_h`` for each head.

    The coefficients are ``softmax_j(q_i . k_j / sqrt(d))``; ``phi(q_i) . phi(k_j)`` with ``phi = elu + 1``
    ("linear", linear in the length); or free parameters of ``i - j`` ("toeplitz", by FFT).  Multi-head attention with
    an output projection is the case ``V_h = W_O^h W_V^h``, of rank at most the width of a head.

    Args:
      in_features: Width of the tokens, ``d``.
      out_features: Width of the outputs, ``p``.
      heads: Number of heads; the interaction rank is at most this.
      kind: "softmax", "linear" or "toeplitz".
      causal: Whether a token sees itself and earlier ones only.
      length: Longest sequence of "toeplitz".
      rngs: Random number generators; the ``params`` stream is used.

    Raises:
      ValueError: ``kind`` is unknown, ``heads`` is below 1, or "toeplitz" has no length.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        heads: int,
        kind: str = "softmax",
        causal: bool = True,
        *,
        length: int | None = None,
        rngs: nnx.Rngs,
    ):
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
        if heads < 1:
            raise ValueError(f"heads: expected at least 1, got {heads}")
        if kind == "toeplitz" and (length is None or length < 1):
            raise ValueError(f"length: 'toeplitz' has a parameter for each lag; expected at least 1, got {length}")
        self.kind, self.causal, self.heads = kind, causal, heads
        draw = jax.nn.initializers.normal(1 / math.sqrt(in_features))
        values = draw(rngs.params(), (heads, out_features, in_features))
        self.value = nnx.Param(values, axes=("heads", None, "embed"))
        if kind == "toeplitz":
            lags = length if causal else 2 * length - 1
            coef = jax.nn.initializers.normal(1 / math.sqrt(lags))(rngs.params(), (lags, heads))
            self.coef = nnx.Param(coef, axes=(None, "heads"))
            return
        self.head_dim = in_features
        shape = (in_features, heads * self.head_dim)
        self.query = nnx.Param(draw(rngs.params(), shape), axes=("embed", "heads"))
        self.key = nnx.Param(draw(rngs.params(), shape), axes=("embed", "heads"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens ``[batch, n, d]`` to ``[batch, n, p]``."""
        values = self.value.get_value()
        check_tokens(x, values.shape[2])
        if x.ndim != 3:
            raise ValueError(f"x: expected tokens [batch, n, {values.shape[2]}], got shape {list(x.shape)}")
        if self.kind == "toeplitz":
            return apply_heads(self.bank(), x, causal=self.causal)
        query, key = self._projected(x)
        value = jnp.einsum("bnd,hpd->bnhp", x, values.astype(x.dtype))
        if self.kind == "linear":
            return _linear_attention(_positive(query), _positive(key), value, self.causal).astype(x.dtype)
        # One width for queries, keys and values, which the library's attention has.
        widths = self.head_dim, value.shape[-1]
        query, key, value = (jnp.pad(y, [(0, 0)] * 3 + [(0, max(widths) - y.shape[-1])]) for y in (query, key, value))
        mixed = nn.attention(query, key, value, causal=self.causal, scale=1 / math.sqrt(self.head_dim))
        return jnp.sum(mixed[..., : widths[1]], axis=2, dtype=working_dtype(x)).astype(x.dtype)

    def bank(self) -> HeadBank:
        """Returns the heads of "toeplitz".

        Raises:
          ValueError: The layer is of another kind.
        """
        if self.kind != "toeplitz":
            raise ValueError(f"kind: only 'toeplitz' has coefficients of the lag alone, got {self.kind!r}")
        return HeadBank(self.coef.get_value(), self.value.get_value())

    def factors(self, x: jax.Array) -> Factors:
        """Returns coefficients and operators at tokens ``[n, d]``, for the study of short sequences."""
        n, dtype = len(x), working_dtype(x)
        values = self.value.get_value().astype(dtype)
        if self.kind == "toeplitz":
            coef = self.coef.get_value().astype(dtype)
            lag = np.arange(n)[:, None] - np.arange(n)[None, :]
            first = 0 if self.causal else len(coef) // 2
            own = coef[np.maximum(lag + first, 0)].transpose(2, 0, 1)
        else:
            query, key = (y[0].astype(dtype) for y in self._projected(x[None]))
            if self.kind == "linear":
                own = einsum("ihk,jhk->hij", _positive(query), _positive(key))
            else:
                own = einsum("ihk,jhk->hij", query, key) / math.sqrt(self.head_dim)
        sees = np.tril(np.ones((n, n), bool)) if self.causal else np.ones((n, n), bool)
        if self.kind == "softmax":
            return Factors(jax.nn.softmax(jnp.where(sees[None], own, -jnp.inf), axis=-1), values)
        return Factors(jnp.where(sees[None], own, 0), values)

    def _projected(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns queries and keys, ``[batch, n, heads, head_dim]``."""
        return tuple(
            nn.linear(x, kernel.get_value()).reshape(*x.shape[:-1], self.heads, self.head_dim)
            for kernel in (self.query, self.key)
        )


def _positive(x: jax.Array) -> jax.Array:
    return jax.nn.elu(x) + 1


def _linear_attention(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool) -> jax.Array:
    """Returns ``sum_h sum_j (query_i . key_j) value_j``, ``[batch, n, p]``, in time linear in ``n``."""
    dtype = working_dtype(query)
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    if not causal:
        return einsum("bihk,bhkp->bip", query, einsum("bjhk,bjhp->bhkp", key, value))
    batch, n, heads, width = query.shape
    size = min(_CHUNK, n)

    def chunked(x):
        padded = jnp.pad(x, [(0, 0), (0, -n % size), (0, 0), (0, 0)])
        return jnp.moveaxis(padded.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    within = np.tril(np.ones((size, size), bool))[None, None]

    def step(state, chunk):
        query, key, value = chunk
        coef = jnp.where(within, einsum("bihk,bjhk->bhij", query, key), 0)
        y = einsum("bhij,bjhp->bip", coef, value) + einsum("bihk,bhkp->bip", query, state)
        return state + einsum("bjhk,bjhp->bhkp", key, value), y

    start = jnp.zeros((batch, heads, width, value.shape[-1]), dtype)
    _, ys = jax.lax.scan(step, start, tuple(chunked(x) for x in (query, key, value)))
    return jnp.moveaxis(ys, 0, 1).reshape(batch, -1, value.shape[-1])[:, :n]
