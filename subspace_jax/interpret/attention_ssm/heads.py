"""Heads with coefficients of the lag alone, applied by a matrix, by FFT, or by a recurrence."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.interpret.attention_ssm._checks import check_tokens
from subspace_jax.interpret.attention_ssm.ssm import einsum
from subspace_jax.linalg import working_dtype

MODES = ("toeplitz", "fft", "recurrent")
# Tokens of a chunk of the recurrence, fewest and most, and frequencies that are mixed at a time.
_CHUNK, _FREQUENCIES = (16, 128), 1024


class Modes(NamedTuple):
    """Recurrences of heads: ``coef[l, h] = Re(phase_h decay_h^l)``, and ``direct_h`` more at lag 0.

    Attributes:
      decay: ``[k]`` complex.
      phase: ``[k]`` complex.
      direct: ``[k]`` real.
    """

    decay: jax.Array
    phase: jax.Array
    direct: jax.Array


class HeadBank(NamedTuple):
    """Heads ``y_i = sum_h sum_j coef[i - j, h] values[h] x_j``.

    Attributes:
      coef: Coefficients by lag, ``[n, k]`` from lag 0; ``[2 n - 1, k]`` from lag ``1 - n`` where tokens see later ones.
      values: Operators, ``[k, p, d]``, which act on columns.
      modes: The recurrences that the coefficients follow, or None.
    """

    coef: jax.Array
    values: jax.Array
    modes: Modes | None = None


def apply_heads(
    bank: HeadBank, x: jax.Array, mode: str = "fft", *, causal: bool = True, axis_name: str | None = None
) -> jax.Array:
    """Applies heads to tokens.

    "toeplitz" forms the matrices ``[k, n, n]`` of the heads, as a reference.  "fft" takes ``k n p d`` multiplications
    and ``(d + p) n log n`` for the transforms.  "recurrent" takes ``k n p d``, in memory that does not grow with ``n``
    beside tokens and outputs: chunks of 16 to 128 tokens by matmuls, with a state ``[k, p]`` between them.  Arrays
    sharded over the batch or over heads stay so.

    Args:
      bank: The heads.
      x: Tokens ``[..., n, d]``, at most as many as the bank has lags; of any number for "recurrent".
      mode: "toeplitz", "fft" or "recurrent", which needs ``bank.modes``.
      causal: Whether the coefficients are those of lags from 0; otherwise of lags of both signs, see
        :class:`HeadBank`.
      axis_name: Within ``jax.shard_map``, for "recurrent": the axis over which the sequence is sharded.  Devices
        exchange one state each.

    Returns:
      ``[..., n, p]`` in the dtype of ``x``; computed in at least float32.

    Raises:
      ValueError: ``mode`` is unknown or does not serve the bank, shapes don't match, or there are more tokens than
        lags.
    """
    _check(bank, x, mode, causal, axis_name)
    n, dtype = x.shape[-2], working_dtype(x)
    tokens, values = x.astype(dtype), bank.values.astype(dtype)
    if mode == "recurrent":
        to = np.result_type(dtype, np.complex64)
        modes = Modes(bank.modes.decay.astype(to), bank.modes.phase.astype(to), bank.modes.direct.astype(dtype))
        return _recurrent(modes, values, tokens, axis_name).astype(x.dtype)
    coef = bank.coef.astype(dtype)
    if causal:
        coef = jnp.concatenate([jnp.zeros((n - 1, coef.shape[1]), dtype), coef[:n]])
    else:
        middle = len(coef) // 2
        coef = coef[middle - n + 1 : middle + n]
    return (_toeplitz if mode == "toeplitz" else _fft)(coef, values, tokens).astype(x.dtype)


def coefficients_of(modes: Modes, n: int) -> jax.Array:
    """Returns the coefficients of recurrences at lags 0 to ``n - 1``, ``[n, k]``."""
    lags = jnp.arange(n, dtype=jnp.int32)
    coef = jnp.real(modes.phase[None] * _powers(modes.decay, lags))
    return coef.at[0].add(modes.direct.astype(coef.dtype))


def _check(bank: HeadBank, x: jax.Array, mode: str, causal: bool, axis_name: str | None) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
    coef, values, modes = bank
    if values.ndim != 3 or coef.ndim != 2 or coef.shape[1] != values.shape[0]:
        raise ValueError(f"bank: expected coef [n, k] and values [k, p, d], got {coef.shape} and {values.shape}")
    check_tokens(x, values.shape[2])
    if axis_name is not None and mode != "recurrent":
        raise ValueError(f"axis_name: a sequence is sharded for the mode 'recurrent' only, got {mode!r}")
    if mode == "recurrent":
        if not causal:
            raise ValueError("mode: 'recurrent' is for causal heads; expected 'toeplitz' or 'fft' without causal")
        if modes is None:
            raise ValueError("bank: expected modes for 'recurrent', as banks of basis 'modal' have them, got None")
        return
    if not causal and len(coef) % 2 == 0:
        raise ValueError(f"bank: expected coef [2 n - 1, k] for lags of both signs, got {len(coef)} of them")
    lags = len(coef) if causal else (len(coef) + 1) // 2
    if x.shape[-2] > lags:
        raise ValueError(f"x: expected at most {lags} tokens, as many as the bank has lags, got {x.shape[-2]}")


@jax.jit
def _toeplitz(coef: jax.Array, values: jax.Array, x: jax.Array) -> jax.Array:
    n = x.shape[-2]
    lag = np.arange(n)[:, None] - np.arange(n)[None, :]
    return einsum("ijk,...jkp->...ip", coef[lag + n - 1], einsum("...nd,kpd->...nkp", x, values))


@jax.jit
def _fft(coef: jax.Array, values: jax.Array, x: jax.Array) -> jax.Array:
    n = x.shape[-2]
    filters = jnp.fft.rfft(coef, 2 * n, axis=0)
    spectrum = jnp.moveaxis(jnp.fft.rfft(x, 2 * n, axis=-2), -2, 0)

    def mix(own):
        gains, tokens = own
        parts = einsum("z...d,kpd->z...kp", jnp.stack([tokens.real, tokens.imag]), values)
        return einsum("k,...kp->...p", gains, jax.lax.complex(*parts))

    # Some frequencies at a time: of all of them the heads' outputs would be [n, k, p].
    if len(spectrum) <= _FREQUENCIES:
        mixed = jax.vmap(mix)((filters, spectrum))
    else:
        mixed = jax.lax.map(mix, (filters, spectrum), batch_size=_FREQUENCIES)
    y = jnp.fft.irfft(jnp.moveaxis(mixed, 0, -2), 2 * n, axis=-2)
    # The coefficients begin at lag 1 - n; what wraps around falls before n - 1.
    return y[..., n - 1 : 2 * n - 1, :]


@functools.partial(jax.jit, static_argnums=3)
def _recurrent(modes: Modes, values: jax.Array, x: jax.Array, axis_name: str | None) -> jax.Array:
    n = x.shape[-2]
    # Within a chunk a token costs k p size, which so is no more than the k p d of its values.
    size = min(n, max(_CHUNK[0], min(_CHUNK[1], x.shape[-1])))
    # Zeros before the first token change nothing, and leave the last state where it is.
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(-n % size, 0), (0, 0)])
    chunks = jnp.moveaxis(padded.reshape(*x.shape[:-2], -1, size, x.shape[-1]), -3, 0)
    lag = np.arange(size)[:, None] - np.arange(size)[None, :]
    own = coefficients_of(modes, size)
    within = jnp.where((lag >= 0)[..., None], own[np.maximum(lag, 0)], 0)
    steps = jnp.arange(size, dtype=jnp.int32)
    onward, full = _powers(modes.decay, steps + 1), _powers(modes.decay, jnp.full(1, size, jnp.int32))[0]
    backward = jnp.flip(_powers(modes.decay, steps), axis=0)

    def step(state, tokens):
        heads = einsum("...id,kpd->...ikp", tokens, values)
        y = einsum("ijk,...jkp->...ip", within, heads) + _read_state(modes, onward, state)
        # Real and imaginary parts by themselves: the heads' outputs are real.
        parts = einsum("zik,...ikp->z...kp", jnp.stack([backward.real, backward.imag]), heads)
        return _along_heads(full, state) * state + jax.lax.complex(*parts), y

    # Made of tokens, so that under shard_map it varies over the same mesh axes.
    nothing = (0 * chunks[0][..., :1, :1]).astype(onward.dtype)
    start = jnp.broadcast_to(nothing, (*x.shape[:-2], *values.shape[:2]))
    state, ys = jax.lax.scan(step, start, chunks)
    y = jnp.moveaxis(ys, 0, -3).reshape(*x.shape[:-2], -1, values.shape[1])[..., -n:, :]
    if axis_name is None:
        return y
    before = _state_of_earlier_shards(modes, state, n, axis_name)
    return y + _read_state(modes, _powers(modes.decay, jnp.arange(1, n + 1, dtype=jnp.int32)), before)


def _state_of_earlier_shards(modes: Modes, state: jax.Array, n: int, axis_name: str) -> jax.Array:
    """Returns the state at the start of a device's part of the sequence, from the last states of all parts."""
    states = jax.lax.all_gather(state, axis_name)
    parts_back = jax.lax.axis_index(axis_name).astype(jnp.int32) - 1 - jnp.arange(len(states), dtype=jnp.int32)
    gain = _powers(modes.decay, n * jnp.maximum(parts_back, 0))
    gain = jnp.where((parts_back >= 0)[:, None], gain, 0)
    return einsum("rk,r...kp->...kp", gain, states)


def _read_state(modes: Modes, powers: jax.Array, state: jax.Array) -> jax.Array:
    """Returns what a state ``[..., k, p]`` adds to the outputs that follow it, ``[..., n, p]``."""
    gain = modes.phase[None] * powers
    real, imag = (einsum("ik,...kp->...ip", part(gain), part(state)) for part in (jnp.real, jnp.imag))
    return real - imag


def _along_heads(x: jax.Array, state: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x[:, None], state.shape)


def _powers(decay: jax.Array, lags: jax.Array) -> jax.Array:
    """Returns ``decay^l``, ``[lags, k]`` complex, by logarithms; ``0^0`` is 1."""
    real = working_dtype(jnp.real(decay))
    size, angle = jnp.abs(decay).astype(real), jnp.angle(decay).astype(real)
    steps = lags.astype(real)[:, None]
    log_size = jnp.log(jnp.where(size > 0, size, 1))[None]
    magnitude = jnp.exp(steps * log_size)
    magnitude = jnp.where((size > 0)[None], magnitude, jnp.where(steps == 0, 1.0, 0.0).astype(real))
    turn = steps * angle[None]
    return jax.lax.complex(magnitude * jnp.cos(turn), magnitude * jnp.sin(turn))
