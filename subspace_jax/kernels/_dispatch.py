"""Selects the implementation of an op.

An op has a reference, ``xla``, for every platform, and perhaps a Pallas kernel, ``mosaic_tpu``.  The choice falls when
a program is lowered, where its platform and devices are known: one traced function serves a CPU test, a GPU, and a
program compiled ahead of time for a TPU.
"""

import functools
from collections.abc import Callable

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

_NAMES = (None, "xla", "mosaic_tpu", "mosaic_tpu_interpret")


def check_implementation(op: str, implementation: str | None, refusal: str | None = None) -> None:
    """Raises if the implementation does not exist or does not support the arguments.

    The platform is checked when the program is lowered, see :func:`choose`.

    Args:
      op: Public name of the op, for messages.
      implementation: Name of the implementation, None for an automatic choice.
      refusal: Why the kernel does not support the arguments, None if it does.

    Raises:
      ValueError: There is no implementation of that name, or it does not support these arguments.
    """
    if implementation not in _NAMES:
        raise ValueError(f"implementation: expected one of {_NAMES} for {op}, got {implementation!r}")
    if implementation not in (None, "xla") and refusal is not None:
        raise ValueError(f"implementation: {implementation!r} can't serve {op} here: {refusal}")


def choose(implementation: str | None, xla: Callable, kernel: Callable | None, *args: jax.Array):
    """Runs an op in one of its implementations.

    Args:
      implementation: None for the kernel on TPUs, in programs for one device or within ``shard_map`` (a compiler cannot
        partition a kernel), and for the reference elsewhere.  A name that :func:`check_implementation` accepts forces
        one; ``mosaic_tpu_interpret`` runs the kernel through XLA on any platform, slowly, for tests.
      xla: The reference, a function of ``args``.
      kernel: ``kernel(*args, interpret)`` with results like the reference's; None if there is none for these arguments.
      *args: Arrays.

    Returns:
      The results of the implementation.

    Raises:
      ValueError: ``mosaic_tpu`` is forced in a program that is lowered for another platform.
    """
    if implementation == "xla" or (implementation is None and kernel is None):
        return xla(*args)
    if implementation == "mosaic_tpu_interpret":
        return kernel(*args, interpret=True)
    reference, shapes = jax.make_jaxpr(xla, return_shape=True)(*args)
    compiled = jax.make_jaxpr(functools.partial(kernel, interpret=False))(*args)
    forced = implementation == "mosaic_tpu"
    outs = _either_p.bind(*args, reference=reference, compiled=compiled, forced=forced)
    return jax.tree.unflatten(jax.tree.structure(shapes), outs)


# A reference and a kernel side by side, one of which is lowered.
_either_p = Primitive("reference_or_kernel")
_either_p.multiple_results = True


@_either_p.def_impl
def _run(*args, **params):
    return jax.jit(functools.partial(_either_p.bind, **params))(*args)


@_either_p.def_abstract_eval
def _shapes(*args, reference, compiled, forced):
    del args, forced
    wanted, got = ([(x.shape, x.dtype) for x in jaxpr.out_avals] for jaxpr in (reference, compiled))
    if wanted != got:
        raise TypeError(f"the kernel returns {got}, the reference {wanted}")
    return compiled.out_avals


def _batch(args, dims, *, reference, compiled, forced):
    def mapped(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
        return jax.make_jaxpr(jax.vmap(jaxpr_as_fun(jaxpr), tuple(dims)))(*args)

    outs = _either_p.bind(*args, reference=mapped(reference), compiled=mapped(compiled), forced=forced)
    return outs, [0] * len(outs)


def _lower(ctx, *args, reference, compiled, forced, on_tpu):
    if forced and not on_tpu:
        raise ValueError(
            f"implementation: 'mosaic_tpu' runs on TPUs, this program is for {'/'.join(ctx.module_context.platforms)}; "
            "expected None or 'xla' here, or 'mosaic_tpu_interpret' to test the kernel"
        )
    kernel = on_tpu and (forced or _is_unpartitioned(ctx.module_context.axis_context))
    return mlir.lower_fun(jaxpr_as_fun(compiled if kernel else reference), multiple_results=True)(ctx, *args)


def _is_unpartitioned(axis_context) -> bool:
    """Whether the compiler has nothing to partition: a program for one device, or the inside of ``shard_map``."""
    if manual := getattr(axis_context, "manual_axes", None):
        mesh = axis_context.mesh
        return set(manual) | set(mesh.manual_axes) == set(mesh.axis_names)
    return getattr(axis_context, "num_devices", 1) == 1


batching.primitive_batchers[_either_p] = _batch
mlir.register_lowering(_either_p, functools.partial(_lower, on_tpu=False))
mlir.register_lowering(_either_p, functools.partial(_lower, on_tpu=True), platform="tpu")
