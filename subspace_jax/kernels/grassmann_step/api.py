"""The public step: checks, choice of the implementation, and shards."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from subspace_jax.kernels._dispatch import check_implementation, choose
from subspace_jax.kernels._shards import leading_axes, over_shards, sharded_like, vary_alike
from subspace_jax.kernels.grassmann_step import mosaic_tpu, xla
from subspace_jax.kernels.grassmann_step.arguments import StepArrays, StepOptions

TRANSPORTS = ("euclidean", "project", "parallel")
RETRACTIONS = ("exp", "qr", "polar", "cayley")


def grassmann_step(
    bases: jax.Array,
    grads: jax.Array,
    momentum: jax.Array | None,
    learning_rate: ArrayLike,
    *,
    decay: ArrayLike = 0.9,
    weight: ArrayLike = 1.0,
    remove_drift: bool | jax.Array = True,
    transport: str = "euclidean",
    retraction: str = "exp",
    implementation: str | None = None,
    block: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Steps stacks of orthonormal bases along geodesics of the Grassmann manifold, with momentum.

    With ``D = decay M + weight G`` and ``H = D - S (S^T D)``, the new basis is the end of the geodesic from S along
    ``-learning_rate H``, or its retraction, re-orthonormalized.  It is ``S X + D Y`` for k x k matrices computed from
    ``S^T D``, ``H^T H`` and ``S^T S``, without a singular value decomposition, and for "exp" without eigenvalues.  A
    step ends after 64 radians (a length of 64 for other retractions); if any step is longer than 4, bases are
    orthonormalized once more.  :func:`subspace_jax.optim.riemannian_sgd` is the Optax transform.

    For C bases of k columns in R^n: about ``12 C n k^2`` FLOPs (``16 C n k^2`` with a transport), and ``20 C n k``
    bytes of arguments and results in float32.  On TPUs a kernel does the step in one pass, for float32, "exp", up to 16
    columns and bases of up to 3 MiB; elsewhere D and H are written and read as well.  Donate bases and momentum to the
    ``jit`` around the step to avoid copies.

    Sharded over Explicit mesh axes, classes need no collective; a sharded n costs sums of three k x k matrices per
    class.  k is gathered.  Under Auto axes the compiler partitions the reference in the same way.  Works under
    ``vmap``.

    Source: arXiv 2308.01547; transports as in Absil, Mahony, Sepulchre (2008).

    Args:
      bases: Orthonormal columns ``[..., n, k]``, float32 or float64.
      grads: Euclidean gradients, like ``bases``.
      momentum: Like ``bases``, zeros before the first step; None for no momentum.
      learning_rate: Step size, a scalar or one per basis, ``[...]``.
      decay: Decay of the momentum; ignored without momentum.
      weight: Weight of the gradient in the momentum, 1 minus the dampening; ignored without momentum.
      remove_drift: Whether to re-orthonormalize; may be traced.
      transport: Transport of the momentum: "euclidean" leaves it unchanged, "project" takes its tangent part at the old
        point, "parallel" transports that along the step.
      retraction: "exp", "qr", "polar" or "cayley".
      implementation: None, "xla", "mosaic_tpu" (TPU) or "mosaic_tpu_interpret" (any platform, slow, for tests).
      block: Bases per kernel block, up to 128; None for 3 MiB of them.

    Returns:
      New bases, and new momentum or None.

    Raises:
      ValueError: Shapes do not match, an axis is empty, a name is unknown, or the implementation is not supported.
      TypeError: A dtype is not supported, or dtypes differ.

    Examples:
      >>> import jax
      >>> from subspace_jax import kernels, linalg
      >>> bases = linalg.random_orthonormal(jax.random.key(0), 32, 4, (10,))
      >>> grads = jax.random.normal(jax.random.key(1), bases.shape)
      >>> bases, momentum = kernels.grassmann_step(bases, grads, 0 * grads, 0.1)
      >>> bool(jax.numpy.max(linalg.orthonormality_error(bases)) < 1e-6)
      True
    """
    _check(bases, grads, momentum, learning_rate, transport, retraction)
    if block is not None and (not isinstance(block, int) or not 1 <= block <= 128):
        raise ValueError(f"block: expected 1 to 128 bases, or None, got {block!r}")
    refusal = mosaic_tpu.refusal(bases, retraction)
    check_implementation("grassmann_step", implementation, refusal)
    options = StepOptions(transport, retraction, False, implementation if refusal is None else "xla", block)
    arrays = _arrays(bases, grads, momentum, learning_rate, (decay, weight), remove_drift)
    new, carried = _move(arrays, options, None)
    return new, None if momentum is None else carried


def _arrays(s, grads, momentum, size, rates, due) -> StepArrays:
    rates = jnp.stack([jnp.asarray(rate).astype(s.dtype) for rate in rates])
    size = jnp.broadcast_to(jnp.asarray(size).astype(s.dtype), s.shape[:-2])
    return StepArrays(s, grads, rates, size, momentum, None if due is None else jnp.asarray(due))


def _check(bases, grads, momentum, learning_rate, transport, retraction):
    if bases.ndim < 2 or 0 in bases.shape or bases.shape[-1] > bases.shape[-2]:
        raise ValueError(f"bases: expected [..., n, k] with 1 <= k <= n and no empty axes, got shape {bases.shape}")
    if bases.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"bases: expected float32 or float64, got {bases.dtype}; bfloat16 can't hold orthonormal bases")
    for name, x in (("grads", grads), ("momentum", momentum)):
        if x is None:
            continue
        if x.shape != bases.shape:
            raise ValueError(f"{name}: expected the shape of bases, {bases.shape}, got {x.shape}")
        if x.dtype != bases.dtype:
            raise TypeError(f"{name}: expected the dtype of bases, {bases.dtype}, got {x.dtype}")
    if jnp.shape(learning_rate) not in ((), bases.shape[:-2]):
        raise ValueError(
            f"learning_rate: expected a scalar or shape {bases.shape[:-2]} for bases {bases.shape}, "
            f"got {jnp.shape(learning_rate)}"
        )
    for name, value, known in (("transport", transport, TRANSPORTS), ("retraction", retraction, RETRACTIONS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {known}, got {value!r}")


def move(
    s: jax.Array,
    grads: jax.Array,
    momentum: jax.Array | None = None,
    *,
    size: ArrayLike,
    decay: ArrayLike = 0.0,
    weight: ArrayLike = 1.0,
    due: bool | jax.Array | None,
    transport: str,
    retraction: str,
    sharding: NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns ``new - s`` and the transported direction: the step without checks, for Optax transforms.

    Args:
      s: Bases ``[..., n, k]``.
      grads: Gradients.
      momentum: None if the direction is the gradient.
      size: Step size.
      decay: Factor of the momentum in the direction.
      weight: Factor of the gradient in the direction.
      due: Whether to remove drift; None for never.
      transport: See :func:`grassmann_step`.
      retraction: Likewise.
      sharding: Sharding of the bases over Auto mesh axes, so that each device steps its shard.
    """
    implementation = None if mosaic_tpu.refusal(s, retraction) is None else "xla"
    options = StepOptions(transport, retraction, implementation=implementation)
    return _move(_arrays(s, grads, momentum, size, (decay, weight), due), options, sharding)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _move(arrays: StepArrays, options: StepOptions, sharding: NamedSharding | None):
    lead = leading_axes(arrays.s, 2)
    basis = f"{lead} n k"
    axes = StepArrays(s=basis, grads=basis, rates="rates", size=lead, momentum=basis, due="")
    names = [name for name, x in arrays._asdict().items() if x is not None]

    def run(*args, n):
        def call(step, *args, **more):
            given = StepArrays(**dict(zip(names, args, strict=True)))
            return step(given, options, **more)

        reference = functools.partial(call, xla.step, axes=n)
        kernel = functools.partial(call, mosaic_tpu.step)
        # Sharded rows need a sum over devices between the inner products and the step.
        return choose("xla" if n else options.implementation, reference, kernel, *args)

    rule = ", ".join(getattr(axes, name) for name in names) + f" -> {basis}, {basis}"
    args = vary_alike(*(getattr(arrays, name) for name in names))
    outs = over_shards(run, rule, gathered=("k", "rates"), inside=("n",), sharding=sharding)(*args)
    return tuple(sharded_like(x, arrays.s) for x in outs)


def tangent_part(s: jax.Array, x: jax.Array, sharding: NamedSharding | None = None) -> jax.Array:
    """Returns ``X - S (S^T X)`` for sharded arrays too; ``sharding`` as in :func:`move`."""
    basis = f"{leading_axes(s, 2)} n k"

    def run(s, x, n):
        return xla.tangent_part(s, x, n)

    rule = f"{basis}, {basis} -> {basis}"
    out = over_shards(run, rule, gathered=("k",), inside=("n",), sharding=sharding)(*vary_alike(s, x))
    return sharded_like(out, s)
