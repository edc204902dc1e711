"""Regression onto a low-rank matrix whose rows and columns differ in scale: a test of optimizers of LoRA's factors."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from subspace_jax import adapters, nn, train
from subspace_jax.train.optimizer import uses_probes

INPUTS, OUTPUTS, TARGET_RANK, ROWS = 64, 48, 4, 2000


class LowRankRegressionTask(train.Task):
    """A kernel ``[64, 48]`` of zeros with a LoRA of scale 1.

    Batches hold ``inputs [batch, 64]``, ``labels [batch, 48]`` and, for evaluation, ``mask [batch]``.

    Args:
      rank: Rank of the LoRA.
      probes: Whether there are gradient probes, see :func:`subspace_jax.adapters.add_gradient_probes`.
      start: Mean square of the labels, the loss of the kernel of zeros.
    """

    def __init__(self, rank: int, probes: bool, start: float):
        self._rules = {"kernel": adapters.LoRA(rank, float(rank))}
        self._probes, self._start = probes, start

    def init(self, key):
        """Returns the factors, and the kernel as a variable."""
        # No constant of the program: XLA's products with a constant of zeros came out as garbage (JAX 0.10.2, CPU).
        frozen = {"kernel": jnp.zeros((INPUTS, OUTPUTS), jnp.float32)}
        factors = adapters.init(key, frozen, self._rules)
        return adapters.add_gradient_probes(factors) if self._probes else factors, frozen

    def roles(self):
        """Returns the roles of factors and probes."""
        return adapters.roles(jax.eval_shape(self.init, jax.random.key(0))[0], self._rules)

    def loss(self, params, variables, batch, *, key, step):
        """Returns the mean squared error, and its ratio to that of the start as a metric."""
        loss = jnp.mean(self._squares(params, variables, batch))
        return loss, (variables, {"relative": loss / self._start})

    def evaluate(self, params, variables, batch, *, key):
        """Returns sums over the examples that are not padding, and their number."""
        loss = jnp.sum(self._squares(params, variables, batch), where=batch["mask"] > 0)
        return {"loss": loss, "relative": loss / self._start, "count": jnp.sum(batch["mask"])}

    def _squares(self, params, variables, batch):
        kernel = adapters.bind(variables, params, self._rules)["kernel"]
        return jnp.mean(jnp.square(nn.linear(batch["inputs"], kernel) - batch["labels"]), axis=-1)


def default_config() -> ConfigDict:
    """Returns the fields of a run; ``model.rank`` is the rank of the factors.  The target has rank 4."""
    config = train.default_config()
    config.task = "examples.low_rank_regression"
    config.train.steps = 400
    config.train.best = "min:relative"
    config.data = ConfigDict({"batch_size": 128, "eval_batch_size": ROWS})
    config.model = ConfigDict({"rank": 8})
    config.optim.name = "adaprelora"
    config.optim.learning_rate = 0.1
    config.optim.kwargs = {"scale": 1.0, "stats": "full"}
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, see :func:`subspace_jax.train.build`.

    Raises:
      ValueError: A field is invalid.
    """
    if not 1 <= config.model.rank <= OUTPUTS:
        raise ValueError(f"model.rank: expected 1 to {OUTPUTS}, got {config.model.rank}")
    examples = axis_scaled_regression(config.seed)
    data = train.array_data(
        examples,
        batch_size=config.data.batch_size,
        evaluate={"eval": examples},
        eval_batch_size=config.data.eval_batch_size,
    )
    start = float(np.mean(np.square(examples["labels"])))
    task = LowRankRegressionTask(config.model.rank, uses_probes(config.optim), start)
    return train.Run((train.Phase("train", task, data),))


def axis_scaled_regression(seed: int) -> dict[str, np.ndarray]:
    """Draws inputs whose columns, and a target of rank 4 whose rows, have scales ``exp(0.8 N(0, 1))``.

    Args:
      seed: Seed.

    Returns:
      ``inputs [2000, 64]`` and ``labels [2000, 48]``, float32.
    """
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((ROWS, INPUTS)) * np.exp(0.8 * rng.standard_normal(INPUTS))
    left, right = rng.standard_normal((OUTPUTS, TARGET_RANK)), rng.standard_normal((TARGET_RANK, INPUTS))
    target = np.exp(0.8 * rng.standard_normal(OUTPUTS))[:, None] * (left @ right) / 16
    return {"inputs": inputs.astype(np.float32), "labels": (inputs @ target.T).astype(np.float32)}
