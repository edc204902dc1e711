"""The methods of the table: each fits to one draw of shots and returns its classifier."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from subspace_jax.represent.few_shot_survey.clip_adapter import ClipAdapter, Shots, fit_clip_adapter
from subspace_jax.represent.few_shot_survey.fitting import adamw_to_zero, batch_order
from subspace_jax.represent.few_shot_survey.probe import Probe, search_probe
from subspace_jax.represent.few_shot_survey.prompts import fit_residual, prompt_residual, start_residual
from subspace_jax.represent.few_shot_survey.prototypes import zero_shot_logits
from subspace_jax.represent.few_shot_survey.tip_adapter import (
    TipCache,
    build_cache,
    fit_tip_f,
    search_tip,
    tip_grid,
    tip_logits,
)
from subspace_jax.represent.linear_probe import linear_probe as fixed_probe

EPOCHS, STEPS, BATCH_SIZE = 20, 60, 256
RATES = (1e-3, 1e-2)
RANK, REDUCTION = 4, 4
# Up to where the nearest key decides, and up to where the cache outweighs cosines that are multiplied by 100.
BETAS, ALPHAS = tip_grid((12.0, 50.0), (50, 25))

_cosine_logits, _cache_logits = jax.jit(zero_shot_logits), jax.jit(tip_logits)

Classifier = Callable[[jax.Array], jax.Array]


class Draw(NamedTuple):
    """One draw of shots.

    Attributes:
      train: Labelled features to fit to.
      validation: Others, to choose on.
      text: Prototypes ``[classes, n]``.
      key: Random key of starts and batches.
      scale: Factor on cosines.
      cache: Weight and sharpness of Tip-Adapter's cache, ``alpha`` and ``beta``; None to search them on ``validation``.
    """

    train: Shots
    validation: Shots
    text: jax.Array
    key: jax.Array
    scale: float = 100.0
    cache: tuple[float, float] | None = None


class FewShotMethod(NamedTuple):
    """A method of the table.

    Attributes:
      fit: Maps a draw to a classifier, which maps features ``[examples, n]`` to logits ``[examples, classes]``.
      capacity: Maps examples, classes and width to the dimension ``v`` of :func:`vc_width`; 0 where nothing is fitted.
      validates: Whether it chooses settings on the validation examples.
    """

    fit: Callable[[Draw], Classifier]
    capacity: Callable[[int, int, int], int]
    validates: bool = True


def _zero_shot(draw: Draw) -> Classifier:
    return lambda features: _cosine_logits(features, draw.text, draw.scale)


def _clip_adapter(draw: Draw) -> Classifier:
    width = draw.text.shape[1]  # of few dimensions in a subspace
    start = ClipAdapter(width, reduction=min(REDUCTION, width), rngs=nnx.Rngs(draw.key))

    def fit(order: np.ndarray, tx: optax.GradientTransformation) -> Classifier:
        adapter, _ = fit_clip_adapter(start, draw.train, draw.text, order, scale=draw.scale, tx=tx)
        return lambda features: _cosine_logits(adapter(features), draw.text, draw.scale)

    return _best_of_rates(draw, fit)


def _residual(rank: int | None) -> Callable[[Draw], Classifier]:
    def fit_draw(draw: Draw) -> Classifier:
        start = start_residual(draw.text, draw.key, None if rank is None else min(rank, *draw.text.shape))

        def fit(order: np.ndarray, tx: optax.GradientTransformation) -> Classifier:
            delta, _ = fit_residual(start, draw.train, draw.text, order, scale=draw.scale, tx=tx)
            return lambda features: _cosine_logits(features, prompt_residual(draw.text, delta), draw.scale)

        return _best_of_rates(draw, fit)

    return fit_draw


def _best_of_rates(draw: Draw, fit: Callable[[np.ndarray, optax.GradientTransformation], Classifier]) -> Classifier:
    """The classifier of the learning rate that is best on the validation examples, the lowest of equals."""
    order = _order(draw)
    found = [fit(order, adamw_to_zero(rate, len(order))) for rate in RATES]
    predicted = [np.argmax(np.asarray(one(draw.validation.features)), axis=1) for one in found]
    return found[int(np.argmax([np.mean(own == draw.validation.labels) for own in predicted]))]


def _tip(trained: bool) -> Callable[[Draw], Classifier]:
    def fit(draw: Draw) -> Classifier:
        cache = build_cache(*draw.train, draw.text.shape[0])
        alpha, beta = _weights(draw, cache)
        if trained:
            order = _order(draw)
            weights = {"alpha": alpha, "beta": beta, "scale": draw.scale}
            # The code's rate for its many steps on ImageNet; few steps are longer, so that they lead as far.
            tx = adamw_to_zero(max(1e-3, 1e-2 * STEPS / len(order)), len(order))
            cache, _ = fit_tip_f(cache, draw.text, order, **weights, tx=tx)
            alpha, beta = _weights(draw, cache)
        return lambda features: _cache_logits(features, cache, draw.text, alpha, beta, draw.scale)

    return fit


def _weights(draw: Draw, cache: TipCache) -> tuple[float, float]:
    if draw.cache is not None:
        return draw.cache
    best = search_tip(*draw.validation, cache, draw.text, BETAS, ALPHAS, scale=draw.scale)
    return best.alpha, best.beta


def _linear_probe(draw: Draw) -> Classifier:
    return search_probe(draw.train, draw.validation, draw.text.shape[0])[0].logits


def _logistic(draw: Draw) -> Classifier:
    features, labels = map(np.asarray, draw.train)
    found = fixed_probe(features, labels, num_classes=draw.text.shape[0], grid=(1e-2,))
    return Probe(jnp.asarray(found.kernel), jnp.asarray(found.bias)).logits


METHODS = {
    "zero-shot": FewShotMethod(_zero_shot, lambda m, classes, n: 0, validates=False),
    "clip-adapter": FewShotMethod(_clip_adapter, lambda m, classes, n: 2 * n * max(1, n // REDUCTION)),
    "residual": FewShotMethod(_residual(None), lambda m, classes, n: classes * n),
    "low-rank-residual": FewShotMethod(_residual(RANK), lambda m, classes, n: min(RANK, classes, n) * (classes + n)),
    "tip": FewShotMethod(_tip(False), lambda m, classes, n: m),
    "tip-f": FewShotMethod(_tip(True), lambda m, classes, n: m),
    "linear-probe": FewShotMethod(_linear_probe, lambda m, classes, n: n + 1),
    "logistic": FewShotMethod(_logistic, lambda m, classes, n: n + 1, validates=False),
}


def _order(draw: Draw) -> np.ndarray:
    """Batches of 20 epochs as in Tip-Adapter-F's code, and of more where these are fewer than 60 steps."""
    num_examples = len(draw.train.labels)
    steps = max(1, num_examples // BATCH_SIZE)
    return batch_order(draw.key, num_examples, epochs=max(EPOCHS, -(-STEPS // steps)), batch_size=BATCH_SIZE)
