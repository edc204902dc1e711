"""Changing an embedding model without recomputing the store: maps from a sample of pairs."""

import json
import os
import pathlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import data, interop, linalg, train
from subspace_jax.data.vectors import check_finite
from subspace_jax.represent.lambda_orthogonality.core import (
    Affine,
    CompatParams,
    backfill_scores,
    check_pairs,
)
from subspace_jax.represent.lambda_orthogonality.maps import (
    METRICS,
    Chain,
    Link,
    centers_of,
    fit_backward,
    fit_ridge,
    map_backward,
    map_forward,
    penalties,
    prepared,
    widths,
)
from subspace_jax.represent.lambda_orthogonality.predict import FOLDS, Prediction, predict

MAPS, RECORD = "maps.safetensors", "upgrade.json"
_PAIRS_A_CENTER, _MOST_CENTERS = 25, 256


@dataclass(frozen=True)
class UpgradeSettings:
    """How an upgrade is fitted and measured.

    Attributes:
      metric: How the store compares vectors: "cosine" (also inner products of unit vectors) or "l2".
      k: Number of neighbours in recall.
      lam: How far the backward map may be from orthogonal: the root mean square of ``s^2 - 1`` over its singular
        values ``s``.
      seed: Seed of centres, batches and folds.
    """

    metric: str = "cosine"
    k: int = 10
    lam: float = 0.5
    seed: int = 0


def fit_upgrade(
    old: np.ndarray,
    new: np.ndarray,
    labels: np.ndarray | None = None,
    settings: UpgradeSettings = UpgradeSettings(),
) -> tuple[Chain, Prediction]:
    """Fits the maps between two models to the vectors of the same items by both, and predicts what they are worth.

    The forward map is an affine regression with a penalty; the backward map is near-orthogonal
    (:func:`subspace_jax.represent.lambda_orthogonality.compat_loss`).

    Args:
      old: Vectors of the old model, ``[pairs, m]``.
      new: Vectors of the new model for the same items in the same order, ``[pairs, n]``.
      labels: Classes of the items, ``[pairs]`` integers from 0; by default clusters of the new vectors.
      settings: How.

    Returns:
      The maps, a chain of one, and the prediction.

    Raises:
      ValueError: The vectors are not paired, too few, not finite or all alike, one of them has no direction under the
        cosine or a width is 1, the labels are not theirs, or a setting is out of
        range.
    """
    if settings.metric not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS}, got {settings.metric!r}")
    if settings.k < 1 or not settings.lam >= 0:
        raise ValueError(f"k, lam: expected at least 1 and at least 0, got {settings.k} and {settings.lam}")
    check_pairs(old, new, labels)
    if len(old) < (least := 2 * max(settings.k, FOLDS)):
        raise ValueError(f"old, new: expected at least {least} pairs, better some thousand; got {len(old)}")
    for name, h in (("old", old), ("new", new)):
        check_finite(name, h)
        data.check_informative(name, h, settings.metric)
    old, new = (prepared(jnp.asarray(h, jnp.float32), settings.metric) for h in (old, new))
    center_key, map_key, predict_key = jax.random.split(jax.random.key(settings.seed), 3)
    if labels is None:
        k = min(_MOST_CENTERS, max(2, len(new) // _PAIRS_A_CENTER))
        labels = linalg.kmeans(center_key, new, k).assignments
    labels = jnp.asarray(labels, jnp.int32)
    forward = fit_ridge(old, new, jnp.ones(len(old)), penalties()).map
    backward = fit_backward(map_key, old, new, labels, jnp.ones(len(old)), lam=settings.lam)
    centers = centers_of(prepared(forward(old), settings.metric), labels)
    options = {"k": settings.k, "metric": settings.metric, "lam": settings.lam}
    found = predict(predict_key, old, new, labels, **options)
    return Chain((Link(CompatParams(backward, forward), centers),), settings.metric, found.order), found


def save_maps(folder: str | os.PathLike, chain: Chain, record: dict) -> None:
    """Writes the maps of a chain as safetensors, with a record in JSON beside them.

    Args:
      folder: The folder, made where it is missing.
      chain: The maps.
      record: Entries of the record beside those that say what the maps are.

    Raises:
      OSError: The folder can't be written.
    """
    folder = train.writable_folder(folder)
    tensors = {}
    for i, link in enumerate(chain.links):
        for name, f in link.maps._asdict().items():
            tensors |= {f"{i}.{name}.kernel": f.kernel, f"{i}.{name}.bias": f.bias}
        tensors[f"{i}.centers"] = link.centers
    arrays = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
    with train.replacing(folder / MAPS) as partial:
        shapes = {name: (x.shape, x.dtype) for name, x in arrays.items()}
        interop.write_safetensors(partial, shapes, arrays.values())
    described = {"metric": chain.metric, "order": chain.order, "widths": widths(chain)}
    with train.replacing(folder / RECORD) as partial:
        partial.write_text(json.dumps(described | record, indent=2) + "\n")


def load_maps(folder: str | os.PathLike) -> tuple[Chain, dict]:
    """Reads what :func:`save_maps` wrote.

    Returns:
      The maps, and the record.

    Raises:
      FileNotFoundError: The folder holds no maps.
      ValueError: A file is damaged.
    """
    folder = pathlib.Path(folder)
    if not (folder / MAPS).is_file() or not (folder / RECORD).is_file():
        raise FileNotFoundError(f"maps: {folder}: expected {MAPS} and {RECORD}, which `upgrade --old --new` writes")
    stored, _ = interop.read_header(folder / MAPS)
    try:
        record = json.loads((folder / RECORD).read_text())
        links = tuple(_link(stored, i) for i in range(len(record["widths"]) - 1))
        return Chain(links, record["metric"], record["order"]), record
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"maps: {folder}: damaged, or of another version: {error!r}") from error


def _link(stored: dict[str, interop.StoredTensor], i: int) -> Link:
    def read(name: str) -> jax.Array:
        return jnp.asarray(np.array(stored[f"{i}.{name}"].read()))

    maps = {name: Affine(read(f"{name}.kernel"), read(f"{name}.bias")) for name in CompatParams._fields}
    return Link(CompatParams(**maps), read("centers"))


def map_store(
    chain: Chain,
    source: data.StoredVectors,
    folder: str | os.PathLike,
    *,
    direction: str = "forward",
    progress: bool = False,
) -> list[pathlib.Path]:
    """Maps a file of vectors, in the memory of one block.

    Args:
      chain: The maps.
      source: The vectors, from :func:`subspace_jax.data.open_vectors`.
      folder: Folder to write to.
      direction: "forward" maps stored vectors to the newest space, and also writes the order in which to re-embed them;
        "backward" maps vectors of the newest model to the oldest space.
      progress: Whether to show a progress bar.

    Returns:
      The files: ``gallery.npy`` and ``order.npy`` (int64 indices, what to re-embed first), or ``queries.npy``.

    Raises:
      ValueError: The vectors have another width, or are not finite.
      OSError: A file can't be written.
    """
    forward = direction == "forward"
    spaces = widths(chain) if forward else widths(chain)[::-1]
    if source.shape[1] != spaces[0]:
        which = "oldest" if forward else "newest"
        raise ValueError(
            f"{source.name}: expected vectors of the {which} model, of width {spaces[0]}; got {source.shape[1]}"
        )
    folder = train.writable_folder(folder)
    out = folder / ("gallery.npy" if forward else "queries.npy")

    @jax.jit
    def apply(links, x):
        own = chain._replace(links=links)
        if not forward:
            return map_backward(own, x), jnp.zeros(len(x))
        mapped = map_forward(own, x)
        return mapped, backfill_scores(mapped, links[-1].centers)

    def of_block(x):
        return jax.device_get(apply(chain.links, x))

    with train.replacing(out) as partial, partial.open("wb") as file:
        scores = data.map_blocks(source, file, spaces[-1], of_block, progress=progress)
    if not forward:
        return [out]
    order = folder / "order.npy"
    with train.replacing(order) as partial, partial.open("wb") as file:
        np.save(file, np.argsort(scores if chain.order == "typical" else -scores, kind="stable"))
    return [out, order]
