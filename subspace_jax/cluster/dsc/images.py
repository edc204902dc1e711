"""Clusters images of one's own, and new ones by what was learned."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from subspace_jax import linalg, train
from subspace_jax.cluster.dsc import core, task
from subspace_jax.cluster.dsc.data import LabelledImages, unit_images
from subspace_jax.cluster.dsc.model import ConvAutoencoder
from subspace_jax.train.experiment import complete_run, task_module

_ENCODED = 256  # images at a time


class DSCResult(NamedTuple):
    """What :func:`fit` returns.

    Attributes:
      coef: ``C [n, n]`` float32; row i has the coefficients of example i.
      affinity: ``[n, n]`` float32, symmetric and not negative.
      labels: ``[n]`` int32, clusters in the order of their first example.
      model: The autoencoder.
      codes: ``[n, p]`` float32, the last layer of the encoder, each example of length 1.
      stopped_at: Steps of each phase, by its name.
      rows: The rows of the run: loss by step, see :class:`subspace_jax.train.At`.
    """

    coef: np.ndarray
    affinity: np.ndarray
    labels: np.ndarray
    model: ConvAutoencoder
    codes: np.ndarray
    stopped_at: Mapping[str, int]
    rows: tuple[Mapping[str, Any], ...]


def fit(
    x: np.ndarray,
    n_clusters: int,
    keep: int,
    config: ConfigDict | None = None,
    *,
    workdir: str | os.PathLike | None = None,
    progress: bool = False,
) -> DSCResult:
    """Clusters images by deep subspace clustering.

    Each image is divided by its length first.  The config's seed is that of the run; the same arguments give the same
    bits.

    Args:
      x: ``[n, height, width, channels]``, floating point; the sides are multiples of 2 to the number of layers.
      n_clusters: Clusters.
      keep: Coefficients of an example that count, see :func:`column_affinity`.
      config: From :func:`default_config`; its data and clusters do not matter.
      workdir: Folder of the run, which resumes there; by default one that is removed.
      progress: Whether to show the run.

    Returns:
      Coefficients, affinity, labels, and what :func:`predict` needs.

    Raises:
      ValueError: ``x`` is no stack of such images or not finite, or an argument or a field is out of range.
    """
    config = task.default_config() if config is None else config.copy_and_resolve_references()
    x = np.asarray(x)
    with config.unlocked():
        config.clusters.update({"number": n_clusters, "keep": keep})
    _, config = task_module(config)
    try:
        task.check_fields(config, x.shape)
    except ValueError as error:
        text = str(error).replace("clusters.number", "n_clusters").replace("clusters.keep", "keep")
        raise ValueError(text) from None
    images = LabelledImages(unit_images(x), None)
    run = complete_run(task.run_of(config, images), config)
    with tempfile.TemporaryDirectory() as scratch:
        done = train.fit(
            dataclasses.replace(
                run,
                config=None,
                workdir=scratch if workdir is None else workdir,
                mesh=train.make_mesh(**config.mesh),
                progress=progress,
                checkpoint_every=config.train.checkpoint_every if workdir is not None else 0,
                best="",
            )
        )
    last = run.phases[-1].task
    n, params = len(x), jax.device_get(done.state.params)
    coef = params["coef"][:n, :n]
    model = last.module(params)
    found = core.coefficient_labels(jax.random.key(0), coef, num_clusters=n_clusters, keep=keep)
    return DSCResult(
        coef,
        np.asarray(core.column_affinity(coef, keep)),
        np.asarray(found),
        model,
        _codes(model, images.inputs),
        task.steps_of(done.rows),
        done.rows,
    )


def predict(result: DSCResult, x: np.ndarray, *, keep: int, ridge: float = 0.1) -> np.ndarray:
    """Labels of new images: the cluster with most of their coefficients on the images that were clustered.

    Coefficients are those of ridge regression on the last layer; the ``keep`` largest magnitudes count.

    Args:
      result: From :func:`fit`.
      x: ``[m, height, width, channels]``, floating point; each is divided by its length first.
      keep: Coefficients that count.
      ridge: Weight of the penalty; the codes have length 1.

    Returns:
      ``[m]`` int32.

    Raises:
      ValueError: ``x`` is no stack of images of that shape or not finite, or ``keep`` or ``ridge`` is out of range.
    """
    n = len(result.labels)
    if not 1 <= keep <= n:
        raise ValueError(f"keep: expected 1 to {n}, the number of examples, got {keep}")
    if not ridge > 0:
        raise ValueError(f"ridge: expected more than 0, got {ridge}")
    points = _codes(result.model, unit_images(np.asarray(x)))
    if points.shape[1] != result.codes.shape[1]:
        raise ValueError(f"x: expected images of the size that was clustered, got shape {np.shape(x)}")
    coef = core.code_on(jnp.asarray(points), jnp.asarray(result.codes), ridge)
    kept = linalg.top_entries(coef, keep)
    members = jax.nn.one_hot(result.labels, int(result.labels.max()) + 1, dtype=coef.dtype)
    mass = jnp.sum(jnp.abs(kept.val)[:, :, None] * members[kept.idx], axis=1)
    return np.asarray(jnp.argmax(mass, axis=1), np.int32)


def _codes(model: ConvAutoencoder, x: np.ndarray) -> np.ndarray:
    """The last layer of the encoder, ``[n, p]``, each row of length 1."""
    found = [np.asarray(model.encode(jnp.asarray(x[i : i + _ENCODED]))[-1]) for i in range(0, len(x), _ENCODED)]
    return unit_images(np.concatenate(found).reshape(len(x), -1))
