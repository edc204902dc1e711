"""A polynomial decoder of codes that are known, on planted activations: are the interactions found?"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from subspace_jax import train
from subspace_jax.interpret.polysae import core, decoder
from subspace_jax.interpret.polysae.data import PAIRS, planted_pairs
from subspace_jax.interpret.polysae.evaluate import strength_and_cooccurrence
from subspace_jax.interpret.polysae.settings import PolySAEConfig

_D, _M, _RANKS, _TRAIN, _TEST = 16, 12, (12, 8, 8), 5000, 1000


class DecoderTask(train.Task):
    """Fits a decoder to activations whose codes are given, as a :class:`subspace_jax.train.Task`.

    Args:
      config: The autoencoder, of whose parameters those of the encoder are left out.
      pairs: Pairs of features that are known to interact, for the evaluation; there are none for order 1.
    """

    def __init__(self, config: PolySAEConfig, pairs: tuple[tuple[int, int], ...] = PAIRS):
        self.config, self.pairs = config, pairs

    def init(self, key):
        """Returns fresh parameters of the decoder, and no variables."""
        params = core.init_params(key, self.config)
        return {name: x for name, x in params.items() if name not in ("W_enc", "b_enc")}, {}

    def loss(self, params, variables, batch, *, key, step):
        """Returns the squared error, summed over d, mean over the batch."""
        del key, step
        error = decoder.decode(self.config, params, batch["codes"]) - batch["inputs"]
        return jnp.mean(jnp.sum(jnp.square(error), axis=1)), (variables, {})

    def after_update(self, params, variables, *, key, step):
        """Retracts the factors."""
        del key, step
        return core.retract(self.config, params), variables

    def evaluators(self):
        """Returns what is left unexplained, and the pairs that are found, as "eval"."""
        return {"eval": _Planted(self)}


class _Planted(train.Evaluator):
    reduce, metrics = "rows", ("unexplained", "pairs")

    def __init__(self, task):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns errors, activations and codes, and each time what the parameters say of all pairs."""
        del key
        params, _ = model
        z, x = batch["codes"], batch["inputs"]
        found = {"error": decoder.decode(self._task.config, params, z) - x, "x": x}
        if self._task.config.order > 1:
            strength, _, correlation = strength_and_cooccurrence(params, z)
            found |= {"strength": jnp.broadcast_to(strength[None], (len(x), *strength.shape))}
            found |= {"correlation": jnp.broadcast_to(correlation, len(x))}
        return found

    def finish(self, eval):
        """Returns the share of the variance that is left, planted pairs among the strongest, and the correlation."""
        x = eval["x"]
        left = np.sum(eval["error"] ** 2) / np.sum((x - x.mean(axis=0)) ** 2)
        if "strength" not in eval:
            return {"unexplained": left}
        strength, pairs = eval["strength"][0], self._task.pairs
        ranked = sorted(itertools.combinations(range(len(strength)), 2), key=lambda pair: -strength[pair])
        found = len(set(ranked[: len(pairs)]) & set(pairs))
        return {"unexplained": left, "pairs": found, "correlation": abs(eval["correlation"][0])}


def default_config() -> ConfigDict:
    """Returns the fields of a run; ``model.order`` is that of the decoder, ``seed`` draws the activations too."""
    config = train.default_config()
    config.task = "subspace_jax.interpret.polysae.planted"
    config.train.best = "min:unexplained"
    config.data = ConfigDict({"batch_size": 256})
    config.model = ConfigDict({"order": 2})
    config.optim.name = "adam"
    config.optim.learning_rate = 1e-2
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, for :func:`subspace_jax.train.build`."""
    drawn = planted_pairs(config.seed, _TRAIN + _TEST, _D, _M)._asdict()
    learn, test = ({n: x[part] for n, x in drawn.items()} for part in (slice(_TRAIN), slice(_TRAIN, None)))
    sets = train.array_data(
        learn, batch_size=config.data.batch_size, evaluate={"eval": test}, eval_batch_size=len(test["inputs"])
    )
    return train.Run((train.Phase("train", _task(config), sets),))


def outline(config: ConfigDict) -> train.Run:
    """Returns the run of a config without examples, for :func:`subspace_jax.planning.plan_run`."""
    sizes = {"inputs": _D, "codes": _M}
    batch = {n: jax.ShapeDtypeStruct((config.data.batch_size, size), np.float32) for n, size in sizes.items()}
    return train.Run((train.Phase("train", _task(config), train.outlined(batch, _TEST)),))


def _task(config: ConfigDict) -> DecoderTask:
    try:
        return DecoderTask(PolySAEConfig(_D, _M, _M, _RANKS, config.model.order))
    except ValueError as error:
        raise ValueError(f"model.{error}") from error
