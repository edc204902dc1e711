"""What the codes say about the factors: nearest neighbours for each subspace, and all scores of disentanglement."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from subspace_jax import linalg, metrics, train
from subspace_jax.represent.xfactors.core import SubspaceLayout

if TYPE_CHECKING:
    from subspace_jax.represent.xfactors.task import XFactorsTask

NEIGHBOURS = 5
_EPS = 1e-8
# Boosted trees are fitted for each value of a factor.
_MOST_VALUES = 20


class FactorScores(train.Evaluator):
    """Codes of the sets "train" and "eval" at the end of training, scored by :func:`factor_scores`.

    Args:
      task: The task.
    """

    sets = ("train", "eval")
    reduce = "rows"
    last = True

    def __init__(self, task: "XFactorsTask"):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns the means of both codes, and the factors."""
        codes = self._task.codes(*model, batch["inputs"])
        return {"mu_s": codes.mu_s, "mu_t": codes.mu_t, "factors": batch["factors"]}

    def finish(self, **collected):
        """Returns the scores by name."""
        task = self._task
        return factor_scores(collected["train"], collected["eval"], task.layout, task.targets, task.factor_names)


def factor_scores(
    fit: Mapping[str, np.ndarray],
    test: Mapping[str, np.ndarray],
    layout: SubspaceLayout,
    targets: Sequence[int],
    names: Sequence[str],
) -> dict[str, float]:
    """Scores codes against their factors.

    Args:
      fit: ``mu_s [examples, residual_dim]``, ``mu_t [examples, factor_dim]`` and ``factors [examples, factors]`` that
        neighbours, classifiers and votes are taken from.
      test: The same of other examples, on which they are scored.
      layout: The layout of the codes.
      targets: Factor of each block of T.
      names: Names of the factors.

    Returns:
      ``A_from_B``: the accuracy of factor A by the nearest neighbours in the block of factor B (the residual code where
      B is "rest"); of all codes together ``mig``, ``modularity``, ``sap``, ``factor_vae``, and disentanglement,
      completeness and informativeness as ``dci_*`` (regression forests, as in the authors' code), ``dci_l1_*`` and,
      where no factor has many values, ``dci_boosted_*`` (boosted trees, as in disentanglement_lib).
    """
    scores, nearest = {}, jax.jit(linalg.nearest_rows, static_argnums=2)
    for of_block, pair in _blocks(fit, test, layout, [names[k] for k in targets]).items():
        _, near = nearest(pair[1], pair[0], min(NEIGHBOURS, len(pair[0])))
        for k, name in enumerate(names):
            votes = fit["factors"][:, k][np.asarray(near)]
            scores[f"{name}_from_{of_block}"] = float(np.mean(_majority(votes) == test["factors"][:, k]))
    codes, codes_test = (_standardized(np.concatenate([part["mu_s"], part["mu_t"]], axis=1)) for part in (fit, test))
    factors, factors_test = fit["factors"], test["factors"]
    for name, score in (("mig", metrics.mig), ("modularity", metrics.modularity), ("sap", metrics.sap_continuous)):
        scores[name] = float(score(codes_test, factors_test))
    four = (codes, factors, codes_test, factors_test)
    scores["factor_vae"] = float(metrics.factor_vae_score(jax.random.key(0), *four).score)
    ways = {
        "dci": (forest_importance, "xfactors"),
        "dci_l1": (metrics.l1_importance, "disentanglement_lib"),
        "dci_boosted": (boosted_importance, "disentanglement_lib"),
    }
    if factors.max() >= _MOST_VALUES:
        del ways["dci_boosted"]
    for name, (importance_fn, variant) in ways.items():
        found = metrics.dci_scores(*four, importance_fn=importance_fn, variant=variant)
        for part in ("disentanglement", "completeness", "informativeness"):
            scores[f"{name}_{part}"] = float(getattr(found, part))
    return scores


def forest_importance(codes, factors, codes_test, factors_test) -> tuple[np.ndarray, np.ndarray]:
    """Importances of random forest regressors, 20 trees of depth 20 for each factor (the authors of XFactors).

    For :func:`subspace_jax.metrics.dci_scores`.

    Returns:
      Importances ``[dims, factors]``, and R^2 on the test set, clipped to [0, 1], ``[factors]``.
    """
    from sklearn.ensemble import RandomForestRegressor

    def of_factor(y, y_test):
        model = RandomForestRegressor(n_estimators=20, max_depth=20, random_state=0).fit(codes, y)
        return model.feature_importances_, np.clip(model.score(codes_test, y_test), 0, 1)

    return _of_each(of_factor, factors, factors_test)


def boosted_importance(codes, factors, codes_test, factors_test) -> tuple[np.ndarray, np.ndarray]:
    """Importances of gradient boosted classifiers, 100 trees of depth 3 for each value (disentanglement_lib).

    For :func:`subspace_jax.metrics.dci_scores`.

    Returns:
      Importances ``[dims, factors]`` and test accuracies ``[factors]``.
    """
    from sklearn.ensemble import GradientBoostingClassifier

    def of_factor(y, y_test):
        model = GradientBoostingClassifier(random_state=0).fit(codes, y)
        return np.abs(model.feature_importances_), model.score(codes_test, y_test)

    return _of_each(of_factor, factors, factors_test)


def _of_each(of_factor, factors, factors_test):
    columns = zip(np.asarray(factors).T, np.asarray(factors_test).T, strict=True)
    importance, scores = zip(*(of_factor(*pair) for pair in columns), strict=True)
    return np.stack(importance, axis=1).astype(np.float32), np.asarray(scores, np.float32)


def _blocks(fit, test, layout, names) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns each part of the code by the name of its factor, the residual as "rest", of both sets."""
    found = {
        name: (fit["mu_t"][:, block], test["mu_t"][:, block])
        for name, block in zip(names, layout.slices(), strict=True)
    }
    return found | ({"rest": (fit["mu_s"], test["mu_s"])} if layout.residual_dim else {})


def _majority(votes: np.ndarray) -> np.ndarray:
    """The most frequent entry of each row, of equal ones that of the nearest neighbour."""
    counts = np.sum(votes[:, :, None] == votes[:, None, :], axis=2)
    return votes[np.arange(len(votes)), np.argmax(counts, axis=1)]


def _standardized(codes: np.ndarray) -> np.ndarray:
    return (codes - codes.mean(axis=0)) / (codes.std(axis=0) + np.float32(_EPS))
