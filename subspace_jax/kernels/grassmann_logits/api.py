"""The public function: checks, derivatives and shards."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from subspace_jax.kernels._dispatch import check_implementation
from subspace_jax.kernels._shards import leading_axes, over_shards, sharded_like, vary_alike
from subspace_jax.kernels.grassmann_logits import xla
from subspace_jax.linalg import working_dtype

_NO_KERNEL = "it has no kernel, because XLA writes no products on TPUs either"


def grassmann_logits(
    x: jax.Array,
    bases: jax.Array,
    gamma: ArrayLike = 25.0,
    *,
    implementation: str | None = None,
    block: int | None = None,
) -> jax.Array:
    """Lengths of features' projections onto class subspaces, ``gamma * ||S_c^T x||``.

    The head of Grassmann class representation (arXiv 2308.01547, section 3) without normalization of the features,
    which :func:`subspace_jax.nn.grassmann_logits` adds.  The gradient of a projection of length zero is zero.

    For B features of width n and C classes of k dimensions the logits cost ``2 B C n k`` FLOPs and the gradients
    ``6 B C n k``, a third of them to recompute the products.  Arguments and results take at least
    ``B n |x| + C n k |S| + 4 B C`` bytes for the logits, and ``2 B n |x| + 2 C n k |S| + 8 B C`` for the gradients; the
    features, as float32, and their gradient are read once per group of classes.  The products ``[B, C, k]`` exist for
    one group of classes at a time, of about 16 MiB of products or bases (at least one class of each of up to 64 runs of
    classes; per 32 GiB of bases, with up to 512 runs of at least four classes).  Besides arguments and results, memory
    holds a few such groups, the features as float32, and the lengths ``[B, C]`` for the gradients; another
    ``[B, C]`` if layouts differ.  Bases are cast to bfloat16 one group at a time.

    Sharded over Explicit mesh axes, batch and classes stay sharded, features and bases are gathered along n and k; the
    gradient of ``x`` is summed once over the devices that shard the classes, that of ``bases`` once per group over
    those that shard the batch.  Under Auto axes the compiler does the same if classes are sharded over a power of two
    of devices up to 64; or up to 512, if a group has four classes per device and eight times their number divides that
    of the classes.  Beyond that every group is gathered.  Works under ``vmap`` and ``shard_map``.

    Args:
      x: Features ``[..., n]``, floating point.  Its dtype is that of the matmuls: in bfloat16 both factors are rounded
        to bfloat16 and sums are float32; otherwise full precision of float32, or of float64.
      bases: ``[classes, n, k]``, floating point.  They need not be orthonormal, but of a size whose square float32
        holds, 1e-15 to 1e15.  Features may be of any size.
      gamma: Scale of the logits, a scalar that may be traced and differentiated.
      implementation: None or "xla".
      block: Classes that are worked on at a time; None for a value by batch and k.

    Returns:
      Logits ``[..., classes]``, float32, or float64 if ``x`` is.

    Raises:
      ValueError: Shapes do not match, an axis is empty, or the implementation does not exist or is not supported.
      TypeError: An array is not floating point.
    """
    _check(x, bases, gamma, block)
    check_implementation("grassmann_logits", implementation, _NO_KERNEL)
    return _logits(x, bases, gamma, block)


def _check(x, bases, gamma, block):
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"x: expected features [..., n] without empty axes, got shape {x.shape}")
    if bases.ndim != 3 or 0 in bases.shape or bases.shape[1] != x.shape[-1]:
        raise ValueError(
            f"bases: expected [classes, {x.shape[-1]}, k] without empty axes for features of shape {x.shape}, "
            f"got {bases.shape}"
        )
    for name, a in (("x", x), ("bases", bases)):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise TypeError(f"{name}: expected floating point, got {a.dtype}")
    if jnp.shape(gamma) != ():
        raise ValueError(f"gamma: expected a scalar, got shape {jnp.shape(gamma)}")
    if block is not None and (not isinstance(block, int) or block < 1):
        raise ValueError(f"block: expected a positive number of classes, or None, got {block!r}")


@functools.partial(jax.jit, static_argnums=3)
def _logits(x, bases, gamma, block):
    return _scaled_norms(*vary_alike(x, bases, jnp.asarray(gamma).astype(working_dtype(x))), block)


# With gamma, as the gradient times gamma would be another array of the size of the logits.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scaled_norms(x, bases, gamma, block):
    return gamma * _norms(x, bases, block)


def _norms(x, bases, block):
    rows = leading_axes(x, 1)
    run = over_shards(functools.partial(xla.norms, block=block), f"{rows} n, c n k -> {rows} c", gathered=("n", "k"))
    return run(x, bases)


def _forward(x, bases, gamma, block):
    lengths = _norms(x, bases, block)
    return gamma * lengths, (x, bases, gamma, lengths)


def _backward(block, kept, weights):
    x, bases, gamma, lengths = kept
    rows = leading_axes(x, 1)
    rule = f"{rows} n, c n k, , {rows} c, {rows} c -> {rows} n, c n k"
    run = functools.partial(_gradients, block=block)
    grads = over_shards(run, rule, gathered=("n", "k"), inside=("c", *rows.split()))(x, bases, gamma, lengths, weights)
    dx, dbases = map(sharded_like, grads, (x, bases))
    return dx, dbases, jnp.sum(weights * lengths)


def _gradients(*args, block, c, **rows):
    return xla.gradients(*args, block=block, mesh_axes=(c, sum(rows.values(), ())))


_scaled_norms.defvjp(_forward, _backward)
