"""From a config to an Optax transform: a schedule, a Euclidean optimizer, and a Riemannian one for subspaces."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from subspace_jax import optim

PyTree = Any

SCHEDULES = ("constant", "linear", "cosine", "step")
EUCLIDEAN = ("sgd", "adam", "adamw", "lamb")
GRASSMANN = ("rsgd", "radam")


def default_config() -> ConfigDict:
    """Returns the fields that :func:`make_optimizer` reads; see it for their meaning."""
    return ConfigDict(
        {
            "name": "sgd",
            "learning_rate": 0.1,
            "schedule": "cosine",
            "warmup_steps": 0,
            "final_scale": 0.0,
            "momentum": 0.9,
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 0.0,
            "clip_norm": 0.0,
            "grassmann": {
                "name": "rsgd",
                "lr_factor": 1.0,
                "momentum": 0.9,
                "transport": "euclidean",
                "retraction": "exp",
                "reorth_every": 5,
            },
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
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule: expected one of {SCHEDULES}, got {config.schedule!r}")
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
    whole = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after
    # Optax mixes integer steps and floats, which strict dtype promotion refuses; float32 counts exactly up to 2^24.
    return lambda step: whole(jnp.asarray(step, jnp.float32))


def make_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a run: parameters named ``bases`` move on Grassmann manifolds, all others as usual.

    Args:
      config: As :func:`default_config` gives it.  ``clip_norm`` (0: off) scales the whole gradient down to this
        norm; ``weight_decay`` is coupled for "sgd" and "adam", decoupled for "adamw" and "lamb", and never touches
        bases, nor with "adamw" a ``magnitude`` (of DoRA); ``grassmann.lr_factor`` multiplies the shared learning rate.
      num_steps: Length of the run, for the schedule.

    Returns:
      The transform.

    Raises:
      ValueError: A name is unknown.
    """
    rate = make_schedule(config, num_steps)
    if config.name == "sgd":
        euclidean = optax.chain(
            optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, momentum=config.momentum)
        )
    elif config.name == "adam":
        euclidean = optax.chain(
            optax.add_decayed_weights(config.weight_decay), optax.adam(rate, b1=config.b1, b2=config.b2)
        )
    elif config.name == "adamw":
        options = {"weight_decay": config.weight_decay, "mask": _decays}
        euclidean = optax.adamw(rate, b1=config.b1, b2=config.b2, **options)
    elif config.name == "lamb":
        euclidean = optax.lamb(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
    else:
        raise ValueError(f"optim.name: expected one of {EUCLIDEAN}, got {config.name!r}")

    manifold = config.grassmann
    shared = {
        "transport": manifold.transport,
        "retraction": manifold.retraction,
        "reorth_every": manifold.reorth_every,
        "lr_factor": manifold.lr_factor,
    }
    if manifold.name == "rsgd":
        grassmann = optim.riemannian_sgd(rate, momentum=manifold.momentum, **shared)
    elif manifold.name == "radam":
        grassmann = optim.riemannian_adam(rate, b1=config.b1, b2=config.b2, **shared)
    else:
        raise ValueError(f"optim.grassmann.name: expected one of {GRASSMANN}, got {manifold.name!r}")

    tx = optim.with_geometry(euclidean, grassmann)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), tx) if config.clip_norm > 0 else tx


def _decays(params: PyTree) -> PyTree:
    """Whether weight decay touches an array: the lengths that DoRA trains are not to shrink."""

    def decays(path, _):
        return not path or getattr(path[-1], "key", None) != "magnitude"

    return jax.tree_util.tree_map_with_path(decays, params)
