"""From a config to an Optax transform: a schedule, an optimizer by name, and another for parameters on manifolds."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from subspace_jax import optim
from subspace_jax.optim import registry
from subspace_jax.optim._checks import path_name
from subspace_jax.optim.quantized_state import DTYPES
from subspace_jax.train.fields import check_at_least, check_choice

PyTree = Any

SCHEDULES = ("constant", "linear", "cosine", "step")
DECAYS = ("all", "kernels")


def default_config() -> ConfigDict:
    """Returns the fields that :func:`make_optimizer` reads; see it for their meaning."""
    return ConfigDict(
        {
            "name": "sgd",
            "learning_rate": 0.1,
            "schedule": "cosine",
            "warmup_steps": 0,
            "final_scale": 0.0,
            "clip_norm": 0.0,
            "decay": "all",
            "state_dtype": "float32",
            "kwargs": {},
            "manifold": {"name": "riemannian_sgd", "kwargs": {}},
        }
    )


def make_schedule(config: ConfigDict, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    Args:
      config: Reads ``learning_rate`` (the peak), ``schedule``, ``warmup_steps`` (linear, from 0) and ``final_scale``
        (last learning rate of "linear" and "cosine" over the peak).  "step" multiplies by 0.1 after 30, 60 and 90 %
        of the steps.
      num_steps: Length of the run.

    Returns:
      Step to learning rate.

    Raises:
      ValueError: The schedule is unknown, or the warm-up is longer than the run.
    """
    return _schedule(config, config.learning_rate, num_steps)


def _schedule(config: ConfigDict, peak: float, num_steps: int) -> optax.Schedule:
    warmup = config.warmup_steps
    check_choice("optim.schedule", config.schedule, SCHEDULES)
    if not 0 <= warmup < num_steps:
        raise ValueError(f"optim.warmup_steps: expected 0 to {num_steps - 1} for a run of {num_steps}, got {warmup}")
    rest = num_steps - warmup
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_scale)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * config.final_scale, rest)
    elif config.schedule == "step":
        drops = np.asarray([num_steps * tenths // 10 - warmup for tenths in (3, 6, 9)], np.float32)

        def after(count):
            return peak * 0.1 ** jnp.sum(count >= drops, dtype=jnp.float32)
    else:
        after = optax.constant_schedule(peak)
    joined = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after
    # Optax mixes integer steps and floats, which strict dtype promotion refuses; float32 counts exactly up to 2^24.
    return lambda step: joined(jnp.asarray(step, jnp.float32))


def make_optimizer(
    config: ConfigDict, num_steps: int, roles: Mapping[str, str] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a run.

    Args:
      config: As :func:`default_config` gives it.  ``name`` is one of :data:`subspace_jax.optim.registry.OPTIMIZERS`,
        and ``kwargs`` has keyword arguments of that optimizer, such as ``weight_decay`` or ``rank``.  Weight decay is
        coupled for "sgd" and "adam", else decoupled; with ``decay`` "kernels" it applies to arrays of that name only,
        and leaves out biases, norms, embedding tables and tokens, as recipes for images do.  ``clip_norm`` (0: off)
        scales the whole gradient down to this norm.  ``state_dtype`` "bfloat16" or "int8" quantizes the optimizer's
        state, see :func:`subspace_jax.optim.quantize_state`.  ``manifold.name`` and ``manifold.kwargs`` are of the
        optimizer for parameters on manifolds; its ``lr_factor`` multiplies the shared learning rate.
      num_steps: Length of the run, for the schedule.
      roles: Path of a parameter, or of a group of them, to its role: "grassmann" and "stiefel" (points on a manifold),
        "no_decay" (outside weight decay) or "probe" (outside clipping); see
        :meth:`subspace_jax.train.Task.roles`.

    Returns:
      The transform.

    Raises:
      ValueError: A field is out of range, or an argument or a name unknown; the message names the field.
    """
    roles = roles or {}
    _check_fields(config, roles)
    rate = make_schedule(config, num_steps)
    entry = registry.OPTIMIZERS[config.name]
    kwargs, more = dict(config.kwargs), {}
    if entry.takes_mask:
        more["mask"] = functools.partial(_decayed, roles=roles, only_kernels=config.decay == "kernels")
    elif config.decay == "kernels":
        raise ValueError(f"optim.decay: {config.name!r} decays all parameters, expected 'all', got 'kernels'")
    if "relative_rate" in entry.arguments() and "relative_rate" not in kwargs:
        more["relative_rate"] = _schedule(config, 1.0, num_steps)
    euclidean = _named("optim.kwargs", entry, rate, kwargs, **more)
    if config.state_dtype != "float32":
        if config.name == "coso":
            raise ValueError(f"optim.state_dtype: {config.state_dtype!r} rounds the bases of coso; expected 'float32'")
        euclidean = optim.quantize_state(euclidean, config.state_dtype)
    on_manifold = registry.MANIFOLD_OPTIMIZERS[config.manifold.name]
    manifold = _named("optim.manifold.kwargs", on_manifold, rate, dict(config.manifold.kwargs))
    tx = optax.partition({"euclidean": euclidean, "grassmann": manifold}, functools.partial(_geometry, roles=roles))
    if config.clip_norm <= 0:
        return tx
    # What gradient probes deliver is no part of the gradient.
    clip = optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(optax.masked(clip, functools.partial(_clipped, roles=roles)), tx)


def uses_probes(config: ConfigDict) -> bool:
    """Whether the optimizer of a config reads the energies of gradients that probes beside the factors deliver."""
    if config.name != "adaprelora":
        return False
    return config.kwargs.get("stats", registry.OPTIMIZERS[config.name].arguments()["stats"]) == "full"


def _named(field: str, entry: registry.Optimizer, rate: optax.Schedule, kwargs: dict, **more: Any):
    try:
        return registry.make(entry, rate, kwargs, **more)
    except ValueError as error:
        raise ValueError(f"{field}.{error}") from error


def _check_fields(config: ConfigDict, roles: Mapping[str, str]) -> None:
    check_choice("optim.name", config.name, registry.OPTIMIZERS)
    check_choice("optim.manifold.name", config.manifold.name, registry.MANIFOLD_OPTIMIZERS)
    check_choice("optim.decay", config.decay, DECAYS)
    check_choice("optim.state_dtype", config.state_dtype, ("float32", *DTYPES))
    for name in ("learning_rate", "warmup_steps", "final_scale", "clip_norm"):
        check_at_least(f"optim.{name}", config[name], 0)
    for path, role in roles.items():
        if role == "stiefel":
            raise ValueError(f"optim.manifold.name: {config.manifold.name!r} moves subspaces, but {path} is {role!r}")


def _role(path: str, roles: Mapping[str, str]) -> str:
    """The role of a parameter, "" for none."""
    return next((role for p, role in roles.items() if path == p or path.startswith(f"{p}/")), "")


def _by_path(f, params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(lambda path, _: f(path_name(path)), params)


def _geometry(params: PyTree, roles: Mapping[str, str]) -> PyTree:
    return _by_path(lambda path: "grassmann" if _role(path, roles) == "grassmann" else "euclidean", params)


def _clipped(params: PyTree, roles: Mapping[str, str]) -> PyTree:
    return _by_path(lambda path: _role(path, roles) != "probe", params)


def _decayed(params: PyTree, roles: Mapping[str, str], only_kernels: bool) -> PyTree:
    def decays(path):
        return _role(path, roles) != "no_decay" and (not only_kernels or path.split("/")[-1] == "kernel")

    return _by_path(decays, params)
