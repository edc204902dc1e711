"""From a config to an Optax transform: a schedule, an optimizer, and a Riemannian one for parameters on manifolds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from subspace_jax import optim
from subspace_jax.adapters.gradient_probes import PROBES
from subspace_jax.optim.lora.adaprelora import STATISTICS
from subspace_jax.optim.projected._shared import METHODS, SIDES
from subspace_jax.optim.projected.projection import MOMENTS
from subspace_jax.optim.quantized_state import DTYPES
from subspace_jax.train.fields import check_at_least, check_choice, check_share, flatten

PyTree = Any

SCHEDULES = ("constant", "linear", "cosine", "step")
EUCLIDEAN = ("sgd", "adam", "adamw", "lamb")
LOW_RANK = ("galore", "fira", "apollo", "apollo_mini", "online_subspace_descent", "coso")
LORA = ("lora_plus", "scaled_gd_lora", "scaled_adamw_lora", "lora_rite", "lora_pro", "adaprelora")
GRASSMANN = ("riemannian_sgd", "riemannian_adam")
DECAYS = ("all", "kernels")

_AT_LEAST_0 = (
    *("learning_rate", "warmup_steps", "final_scale", "weight_decay", "clip_norm"),
    *("low_rank.rank", "grassmann.lr_factor"),
)
_ABOVE_0 = (
    *("low_rank.refresh_every", "low_rank.scale", "low_rank.sketch_rank"),
    *("lora.ratio", "lora.scale", "grassmann.reorth_every"),
)
_SHARES = ("momentum", "b1", "b2", "grassmann.momentum")
_NO_KERNELS = ("bias", "scale", "embedding", "magnitude", "bases")


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
            "decay": "all",
            "clip_norm": 0.0,
            "low_rank": {
                "rank": 0,
                "refresh_every": 200,
                "method": "subspace_iteration",
                "side": "std",
                "moments": "keep",
                "scale": 1.0,
                "sketch_rank": 64,
                "state_dtype": "float32",
            },
            "lora": {"ratio": 16.0, "scale": 2.0, "stats": "projected"},
            "grassmann": {
                "name": "riemannian_sgd",
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
    whole = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after
    # Optax mixes integer steps and floats, which strict dtype promotion refuses; float32 counts exactly up to 2^24.
    return lambda step: whole(jnp.asarray(step, jnp.float32))


def make_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a run: parameters named ``bases`` move on Grassmann manifolds, all others as usual.

    Args:
      config: As :func:`default_config` gives it.  ``clip_norm`` (0: off) scales the whole gradient down to this
        norm; ``weight_decay`` is coupled for "sgd" and "adam", decoupled for "adamw" and "lamb", and never touches
        bases, nor with "adamw" a ``magnitude`` (of DoRA); with ``decay`` "kernels" it touches arrays of that name only,
        and leaves out biases, norms, tables and tokens, as recipes for images do.  ``grassmann.lr_factor`` multiplies
        the shared learning rate.

        The names in ``LOW_RANK`` project the gradients of kernels, those of stacked layers included, and are Adam for
        tables, biases and norms.  ``low_rank.rank`` 0 is a quarter of a kernel's shorter side; ``low_rank.scale`` is
        that of the method (1 keeps the learning rate that all other leaves have; 1 is 128 for "apollo_mini");
        ``low_rank.side`` and ``low_rank.moments`` are of "galore" alone, ``low_rank.sketch_rank`` is of "coso";
        ``low_rank.state_dtype`` "bfloat16" or "int8" makes the moments narrow, see
        :func:`subspace_jax.optim.quantize_state`.

        The names in ``LORA`` are for adapters: ``lora.ratio`` is of "lora_plus", ``lora.scale`` (alpha over rank) of
        "lora_pro" and "adaprelora", and ``lora.stats`` of the latter.  For both groups decay is decoupled and touches
        every leaf.
      num_steps: Length of the run, for the schedule.

    Returns:
      The transform.

    Raises:
      ValueError: A name is unknown, or ``decay`` is "kernels" for an optimizer of ``LOW_RANK`` or ``LORA``.
    """
    check_optimizer(config)
    rate = make_schedule(config, num_steps)
    if config.decay == "kernels" and config.name not in EUCLIDEAN:
        raise ValueError(f"optim.decay: {config.name!r} decays all that it trains, expected 'all', got 'kernels'")
    decayed = _only_kernels if config.decay == "kernels" else None
    if config.name == "sgd":
        euclidean = optax.chain(
            optax.add_decayed_weights(config.weight_decay, decayed), optax.sgd(rate, momentum=config.momentum)
        )
    elif config.name == "adam":
        euclidean = optax.chain(
            optax.add_decayed_weights(config.weight_decay, decayed), optax.adam(rate, b1=config.b1, b2=config.b2)
        )
    elif config.name == "adamw":
        # The lengths that DoRA trains are not to shrink.
        options = {"weight_decay": config.weight_decay, "mask": decayed or functools.partial(_but_for, ("magnitude",))}
        euclidean = optax.adamw(rate, b1=config.b1, b2=config.b2, **options)
    elif config.name == "lamb":
        options = {"weight_decay": config.weight_decay, "mask": decayed}
        euclidean = optax.lamb(rate, b1=config.b1, b2=config.b2, **options)
    elif config.name in LOW_RANK:
        euclidean = _narrowed(config, _low_rank(config, rate, num_steps))
    else:
        euclidean = _lora(config, rate)

    manifold = config.grassmann
    shared = {
        "transport": manifold.transport,
        "retraction": manifold.retraction,
        "reorth_every": manifold.reorth_every,
        "lr_factor": manifold.lr_factor,
    }
    if manifold.name == "riemannian_sgd":
        grassmann = optim.riemannian_sgd(rate, momentum=manifold.momentum, **shared)
    else:
        grassmann = optim.riemannian_adam(rate, b1=config.b1, b2=config.b2, **shared)

    tx = optim.with_geometry(euclidean, grassmann)
    if config.clip_norm <= 0:
        return tx
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.name == "adaprelora" and config.lora.stats == "full":
        # What the probes of energies deliver is no part of the gradient.
        clip = optax.masked(clip, functools.partial(_but_for, PROBES))
    return optax.chain(clip, tx)


def check_optimizer(config: ConfigDict) -> None:
    """Checks the fields of :func:`default_config`, those too that the chosen optimizer does not use.

    Raises:
      ValueError: A number is out of range, or a name is unknown; the message names the field.
    """
    check_choice("optim.name", config.name, (*EUCLIDEAN, *LOW_RANK, *LORA))
    check_choice("optim.grassmann.name", config.grassmann.name, GRASSMANN)
    check_choice("optim.decay", config.decay, DECAYS)
    check_choice("optim.low_rank: method", config.low_rank.method, METHODS)
    check_choice("optim.low_rank: side", config.low_rank.side, SIDES)
    check_choice("optim.low_rank: moments", config.low_rank.moments, MOMENTS)
    check_choice("optim.low_rank.state_dtype", config.low_rank.state_dtype, ("float32", *DTYPES))
    check_choice("optim.lora: stats", config.lora.stats, STATISTICS)
    fields = flatten(config)
    for name in _AT_LEAST_0:
        check_at_least(f"optim.{name}", fields[name], 0)
    for name in _ABOVE_0:
        check_at_least(f"optim.{name}", fields[name], 0, above=True)
    for name in _SHARES:
        check_share(f"optim.{name}", fields[name])


def _low_rank(config: ConfigDict, rate: optax.Schedule, num_steps: int) -> optax.GradientTransformation:
    fields = config.low_rank
    moments = {"b1": config.b1, "b2": config.b2, "weight_decay": config.weight_decay}
    renewed = {**moments, "refresh_every": fields.refresh_every, "scale": fields.scale}

    def rank(path: str, shape: tuple[int, ...]) -> int | None:
        # Biases of stacked layers look like matrices, and rows of a table that no token met have no gradient.
        if len(shape) < 2 or path.split("/")[-1] in _NO_KERNELS:
            return None
        return fields.rank or max(1, min(shape[-2:]) // 4)

    try:
        if config.name == "galore":
            options = {"method": fields.method, "side": fields.side, "moments": fields.moments}
            return optim.galore(rate, rank, **options, **renewed)
        if config.name == "fira":
            return optim.fira(rate, rank, method=fields.method, **renewed)
        if config.name == "apollo":
            return optim.apollo(rate, rank, **renewed)
        if config.name == "apollo_mini":
            options = {**renewed, "scale": 128 * fields.scale, "scaling": "tensor"}
            return optim.apollo(rate, lambda *leaf: None if rank(*leaf) is None else 1, **options)
        if config.name == "online_subspace_descent":
            options = {"period": fields.refresh_every, "scale": fields.scale}
            relative = _schedule(config, 1.0, num_steps)
            return optim.online_subspace_descent(rate, rank, relative_rate=relative, **moments, **options)
        # One run is one task: the history, which later tasks would need, has room for one column.
        return optim.coso(
            rate,
            rank,
            fields.sketch_rank,
            update_every=fields.refresh_every,
            max_history=1,
            **moments,
        )
    except ValueError as error:
        raise ValueError(f"optim.low_rank: {error}") from error


def _narrowed(config: ConfigDict, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    dtype = config.low_rank.state_dtype
    if dtype == "float32":
        return tx
    if config.name == "coso":
        raise ValueError(f"optim.low_rank.state_dtype: {dtype!r} would round the bases of coso; expected 'float32'")
    try:
        return optim.quantize_state(tx, dtype)
    except ValueError as error:
        raise ValueError(f"optim.low_rank.state_{error}") from error


def _lora(config: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    fields = config.lora
    options = {"b1": config.b1, "b2": config.b2, "weight_decay": config.weight_decay}
    try:
        if config.name == "lora_plus":
            return optim.lora_plus(rate, ratio=fields.ratio, **options)
        if config.name == "scaled_gd_lora":
            return optim.scaled_gd_lora(rate, weight_decay=config.weight_decay)
        if config.name == "scaled_adamw_lora":
            return optim.scaled_adamw_lora(rate, **options)
        if config.name == "lora_rite":
            return optim.lora_rite(rate, **options)
        if config.name == "lora_pro":
            return optim.lora_pro(rate, scale=fields.scale, **options)
        return optim.adaprelora(rate, scale=fields.scale, stats=fields.stats, **options)
    except ValueError as error:
        raise ValueError(f"optim.lora: {error}") from error


def _only_kernels(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: bool(path) and getattr(path[-1], "key", None) == "kernel", params
    )


def _but_for(names: tuple[str, ...], params: PyTree) -> PyTree:
    """True for every array but those of these names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path or getattr(path[-1], "key", None) not in names, params
    )
