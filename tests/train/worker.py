"""One of the processes of ``test_processes.py``: ``python -m tests.train.worker INDEX COUNT PORT WORKDIR``."""

import logging
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from subspace_jax import train
from subspace_jax.train import digests, loop
from subspace_jax.train.reading import DamagedError

from .common import Interrupted, breaking, classification, make_tx, run_of

NUM_STEPS = 8
SIZES = {"data": 1, "fsdp": 4, "tensor": 2}  # fsdp goes over both processes


def problem():
    task, data = classification(features=())
    return task, make_tx(num_steps=12), data


def fit(workdir, data=None, num_steps=NUM_STEPS):
    task, tx, whole = problem()
    mesh = train.make_mesh(**SIZES)
    return train.fit(run_of(task, tx, data or whole, num_steps=num_steps, workdir=workdir, mesh=mesh))


def main(index, count, port, workdir):
    jax.config.update("jax_num_cpu_devices", 8 // count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    loop.plot_curves = lambda *arguments: None  # takes longer than a run
    logging.basicConfig(level=logging.INFO, format=f"{index}: %(message)s", stream=sys.stdout, force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)
    assert jax.device_count() == 8
    assert jax.process_count() == count

    batch = next(problem()[2].train(0))
    assert len(batch["labels"]) == 32 // count
    print(f"{index}: rows {batch['labels'].tolist()}")
    try:
        # Both processes would hold the same rows here, and each would read others.
        train.check_batch_size(32, train.make_mesh(data=1, tensor=8))
    except ValueError as error:
        print(f"{index}: refused {error}")

    try:
        fit(workdir, breaking(problem()[2], 5))
    except Interrupted:
        print(f"{index}: interrupted")
    result = fit(workdir)
    first = multihost_utils.process_allgather(result.state, tiled=True)

    if index == 1:
        check = digests.check

        def torn(folder, known, names):
            if folder.name == str(NUM_STEPS) and len(names) > 1:  # the files of this process, not the record alone
                raise DamagedError("torn")
            check(folder, known, names)

        digests.check = torn
    again = multihost_utils.process_allgather(fit(workdir).state, tiled=True)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)
    np.savez(f"{workdir}/process_{index}.npz", *jax.tree.leaves(first))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
