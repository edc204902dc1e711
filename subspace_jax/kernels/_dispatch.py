"""Which implementation of an op runs.

An op has a reference, ``xla``, for every platform, and perhaps a Pallas kernel, ``mosaic_tpu``.  The choice falls when
a program is lowered: only then are its platform and its devices known, and one traced function serves a CPU test, a
GPU, and a program compiled ahead of time for a TPU.
"""

import functools
from collections.abc import Callable

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

_NAMES = (None, "xla", "mosaic_tpu", "mosaic_tpu_interpret")


def check_implementation(op: str, implementation: str | None, *args: jax.Array, refusal: str | None = None) -> None:
    """Raises where an implementation that was asked for by name can't serve.

    Args:
      op: Public name of the op, for messages.
      implementation: What the caller asked for.
      *args: Arrays; they tell the platform where the call is not traced.
      refusal: Why the kernel can't serve these arguments, None where it can.

    Raises:
      ValueError: There is no implementation of that name, or it can't serve these arguments or this platform.
    """
    if implementation not in _NAMES:
        raise ValueError(f"implementation: expected one of {_NAMES} for {op}, got {implementation!r}")
    if implementation in (None, "xla"):
        return
    if refusal is not None:
        raise ValueError(f"implementation: {implementation!r} can't serve {op} here: {refusal}")
    # Under a trace the platform is not known yet; there Pallas refuses when the program is lowered.
    if implementation == "mosaic_tpu" and not any(isinstance(x, jax.core.Tracer) for x in args):
        platforms = {d.platform for x in args if isinstance(x, jax.Array) for d in x.devices()}
        platforms = platforms or {jax.default_backend()}
        if platforms != {"tpu"}:
            raise ValueError(
                f"implementation: 'mosaic_tpu' of {op} runs on TPUs, the arguments are on {sorted(platforms)}; "
                "expected None or 'xla' here, or 'mosaic_tpu_interpret' to test the kernel"
            )


def choose(implementation: str | None, xla: Callable, kernel: Callable | None, *args: jax.Array):
    """Runs an op in one of its implementations.

    Args:
      implementation: None for the kernel where it serves (a TPU, and a program for one device or within ``shard_map``,
        for a compiler can't split a kernel over devices) and the reference elsewhere.  A name that
        :func:`check_implementation` let pass forces one; ``mosaic_tpu_interpret`` runs the kernel's code through XLA on
        any platform, slowly, for tests.
      xla: The reference, a function of ``args``.
      kernel: ``kernel(*args, interpret)`` with results like the reference's; None where it can't serve.
      *args: Arrays.

    Returns:
      What the implementation returns.
    """
    if implementation == "xla" or (implementation is None and kernel is None):
        return xla(*args)
    if implementation is not None:
        return kernel(*args, interpret=implementation == "mosaic_tpu_interpret")
    reference, shapes = jax.make_jaxpr(xla, return_shape=True)(*args)
    compiled = jax.make_jaxpr(functools.partial(kernel, interpret=False))(*args)
    outs = _either_p.bind(*args, reference=reference, compiled=compiled)
    return jax.tree.unflatten(jax.tree.structure(shapes), outs)


# A reference and a kernel side by side, one of which is lowered.
_either_p = Primitive("reference_or_kernel")
_either_p.multiple_results = True


@_either_p.def_impl
def _run(*args, **jaxprs):
    return jax.jit(functools.partial(_either_p.bind, **jaxprs))(*args)


@_either_p.def_abstract_eval
def _shapes(*args, reference, compiled):
    wanted, got = ([(x.shape, x.dtype) for x in jaxpr.out_avals] for jaxpr in (reference, compiled))
    if wanted != got:
        raise TypeError(f"the kernel returns {got}, the reference {wanted}")
    return compiled.out_avals


def _batch(args, dims, *, reference, compiled):
    def mapped(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
        return jax.make_jaxpr(jax.vmap(jaxpr_as_fun(jaxpr), tuple(dims)))(*args)

    outs = _either_p.bind(*args, reference=mapped(reference), compiled=mapped(compiled))
    return outs, [0] * len(outs)


def _lower(ctx, *args, reference, compiled, on_tpu):
    jaxpr = compiled if on_tpu and _is_whole(ctx.module_context.axis_context) else reference
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *args)


def _is_whole(axis_context) -> bool:
    """Whether a lowered program sees whole arrays or, within ``shard_map``, shards: nothing is left to be split."""
    if manual := getattr(axis_context, "manual_axes", None):
        mesh = axis_context.mesh
        return set(manual) | set(mesh.manual_axes) == set(mesh.axis_names)
    return getattr(axis_context, "num_devices", 1) == 1


batching.primitive_batchers[_either_p] = _batch
mlir.register_lowering(_either_p, functools.partial(_lower, on_tpu=False))
mlir.register_lowering(_either_p, functools.partial(_lower, on_tpu=True), platform="tpu")
