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


# A step on the Grassmann manifold.


def _plain_step(s, m, grads):
    d = 0.9 * m + grads
    u, sigma, rt = jnp.linalg.svd(d - s @ (s.mT @ d), full_matrices=False)
    sigma = -0.1 * sigma[..., None, :]
    return ((s @ rt.mT) * jnp.cos(sigma) + u * jnp.sin(sigma)) @ rt, d


def _step(s, m, grads, implementation=None):
    return kernels.grassmann_step(s, grads, m, 0.1, implementation=implementation)


def _step_args(c, n, k, dtype="float32"):
    grads, momentum = (normal(seed, c, n, k, scale=n**-0.5) for seed in (1, 2))
    return orthonormal(0, n, k, (c,)), momentum, grads


def check_step():
    # Bases in float32 are orthonormal to 5e-7 or so, and the largest entry is below 1.
    yield from checks("Grassmann step", _step, _plain_step, lambda _: _step_args(5, 130, 3), {"float32": 5e-6})


def step_cases(real):
    shapes = [(1000, 2048, 8), (10_000, 2048, 8), (21841, 768, 16), (1000, 2048, 32)] if real else [(200, 2048, 8)]
    for shape in shapes:
        yield functools.partial(_step_case, shape)


def _step_case(shape):
    c, n, k = shape
    s, momentum, grads = _step_args(*shape)
    ways = implementations(_step, k <= 16)
    calls = {name: stepping(f, (s, momentum), grads) for name, f in ways.items()}
    # A batched SVD takes minutes to compile for a TPU, and seconds to run on a GPU beyond this size.
    if c * n * k <= 1000 * 2048 * 8 and jax.default_backend() != "tpu":
        calls["plain (SVD)"] = stepping(exact(_plain_step), (s, momentum), grads)
        calls["torch (SVD)"] = functools.partial(_torch_step, s, momentum, grads)
    least = 2 * size(s, momentum) + size(grads)
    return Case("grassmann_step", _words(shape, "Cnk"), "float32", least, 12 * c * n * k * k, calls)


def _torch_step(s, m, grads):
    import torch

    s, m, grads = _to_torch(s, m, grads)

    def call():
        nonlocal s, m
        with torch.no_grad():
            m = 0.9 * m + grads
            u, sigma, rt = torch.linalg.svd(m - s @ (s.mT @ m), full_matrices=False)
            sigma = -0.1 * sigma.unsqueeze(-2)
            s = ((s @ rt.mT) * torch.cos(sigma) + u * torch.sin(sigma)) @ rt
        return s

    return call, None


def _to_torch(*arrays):
    """Arrays as PyTorch tensors, on its GPU where it has one."""
    import torch

    place = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return [torch.from_numpy(np.array(x, np.float32)).to(place, dtypes[x.dtype.name]) for x in arrays]


# DoRA.


def _plain_norm(w, a, b):
    wide = w.astype(jnp.float32) + 0.5 * jnp.matmul(a, b, preferred_element_type=jnp.float32)
    return jnp.linalg.norm(wide, axis=0)


def _factors(rows, columns, rank, dtype):
    return (
        normal(0, rows, columns, dtype=dtype, scale=rows**-0.5),
        normal(1, rows, rank, dtype=dtype, scale=rows**-0.5),
        normal(2, rank, columns, dtype=dtype, scale=rank**-0.5),
    )


def check_norm():
    def plain(w, a, b):
        return jnp.linalg.norm(w + 0.5 * a @ b, axis=0)

    def ours(w, a, b):
        return kernels.dora_weight_norm(w, a, b, 0.5)

    args = functools.partial(_factors, 70, 33, 5)
    yield from checks("DoRA's norm", ours, plain, args, {"float32": 1e-5, "bfloat16": 1e-5})


def norm_cases(real):
    shapes = [(8192, 8192, 384), (4096, 14336, 16), (8192, 28672, 384)] if real else [(4096, 4096, 64)]
    for shape in shapes:
        for dtype in ("bfloat16", "float32") if real else ("float32",):
            yield functools.partial(_norm_case, shape, dtype)


def _norm_case(shape, dtype):
    rows, columns, rank = shape
    w, a, b = _factors(*shape, dtype)
    energy = kernels.column_energy(w)
    calls = {
        "xla, energy at hand": compiled(
            lambda w, a, b, e: kernels.dora_weight_norm(w, a, b, 0.5, energy=e), w, a, b, energy
        ),
        "xla": compiled(lambda w, a, b: kernels.dora_weight_norm(w, a, b, 0.5), w, a, b),
        "plain (dense)": compiled(exact(_plain_norm), w, a, b),
        "PEFT": functools.partial(_peft_norm, w, a, b),
    }
    least = size(w, a, b) + 4 * columns
    return Case("dora_weight_norm", _words(shape, ("in", "out", "r")), dtype, least, 2 * rows * columns * rank, calls)


def _peft_norm(w, a, b):
    """As PEFT does in a forward pass: the product by way of an identity matrix, then the dense norm."""
    import torch
    from peft.tuners.lora.dora import DoraLinearLayer

    layer, (w, down, up) = DoraLinearLayer(fan_in_fan_out=False), _to_torch(w.T, a.T, b.T)
    down, up = (_torch_linear(m) for m in (down, up))

    def call():
        with torch.no_grad():
            return layer.get_weight_norm(w, layer.get_lora_weight(down, up), 0.5)

    return call, None


def _torch_linear(weight):
    import torch

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def _plain_dora(x, w, a, b, magnitude):
    v = w.astype(jnp.float32) + 0.5 * jnp.matmul(a, b, preferred_element_type=jnp.float32)
    g = magnitude / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))
    return ((x @ w) * g.astype(x.dtype) + g.astype(x.dtype) * (0.5 * (x @ a @ b))).astype(x.dtype)


def _dora(x, w, a, b, magnitude):
    return kernels.dora_linear(x, w, a, b, magnitude, 0.5)


def _dora_args(tokens, rows, columns, rank, dtype):
    magnitude = 1 + 0.1 * normal(4, columns)
    return normal(3, tokens, rows, dtype=dtype), *_factors(rows, columns, rank, dtype), magnitude


def _loss(f):
    return lambda *args: jnp.sum(jnp.square(f(*args).astype(jnp.promote_types(args[0].dtype, jnp.float32))))


def check_dora():
    def plain(x, w, a, b, magnitude):
        v = w + 0.5 * a @ b
        return x @ (v * (magnitude / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))))

    args = functools.partial(_dora_args, 7, 70, 33, 5)
    # bfloat16: the products, the update and the result are rounded to 2^-9 of themselves.
    allowed = {"float32": 1e-5, "bfloat16": 2e-2}
    yield from checks("DoRA's layer", _dora, plain, args, allowed)
    yield from checks(
        "DoRA's layer, gradients",
        jax.grad(_loss(_dora), (0, 2, 3, 4)),
        jax.grad(_loss(plain), (0, 2, 3, 4)),
        args,
        allowed,
    )


def dora_cases(real):
    shapes = [(4096, 8192, 8192, 384), (8192, 4096, 14336, 16)] if real else [(512, 768, 3072, 16)]
    for shape in shapes:
        for dtype in ("bfloat16",) if real else ("float32",):
            yield functools.partial(_dora_case, shape, dtype)


def _dora_case(shape, dtype):
    """Output and gradients of x, a, b and the magnitude, as a training step asks for."""
    t, rows, columns, rank = shape
    args = _dora_args(*shape, dtype)
    ways = {"xla": _dora, "plain (dense)": exact(_plain_dora)}
    calls = {name: compiled(jax.value_and_grad(_loss(f), (0, 2, 3, 4)), *args) for name, f in ways.items()}
    calls["PEFT"] = functools.partial(_peft_dora, *args)
    # Forwards: x, W, the result; backwards: d twice, W, x again, dx.
    least = 2 * size(args[1]) + 3 * size(args[0]) + 3 * t * columns * args[0].dtype.itemsize
    flops = 4 * t * rows * columns + 8 * t * rank * (rows + columns) + 2 * rows * columns * rank
    return Case("dora_linear, gradients", _words(shape, ("t", "in", "out", "r")), dtype, least, flops, calls)


def _peft_dora(x, w, a, b, magnitude):
    import torch
    from peft.tuners.lora.dora import DoraLinearLayer

    x, w, down, up, magnitude = _to_torch(x, w.T, a.T, b.T, magnitude)
    base, down, up = (_torch_linear(m) for m in (w, down, up))
    dora = DoraLinearLayer(fan_in_fan_out=False)
    dora.weight = torch.nn.Parameter(magnitude.to(x.dtype))
    trained = [x.requires_grad_(), down.weight.requires_grad_(), up.weight.requires_grad_(), dora.weight]

    def call():
        result = base(x)
        y = result + dora(x, lora_A=down, lora_B=up, scaling=0.5, base_layer=base, base_result=result)
        return torch.autograd.grad(y.float().square().sum(), trained)[0]

    return call, None


# A linear layer with a low-rank update.


def _plain_lora(x, w, a, b):
    return x @ w + 0.5 * (x @ a @ b)


def _lora(x, w, a, b):
    return kernels.lora_linear(x, w, a, b, 0.5)


def _lora_args(tokens, rows, columns, rank, dtype):
    return normal(3, tokens, rows, dtype=dtype), *_factors(rows, columns, rank, dtype)


def check_lora():
    args = functools.partial(_lora_args, 7, 70, 33, 5)
    # bfloat16: the update and the result are rounded to 2^-9 of themselves.
    allowed = {"float32": 1e-5, "bfloat16": 2e-2}
    yield from checks("LoRA's layer", _lora, _plain_lora, args, allowed)
    yield from checks(
        "LoRA's layer, gradients",
        jax.grad(_loss(_lora), range(4)),
        jax.grad(_loss(_plain_lora), range(4)),
        args,
        allowed,
    )


def lora_cases(real):
    shapes = (
        [(8192, 4096, 14336, 8), (8192, 4096, 14336, 64), (8192, 8192, 8192, 384)] if real else [(1024, 768, 3072, 8)]
    )
    for shape in shapes:
        for dtype in ("bfloat16",) if real else ("float32",):
            yield functools.partial(_lora_case, shape, dtype)
            yield functools.partial(_lora_gradients_case, shape, dtype)


def _lora_case(shape, dtype):
    t, rows, columns, rank = shape
    args = _lora_args(*shape, dtype)
    calls = {
        "xla": compiled(_lora, *args),
        "plain": compiled(exact(_plain_lora), *args),
        "x w alone": compiled(exact(lambda x, w: x @ w), *args[:2]),
    }
    least = size(args) + t * columns * args[0].dtype.itemsize
    flops = 2 * t * (rows * columns + rank * (rows + columns))
    return Case("lora_linear", _words(shape, ("t", "in", "out", "r")), dtype, least, flops, calls)


def _lora_gradients_case(shape, dtype):
    t, rows, columns, rank = shape
    args = _lora_args(*shape, dtype)
    ways = {"xla": _lora, "plain": exact(_plain_lora)}
    calls = {name: compiled(jax.value_and_grad(_loss(f), (0, 2, 3)), *args) for name, f in ways.items()}
    least = 2 * size(args[1]) + 3 * size(args[0]) + 3 * t * columns * args[0].dtype.itemsize
    flops = 4 * t * rows * columns + 8 * t * rank * (rows + columns)
    return Case("lora_linear, gradients", _words(shape, ("t", "in", "out", "r")), dtype, least, flops, calls)


# Energies of a weight's gradient.


def _plain_energy(x, dy):
    square = jnp.square(jnp.matmul(x.T, dy, preferred_element_type=jnp.float32))
    return jnp.sum(square, axis=1), jnp.sum(square, axis=0)


def _energy_args(tokens, rows, columns, dtype):
    return normal(0, tokens, rows, dtype=dtype), normal(1, tokens, columns, dtype=dtype)


def check_energy():
    def plain(x, dy):
        square = jnp.square(x.T @ dy)
        return jnp.sum(square, axis=1), jnp.sum(square, axis=0)

    args = functools.partial(_energy_args, 33, 70, 50)
    yield from checks(
        "energies of a gradient", kernels.weight_grad_energy, plain, args, {"float32": 1e-5, "bfloat16": 1e-5}
    )


def energy_cases(real):
    shapes = [(8192, 4096, 14336), (8192, 8192, 8192)] if real else [(1024, 768, 3072)]
    for shape in shapes:
        for dtype in ("bfloat16",) if real else ("float32",):
            yield functools.partial(_energy_case, shape, dtype)


def _energy_case(shape, dtype):
    t, rows, columns = shape
    args = _energy_args(*shape, dtype)
    calls = {
        "xla": compiled(kernels.weight_grad_energy, *args),
        "plain": compiled(exact(_plain_energy), *args),
        "x^T dy alone": compiled(exact(lambda x, dy: x.T @ dy), *args),
    }
    least = size(args) + 4 * (rows + columns)
    return Case("weight_grad_energy", _words(shape, ("t", "in", "out")), dtype, least, 2 * t * rows * columns, calls)


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
    "grassmann_step": check_step,
    "grassmann_logits": check_logits,
    "dora_weight_norm": check_norm,
    "dora_linear": check_dora,
    "lora_linear": check_lora,
    "weight_grad_energy": check_energy,
    "projected_adam_step": check_projected_adam,
    "subspace_residual": check_residual,
}
CASES = {
    "grassmann_step": step_cases,
    "grassmann_logits": logits_cases,
    "dora_weight_norm": norm_cases,
    "dora_linear": dora_cases,
    "lora_linear": lora_cases,
    "weight_grad_energy": energy_cases,
    "projected_adam_step": projected_adam_cases,
    "subspace_residual": residual_cases,
}
