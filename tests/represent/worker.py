"""One of two processes of a test: ``python -m tests.represent.worker INDEX PORT OUT [WORKDIR]``.

Without a folder for a run it writes the features of ``test_features.py``, else the learners of
``test_dynamic_subspace_learners_task.py``.
"""

import dataclasses
import pathlib
import sys

import jax
import numpy as np

from subspace_jax import represent, train
from subspace_jax.represent.gcr import task as classify


def features(*, eval_batch_size=768):
    """Features and labels of a model whose parameters are sharded over all devices."""
    config = classify.default_config()
    config.data.name = "union_of_subspaces"
    config.data.eval_batch_size = eval_batch_size
    config.model.features = (8,)
    config.model.dims = (2,)
    config.mesh.data, config.mesh.fsdp = 1, -1
    run = train.build(config)
    (phase,) = run.phases
    state = train.init_state(phase.task, phase.tx, run.mesh)
    assert state.params["backbone"]["layers"][0]["kernel"].is_fully_replicated == (jax.device_count() == 1)
    return represent.features_of(phase.task, state, phase.data.evaluate["eval"]())


def learners(workdir):
    """Ends ten epochs of learners, of which one is split; returns arrays that host code decides on."""
    config = train.load_config("represent/digits_learners:dynamic")
    config.learners.patience = 1
    run = train.build(config)
    (phase,) = run.phases
    phase = phase._replace(num_steps=10 * phase.round_steps)
    found = train.fit(dataclasses.replace(run, phases=(phase,), workdir=pathlib.Path(workdir), progress=False))
    variables = found.state.variables
    return {
        "learner_id": np.asarray(variables["model"]["embedding"]["learner_id"]),
        "assignment": np.asarray(variables["assignment"]),
        "kernel": np.asarray(found.state.params["embedding"]["kernel"]),
        "recall": found.metrics["recall_at_1"],
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
    arrays = learners(sys.argv[4]) if sys.argv[4:] else dict(zip(("features", "labels"), features(), strict=True))
    np.savez(sys.argv[3], **arrays)
