"""A classifier of examples of several domains whose codes are decoupled from the dominant one (arXiv 2508.12803)."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from subspace_jax import losses, metrics, nn, train
from subspace_jax.losses.decoupling import OnlineDecoupler
from subspace_jax.represent.decoupling_probe.data import DOMAINS, NUM_CLASSES, domain_mixture


class DecoupledClassifierTask(train.Task):
    """An encoder of linear layers with a ReLU between them, a linear head, and a penalty on the codes.

    Batches hold ``inputs [batch, n]``, ``labels [batch]``, ``domains [batch]`` and, for evaluation, ``mask [batch]``.
    ``variables["decoupler"]`` is the state of the decoupler: a batch goes into its reservoir in the loss, and it is
    updated after the step.

    Args:
      widths: Width of an input, of the hidden layers, of the codes, and number of classes.
      decoupler: The decoupler.
      weight: Factor on its penalty.

    Raises:
      ValueError: ``weight`` is negative.
    """

    def __init__(self, widths: Sequence[int], decoupler: OnlineDecoupler, weight: float):
        if not weight >= 0:
            raise ValueError(f"weight: expected at least 0, got {weight}")
        self._widths, self.decoupler, self._weight = tuple(widths), decoupler, weight

    def init(self, key):
        """Returns layers with kernels of He's normal distribution and biases of zero, and a fresh decoupler."""
        key, probe_key = jax.random.split(key)
        draw = jax.nn.initializers.he_normal()
        sizes = list(itertools.pairwise(self._widths))
        layers = {
            f"layer{i}": {"kernel": draw(own, size, jnp.float32), "bias": jnp.zeros(size[1], jnp.float32)}
            for i, (own, size) in enumerate(zip(jax.random.split(key, len(sizes)), sizes, strict=True))
        }
        return layers, {"decoupler": self.decoupler.init(probe_key, self._widths[-2])}

    def axes(self):
        """Returns the logical axis names of parameters; the decoupler is on every device."""
        names = [("embed", "mlp") if i % 2 == 0 else ("mlp", "embed") for i in range(len(self._widths) - 1)]
        layers = {f"layer{i}": {"kernel": P(*axes), "bias": P(axes[1])} for i, axes in enumerate(names)}
        _, variables = jax.eval_shape(self.init, jax.random.key(0))
        return layers, jax.tree.map(lambda x: P(*(None,) * x.ndim), variables)

    def loss(self, params, variables, batch, *, key, step):
        """Returns cross-entropy and weighted penalty, means over the batch; metrics have the penalty itself.

        ``share`` is the mean of ``||q^T h|| / ||h||``: it falls only where codes rotate out of the subspace.
        """
        del step
        codes, logits = self._outputs(params, batch["inputs"])
        decoupler, domains = variables["decoupler"], batch["domains"]
        penalty = self.decoupler.penalty(decoupler, codes, domains)
        found = {
            "accuracy": jnp.mean(_hits(logits, batch["labels"])),
            "penalty": penalty,
            "share": self.decoupler.share(decoupler, codes, domains),
        }
        loss = jnp.mean(losses.cross_entropy(logits, batch["labels"])) + self._weight * penalty
        return loss, ({"decoupler": self.decoupler.observe(decoupler, codes, domains, key)}, found)

    def after_update(self, params, variables, *, key, step):
        """Returns the decoupler with a new subspace, where one is due."""
        del step
        return params, {"decoupler": self.decoupler.maybe_update(variables["decoupler"], key)}

    def evaluate(self, params, variables, batch, *, key):
        """Returns sums of cross-entropy and correct predictions, and the number of examples."""
        del variables, key
        real, (_, logits) = batch["mask"] > 0, self._outputs(params, batch["inputs"])
        return {
            "loss": jnp.sum(losses.cross_entropy(logits, batch["labels"]), where=real),
            "accuracy": jnp.sum(_hits(logits, batch["labels"]), where=real),
            "count": jnp.sum(real.astype(jnp.float32)),
        }

    def evaluators(self):
        """Returns the default one, and the probe of the codes for the dominant domain."""
        return {**super().evaluators(), "domains": _DomainProbe(self)}

    def codes(self, params, inputs: jax.Array) -> jax.Array:
        """Maps inputs ``[batch, n]`` to codes ``[batch, features]``."""
        return self._outputs(params, inputs)[0]

    def _outputs(self, params, x):
        depth = len(self._widths) - 1
        for i in range(depth - 1):
            x = nn.linear(jax.nn.relu(x) if i else x, **params[f"layer{i}"])
        return x, nn.linear(x, **params[f"layer{depth - 1}"])


class _DomainProbe(train.Evaluator):
    """Balanced accuracy of fresh probes, "dominant or not", on the codes of the test set."""

    sets = ("train", "eval")
    reduce = "rows"
    metrics = ("probe_accuracy", "weighted_probe_accuracy")

    def __init__(self, task: DecoupledClassifierTask):
        self._task = task

    def collect(self, model, batch, *, key):
        del key
        return self._task.codes(model[0], batch["inputs"]), batch["domains"] == self._task.decoupler.target

    def finish(self, train, eval):
        return {
            "probe_accuracy": metrics.balanced_probe_accuracy(*train, *eval),
            "weighted_probe_accuracy": metrics.balanced_probe_accuracy(*train, *eval, weighted=True),
        }


def default_config() -> ConfigDict:
    """Returns the fields of a run on :func:`domain_mixture`.

    ``model.features`` are the widths of the encoder, the last that of the codes.  ``decoupling`` is described in
    :func:`subspace_jax.train.default_decoupling`; the domains are "dominant", "second" and "third".
    """
    config = train.default_config()
    config.task = "subspace_jax.represent.decoupling_probe.task"
    config.data = ConfigDict({"num_train": 2000, "num_test": 2000, "batch_size": 2000, "eval_batch_size": 2000})
    config.model = ConfigDict({"features": (64, 32)})
    config.decoupling = train.default_decoupling()
    config.decoupling.target = DOMAINS[0]
    config.optim.name = "adam"
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "constant"
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Makes the run of a config, as :func:`subspace_jax.train.build` asks for it.

    Raises:
      ValueError: A field can't serve.
    """
    sizes, features = config.data, tuple(config.model.features)
    if not features or min(features) < 1:
        raise ValueError(f"model.features: expected widths of at least 1, got {features}")
    decoupler = train.decoupler_of(config.decoupling, DOMAINS)
    try:
        learn, test = domain_mixture(config.seed, sizes.num_train, sizes.num_test)
    except ValueError as error:
        raise ValueError(f"data.{error}") from error
    widths = (learn["inputs"].shape[1], *features, NUM_CLASSES)
    task = DecoupledClassifierTask(widths, decoupler, config.decoupling.weight)
    sets = {"evaluate": {"train": learn, "eval": test}, "eval_batch_size": sizes.eval_batch_size}
    examples = train.array_data(learn, batch_size=sizes.batch_size, **sets)
    return train.Run((train.Phase("train", task, examples),))


def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
