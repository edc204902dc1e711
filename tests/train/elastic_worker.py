"""A process of ``test_cluster.py``: ``python -m tests.train.elastic_worker INDEX COUNT PORT WORKDIR CONFIG [SETTING]``.

Runs a config to its end, or goes on from where it is, and writes the state that it then has.
"""

import logging
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from subspace_jax import train


def main(index, count, port, workdir, config, *settings):
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, force=True)
    assert train.initialize(f"localhost:{port}", count, index, timeout=60)
    assert (jax.process_index(), jax.process_count()) == (index, count)
    state = train.run(train.override(train.load_config(config), settings), workdir, progress=False).state
    state = multihost_utils.process_allgather(state, tiled=True)
    np.savez(f"{workdir}/state_{count}_{index}.npz", *map(np.asarray, jax.tree.leaves(state)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
