"""What scripts/bench/kernels.py checks and times: for each op the plain formula, sizes, counts and peers."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import kernels

Call = Callable[[], Any]


class Case(NamedTuple):
    """One table of the report: ``calls`` make, for each name, what is timed and its temporary bytes (None: unknown)."""

    op: str
    shape: str
    dtype: str
    least_bytes: int
    flops: int
    calls: Mapping[str, Callable[[], tuple[Call, int | None]]]


def compiled(f, *args):
    """Makes a call of a function of these arguments."""

    def make():
        program = jax.jit(f).lower(*args).compile()
        return lambda: program(*args), program.memory_analysis().temp_size_in_bytes

    return make


def stepping(f, state, *args):
    """Makes a call of ``state = f(*state, *args)`` that goes on from its own copy of the state, which it gives away."""

    def make():
        held = jax.tree.map(jnp.array, state)
        program = jax.jit(f, donate_argnums=range(len(state))).lower(*held, *args).compile()

        def call():
            nonlocal held
            held = program(*held, *args)
            return held

        return call, program.memory_analysis().temp_size_in_bytes

    return make


def normal(seed, *shape, dtype="float32", scale=1.0):
    """Normal numbers, made on the device."""
    return jax.jit(lambda key: (scale * jax.random.normal(key, shape)).astype(dtype))(jax.random.key(seed))


def orthonormal(seed, n, k, lead=()):
    """Bases ``[..., n, k]``; by Cholesky QR, for a Householder QR of many is slow."""

    def make(key):
        x = jax.random.normal(key, (*lead, n, k))
        for _ in range(2):
            gram = jnp.einsum("...ni,...nj->...ij", x, x, precision="highest")
            x = jnp.einsum("...nk,...kj->...nj", x, jnp.linalg.inv(jnp.linalg.cholesky(gram)).mT, precision="highest")
        return x

    return jax.jit(make)(jax.random.key(seed))


def in_float64(f, *args):
    """A plain formula, of the same numbers in float64."""
    with jax.enable_x64(True):
        up = [jnp.asarray(np.asarray(a), jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in args]
        return jax.tree.map(np.asarray, f(*up))


def checks(name, op, plain, make_args, tolerances):
    """A row for each dtype: the op as it runs here, and the plain formula in float64."""
    for dtype, tolerance in tolerances.items():
        args = make_args(dtype)
        yield name, dtype, tolerance, jax.jit(op)(*args), in_float64(plain, *args)


def implementations(op, has_kernel):
    """The op by each implementation that serves the device, the default first."""
    names = ("mosaic_tpu", "xla") if has_kernel and jax.default_backend() == "tpu" else ("xla",)
    return {name: functools.partial(op, implementation=name) for name in names}


def size(*arrays):
    """Bytes of arrays, or of the leaves of trees."""
    return sum(a.nbytes for a in jax.tree.leaves(arrays))


def exact(f):
    """The formula with float32 products in float32, as the ops have them, whatever the device does by default."""

    def run(*args):
        with jax.default_matmul_precision("highest"):
            return f(*args)

    return run


# Grassmann logits and their loss.


def _plain_logits(x, bases):
    return 25.0 * jnp.sqrt(
        jnp.sum(jnp.square(jnp.einsum("bn,cnk->bck", x, bases.astype(x.dtype))), -1).astype("float32")
    )


def _plain_logits_exact(x, bases):
    return 25.0 * jnp.sqrt(jnp.sum(jnp.square(jnp.einsum("bn,cnk->bck", x, bases)), -1))


def _unit_rows(seed, b, n, dtype):
    x = normal(seed, b, n)
    return (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)


def _logits_args(b, n, c, k, dtype):
    return _unit_rows(0, b, n, dtype), orthonormal(1, n, k, (c,)), jax.random.randint(jax.random.key(2), (b,), 0, c)


def check_logits():
    def loss(x, bases, labels):
        logits = _plain_logits_exact(x, bases)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def ours(x, bases, labels):
        return jnp.mean(kernels.grassmann_cross_entropy(x, bases, labels))

    args = functools.partial(_logits_args, 13, 70, 11, 3)
    # bfloat16: products of numbers rounded to 2^-9.
    allowed = {"float32": 1e-5, "bfloat16": 1e-2}
    first = functools.partial(checks, make_args=lambda dtype: args(dtype)[:2], tolerances=allowed)
    yield from first("logits", kernels.grassmann_logits, _plain_logits_exact)
    yield from checks("logits, gradients of the loss", jax.grad(ours, (0, 1)), jax.grad(loss, (0, 1)), args, allowed)


def logits_cases(real):
    shapes = [(1024, 2048, 1000, 8), (1024, 768, 21841, 16), (4096, 2048, 21841, 16)] if real else [(256, 768, 1000, 8)]
    for shape in shapes:
        for dtype in ("bfloat16", "float32") if real else ("float32",):
            yield functools.partial(_logits_case, shape, dtype)
            yield functools.partial(_loss_case, shape, dtype)


def _logits_case(shape, dtype):
    b, n, c, k = shape
    x, bases, _ = _logits_args(*shape, dtype)
    ways = implementations(kernels.grassmann_logits, False) | {"plain": exact(_plain_logits)}
    # The product alone, whatever becomes of it: it writes [B, C k].
    ways["product alone"] = exact(lambda x, bases: jnp.einsum("bn,cnk->bck", x, bases.astype(x.dtype)))
    calls = {name: compiled(f, x, bases) for name, f in ways.items()}
    return Case("grassmann_logits", _words(shape, "BnCk"), dtype, size(x, bases) + 4 * b * c, 2 * b * c * n * k, calls)


def _loss_case(shape, dtype):
    b, n, c, k = shape
    args = _logits_args(*shape, dtype)

    def plain(x, bases, labels):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(_plain_logits(x, bases), labels))

    ways = implementations(lambda *args, **how: jnp.mean(kernels.grassmann_cross_entropy(*args, **how)), False)
    ways["plain"] = exact(plain)
    calls = {name: compiled(jax.value_and_grad(f, (0, 1)), *args) for name, f in ways.items()}
    least = 2 * size(*args[:2]) + 8 * b * c
    return Case("grassmann_cross_entropy, gradients", _words(shape, "BnCk"), dtype, least, 6 * b * c * n * k, calls)


# Adam within a subspace.


def _plain_projected_adam(w, mu, nu, grad, basis):
    r = basis.mT @ grad.astype(jnp.float32)
    mu, nu = 0.9 * mu + 0.1 * r, 0.999 * nu + 0.001 * r * r
    step = 0.01 * 0.25 * (1 - 0.999**4) ** 0.5 / (1 - 0.9**4) * mu / (jnp.sqrt(nu) + 1e-6)
    return (w - (basis @ step).astype(w.dtype)).astype(w.dtype), mu, nu


def _projected_adam(w, mu, nu, grad, basis, implementation=None):
    return kernels.projected_adam_step(w, grad, basis, mu, nu, 3, 0.01, scale=0.25, implementation=implementation)


def _adam_args(m, n, r, dtype):
    moments = normal(0, r, n, scale=0.1), jnp.square(normal(1, r, n)) + 0.5
    return normal(2, m, n, dtype=dtype), *moments, normal(3, m, n, dtype=dtype), orthonormal(4, m, r)


def check_projected_adam():
    def plain(w, mu, nu, grad, basis):
        r = basis.mT @ grad
        mu, nu = 0.9 * mu + 0.1 * r, 0.999 * nu + 0.001 * r * r
        step = 0.01 * 0.25 * (1 - 0.999**4) ** 0.5 / (1 - 0.9**4) * mu / (jnp.sqrt(nu) + 1e-6)
        return w - basis @ step, mu, nu

    # bfloat16: the new weights are rounded to it.
    tolerances = {"float32": 1e-5, "bfloat16": 1e-2}
    yield from checks("projected Adam", _projected_adam, plain, functools.partial(_adam_args, 70, 33, 5), tolerances)


def projected_adam_cases(real):
    shapes = [(4096, 14336, 128), (8192, 8192, 384), (8192, 28672, 384)] if real else [(768, 3072, 64)]
    for shape in shapes:
        for dtype in ("bfloat16", "float32") if real else ("float32",):
            yield functools.partial(_projected_adam_case, shape, dtype)


def _projected_adam_case(shape, dtype):
    m, n, r = shape
    w, mu, nu, grad, basis = _adam_args(*shape, dtype)
    ways = implementations(_projected_adam, True) | {"plain": exact(_plain_projected_adam)}
    calls = {name: stepping(f, (w, mu, nu), grad, basis) for name, f in ways.items()}
    calls["optax galore"] = functools.partial(_optax_galore, w, grad, r)
    least = 2 * size(w, mu, nu) + size(grad, basis)
    return Case("projected_adam_step", _words(shape, "mnr"), dtype, least, 4 * m * n * r, calls)


def _optax_galore(w, grad, rank):
    """Between two of its refreshes, whose SVD is no part of this."""
    tx = optax.contrib.galore(0.01, rank=rank, update_proj_gap=10**9)

    def step(w, state, grad):
        updates, state = tx.update(grad, state, w)
        return optax.apply_updates(w, updates), state

    state = jax.jit(tx.init)(w)
    return stepping(step, (w, state), grad)()


# Residuals off a subspace.


def _plain_residual(x, mean, basis):
    y = x.astype(jnp.float32) - mean
    return jnp.sum(jnp.square(y - y @ basis @ basis.mT), -1)


def _residual_args(n, d, p, dtype):
    return normal(0, n, d, dtype=dtype), normal(1, d), orthonormal(2, d, p)


def check_residual():
    def plain(x, mean, basis):
        y = x - mean
        return jnp.sum(jnp.square(y - y @ basis @ basis.mT), -1)

    def complement(x, mean, basis):
        return kernels.subspace_residual(x, mean, complement=kernels.complement_basis(basis))

    args = functools.partial(_residual_args, 37, 50, 21)
    tolerances = {"float32": 1e-5, "bfloat16": 1e-5}
    yield from checks("residual, basis", kernels.subspace_residual, plain, args, tolerances)
    yield from checks("residual, complement", complement, plain, args, tolerances)


def residual_cases(real):
    shapes = [(1_000_000, 1536, 500), (1_000_000, 1536, 1300)] if real else [(20_000, 768, 100), (20_000, 768, 640)]
    for shape in shapes:
        for dtype in ("bfloat16", "float32") if real else ("float32",):
            yield functools.partial(_residual_case, shape, dtype)


def _residual_case(shape, dtype):
    n, d, p = shape
    x, mean, basis = _residual_args(*shape, dtype)
    perp = kernels.complement_basis(basis)
    calls = {
        "complement": compiled(
            lambda x, mean, perp: kernels.subspace_residual(x, mean, complement=perp), x, mean, perp
        ),
        "basis": compiled(kernels.subspace_residual, x, mean, basis),
        "plain": compiled(exact(_plain_residual), x, mean, basis),
    }
    flops = min(2 * n * d * (d - p), 4 * n * d * p)
    return Case("subspace_residual", _words(shape, "NDp"), dtype, size(x, mean) + 4 * n, flops, calls)


def _words(shape, names):
    return ", ".join(f"{name} {length}" for name, length in zip(names, shape, strict=True))


CHECKS = {
    "grassmann_logits": check_logits,
    "projected_adam_step": check_projected_adam,
    "subspace_residual": check_residual,
}
CASES = {
    "grassmann_logits": logits_cases,
    "projected_adam_step": projected_adam_cases,
    "subspace_residual": residual_cases,
}
