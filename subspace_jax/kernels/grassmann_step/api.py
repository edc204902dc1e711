"""The public step: checks, which implementation runs, and shards."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from subspace_jax.kernels._dispatch import check_implementation, choose
from subspace_jax.kernels._products import placed_like
from subspace_jax.kernels._shards import over_shards, vary_alike
from subspace_jax.kernels.grassmann_step import mosaic_tpu, xla

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
    """Steps stacks of orthonormal bases down their gradients: momentum, tangent part, geodesic, drift removed.

    With ``D = decay M + weight G`` and ``H = D - S (S^T D)``, the new basis is that at the end of the geodesic from S
    along ``-learning_rate H``, or its retraction, re-orthonormalised.  All of it is ``S X + D Y`` for k x k matrices
    that follow from ``S^T D``, ``H^T H`` and ``S^T S``: no singular value decomposition, and no eigenvalues for "exp".
    A step ends after 64 radians (a length of 64 for other retractions), and where any is longer than 4, bases are made
    orthonormal once more.  :func:`subspace_jax.optim.riemannian_sgd` is this as an Optax transform.

    For C bases of k columns in R^n: about ``12 C n k^2`` FLOPs (``16 C n k^2`` with a transport), and ``20 C n k``
    bytes of arguments and results in float32, which is also what a TPU moves: a kernel does the whole step on the chip,
    for float32, "exp", up to 16 columns and bases of up to 3 MiB.  Elsewhere D and H are written and read as well.
    Donate bases and momentum to the ``jit`` around the step, or they are copied.

    Sharded over Explicit mesh axes, classes need no collective; a split n costs sums of three k x k matrices for each
    class.  k is gathered.  Under Auto axes the compiler does the same with the reference.  Works under ``vmap``.

    Source: arXiv 2308.01547; transports as in Absil, Mahony, Sepulchre (2008).

    Args:
      bases: Orthonormal columns ``[..., n, k]``, float32 or float64.
      grads: Euclidean gradients, like ``bases``.
      momentum: Like ``bases``, zeros before the first step; None for none.
      learning_rate: Step size, a scalar or one number for each basis, ``[...]``.
      decay: Of the momentum.
      weight: Of the gradient in the momentum: 1 less the dampening.  Both are ignored without momentum.
      remove_drift: Whether to re-orthonormalise; may be traced.
      transport: What becomes of the momentum: "euclidean" leaves it as it is, "project" takes its tangent part at the
        old point, "parallel" carries that along the step.
      retraction: "exp", "qr", "polar" or "cayley".
      implementation: None, "xla", "mosaic_tpu" (TPU) or "mosaic_tpu_interpret" (any platform, slow, for tests).
      block: Bases that the kernel works on at a time, up to 128; None for a value by shape, 3 MiB of them.

    Returns:
      New bases, and new momentum or None.

    Raises:
      ValueError: Shapes don't fit together, an axis is empty, a name is unknown, or the implementation can't serve.
      TypeError: A dtype is none of the above, or they differ.

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
    check_implementation("grassmann_step", implementation, bases, refusal=refusal)
    new, carried = move(
        bases,
        grads,
        momentum,
        size=learning_rate,
        decay=decay,
        weight=weight,
        due=remove_drift,
        transport=transport,
        retraction=retraction,
        difference=False,
        implementation=implementation,
        block=block,
    )
    return new, None if momentum is None else carried


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
    difference: bool = True,
    implementation: str | None = None,
    block: int | None = None,
    sharding: NamedSharding | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The step without checks, for transforms, which return differences.

    Where bases are split over Auto mesh axes, ``sharding`` is theirs, and each device steps what it holds.

    Returns:
      ``new - s``, or the new bases without ``difference``; and what becomes of the direction.
    """
    rates = jnp.stack([jnp.asarray(decay).astype(s.dtype), jnp.asarray(weight).astype(s.dtype)])
    size = jnp.broadcast_to(jnp.asarray(size).astype(s.dtype), s.shape[:-2])
    due = None if due is None else jnp.asarray(due)
    if mosaic_tpu.refusal(s, retraction) is not None:
        implementation = "xla"
    how = transport, retraction, difference, implementation, block, sharding
    return _move(s, grads, momentum, rates, size, due, *how)


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9, 10, 11))
def _move(s, grads, momentum, rates, size, due, transport, retraction, difference, implementation, block, sharding):
    lead = " ".join(f"class{i}" for i in range(s.ndim - 2))
    basis = f"{lead} n k"
    given = {"s": s, "grads": grads, "momentum": momentum, "rates": rates, "size": size, "due": due}
    words = {"s": basis, "grads": basis, "momentum": basis, "rates": "rates", "size": lead, "due": ""}
    names = [name for name, x in given.items() if x is not None]
    how = {"transport": transport, "retraction": retraction, "difference": difference}

    def run(*args, n):
        def unpack(step, *args, **more):
            own = dict.fromkeys(given) | dict(zip(names, args, strict=True))
            own["size"] = own["size"][..., None, None]
            return step(**own, **how, **more)

        reference = functools.partial(unpack, xla.step, axes=n)
        kernel = functools.partial(unpack, mosaic_tpu.step, block=block)
        # Rows that are split leave a sum over devices between the inner products and the step.
        return choose("xla" if n else implementation, reference, kernel, *args)

    rule = ", ".join(words[name] for name in names) + f" -> {basis}, {basis}"
    args = vary_alike(*(given[name] for name in names))
    outs = over_shards(run, rule, together=("k", "rates"), inside=("n",), sharding=sharding)(*args)
    return tuple(placed_like(x, s) for x in outs)


def tangent_part(s: jax.Array, x: jax.Array, sharding: NamedSharding | None = None) -> jax.Array:
    """``X - S (S^T X)``, wherever the two are sharded; ``sharding`` as for :func:`move`."""
    basis = " ".join(f"class{i}" for i in range(s.ndim - 2)) + " n k"

    def run(s, x, n):
        return xla.tangent_part(s, x, n)

    rule = f"{basis}, {basis} -> {basis}"
    out = over_shards(run, rule, together=("k",), inside=("n",), sharding=sharding)(*vary_alike(s, x))
    return placed_like(out, s)
