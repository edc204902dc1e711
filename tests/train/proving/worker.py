"""A process of a proving task: ``python -m tests.train.proving.worker NAME WORKDIR DEVICES [STEP TO BE KILLED AT]``."""

import importlib
import os
import sys

os.environ["XLA_FLAGS"] = f"--xla_cpu_enable_concurrency_optimized_scheduler=false {os.environ.get('XLA_FLAGS', '')}"

import jax
import numpy as np

from .runs import StopAt, fit


def main(name, workdir, devices, kill_at):
    jax.config.update("jax_num_cpu_devices", devices)
    run = importlib.import_module(f"tests.train.proving.{name}").build()
    hooks = [StopAt(kill_at, kill=True)] if kill_at else []
    state = fit(run, workdir, *hooks, checkpoint_every=20).state
    np.savez(f"{workdir}/state.npz", *map(np.asarray, jax.tree.leaves(jax.device_get(state))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
