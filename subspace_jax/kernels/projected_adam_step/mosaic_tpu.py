"""Pallas TPU kernel of the step: G and W are read once, W is written once, R and N stay in VMEM.

A strip of columns (rows, for the right side) is swept twice in tiles: the first sweep sums R and updates the moments,
the second applies N.  The basis stays in VMEM throughout.  XLA reads the moments a second time, and on v6e changes the
layout of W for the second matmul, with a copy of W and more than twice the traffic.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from subspace_jax.kernels._shards import result
from subspace_jax.kernels.projected_adam_step.arguments import AdamArrays

# Of the basis: with the tiles it must fit into 64 MiB, the smallest VMEM of v5e, v5p and v6e.
_BASIS_BYTES = 30 << 20
_BLOCK = 512
_TILE = 512


def refusal(w, basis, mu, side: str, block: int | None) -> str | None:
    """Returns why the kernel does not support the arguments, None if it does."""
    if jnp.float64 in (w.dtype, basis.dtype, mu.dtype):
        return "the kernel has no float64"
    if (size := _basis_bytes(w, basis)) > _BASIS_BYTES:
        return f"a basis of shape {basis.shape[-2:]} takes {size} bytes on the chip, of at most {_BASIS_BYTES}"
    if side == "right" and mu.shape[-1] < 128:
        return f"moments of {mu.shape[-1]} columns would be padded to 128, which costs more than the kernel saves"
    multiple = 128 if side == "left" else 16
    if block is not None and block % multiple and block < w.shape[-1 if side == "left" else -2]:
        return f"the kernel takes blocks that are multiples of {multiple} for side {side!r}, got {block}"
    return None


def _basis_bytes(w, basis) -> int:
    rows, rank = basis.shape[-2:]
    return (rows + _TILE) * (-(-rank // 128) * 128) * (2 if w.dtype == jnp.bfloat16 else 4)


def step(arrays: AdamArrays, *, side: str, block: int | None, interpret: bool):
    """Returns new ``w, mu, nu``; leading axes of all but ``scalars`` are mapped over."""
    call = functools.partial(_step, side=side, block=block, interpret=interpret)
    for _ in arrays.w.shape[:-2]:
        call = jax.vmap(call, (AdamArrays(0, 0, 0, 0, 0, None),))
    return call(arrays)


def _step(arrays: AdamArrays, *, side, block, interpret):
    w, grad, basis, mu, nu, scalars = arrays
    (m, n), rank, left = w.shape, basis.shape[-1], side == "left"
    swept, across = (m, n) if left else (n, m)
    tile = _size(swept, _TILE, 16 if left else 128)
    block = _size(across, block or _BLOCK, 128 if left else 16)
    if w.dtype == grad.dtype == jnp.bfloat16:
        basis = basis.astype(jnp.bfloat16)

    def spec(shape, index):
        return pl.BlockSpec(shape if left else shape[::-1], lambda *i: index(*i) if left else index(*i)[::-1])

    # G advances in the first sweep and W in the second; a block whose index stays is not fetched again.
    last = pl.cdiv(swept, tile) - 1
    first = spec((tile, block), lambda j, sweep, i: (jnp.where(sweep == 0, i, last), j))
    second = spec((tile, block), lambda j, sweep, i: (jnp.where(sweep == 0, 0, i), j))
    moments = spec((rank, block), lambda j, sweep, i: (0, j))
    resident = pl.BlockSpec(((last + 1) * tile, rank), lambda *_: (0, 0), pipeline_mode=pl.Buffered(buffer_count=1))
    small = (rank, block) if left else (block, rank)
    width = w.dtype.itemsize
    return pl.pallas_call(
        functools.partial(_body, swept=swept, tile=tile, left=left),
        grid=(pl.cdiv(across, block), 2, last + 1),
        in_specs=[second, first, resident, moments, moments, pl.BlockSpec(memory_space=pltpu.SMEM)],
        out_specs=[second, moments, moments],
        out_shape=[result(x.shape, x.dtype, w, grad, basis, mu, nu, scalars) for x in (w, mu, nu)],
        scratch_shapes=[pltpu.VMEM(small, jnp.float32)],
        input_output_aliases={0: 0, 3: 1, 4: 2},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=60 << 20
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * m * n * rank,
            bytes_accessed=m * n * (2 * width + grad.dtype.itemsize) + basis.nbytes + 16 * mu.size,
            transcendentals=mu.size,
        ),
        interpret=interpret,
        name="projected_adam_step",
    )(w, grad, basis, mu, nu, scalars[None])


def _size(axis: int, size: int, multiple: int) -> int:
    """Returns a block of at most ``size``: the full axis, or a multiple of ``multiple``."""
    return axis if axis <= size else size - size % multiple


def _body(*refs, swept, tile, left):
    (w, g, basis, mu, nu, scalars), (w_out, mu_out, nu_out), (r,) = refs[:6], refs[6:9], refs[9:]
    sweep, i, count = pl.program_id(1), pl.program_id(2), pl.num_programs(2)
    p = basis[pl.ds(i * tile, tile), :]

    @pl.when((sweep == 0) & (i == 0))
    def _():
        r[...] = jnp.zeros_like(r)

    @pl.when(sweep == 0)
    def _():
        x, y = g[...], p
        if swept % tile:  # The last tile is undefined beyond the edge.
            inside = swept - i * tile
            x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0 if left else 1) < inside, x, 0)
            y = jnp.where(jax.lax.broadcasted_iota(jnp.int32, y.shape, 0) < inside, y, 0)
        r[...] += _dot(y, x, ((0,), (0,)), g.dtype) if left else _dot(x, y, ((1,), (0,)), g.dtype)

    @pl.when((sweep == 0) & (i == count - 1))
    def _():
        rate1, rate2, eps, size = (scalars[0, j] for j in range(4))
        mean = (1 - rate1) * mu[...] + rate1 * r[...]
        square = (1 - rate2) * nu[...] + rate2 * jnp.square(r[...])
        mu_out[...], nu_out[...] = mean, square
        r[...] = size * mean / (jnp.sqrt(square) + eps)

    @pl.when(sweep == 1)
    def _():
        update = _dot(p, r[...], ((1,), (0,)), w.dtype) if left else _dot(r[...], p, ((1,), (1,)), w.dtype)
        w_out[...] = ((w[...].astype(jnp.float32) - update) * scalars[0, 4]).astype(w.dtype)


def _dot(x, y, contracted, dtype):
    if dtype == jnp.bfloat16:
        x, y, precision = x.astype(dtype), y.astype(dtype), None
    else:
        x, y, precision = x.astype(jnp.float32), y.astype(jnp.float32), jax.lax.Precision.HIGHEST
    dims = (contracted, ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)
