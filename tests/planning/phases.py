"""A run of several phases and evaluators, as a config names it."""

import jax
import jax.numpy as jnp
import optax

from subspace_jax import train
from tests.train.common import Regression


class Doubled(train.Evaluator):
    """Prepares an array that is none of the state."""

    def prepare(self, params, variables):
        """Returns parameters times two."""
        return params["w"] * 2, variables

    def collect(self, model, batch, *, key):
        """Returns a sum over the batch."""
        return {"sum": jnp.sum(batch["mask"] * (batch["inputs"] @ model[0]))}


class Norm(train.Evaluator):
    """Needs no examples."""

    sets = ()

    def collect(self, model, batch, *, key):
        """Returns the norm of the parameters."""
        return {"norm": jnp.linalg.norm(model[0]["w"])}


class Measured(Regression):
    """A task with three evaluators."""

    def evaluators(self):
        """Returns the default one and two more."""
        return {**super().evaluators(), "doubled": Doubled(), "norm": Norm()}


def batch(rows, mask=False):
    """Returns the shapes of a batch."""
    shapes = {
        "inputs": jax.ShapeDtypeStruct((rows, 8), jnp.float32),
        "labels": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }
    return shapes | ({"mask": jax.ShapeDtypeStruct((rows,), jnp.float32)} if mask else {})


def outline(config):
    """Returns the run without examples."""
    task, sgd, momentum = Measured(), optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)
    small, large = train.outlined(batch(16), 8), train.outlined(batch(32), 8)
    if config.seed:
        return train.Run((train.Phase("late", task, lambda state: small, tx=sgd),))
    phases = (
        ("first", small, sgd),
        ("again", small, sgd),
        ("other optimizer", small, momentum),
        ("larger batch", large, sgd),
    )
    return train.Run(tuple(train.Phase(name, task, data, tx=tx) for name, data, tx in phases))


def build(config):
    """Needed of every task module; planning calls ``outline``."""
    raise NotImplementedError
