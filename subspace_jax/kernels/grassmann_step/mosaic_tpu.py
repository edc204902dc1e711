"""Pallas TPU kernel: the whole step in one pass, each array read once and written once.

A TPU stores ``[C, n, k]`` as ``[C, k, n]``, n along the lanes, and so the kernel sees it.  Products with k columns
would leave most of the matrix unit idle: inner products are made on the vector unit, row by row.  A group of classes is
on the chip at a time; its ``k x k`` matrices lie side by side, one class to a lane, and the step between the inner
products and the combinations is vector work for all of them together.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from subspace_jax.kernels._shards import result
from subspace_jax.kernels.grassmann_step import lanes
from subspace_jax.kernels.grassmann_step.coefficients import LONGEST, SHORT, combinations

# Of one array: with double buffers of five there are ten on the chip, within 64 MiB, the least of v5e, v5p and v6e.
_BLOCK_BYTES = 3 << 20
_MAX_COLUMNS = 16
_MAX_CLASSES = 128


def refusal(s, retraction: str) -> str | None:
    """Why the kernel can't serve, None where it can."""
    n, k = s.shape[-2:]
    if s.dtype != jnp.float32:
        return f"the kernel is for float32, got {s.dtype}"
    if retraction != "exp":
        return f"the kernel knows the retraction 'exp' only, got {retraction!r}"
    if k > _MAX_COLUMNS:
        return f"the kernel serves up to {_MAX_COLUMNS} dimensions, got {k}"
    if _bytes(n, k) > _BLOCK_BYTES:
        return f"one basis {s.shape[-2:]} takes {_bytes(n, k)} bytes on the chip, of at most {_BLOCK_BYTES}"
    return None


def _bytes(n: int, k: int) -> int:
    return 4 * (-(-n // 128) * 128) * (-(-k // 8) * 8)


def step(s, grads, momentum, rates, size, due, *, transport, retraction, difference, block, interpret):
    """As the reference, for an n that is whole."""
    del retraction
    shape = s.shape
    n, k = shape[-2:]
    rows = [x.reshape(-1, n, k).swapaxes(1, 2) for x in (s, grads, momentum) if x is not None]
    classes = rows[0].shape[0]
    group = min(classes, block or min(_MAX_CLASSES, _BLOCK_BYTES // _bytes(n, k)))
    groups = pl.cdiv(classes, group)
    # Without momentum, a direction that stays as it is is the gradient, which is at hand.
    keeps = momentum is not None or transport != "euclidean"
    due = jnp.asarray(False if due is None else due).astype(jnp.float32)
    numbers = jnp.stack([*rates, due])[None]
    sizes = jnp.pad(size.reshape(-1), (0, groups * group - classes)).reshape(groups, 1, group)
    moving = 1 if transport == "euclidean" else 2

    one = pl.BlockSpec((group, k, n), lambda i: (i, 0, 0))
    # What is given away is replaced where it lies: bases by bases, momentum by momentum, and gradients by differences,
    # but for those that are returned as the direction.
    in_place = ({4: 1} if momentum is not None else {}) | ({} if difference else {2: 0})
    in_place |= {3: 0} if difference and momentum is not None else {}
    outs = pl.pallas_call(
        functools.partial(
            _body, classes=classes, transport=transport, difference=difference, with_momentum=momentum is not None
        ),
        grid=(groups,),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((1, 1, group), lambda i: (i, 0, 0)),
            *[one] * len(rows),
        ],
        out_specs=[one] * (1 + keeps),
        out_shape=[result(rows[0].shape, jnp.float32, *rows, numbers, sizes)] * (1 + keeps),
        scratch_shapes=[pltpu.VMEM((3 + 2 * moving, k, k, group), jnp.float32)],
        input_output_aliases=in_place,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=60 << 20),
        cost_estimate=pl.CostEstimate(
            flops=classes * n * k * k * (8 + 4 * moving),
            bytes_accessed=4 * classes * n * k * (len(rows) + 1 + keeps),
            transcendentals=0,
        ),
        interpret=interpret,
        name="grassmann_step",
    )(numbers, sizes, *rows)
    outs = [x.swapaxes(1, 2).reshape(shape) for x in outs]
    return outs[0], outs[1] if keeps else grads


def _body(numbers, sizes, *refs, classes, transport, difference, with_momentum):
    *refs, small = refs
    ins, outs = refs[: 2 + with_momentum], refs[2 + with_momentum :]
    group, k, n = ins[0].shape
    lane = jax.lax.broadcasted_iota(jnp.int32, (k, group), 1)

    def rows_of(c):
        s, d = ins[0][c], ins[1][c]
        return s, numbers[0, 0] * ins[2][c] + numbers[0, 1] * d if with_momentum else d

    def enter(which, i, c, column):
        """Puts row i of a matrix of class c, which comes as a column, into its lane."""
        small[which, i] = jnp.where(lane == c, column, small[which, i])

    def inner_products(c, _):
        s, d = rows_of(c)
        h = d
        for i in range(k):
            column = jnp.sum(d * s[i : i + 1], axis=1, keepdims=True)  # s_i^T D
            h = h - column * s[i : i + 1]
            enter(0, i, c, column)
        row = jax.lax.broadcasted_iota(jnp.int32, (k, 1), 0)
        for i in range(k):
            enter(1, i, c, jnp.sum(h * h[i : i + 1], axis=1, keepdims=True))
            # Each product gives up its share of the identity before they are added, so that no sum comes near 1.
            share = jnp.where(row == i, 1.0 / n, 0.0)
            enter(2, i, c, jnp.sum(s * s[i : i + 1] - share, axis=1, keepdims=True))
        return 0

    jax.lax.fori_loop(0, group, inner_products, 0)

    # The last group has lanes without a class.
    used = jax.lax.broadcasted_iota(jnp.int32, (k, k, group), 2) < classes - pl.program_id(0) * group
    overlap, square, drift = (jnp.where(used, small[i], 0.0) for i in range(3))
    size = sizes[...]
    length = jnp.abs(size) * jnp.sqrt(lanes.norm(square))
    size = size * (LONGEST / jnp.maximum(length, LONGEST))
    update, carried = combinations(overlap, square, numbers[0, 2] * drift, size, transport, "exp", algebra=lanes.LANES)
    moving = [update] if carried is None else [update, carried]
    for i, m in enumerate(m for combination in moving for m in combination):
        small[3 + i] = m

    def column_of(which, i, c):
        return jnp.sum(jnp.where(lane == c, small[which, i], 0.0), axis=1, keepdims=True)

    def combine(c, _):
        s, d = rows_of(c)

        def combined(of_s, of_d):
            return sum(column_of(of_s, i, c) * s[i : i + 1] + column_of(of_d, i, c) * d[i : i + 1] for i in range(k))

        moved = combined(3, 4)
        outs[0][c] = moved if difference else s + moved
        if len(outs) > 1:
            outs[1][c] = d if carried is None else combined(5, 6)
        return 0

    jax.lax.fori_loop(0, group, combine, 0)

    def newton(c, _):
        """One step towards the nearest orthonormal basis, as in the reference."""
        s = ins[0][c]
        new = s + outs[0][c] if difference else outs[0][c]
        row, fixed = jax.lax.broadcasted_iota(jnp.int32, (k, 1), 0), new
        for i in range(k):
            error = jnp.sum(new * new[i : i + 1], axis=1, keepdims=True) - jnp.where(row == i, 1.0, 0.0)
            fixed = fixed - 0.5 * error * new[i : i + 1]
        outs[0][c] = fixed - s if difference else fixed
        return 0

    @pl.when(jnp.max(length) > SHORT)
    def _():
        for _ in range(2):
            jax.lax.fori_loop(0, group, newton, 0)
