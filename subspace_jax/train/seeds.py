"""The seed of a run that goes on, compared with that of the run before."""

import dataclasses
import logging

import jax
import numpy as np

from subspace_jax.train.phases import Run
from subspace_jax.train.state import TrainState, run_key

log = logging.getLogger(__name__)


def with_seed(state: TrainState, run: Run, shardings: TrainState) -> TrainState:
    """Compares the key of a restored state with that of the seed; raises ValueError for another one."""
    key = run_key(run.seed)
    if np.array_equal(np.asarray(key), np.asarray(state.key)):
        return state
    if not run.change_seed:
        raise ValueError(
            f"seed: the run in {run.workdir} began with another seed than {run.seed}; give that one, or go on with "
            "this one by --change-seed (change_seed=True), or start anew by --restart (restart=True)"
        )
    log.warning("Going on with another seed than that of the run before: %d.", run.seed)
    return dataclasses.replace(state, key=jax.device_put(np.asarray(key), shardings.key))
