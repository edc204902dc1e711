"""Generation token by token, for those who read along."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.nn.models.causal_lm.config import CausalLMConfig
from subspace_jax.nn.models.causal_lm.generate import Options, next_token, prepare, read_prompt

PyTree = Any


def stream(config: CausalLMConfig, params: PyTree, tokens: jax.Array, **options: Any) -> Iterator[np.ndarray]:
    """Yields the tokens of :func:`generate` one step at a time, until every text has ended.

    One program reads the prompts, another one takes a step; the host waits for each token.

    Args:
      config: The model.
      params: Its parameters; kernels may be structured.
      tokens: Prompts ``[batch, length]``, padded on either side.
      **options: Those of :func:`generate`, of which ``max_new_tokens`` is required.

    Returns:
      An iterator over arrays ``[batch]`` int32; an end token is among them, and padding follows it.

    Raises:
      ValueError: As for :func:`generate`, before the first token.
    """
    decoding, valid, sampling = prepare(config, params, tokens, Options(**options))
    return _steps(config, decoding, params, tokens.astype(jnp.int32), valid, sampling)


def _steps(config, decoding, params, tokens, valid, sampling) -> Iterator[np.ndarray]:
    state = _read(config, decoding, params, tokens, valid, sampling)
    yield np.array(state.token)  # a copy: the next step donates the state
    while state.step < decoding.max_new_tokens and not np.all(state.done):
        state = _step(config, decoding, params, sampling, state)
        yield np.array(state.token)


_read = jax.jit(read_prompt, static_argnums=(0, 1))
_step = jax.jit(next_token, static_argnums=(0, 1), donate_argnums=4)
