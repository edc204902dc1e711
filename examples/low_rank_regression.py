"""Regression onto a low-rank matrix whose rows and columns differ in scale, by factors: a test of their optimizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from subspace_jax import adapters, data, nn, train

INPUTS, OUTPUTS, TARGET_RANK, ROWS = 64, 48, 4, 2000


class LowRankRegressionTask:
    """A kernel ``[64, 48]`` of zeros with a LoRA of scale 1, as a :class:`subspace_jax.train.Task`.

    Batches hold ``inputs [batch, 64]``, ``labels [batch, 48]`` and, for evaluation, ``mask [batch]``.

    Args:
      rank: Of the LoRA.
      probes: Whether energy probes are beside the factors, see :func:`subspace_jax.adapters.add_energy_probes`.
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
        return adapters.add_energy_probes(factors) if self._probes else factors, frozen

    def axes(self):
        """Returns the logical axis names: nothing is split."""
        return jax.tree.map(lambda x: P(*(None,) * x.ndim), jax.eval_shape(self.init, jax.random.key(0)))

    def loss(self, params, variables, batch, key):
        """Returns the mean square of the errors, and that as a share of the start's as a metric."""
        del key
        loss = jnp.mean(self._squares(params, variables, batch))
        return loss, (variables, {"relative": loss / self._start})

    def evaluate(self, params, variables, batch):
        """Returns sums over the real rows, and their number."""
        loss = jnp.sum(self._squares(params, variables, batch), where=batch["mask"] > 0)
        return {"loss": loss, "relative": loss / self._start, "count": jnp.sum(batch["mask"])}

    def _squares(self, params, variables, batch):
        kernel = adapters.bind(variables, params, self._rules)["kernel"]
        return jnp.mean(jnp.square(nn.linear(batch["inputs"], kernel) - batch["labels"]), axis=-1)


def default_config() -> ConfigDict:
    """Returns the fields of a run; ``model.rank`` is that of the factors, 4 that of the target."""
    config = train.default_config()
    config.task = "examples.low_rank_regression"
    config.train.steps = 400
    config.train.best = "min:relative"
    config.data = ConfigDict({"batch_size": 128, "eval_batch_size": ROWS})
    config.model = ConfigDict({"rank": 8})
    config.optim.name = "adaprelora"
    config.optim.learning_rate = 0.1
    config.optim.lora.scale = 1.0
    config.optim.lora.stats = "full"
    return config.lock()


def build(config: ConfigDict) -> tuple[LowRankRegressionTask, train.Data]:
    """Makes the task and the data of a config, as :func:`subspace_jax.train.build` asks for them.

    Raises:
      ValueError: A field can't serve.
    """
    if not 1 <= config.model.rank <= OUTPUTS:
        raise ValueError(f"model.rank: expected 1 to {OUTPUTS}, got {config.model.rank}")
    examples, sizes = axis_scaled_regression(config.seed), config.data
    batches = functools.partial(data.train_batches, examples, batch_size=sizes.batch_size)
    batches(seed=config.seed)  # what is wrong with batch size or seed shows now
    probes = config.optim.name == "adaprelora" and config.optim.lora.stats == "full"
    task = LowRankRegressionTask(config.model.rank, probes, float(np.mean(np.square(examples["labels"]))))
    return task, train.Data(
        batch_size=sizes.batch_size,
        steps_per_epoch=data.steps_per_epoch(ROWS, sizes.batch_size),
        train=lambda seed: batches(seed=seed),
        evaluate=data.eval_passes(examples, sizes.eval_batch_size),
    )


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
