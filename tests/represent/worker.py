"""One of two processes of ``test_features.py``: ``python -m tests.represent.worker INDEX PORT OUT``."""

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


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
    values, labels = features()
    np.savez(sys.argv[3], features=values, labels=labels)
