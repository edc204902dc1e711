"""The fields of a run that all streams with experts share."""

from ml_collections import ConfigDict

from subspace_jax import train
from subspace_jax.continual.igsp.phases import Optimizers, TaskConfig
from subspace_jax.continual.igsp.state import ExpertSettings
from subspace_jax.train.fields import check_at_least


def stream_config() -> ConfigDict:
    """Returns the fields of :func:`subspace_jax.train.default_config` and those of a stream with experts.

    ``experts`` has the fields of :class:`ExpertSettings`.  ``stream.identify_steps`` and ``stream.tune_steps`` are the
    steps of both phases of a task; the learning rate of the router is that of the experts times ``router_rate`` in the
    first phase, and times ``kept_router_rate`` in the second, 0 leaving it as it is.  The warm-up of ``optim`` is in
    the first phase, and its schedule in the second.  ``stream.project`` keeps new experts out of the historical
    subspace in the second phase.
    """
    config = train.default_config()
    config.train.best = "min:experts/change"
    config.optim.update({"name": "adam", "learning_rate": 1e-3, "schedule": "constant"})
    config.experts = ConfigDict(dict(ExpertSettings()._asdict()))
    config.stream = ConfigDict(
        {"identify_steps": 300, "tune_steps": 700, "router_rate": 1.0, "kept_router_rate": 0.1, "project": True}
    )
    return config


def expert_settings(config: ConfigDict) -> ExpertSettings:
    """Returns the settings of a config.

    Raises:
      ValueError: A number is out of range; the message names the field.
    """
    settings = ExpertSettings(**config.experts)
    for name in ("max_experts", "rank", "candidates", "window", "calm_windows"):
        check_at_least(f"experts.{name}", settings[settings._fields.index(name)], 1)
    for name in ("penalty", "complement", "tolerance", "max_rank"):
        check_at_least(f"experts.{name}", settings[settings._fields.index(name)], 0)
    check_at_least("experts.tau", settings.tau, 0, above=True)
    if not 0 < settings.energy <= 1:
        raise ValueError(f"experts.energy: expected a share in (0, 1], got {settings.energy}")
    return settings


def task_config(config: ConfigDict) -> TaskConfig:
    """Returns how each task of a config is learnt.

    Raises:
      ValueError: A number is out of range; the message names the field.
    """
    stream = config.stream
    for name in ("identify_steps", "tune_steps"):
        check_at_least(f"stream.{name}", stream[name], 1)
    for name in ("router_rate", "kept_router_rate"):
        check_at_least(f"stream.{name}", stream[name], 0)

    def transform(factor: float, *, first: bool):
        optim = config.optim.copy_and_resolve_references()
        optim.learning_rate = factor * optim.learning_rate
        if first:  # a rate that falls to zero would look like a router that has converged
            optim.schedule = "constant"
        else:
            optim.warmup_steps = 0
        return train.make_optimizer(optim, stream.identify_steps if first else stream.tune_steps)

    kept_router = transform(stream.kept_router_rate, first=False) if stream.kept_router_rate else None
    optimizers = Optimizers(
        transform(1.0, first=True),
        transform(stream.router_rate, first=True),
        transform(1.0, first=False),
        kept_router,
    )
    return TaskConfig(stream.identify_steps, stream.tune_steps, optimizers, stream.project)
