"""Maps between two models by a train loop (arXiv 2509.16664)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from subspace_jax import losses, train
from subspace_jax.represent.lambda_orthogonality.core import CompatParams, CompatSettings, compat_loss
from subspace_jax.represent.lambda_orthogonality.data import FEATURES, digits_pair
from subspace_jax.represent.lambda_orthogonality.evaluate import Retrieval
from subspace_jax.represent.lambda_orthogonality.model import CompatAdapters
from subspace_jax.train.fields import check_at_least


class CompatTask(train.Task):
    """Trains a near-orthogonal backward and an affine forward map, as a :class:`subspace_jax.train.Task`.

    Batches hold ``old [batch, m]`` and ``new [batch, n]``, vectors of the same examples, ``labels [batch]`` and, for
    evaluation, ``mask [batch]``.  Negatives are all old vectors of the batch, over all devices.

    Args:
      old_features: Width of the old vectors.
      new_features: Width of the new vectors.
      settings: Weights and constants of the loss.
      strict: Whether the backward map is a rotation, the limit of a large weight with threshold 0.

    Raises:
      ValueError: A setting is out of range, or the map is to be a rotation and the widths differ.
    """

    splittable = False

    def __init__(
        self,
        old_features: int,
        new_features: int,
        settings: CompatSettings,
        *,
        strict: bool = False,
    ):
        _check(settings)
        back, forth, contrastive, orthogonal = settings.weights
        # Of a rotation the penalty has no gradient but rounding.
        self._settings = dataclasses.replace(
            settings, weights=(back, forth, contrastive, 0.0 if strict else orthogonal)
        )
        self._make = lambda key: CompatAdapters(old_features, new_features, strict=strict)
        self._graph, self._axes = train.split_module(self._make)

    def init(self, key):
        """Returns maps that are the identity, and no variables."""
        return train.module_arrays(self._make(key))

    def axes(self):
        """Returns the logical axis names of parameters and variables."""
        return self._axes

    def roles(self):
        """Returns that no weight decay acts on the backward map, which it would pull to 0 instead of a rotation."""
        return {f"backward/{name}": "no_decay" for name in self._axes[0]["backward"]}

    def adapters(self, params, variables) -> CompatParams:
        """Returns the maps."""
        return nnx.merge(self._graph, params, variables).params()

    def loss(self, params, variables, batch, *, key, step):
        """Returns the loss of the batch, with its terms and the orthogonality residual as metrics."""
        del key, step
        maps = self.adapters(params, variables)
        loss, terms = compat_loss(maps, batch["new"], batch["old"], batch["labels"], self._settings)
        return loss, (variables, terms | {"residual": losses.orthogonality_residual(maps.backward.kernel)})

    def evaluate(self, params, variables, batch, *, key):
        """Returns sums of both squared errors, of the residual, and the number of examples."""
        del key
        maps, mask = self.adapters(params, variables), batch["mask"]
        errors = {
            "backward": maps.backward(batch["new"]) - batch["old"],
            "forward": maps.forward(batch["old"]) - batch["new"],
        }
        count = jnp.sum(mask)
        sums = {name: jnp.sum(mask[:, None] * jnp.square(error)) for name, error in errors.items()}
        return sums | {"residual": count * losses.orthogonality_residual(maps.backward.kernel), "count": count}

    def evaluators(self):
        """Returns the errors of both maps as "eval", and "retrieval"."""
        return {**super().evaluators(), "retrieval": Retrieval(self)}


def default_config() -> ConfigDict:
    """Returns the fields of a run on the pair of networks for digits, which ``seed`` draws.

    ``model.weights`` are those of the backward, forward, contrastive and orthogonality terms; ``model.strict`` makes
    the backward map a rotation.  Other fields of ``model``: see :class:`CompatSettings`.
    """
    config = train.default_config()
    config.task = "subspace_jax.represent.lambda_orthogonality.task"
    config.train.best = "max:retrieval/cross_cmc1"
    config.data = ConfigDict({"batch_size": 256, "eval_batch_size": 600})
    config.model = ConfigDict({**dataclasses.asdict(CompatSettings()), "strict": False})
    config.optim.name = "adam"
    config.optim.schedule = "constant"
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, for :func:`subspace_jax.train.build`.

    Raises:
      ValueError: A field can't serve.
    """
    task, sizes = _task(config), config.data
    sets = digits_pair(config.seed)
    examples = train.array_data(
        sets["train"], batch_size=sizes.batch_size, evaluate=sets, eval_batch_size=sizes.eval_batch_size
    )
    return train.Run((train.Phase("train", task, examples),))


def outline(config: ConfigDict) -> train.Run:
    """Returns the run of a config without examples, for :func:`subspace_jax.planning.plan_run`."""
    sizes = config.data
    batch = {name: jax.ShapeDtypeStruct((sizes.batch_size, FEATURES), np.float32) for name in ("old", "new")}
    batch["labels"] = jax.ShapeDtypeStruct((sizes.batch_size,), np.int32)
    examples = train.outlined(batch, sizes.eval_batch_size, sets=("train", "eval"))
    return train.Run((train.Phase("train", _task(config), examples),))


def _task(config: ConfigDict) -> CompatTask:
    fields = dict(config.model)
    strict = fields.pop("strict")
    try:
        return CompatTask(FEATURES, FEATURES, CompatSettings(**fields), strict=strict)
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def _check(settings: CompatSettings) -> None:
    if len(settings.weights) != 4:
        raise ValueError(f"weights: expected four, got {settings.weights}")
    check_at_least("weights", min(settings.weights), 0)
    check_at_least("lam", settings.lam, 0)
    for name in ("kappa", "temperature"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name}: expected a number above 0, got {getattr(settings, name)}")
