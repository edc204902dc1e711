"""The decoupler: a probe that follows hidden states while they train, and the penalty on what it finds."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_jax.linalg import random_orthonormal
from subspace_jax.losses.decoupling.penalty import decoupling_penalty
from subspace_jax.losses.decoupling.probe import ProbeState, fit_probe, init_variational_probe, posterior
from subspace_jax.losses.decoupling.subspace import MODES, average_subspace, dominant_subspace

ONLY = ("all", "others")


class DecouplerState(NamedTuple):
    """The state of an :class:`OnlineDecoupler`: arrays that a step returns and a checkpoint holds.

    Attributes:
      states: Reservoir of the latest hidden states, ``[capacity, features]`` float32.
      labels: Their domains, ``[capacity]`` int32; -1 for free slots.
      slot: The next slot, int32.
      step: Steps that were counted, int32.
      probe: The probe and its optimizer's state.
      basis: The subspace, ``[features, dim]`` float32; zeros until the first estimate.
    """

    states: jax.Array
    labels: jax.Array
    slot: jax.Array
    step: jax.Array
    probe: ProbeState
    basis: jax.Array


@dataclass(frozen=True)
class OnlineDecoupler:
    """Estimates a domain's subspace again and again, and penalises hidden states in it (arXiv 2508.12803).

    All methods are pure, and work under ``jit``, ``vmap`` (of several layers, say) and sharded batches.  Every
    ``every`` steps the probe goes on from where it stands, on the reservoir; until the first estimate the penalty is 0.
    The probe sees states less their mean, divided by one number, their root mean square: directions stay what they are.

    Attributes:
      num_domains: Number of domains.
      target: The dominant one.
      dim: Dimension of the subspace; 0 for ``num_domains - 1``, the most, with mode "binary" one.
      mode: See :func:`dominant_subspace`; "binary" trains a probe of the target against all others, and "random" draws
        a random subspace each time, as a control.
      every: Steps between estimates; 500 in the paper.
      probe_steps: Steps of the probe for each.
      learning_rate: Of the probe, by Adam.
      capacity: Hidden states in the reservoir.
      per_step: States that each batch gives to it, at random.
      only: "all" penalises all states, as the paper does; "others" leaves those of the target free.
      smoothing: Share that the projector so far keeps in the average with the new one, see :func:`average_subspace`.

    Raises:
      ValueError: A field is out of range.
    """

    num_domains: int
    target: int
    dim: int = 0
    mode: str = "target"
    every: int = 500
    probe_steps: int = 200
    learning_rate: float = 3e-2
    capacity: int = 2048
    per_step: int = 64
    only: str = "all"
    smoothing: float = 0.0

    def __post_init__(self):
        if self.num_domains < 2:
            raise ValueError(f"num_domains: expected at least two domains, got {self.num_domains}")
        if not 0 <= self.target < self.num_domains:
            raise ValueError(f"target: expected a domain in 0 to {self.num_domains - 1}, got {self.target}")
        for name, known in (("mode", (*MODES, "random")), ("only", ONLY)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name in ("every", "probe_steps", "capacity", "per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        most = 1 if self.mode == "binary" else self.num_domains - 1
        if not 0 <= self.dim <= most:
            raise ValueError(f"dim: expected 0 to {most} for {self.num_domains} domains, got {self.dim}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected above 0, got {self.learning_rate}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing: expected a share in [0, 1), got {self.smoothing}")

    def init(self, key: jax.Array, num_features: int) -> DecouplerState:
        """Returns a fresh state for hidden states of length ``num_features``.

        Raises:
          ValueError: The subspace has more dimensions than the hidden states.
        """
        binary = self.mode == "binary"
        dim = self.dim or (1 if binary else self.num_domains - 1)
        if dim > num_features:
            raise ValueError(f"dim: expected at most the {num_features} features of the hidden states, got {dim}")
        probe = init_variational_probe(key, num_features, 2 if binary else self.num_domains)
        return DecouplerState(
            states=jnp.zeros((self.capacity, num_features), jnp.float32),
            labels=jnp.full(self.capacity, -1, jnp.int32),
            slot=jnp.int32(0),
            step=jnp.int32(0),
            probe=ProbeState(probe, self._opt.init(probe)),
            basis=jnp.zeros((num_features, dim), jnp.float32),
        )

    def observe(self, state: DecouplerState, h: jax.Array, y: jax.Array, key: jax.Array) -> DecouplerState:
        """Puts some of a batch's hidden states into the reservoir.

        Args:
          state: The state.
          h: Hidden states ``[..., features]``; a constant for derivatives.
          y: Their domains ``[...]``, integers; -1 for padding.
          key: Key of the choice.
        """
        _check_labels(h, y)
        rows, labels = jax.lax.stop_gradient(h).reshape(-1, h.shape[-1]), y.reshape(-1).astype(jnp.int32)
        count = min(self.per_step, self.capacity, len(rows))
        # Padding comes last: a draw is below 1.
        order = jax.random.uniform(key, labels.shape) + (labels >= 0).astype(jnp.float32)
        chosen = jax.lax.top_k(order, count)[1]
        slot = jnp.where(state.slot + count > self.capacity, 0, state.slot)
        return state._replace(
            states=jax.lax.dynamic_update_slice(
                state.states, rows[chosen].astype(jnp.float32), (slot, jnp.zeros_like(slot))
            ),
            labels=jax.lax.dynamic_update_slice(state.labels, labels[chosen], (slot,)),
            slot=slot + count,
        )

    def maybe_update(self, state: DecouplerState, key: jax.Array) -> DecouplerState:
        """Counts a step, and estimates the subspace anew where ``every`` divides the count.

        Args:
          state: The state; under ``vmap`` its ``step`` must not be batched, or every step pays for an estimate: see
            :meth:`due` and :meth:`update`.
          key: Key of the probe's training.
        """
        state = state._replace(step=state.step + 1)
        return jax.lax.cond(self.due(state.step), self.update, lambda state, key: state, state, key)

    def due(self, step: jax.Array) -> jax.Array:
        """Returns whether the subspace is estimated after this many steps."""
        return step % self.every == 0

    def update(self, state: DecouplerState, key: jax.Array) -> DecouplerState:
        """Estimates the subspace anew; arguments: see :meth:`maybe_update`."""
        fit_key, random_key = jax.random.split(key)
        features, dim = state.basis.shape
        filled = state.labels >= 0
        if self.mode == "random":
            probe, basis = state.probe, random_orthonormal(random_key, features, dim)
        else:
            labels, target = state.labels, self.target
            if self.mode == "binary":
                labels, target = jnp.where(filled, (labels == target).astype(jnp.int32), labels), 1
            probe = fit_probe(fit_key, state.probe, _scaled(state.states, filled), labels, self.probe_steps, self._opt)
            basis = dominant_subspace(posterior(probe.params)[0], target, dim, mode=self.mode)
        if self.smoothing:
            basis = average_subspace(state.basis, basis, self.smoothing)
        # A reservoir of one side alone tells nothing.
        tells = jnp.any(state.labels == self.target) & jnp.any(filled & (state.labels != self.target))
        new = state._replace(probe=probe, basis=basis)
        return jax.tree.map(functools.partial(jax.lax.select, tells), new, state)

    def penalty(self, state: DecouplerState, h: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the :func:`decoupling_penalty` of a batch, a scalar; arguments: see :meth:`observe`."""
        _check_labels(h, y)
        counts = y >= 0 if self.only == "all" else (y >= 0) & (y != self.target)
        return decoupling_penalty(h, state.basis, counts)

    def share(self, state: DecouplerState, h: jax.Array, y: jax.Array) -> jax.Array:
        """Returns the mean of ``||q^T h|| / ||h||`` over a batch, a scalar; shrinking the states does not change it."""
        unit = h.astype(jnp.float32)
        unit = unit / jnp.maximum(jnp.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
        return self.penalty(state, jax.lax.stop_gradient(unit), y)

    @property
    def _opt(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)


def _check_labels(h: jax.Array, y: jax.Array) -> None:
    if y.shape != h.shape[:-1]:
        raise ValueError(f"y: expected a domain for each of the states {h.shape}, got shape {y.shape}")


def _scaled(states: jax.Array, filled: jax.Array) -> jax.Array:
    """Hidden states less their mean, with a root mean square of 1; 0 in free slots."""
    count = jnp.maximum(jnp.sum(filled), 1).astype(states.dtype)
    mean = jnp.sum(jnp.where(filled[:, None], states, 0), axis=0, keepdims=True) / count
    centered = jnp.where(filled[:, None], states - mean, 0)
    square = jnp.sum(jnp.square(centered)) / (count * states.shape[1])
    return centered * jax.lax.rsqrt(jnp.maximum(square, 1e-20))
