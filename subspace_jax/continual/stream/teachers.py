"""Linear teacher tasks whose pattern of sharing is known (a stand-in of this library for arXiv 2605.19301)."""

from typing import NamedTuple

import numpy as np

from subspace_jax.continual.stream.tasks import Stream, TaskData, make_stream

COEFFICIENTS = ((1, 0, 0), (0, 1, 0), (0.5, 0.5, 0), (0.7, 0.3, 0), (0, 0, 1), (0.3, 0.3, 0.4))


class Teachers(NamedTuple):
    """Six linear maps, sums of three atoms of rank 2.

    Attributes:
      kernels: ``[6, inputs, outputs]``, float32: targets are ``x @ kernels[t]``.
      atoms: ``[3, inputs, outputs]``.
    """

    kernels: np.ndarray
    atoms: np.ndarray


def teacher_tasks(seed: int = 0, *, inputs: int = 32, outputs: int = 16, rank: int = 2) -> Teachers:
    """Draws the teachers: tasks 0, 1 and 4 have an atom that no earlier task has.

    Args:
      seed: Seed of the atoms.
      inputs: Size of an input.
      outputs: Size of an output.
      rank: Rank of an atom.
    """
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((3, inputs, rank))
    atoms = left @ rng.standard_normal((3, rank, outputs)) / np.sqrt(inputs)
    kernels = np.einsum("ta,aio->tio", np.asarray(COEFFICIENTS), atoms)
    return Teachers(kernels.astype(np.float32), atoms.astype(np.float32))


def teacher_stream(teachers: Teachers, *, num_train: int = 1024, num_test: int = 256, seed: int = 0) -> Stream:
    """Makes a stream of regressions from teachers: ``inputs`` of independent standard normals, and ``targets``.

    Args:
      teachers: The teachers.
      num_train: Examples of a task for training.
      num_test: Those for evaluation.
      seed: Seed of the inputs.
    """
    rng, tasks = np.random.default_rng(seed), []
    for t, kernel in enumerate(teachers.kernels):
        parts = []
        for count in (num_train, num_test):
            x = rng.standard_normal((count, len(kernel))).astype(np.float32)
            parts.append({"inputs": x, "targets": x @ kernel})
        tasks.append(TaskData(f"teacher {t}", *parts))
    return make_stream(tasks)
