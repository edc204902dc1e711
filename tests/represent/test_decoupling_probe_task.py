"""The classifier with decoupled codes keeps the contract of tasks, with an estimate and a penalty in two steps."""

import pytest

from subspace_jax.represent.decoupling_probe import OnlineDecoupler
from subspace_jax.represent.decoupling_probe.data import NUM_CLASSES, domain_mixture
from subspace_jax.represent.decoupling_probe.task import DecoupledClassifierTask
from tests.train.common import data_of
from tests.train.task_battery import TaskContract


@pytest.mark.slow
class TestDecoupledClassifier(TaskContract):
    deterministic = False  # the choice of states depends on the micro-batch
    # The probe's Adam divides by the size of a gradient: where that is small, more is left of the order of sums.
    atol = 1e-4

    def make(self):
        learn, test = domain_mixture(0, 128, 72)
        decoupler = OnlineDecoupler(3, 0, every=1, probe_steps=4, capacity=64, per_step=32)
        task = DecoupledClassifierTask((32, 16, 8, NUM_CLASSES), decoupler, 0.1)
        own = data_of(learn, test, 32)
        return task, own._replace(evaluate={"train": data_of(learn, learn, 32).evaluate["eval"], **own.evaluate})
