"""LoRA-RITE: an adaptive optimizer whose steps do not depend on how an update is factored (arXiv 2410.20625)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _adam, _checks
from subspace_jax.optim._arrays import automatic, spec_of
from subspace_jax.optim.lora import _factors
from subspace_jax.optim.lora._factors import PairRule

PyTree = Any


class LoRARITEState(NamedTuple):
    """State of :func:`lora_rite`; trees like the parameters, float32 (float64 for float64 factors).

    Attributes:
      count: Steps taken, int32 scalar.
      momentum: First moments, like the factors.
      second: Second moments, ``[..., r, r]`` for each factor.
      escaped: What rotations took from the second moments, ``[...]`` for each factor; None without ``escape``.
      basis: Orthonormal bases of the columns of ``a`` and of the rows of ``b``, like the factors.
      fallback: State for other leaves.
    """

    count: jax.Array
    momentum: PyTree
    second: PyTree
    escaped: PyTree
    basis: PyTree
    fallback: optax.OptState


class LoRARITEOptions(NamedTuple):
    """Decays and limits of :func:`lora_rite`.

    Attributes:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the eigenvalues of the second moment.
      clip_norm: Cap on the common norm of the unmagnified gradients of all factors, None for none.
      skip_rms: A factor whose unmagnified gradient, before the cap, has a larger root mean square has no step; None,
        the default, for no limit.  It is in units of the loss: the authors' code has 1, for means over tokens.  A loss
        that is summed over a batch may be above it at every step, and then nothing moves.
      escape: Whether what a second moment loses by rotations is added to it.
      update_cap: Cap on the root mean square of a first moment where it is used, None for none.
    """

    b1: ArrayLike = 0.9
    b2: ArrayLike = 0.999
    eps: ArrayLike = 1e-6
    clip_norm: ArrayLike | None = 1.0
    skip_rms: ArrayLike | None = None
    escape: bool = False
    update_cap: ArrayLike | None = None


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    clip_norm: ArrayLike | None = 1.0,
    skip_rms: ArrayLike | None = None,
    escape: bool = False,
    update_cap: ArrayLike | None = None,
    balance: bool = False,
    weight_decay: ArrayLike = 0.0,
    pairs: PairRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-RITE (Yen et al., arXiv 2410.20625): matrix Adam in the orthonormal coordinates of the partner factor.

    With ``b^T = Q R``, the gradient of ``a`` without the size of its partner is ``grad_a R^+``.  Its second moment is
    an r x r matrix, which rotates with Q, as the first moment does; the root of its inverse preconditions.  ``b``
    likewise by the QR factors of ``a``.  The path of ``a b`` is the same for all ``(a N, N^-1 b)``.

    State of a pair: ``2 (in + out) r + 2 r^2`` entries, and 2 with ``escape``.  A step takes two thin QR factors and,
    of r x r matrices, two singular value and two eigenvalue decompositions, six of the latter with ``escape``.

    Args:
      learning_rate: Fixed learning rate or schedule.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the eigenvalues of the second moment.
      clip_norm: This and other arguments: see :class:`LoRARITEOptions`.
      skip_rms: Largest gradient that is followed.
      escape: Whether losses by rotations are compensated.
      update_cap: Cap on the first moment.
      balance: Whether both factors are brought to one norm after every step.
      weight_decay: Decoupled, for all leaves.
      pairs: See :func:`adaprelora`.
      fallback: See :func:`adaprelora`.

    Returns:
      The transform.  Its ``update`` needs ``params``.  State is float32 for 16-bit parameters, where Optax keeps their
      dtype; complex parameters are refused.

    Raises:
      ValueError: A number is out of range; a rank is larger than a side of its weight; and see :func:`adaprelora` for
        factors that don't fit.
      TypeError: A factor is not of floating point.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> factors = {"q": {"a": jax.numpy.eye(8, 2), "b": jax.numpy.zeros((2, 4))}}
      >>> tx = optim.lora_rite(1e-3)
      >>> updates, state = tx.update(factors, tx.init(factors), factors)
      >>> state[0].second["q"]["a"].shape
      (2, 2)
    """
    options = LoRARITEOptions(b1, b2, eps, clip_norm, skip_rms, escape, update_cap)
    scaled = scale_by_lora_rite(options, pairs=pairs, fallback=fallback)
    parts = [scaled, _adam.descend(learning_rate, weight_decay, after=False)]
    return optax.chain(*parts, _balanced(pairs)) if balance else optax.chain(*parts)


def scale_by_lora_rite(
    options: LoRARITEOptions | None = None,
    *,
    pairs: PairRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The directions of :func:`lora_rite`, positive ascends, for use in a chain.

    Args:
      options: Decays and limits.
      pairs: This and other arguments: see :func:`lora_rite`.  Which leaves are factors.
      fallback: Transform for other leaves.

    Returns:
      The transform.

    Raises:
      ValueError: See :func:`lora_rite`.
      TypeError: See :func:`lora_rite`.

    Examples:
      >>> import optax
      >>> from subspace_jax import optim
      >>> scaled = optim.scale_by_lora_rite(optim.LoRARITEOptions(escape=True))
      >>> tx = optax.chain(scaled, optax.scale_by_learning_rate(1e-3))
    """
    options = options or LoRARITEOptions()
    _checks.check_moments(options.b1, options.b2, options.eps)
    for name in ("clip_norm", "skip_rms", "update_cap"):
        if (value := getattr(options, name)) is not None:
            _checks.check_number(name, value, 0, closed=False)

    def start(a, b):
        rank = a.shape[-1]
        if rank > min(a.shape[-2], b.shape[-1]):
            raise ValueError(f"params: expected a rank of at most both sides, which QR needs, got {a.shape}, {b.shape}")

        def square():
            return _factors.zeros(jnp.broadcast_to(jnp.max(a, axis=-2, keepdims=True), (*a.shape[:-2], rank, rank)))

        def like():
            return _factors.zeros(a), _factors.zeros(b)

        lost = tuple(_factors.zeros(jnp.max(x, axis=-1), -1) for x in (a, b)) if options.escape else (None, None)
        return like(), (square(), square()), lost, like()

    def step(t, factors, slots):
        # Both factors of all pairs in one list: own gradient, QR factors of the partner, old slots.
        sides = []
        for f, (momentum, second, lost, basis) in zip(map(_factors.bounded, factors), slots, strict=True):
            (qa, ra), (qb, rb) = linalg.positive_qr(f.a), linalg.positive_qr(f.b)
            sides.append(_side(f.grad_a, qb, rb, momentum[0], second[0], lost[0], basis[1]))
            sides.append(_side(f.grad_b, qa, ra, momentum[1], second[1], lost[1], basis[0]))
        free = [linalg.times(s.grad, s.inverse) for s in sides]
        free = _limited(free, options.clip_norm, options.skip_rms)
        made = [_moved(t, u, s, options) for u, s in zip(free, sides, strict=True)]
        directions, news = [], []
        for i in range(0, len(made), 2):
            (da, ma, va, ea), (db, mb, vb, eb) = made[i], made[i + 1]
            directions.append((da, db))
            news.append(((ma, mb), (va, vb), (ea, eb), (sides[i + 1].new, sides[i].new)))
        return directions, news

    return _factors.on_factors(LoRARITEState, start, step, pairs=pairs, fallback=fallback)


class _Side(NamedTuple):
    """One factor's gradient and slots, and the basis of its partner, new and old, with the inverse of its R."""

    grad: jax.Array
    new: jax.Array
    old: jax.Array
    inverse: jax.Array
    momentum: jax.Array
    second: jax.Array
    lost: jax.Array | None


def _side(grad, q, r, momentum, second, lost, old):
    # A factor that begins at zero has R = 0, whose pseudo-inverse is zero: its partner waits for it.
    return _Side(grad, q, old, linalg.of_each(jnp.linalg.pinv, r), momentum, second, lost)


def _limited(free, clip_norm, skip_rms):
    """Skips factors above ``skip_rms``, and clips the common norm."""
    out = free
    if clip_norm is not None and free:
        # Pairs may be of several dtypes; over the largest entry, no square is too large or too small.
        wide = linalg.working_dtype(*free)
        largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(u)).astype(wide) for u in free])
        largest = jnp.where(largest > 0, largest, 1)
        squares = [jnp.sum(jnp.square(u.astype(wide) / largest)) for u in free]
        norm = largest * jnp.sqrt(sum(squares))
        cap = jnp.asarray(clip_norm).astype(wide)
        share = jnp.where(norm > cap, cap / jnp.where(norm > 0, norm, 1), 1)
        out = [u * share.astype(u.dtype) for u in free]
    if skip_rms is not None:
        sizes = [jnp.sqrt(jnp.mean(jnp.square(u), axis=(-2, -1), keepdims=True)) for u in free]
        limits = [jnp.asarray(skip_rms).astype(size.dtype) for size in sizes]
        out = [jnp.where(size > limit, 0, u) for u, size, limit in zip(out, sizes, limits, strict=True)]
    return out


def _moved(t, u, s, options):
    dtype = u.dtype
    b1, b2, eps = (jnp.asarray(x).astype(dtype) for x in options[:3])
    t = t.astype(dtype)
    # Averages of which the first step's share is one: no correction is needed.
    keep1, keep2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
    rotation = linalg.gram(s.new, s.old)
    rotated = linalg.times(linalg.times(rotation, s.second), rotation.mT)
    lost = s.lost
    if options.escape:
        before, after = (linalg.of_each(jnp.linalg.eigvalsh, x) for x in (s.second, rotated))
        most = jnp.maximum(jnp.max(before - after, axis=-1), 0)
        trace = jnp.maximum(jnp.sum(before - after, axis=-1), 0)
        lost = keep2 * (lost + jnp.minimum(most, trace))
    second = (1 - keep2) * linalg.gram(u, u) / u.shape[-2] + keep2 * rotated
    values, vectors = linalg.of_each(jnp.linalg.eigh, second)
    values = jnp.maximum(values, 0) + (lost[..., None] if options.escape else 0)
    root = linalg.times(vectors / (jnp.sqrt(values) + eps)[..., None, :], vectors.mT)
    momentum = (1 - keep1) * linalg.times(u, root) + keep1 * linalg.times(s.momentum, rotation.mT)
    used = momentum
    if options.update_cap is not None:
        size = jnp.sqrt(jnp.mean(jnp.square(used), axis=(-2, -1), keepdims=True))
        used = used / jnp.maximum(1, size / jnp.asarray(options.update_cap).astype(dtype))
    return linalg.times(used, s.inverse.mT), momentum, second, lost


def _balanced(pairs):
    """Changes updates so that both factors of a pair end with the same norm; their product is unchanged."""
    rule = _factors.adapter_pairs if pairs is None else pairs

    def update(updates, state, params=None):
        found, structure = _factors.find_pairs(updates, rule)
        leaves, weights = jax.tree.leaves(updates), structure.flatten_up_to(params)
        old = [[weights[i] for i in pair[1:3]] for pair in found]
        steps = [[leaves[i] for i in pair[1:3]] for pair in found]

        def run(old, steps):
            out = []
            for both, moves in zip(old, steps, strict=True):
                dtype = linalg.working_dtype(*both)
                new = [w.astype(dtype) + d.astype(dtype) for w, d in zip(both, moves, strict=True)]
                sizes = [jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + 1e-6 for x in new]
                wanted = jnp.sqrt(sizes[0] * sizes[1])
                rows = zip(new, sizes, both, moves, strict=True)
                out.append([(x * (wanted / size) - w.astype(dtype)).astype(d.dtype) for x, size, w, d in rows])
            return out

        made = automatic(run, (old, steps), lambda: spec_of(steps)) if found else []
        for pair, both in zip(found, made, strict=True):
            leaves[pair.a], leaves[pair.b] = both
        return structure.unflatten(leaves), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
