"""Pallas TPU kernel: the step in one pass that reads and writes each array once.

A TPU stores ``[C, n, k]`` as ``[C, k, n]``, n along the lanes, which is the kernel's layout.  Matmuls with k columns
leave most of the matrix unit idle, so that inner products run on the vector unit, row by row.  A block holds a group of
classes, whose ``k x k`` matrices are stored one class per lane: the algebra between inner products and combinations is
vector work over all classes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from subspace_jax.kernels._shards import result
from subspace_jax.kernels.grassmann_step import lanes
from subspace_jax.kernels.grassmann_step.arguments import StepArrays, StepOptions
from subspace_jax.kernels.grassmann_step.coefficients import LONGEST, SHORT, combinations

# Of one array: double buffers of five arrays make ten, within 64 MiB, the smallest VMEM of v5e, v5p and v6e.
_BLOCK_BYTES = 3 << 20
_MAX_COLUMNS = 16
_MAX_CLASSES = 128


def refusal(s, retraction: str) -> str | None:
    """Returns why the kernel does not support the arguments, None if it does."""
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


def step(arrays: StepArrays, options: StepOptions, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Like the reference, for an unsharded n."""
    s, grads, momentum = arrays.s, arrays.grads, arrays.momentum
    transport, difference, block = options.transport, options.difference, options.block
    shape = s.shape
    n, k = shape[-2:]
    rows = [x.reshape(-1, n, k).swapaxes(1, 2) for x in (s, grads, momentum) if x is not None]
    classes = rows[0].shape[0]
    group = min(classes, block or min(_MAX_CLASSES, _BLOCK_BYTES // _bytes(n, k)))
    groups = pl.cdiv(classes, group)
    # Without momentum, an untransported direction is the gradient itself.
    keeps = momentum is not None or transport != "euclidean"
    due = jnp.asarray(False if arrays.due is None else arrays.due).astype(jnp.float32)
    scalars = jnp.stack([*arrays.rates, due])[None]
    sizes = jnp.pad(arrays.size.reshape(-1), (0, groups * group - classes)).reshape(groups, 1, group)
    moving = 1 if transport == "euclidean" else 2

    one = pl.BlockSpec((group, k, n), lambda i: (i, 0, 0))
    # Donated arrays are updated in place: bases, momentum, and gradients by differences, except gradients that are
    # returned as the direction.
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
        out_shape=[result(rows[0].shape, jnp.float32, *rows, scalars, sizes)] * (1 + keeps),
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
    )(scalars, sizes, *rows)
    outs = [x.swapaxes(1, 2).reshape(shape) for x in outs]
    return outs[0], outs[1] if keeps else grads


def _body(scalars, sizes, *refs, classes, transport, difference, with_momentum):
    *refs, small = refs
    ins, outs = refs[: 2 + with_momentum], refs[2 + with_momentum :]
    group, k, n = ins[0].shape
    lane = jax.lax.broadcasted_iota(jnp.int32, (k, group), 1)

    def rows_of(c):
        s, d = ins[0][c], ins[1][c]
        return s, scalars[0, 0] * ins[2][c] + scalars[0, 1] * d if with_momentum else d

    def enter(which, i, c, column):
        """Stores a column as row i of the matrix of class c, in its lane."""
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
            # The identity is subtracted from the terms of the sum, so that no partial sum comes near 1.
            part = jnp.where(row == i, 1.0 / n, 0.0)
            enter(2, i, c, jnp.sum(s * s[i : i + 1] - part, axis=1, keepdims=True))
        return 0

    jax.lax.fori_loop(0, group, inner_products, 0)

    # The last group may have lanes without a class.
    used = jax.lax.broadcasted_iota(jnp.int32, (k, k, group), 2) < classes - pl.program_id(0) * group
    overlap, square, drift = (jnp.where(used, small[i], 0.0) for i in range(3))
    size = sizes[...]
    length = jnp.abs(size) * jnp.sqrt(lanes.norm(square))
    size = size * (LONGEST / jnp.maximum(length, LONGEST))
    update, carried = combinations(overlap, square, scalars[0, 2] * drift, size, transport, "exp", algebra=lanes.LANES)
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
        """Takes one Newton step towards the nearest orthonormal basis, as in the reference."""
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
