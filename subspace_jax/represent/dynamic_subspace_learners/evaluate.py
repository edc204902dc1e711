"""What is measured of dynamic subspace learners: retrieval, clusters, learners; and pictures of attention maps."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import linalg, metrics, train
from subspace_jax.represent.dynamic_subspace_learners import core

if TYPE_CHECKING:
    from subspace_jax.represent.dynamic_subspace_learners.task import SubspaceLearnersTask

PyTree = Any

KS = (1, 2, 4, 8)
RECALLS = tuple(f"recall_at_{k}" for k in KS)


class Retrieval(train.Evaluator):
    """Recall among the nearest others of a set, and NMI of its k-means clusters with the labels.

    Args:
      task: The task.
      name: The set.
    """

    reduce, metrics = "rows", (*RECALLS, "nmi")

    def __init__(self, task: "SubspaceLearnersTask", name: str):
        self._task, self.sets = task, (name,)

    def collect(self, model, batch, *, key):
        """Returns embeddings and labels."""
        return {"x": self._task.embed(*model, batch["inputs"]).embedding, "labels": batch["labels"]}

    def finish(self, **collected):
        """Returns the figures of one set."""
        ((_, found),) = collected.items()
        x, labels = found["x"], found["labels"]
        recalls, nmi = _retrieval(x, labels, len(np.unique(labels)))
        return {**dict(zip(RECALLS, np.asarray(recalls), strict=True)), "nmi": nmi}


def _retrieval(x: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Returns recalls at :data:`KS` and NMI of ``num_classes`` clusters of embeddings."""
    found = _kmeans(jax.random.key(0), x, num_classes).assignments
    return _recalls(x, labels), _nmi(labels, found)


_kmeans = jax.jit(
    lambda key, x, k: linalg.kmeans(key, x, k, restarts=core.RESTARTS, max_steps=core.MAX_STEPS), static_argnums=2
)
_recalls = jax.jit(lambda x, labels: metrics.recall_at_k(x, labels, KS))
_nmi = jax.jit(metrics.normalized_mutual_info)


class Clusters(train.Evaluator):
    """The training set, in order: features by which it is clustered; and NMI of its clusters with its attributes.

    Args:
      task: The task.
      attributes: Fields of integers, such as ``labels``.
    """

    sets, reduce, last = ("train",), "rows", True

    def __init__(self, task: "SubspaceLearnersTask", attributes: tuple[str, ...]):
        self._task, self._attributes = task, attributes
        self.metrics = tuple(f"{name}_nmi" for name in attributes)

    def collect(self, model, batch, *, key):
        """Returns features, clusters and attributes; ``batch["index"]`` is the number of each example in the set."""
        params, variables = model
        return {
            "features": self._task.embed(params, variables, batch["inputs"]).features.astype(jnp.float32),
            "cluster": variables["assignment"][batch["index"]],
            **{name: batch[name] for name in self._attributes},
        }

    def finish(self, **collected):
        """Returns the figures as scalars, and ``features`` ``[examples, n]``."""
        found = collected["train"]
        agreement = {f"{name}_nmi": _nmi(found["cluster"], found[name]) for name in self._attributes}
        return {**agreement, "features": found["features"]}


class Learners(train.Evaluator):
    """How many learners there are, and whether that is more than one."""

    sets, metrics = (), ("count", "several")

    def collect(self, model, batch, *, key):
        """Returns the learner of each neuron."""
        return model[1]["model"]["embedding"]["learner_id"]

    def finish(self, result):
        """Returns ``count``, and ``several``, 1 if there are two or more."""
        count = int(np.max(result)) + 1
        return {"count": count, "several": count > 1}


def attention_maps(task: "SubspaceLearnersTask", params: PyTree, variables: PyTree, inputs: jax.Array) -> jax.Array:
    """Attention maps of images at their own resolution, each scaled from 0 to 1.

    Thresholded at 0.5 they may serve as segmentation masks (arXiv 2206.09068; the threshold is a design choice).

    Args:
      task: The task.
      params: Parameters.
      variables: Variables.
      inputs: Images ``[batch, height, width, channels]``.

    Returns:
      ``[batch, height, width]``, float32; 0 where a map is constant.

    Raises:
      ValueError: The network has no attention.
    """
    maps = task.embed(params, variables, inputs).attention
    if maps is None:
        raise ValueError("task: expected a network with attention, such as that of model.backbone='convnet', got none")
    wide = jax.image.resize(maps[..., 0].astype(jnp.float32), inputs.shape[:3], "bilinear")
    low, high = (f(wide, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
    return jnp.where(high > low, (wide - low) / jnp.where(high > low, high - low, 1), 0)


def draw_run(
    workdir: str | os.PathLike,
    out: str | os.PathLike | None = None,
    *,
    num_images: int = 16,
    step: int | Literal["best"] | None = None,
) -> Path:
    """Draws attention maps of the first images of a run's evaluation set.

    Args:
      workdir: Folder of the run.
      out: The PNG to write; ``attention.png`` in ``workdir`` by default.
      num_images: Number of images, or all where there are fewer.
      step: Step of the checkpoint, or "best"; the latest by default.

    Returns:
      The path of the PNG.

    Raises:
      FileNotFoundError: There is no run, or no such checkpoint.
      ValueError: The run is of another method, its network has no attention, or ``num_images`` is below 1.
    """
    if num_images < 1:
        raise ValueError(f"num_images: expected at least 1, got {num_images}")
    restored = train.restore(workdir, step=step)
    task, state = restored.phase.task, restored.state
    if not hasattr(task, "embed"):
        raise ValueError(f"workdir: expected a run of dynamic subspace learners, got one of {type(task).__name__}")
    batch = next(iter(restored.phase.data(state).evaluate["eval"]()))
    images = batch["inputs"][batch["mask"] > 0][:num_images]
    maps = jax.jit(lambda *arrays: attention_maps(task, *arrays))(state.params, state.variables, images)
    path = Path(out if out is not None else Path(workdir) / "attention.png")
    plot_attention(images, np.asarray(maps), path)
    return path


def plot_attention(images: np.ndarray, maps: np.ndarray, path: str | os.PathLike, *, columns: int = 8) -> None:
    """Draws images and, below each, its attention map over it, with the outline of the map at 0.5.

    Args:
      images: ``[images, height, width, channels]`` of 1 or 3 channels.
      maps: ``[images, height, width]`` between 0 and 1.
      path: The PNG to write.
      columns: Images in a line.
    """
    from matplotlib.figure import Figure

    lines = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.2 * columns, 2.4 * lines), layout="constrained")
    axes = figure.subplots(2 * lines, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (image, attention) in enumerate(zip(images, maps, strict=True)):
        line, column = divmod(i, columns)
        gray = np.mean(image, axis=-1)
        shown = (image - image.min()) / max(np.ptp(image), 1e-6) if image.shape[-1] == 3 else gray
        axes[2 * line, column].imshow(shown, cmap="gray")
        below = axes[2 * line + 1, column]
        below.imshow(gray, cmap="gray")
        below.imshow(attention, cmap="magma", alpha=0.6, vmin=0, vmax=1)
        if attention.min() < 0.5 < attention.max():
            below.contour(attention, [0.5], colors="cyan", linewidths=0.8)
    with train.replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
