"""Probes whose gradients are energies of a weight's gradient."""

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.kernels._shards import leading_axes, over_shards, sharded_like
from subspace_jax.kernels.weight_grad_energy import xla


def energy_probes(
    x: jax.Array, y: jax.Array, rows: jax.Array, columns: jax.Array, gain: jax.Array | None = None
) -> jax.Array:
    """Returns the outputs of a layer unchanged; gradients of the probes are energies of the weight's gradient.

    For outputs ``y`` of a layer with inputs ``x`` and a frozen weight of gradient ``G = x^T dy``, ``jax.grad`` returns
    ``sum_j G_ij^2`` for ``rows`` and ``sum_i G_ij^2`` for ``columns``, for any values of the probes.  These are not
    derivatives, but a train step that differentiates the probes obtains them without further code.

    Cost and memory of the backward pass: see :func:`weight_grad_energy`; none if probes are not differentiated.
    Sharded tokens are summed before the square, under Auto and Explicit axes and in a ``shard_map`` that checks types.
    A layer that is applied twice in one loss, under ``vmap`` over its inputs, or to the micro-batches of an accumulated
    step gives the sum of the energies of each part instead, another, noisier statistic.

    Source: arXiv 2605.08734.

    Args:
      x: Inputs ``[..., in]``, float32, bfloat16, float16 or float64.  If probes have leading axes, those of a stack of
        weights, x and y start with them.
      y: Outputs ``[..., out]``, of the same dtype.
      rows: Probe ``[..., in]``, usually zeros, float32 or float64.
      columns: Probe ``[..., out]``.
      gain: ``[..., out]``, if ``y`` is the matmul with the weight times this: G is the gradient of the weight without
        it.  None for 1.

    Returns:
      ``y``.

    Raises:
      ValueError: Shapes do not match.
      TypeError: ``x`` and ``y`` have different dtypes.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from subspace_jax import kernels
      >>> x, w = jnp.array([[1.0, 2.0]]), jnp.ones((2, 1))
      >>> def loss(rows, columns):
      ...     return 3 * jnp.sum(kernels.energy_probes(x, x @ w, rows, columns))
      >>> rows, columns = jax.grad(loss, (0, 1))(jnp.zeros(2), jnp.zeros(1))
      >>> [float(e) for e in (*rows, *columns)]
      [9.0, 36.0, 45.0]
    """
    lead = rows.shape[:-1]
    for name, probe, array in (("rows", rows, x), ("columns", columns, y)):
        wanted = (*array.shape[: len(lead)], array.shape[-1])
        if array.ndim < len(lead) + 1 or probe.shape != wanted:
            raise ValueError(f"{name}: expected the probe {wanted} for an array {array.shape}, got {probe.shape}")
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y: expected outputs {(*x.shape[:-1], 'out')} for x {x.shape}, got {y.shape}")
    if y.dtype != x.dtype:
        raise TypeError(f"y: expected the dtype of x, {x.dtype}, got {y.dtype}")
    if gain is None:
        gain = jnp.ones_like(columns)
        call = _tap
    elif gain.shape != columns.shape:
        raise ValueError(f"gain: expected {columns.shape}, got {gain.shape}")
    else:
        call = _tap_before_gain
    for _ in lead:
        call = jax.vmap(call)
    x, gain = jax.lax.stop_gradient((x, gain))
    return call(x, y, rows, columns, gain)


@jax.custom_vjp
def _tap(x, y, rows, columns, gain):
    del x, rows, columns, gain
    return y


@jax.custom_vjp
def _tap_before_gain(x, y, rows, columns, gain):
    del x, rows, columns, gain
    return y


def _forward(x, y, rows, columns, gain):
    return y, (x, rows, columns, gain)


def _energies(x, d, rows, columns):
    given = leading_axes(x, 1)
    names = tuple(given.split())
    # Within a shard_map that checks types: what tokens vary over, and the weight does not.
    by_tokens, by_weight = (
        frozenset().union(*(jax.typeof(z).manual_axis_type.varying for z in both)) for both in ((x, d), (rows, columns))
    )
    manual = tuple(sorted(by_tokens - by_weight))

    def run(x, d, **split):
        axes = (*manual, *(axis for name in names for axis in split[name]))
        return xla.energies(x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1]), axes=axes, block=None)

    found = over_shards(run, f"{given} i, {given} o -> i, o", inside=names)(x, d)
    return tuple(sharded_like(e.astype(probe.dtype), probe) for e, probe in zip(found, (rows, columns), strict=True))


def _backward(kept, d):
    x, rows, columns, gain = kept
    return jnp.zeros_like(x), d, *_energies(x, d, rows, columns), jnp.zeros_like(gain)


def _backward_before_gain(kept, d):
    x, rows, columns, gain = kept
    work = linalg.working_dtype(d)
    before = (d.astype(work) * jnp.broadcast_to(gain.astype(work), d.shape)).astype(d.dtype)
    return jnp.zeros_like(x), d, *_energies(x, before, rows, columns), jnp.zeros_like(gain)


_tap.defvjp(_forward, _backward)
_tap_before_gain.defvjp(_forward, _backward_before_gain)
