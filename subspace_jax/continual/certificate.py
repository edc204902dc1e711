"""How far steps may have moved the layer outputs of earlier tasks, and a guard that holds them within a bound.

For a layer ``y = h W`` and the inputs ``h`` that it had at the end of an earlier task, a later kernel gives

    y' - y = h (W' - W) + (h' - h) W'.

The first term is bounded by second moments of ``h``: those inside the history ``M``, where updates have (almost) no
component, and what they leave outside.  The second is at most the spectral norm of ``W'`` times the change of inputs,
which is that of the layer below times its gain.  All changes are root mean squares over examples, of the Euclidean
norm of a layer's output over all positions; the bounds hold for the examples whose moments are stored.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.optim import _checks

GUARDS = ("off", "scale", "refuse")

# Of a bound, for the rounding of float32 sums, and the halvings that a guard tries before it refuses a step.
_SLACK = 1.001
_HALVINGS = 5
# Squarings of a Gram matrix: a spectral norm is bounded within a factor of size ** (1 / 64).
_SQUARINGS = 5

Kernels = Mapping[str, jax.Array]


class Layer(NamedTuple):
    """What is stored of one layer ``[d, n]``, for ``T`` tasks.

    Attributes:
      history: ``[d, h]``, orthonormal columns and zero columns behind them.
      owner: ``[h]``, int32: the task that a column comes from, -1 for zero columns.
      inside: ``[T]``, the root of the largest second moment of a task's inputs inside the history.
      factor: ``[T, d, k]``: its square is the main part of the second moments outside.
      rest: ``[T]``, the largest second moment in other directions.
      anchor: ``[T, d, n]``, the kernels at the end of each task.
      start: ``[d, n]``, the kernel at the start of this task.
      base: ``[T]``, the bound of the first term at that start.
    """

    history: jax.Array
    owner: jax.Array
    inside: jax.Array
    factor: jax.Array
    rest: jax.Array
    anchor: jax.Array
    start: jax.Array
    base: jax.Array


class Certificate(NamedTuple):
    """What is stored of a stream, and what the last step was found to do.

    Attributes:
      layers: :class:`Layer` by name.
      known: ``[T]``, 1 for tasks that have ended.
      norm: ``[T]``, root mean square norm of a task's features at its end.
      share: ``[T]``, of the squares of the last update the share inside the columns of each task.
      bound: ``[T]``, the bound on the change of each task's features, over ``norm``; 0 for tasks that have not ended.
      scaled: Steps that the guard made shorter, int32.
      refused: Steps that it did not take, int32.
    """

    layers: dict[str, Layer]
    known: jax.Array
    norm: jax.Array
    share: jax.Array
    bound: jax.Array
    scaled: jax.Array
    refused: jax.Array


class Ended(NamedTuple):
    """What the end of a task leaves.

    Attributes:
      task: Its position, int32.
      moments: Second moments of the inputs of each layer, ``{name: [d, d]}``: summed over positions, averaged over
        examples.
      norm: Root mean square norm of the features.
      histories: ``{name: [d, h]}``, orthonormal columns and zero columns behind them.
    """

    task: jax.Array
    moments: Mapping[str, jax.Array]
    norm: jax.Array
    histories: Mapping[str, jax.Array]


def init_certificate(kernels: Kernels, history_sizes: Mapping[str, int], num_tasks: int, rank: int = 32) -> Certificate:
    """Returns the certificate before the first task.

    Args:
      kernels: ``{name: [d, n]}`` in the order of the layers.
      history_sizes: Columns of the history of each layer.
      num_tasks: ``T``.
      rank: Columns ``k`` of the factors; exact from ``d`` on.

    Raises:
      ValueError: A number is below 1.
    """
    num_tasks, rank = (_checks.static_int(name, x, 1) for name, x in (("num_tasks", num_tasks), ("rank", rank)))
    layers = {}
    for name, kernel in kernels.items():
        d, n = kernel.shape
        columns, per_task = history_sizes[name], jnp.zeros((num_tasks,), jnp.float32)
        layers[name] = Layer(
            history=jnp.zeros((d, columns), jnp.float32),
            owner=jnp.full((columns,), -1, jnp.int32),
            inside=per_task,
            factor=jnp.zeros((num_tasks, d, min(rank, d)), jnp.float32),
            rest=per_task,
            anchor=jnp.zeros((num_tasks, d, n), jnp.float32),
            start=jnp.asarray(kernel, jnp.float32),
            base=per_task,
        )
    zeros, count = jnp.zeros((num_tasks,), jnp.float32), jnp.zeros((), jnp.int32)
    return Certificate(layers, zeros, zeros, zeros, zeros, count, count)


def input_moments(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the second moments of layers' inputs ``{name: [examples, positions, d]}``, see :class:`Ended`."""
    return {
        name: jnp.einsum("npd,npe->de", x, x, precision=jax.lax.Precision.HIGHEST) / x.shape[0]
        for name, x in inputs.items()
    }


def end_task(certificate: Certificate, kernels: Kernels, ended: Ended) -> Certificate:
    """Returns the certificate at the start of the next task.

    Args:
      certificate: That of the task that ends.
      kernels: ``{name: [d, n]}`` at its end.
      ended: Its moments and the new histories.
    """
    layers, t = {}, ended.task
    for name, layer in certificate.layers.items():
        w, history = jnp.asarray(kernels[name], jnp.float32), ended.histories[name]
        used = jnp.sum(jnp.square(history), axis=0) > 0.5
        owner = jnp.where(used & (layer.owner < 0), t, layer.owner)
        inside, factor, rest = _parts(ended.moments[name], history, layer.factor.shape[-1])
        layer = layer._replace(
            history=history,
            owner=owner,
            inside=layer.inside.at[t].set(inside),
            factor=layer.factor.at[t].set(factor),
            rest=layer.rest.at[t].set(rest),
            anchor=layer.anchor.at[t].set(w),
            start=w,
        )
        layers[name] = layer._replace(base=_base(layer, w))
    return certificate._replace(
        layers=layers,
        known=certificate.known.at[t].set(1.0),
        norm=certificate.norm.at[t].set(ended.norm),
        share=jnp.zeros_like(certificate.share),
    )


def _parts(moments: jax.Array, history: jax.Array, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Second moments inside a history, and outside it as a factor and the largest moment beside that."""
    within = linalg.gram(history, linalg.times(moments, history))
    inside = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(within)[-1], 0)) if history.shape[-1] else jnp.zeros(())
    part = moments - linalg.times(history, linalg.gram(history, moments))
    outside = part - linalg.times(linalg.times(part, history), history.T)
    values, vectors = jnp.linalg.eigh((outside + outside.T) / 2)
    values = jnp.maximum(values[::-1], 0)
    factor = vectors[:, ::-1][:, :rank] * jnp.sqrt(values[:rank])[None]
    rest = values[rank] if rank < len(values) else jnp.zeros_like(values[0])
    return inside, factor, rest


def _base(layer: Layer, kernel: jax.Array) -> jax.Array:
    """The bound of the first term for the kernels at the end of each task, against only the history of that time."""

    def of_task(inside, factor, rest, anchor, task):
        moved = kernel - anchor
        own = (layer.owner >= 0) & (layer.owner <= task)
        leak = jnp.sum(jnp.square(linalg.gram(layer.history, moved)), axis=-1)
        return inside * jnp.sqrt(jnp.sum(jnp.where(own, leak, 0))) + _outside(factor, rest, moved)

    order = jnp.arange(len(layer.rest), dtype=jnp.int32)
    return jax.vmap(of_task)(layer.inside, layer.factor, layer.rest, layer.anchor, order)


def _outside(factor: jax.Array, rest: jax.Array, moved: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(linalg.gram(factor, moved))) + rest * jnp.sum(jnp.square(moved)))


def spectral_norm_bound(x: jax.Array) -> jax.Array:
    """Returns a number that is at least the spectral norm of ``x [m, n]``, by matmuls alone.

    The root of a Schatten norm of order 64: within a factor ``min(m, n) ** (1 / 64)``.
    """
    x = x if x.shape[0] >= x.shape[1] else x.T
    power, log = linalg.gram(x, x), jnp.zeros((), x.dtype)
    for _ in range(_SQUARINGS):
        size = jnp.maximum(jnp.linalg.norm(power), 1e-30)
        power, log = linalg.times(power / size, power / size), 2 * (log + jnp.log(size))
    size = jnp.log(jnp.maximum(jnp.trace(power), 1e-30)) + log
    return jnp.exp(size / 2 ** (_SQUARINGS + 1))


def output_bounds(certificate: Certificate, kernels: Kernels, gains: Sequence[float]) -> jax.Array:
    """Returns bounds on the change of old outputs since the end of each task.

    Args:
      certificate: The certificate.
      kernels: ``{name: [d, n]}`` as they are now.
      gains: Of each layer, see :class:`subspace_jax.continual.stream.Body`.

    Returns:
      ``[T, layers + 1]``: of the outputs of each layer before the activation, and of the features; 0 for tasks that
      have not ended.
    """
    change, found = jnp.zeros_like(certificate.norm), []
    for (name, layer), gain in zip(certificate.layers.items(), gains, strict=True):
        kernel = jnp.asarray(kernels[name], jnp.float32)
        moved = kernel - layer.start
        leak = jnp.sqrt(jnp.sum(jnp.square(linalg.gram(layer.history, moved))))
        outside = jax.vmap(_outside, in_axes=(0, 0, None))(layer.factor, layer.rest, moved)
        own = layer.base + layer.inside * leak + outside
        found.append(own + spectral_norm_bound(kernel) * change)
        change = gain * found[-1]
    return jnp.stack([*found, change], axis=-1) * certificate.known[:, None] * _SLACK


def update_shares(certificate: Certificate, updates: Kernels) -> jax.Array:
    """Returns, of the squares of an update of all layers, the share inside the columns of each task, ``[T]``."""
    num_tasks = len(certificate.norm)
    inside, total = jnp.zeros((num_tasks,), jnp.float32), jnp.zeros((), jnp.float32)
    for name, layer in certificate.layers.items():
        update = jnp.asarray(updates[name], jnp.float32)
        squares = jnp.sum(jnp.square(linalg.gram(layer.history, update)), axis=-1)
        inside += linalg.times(squares[None], jax.nn.one_hot(layer.owner, num_tasks, dtype=squares.dtype))[0]
        total += jnp.sum(jnp.square(update))
    return inside / jnp.maximum(total, 1e-37)


def certify(
    certificate: Certificate,
    old: Kernels,
    new: Kernels,
    gains: Sequence[float],
    *,
    guard: str = "off",
    limit: float = 0.1,
) -> tuple[dict[str, jax.Array], Certificate]:
    """Certifies a step, and holds it within a bound.

    Args:
      certificate: The certificate.
      old: ``{name: [d, n]}`` before the step.
      new: The same after it.
      gains: See :func:`output_bounds`.
      guard: "off"; "refuse" takes no step whose bound for an old task is above the limit; "scale" halves it first, up
        to five times.
      limit: The largest change of an old task's features, as a share of their root mean square norm.

    Returns:
      The kernels that the step ends with, and the certificate with shares, bounds and counts.

    Raises:
      ValueError: ``guard`` is unknown or ``limit`` is not above 0.
    """
    _checks.check_choice("guard", guard, GUARDS)
    if not isinstance(limit, jax.Array) and not limit > 0:
        raise ValueError(f"limit: expected a share above 0, got {limit}")
    norm = jnp.maximum(certificate.norm, 1e-30)

    def at(factor):
        return {name: old[name] + factor.astype(old[name].dtype) * (new[name] - old[name]) for name in old}

    def bound_at(factor):
        kernels = new if factor is None else at(factor)
        return output_bounds(certificate, kernels, gains)[:, -1] / norm

    bound, kernels = bound_at(None), dict(new)
    if guard != "off":
        halvings = _HALVINGS if guard == "scale" else 0

        def over(carry):
            return (jnp.max(carry[1]) > limit) & (carry[0] > 0)

        def shorter(carry):
            smaller = carry[0] / 2
            smaller = jnp.where(smaller < 2.0**-halvings, 0.0, smaller)
            return smaller, bound_at(smaller)

        factor, bound = jax.lax.while_loop(over, shorter, (jnp.ones((), jnp.float32), bound))
        # A step that is taken as a whole keeps its bits.
        kernels = jax.tree.map(lambda x, y: jnp.where(factor < 1, y, x), dict(new), at(factor))
        certificate = certificate._replace(
            scaled=certificate.scaled + ((factor < 1) & (factor > 0)).astype(jnp.int32),
            refused=certificate.refused + (factor == 0).astype(jnp.int32),
        )
    share = update_shares(certificate, {name: kernels[name] - old[name] for name in old})
    return kernels, certificate._replace(share=share, bound=bound)
