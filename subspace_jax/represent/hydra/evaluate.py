"""What is measured of a trained model: its features, its projections, and the gates of all pairs of classes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import train
from subspace_jax.represent.hydra.core import class_pair_gates, effective_rank
from subspace_jax.represent.linear_probe import linear_probe, probe_logits, scores_of
from subspace_jax.represent.neighbors import nearest_classes

if TYPE_CHECKING:
    from subspace_jax.represent.hydra.task import HydraTask

_LARGEST_SHOWN = 24  # dimensions that have a map of their own


class FeatureQuality(train.Evaluator):
    """Accuracy of a linear probe on features and of the nearest neighbour among projections, and effective rank.

    The rank is that of the features of "eval".  Both classifiers are fitted to the set "train" and tested on "eval".

    Args:
      task: The task.
    """

    sets, reduce, last = ("train", "eval"), "rows", True
    metrics = ("probe_accuracy", "nearest_accuracy", "effective_rank")

    def __init__(self, task: "HydraTask"):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns features, projections and labels of the examples."""

        def rows(params, variables, batch):
            features = self._task.features(params, variables, batch["inputs"])
            projections = self._task.module(params, variables).projector(features)
            return {"features": features, "projections": projections, "labels": batch["labels"]}

        return train.gathered(self._task, rows)(*model, batch)

    def finish(self, **collected):
        """Fits both classifiers."""
        learn, test = (collected[name] for name in self.sets)
        mesh = train.make_mesh(devices=jax.local_devices())
        probe = linear_probe(learn["features"], learn["labels"], mesh=mesh)
        found = np.argmax(probe_logits(probe, test["features"]), axis=1)
        near = nearest_classes(learn["projections"], learn["labels"], test["projections"], k=1, mesh=mesh)
        return {
            "probe_accuracy": scores_of(found, test["labels"]).accuracy,
            "nearest_accuracy": scores_of(near, test["labels"]).accuracy,
            "effective_rank": float(effective_rank(jnp.asarray(test["features"]))),
        }


class GateStatistics(train.Evaluator):
    """Mean and standard deviation of the gates over all pairs of classes and all dimensions.

    Args:
      task: The task.
    """

    sets, last, metrics = (), True, ("mean", "std")

    def __init__(self, task: "HydraTask"):
        self._task = task

    def collect(self, model, batch, *, key):
        """Returns both."""

        def moments(params, variables):
            gates = class_pair_gates(self._task.module(params, variables).gate, self._task.num_classes)
            return {"mean": jnp.mean(gates), "std": jnp.std(gates)}

        return train.gathered(self._task, moments)(*model)

    def finish(self, result):
        """Returns them as they are."""
        return result


def class_gates_of_run(
    workdir: str | os.PathLike, *, step: int | Literal["best"] | None = None, trust_remote_code: bool = False
) -> np.ndarray:
    """Computes the gates of all pairs of classes with the model of a run.

    Args:
      workdir: Folder of the run.
      step: Step of the checkpoint, or "best"; the latest by default.
      trust_remote_code: See :func:`subspace_jax.train.restore`.

    Returns:
      ``[classes, classes, d]`` float32.

    Raises:
      FileNotFoundError: There is no run, or no such checkpoint.
      ValueError: The run is of another task.
    """
    from subspace_jax.represent.hydra.task import HydraTask

    _, phase, state, _ = train.restore(workdir, step=step, trust_remote_code=trust_remote_code)
    task = phase.task
    if not isinstance(task, HydraTask):
        raise ValueError(f"workdir: expected a run of represent.hydra, got one of {type(task).__name__}")

    @jax.jit
    def gates(params, variables):
        return class_pair_gates(task.module(params, variables).gate, task.num_classes)

    return np.asarray(gates(state.params, state.variables))


def class_order(relation: np.ndarray) -> np.ndarray:
    """Orders classes so that related ones are neighbours: the leaves of average-linkage clustering by ``1 - relation``.

    A design choice: the paper says that gates reveal relations between classes, not how they are read.

    Args:
      relation: ``[classes, classes]`` symmetric, such as the mean gate of each pair.

    Returns:
      A permutation ``[classes]`` of integers.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(relation) < 2:
        return np.arange(len(relation))
    upper = np.triu_indices(len(relation), 1)
    return leaves_list(linkage(1 - relation[upper], "average"))


def plot_class_gates(gates: np.ndarray, output: str | os.PathLike, class_names: Sequence[str] = ()) -> None:
    """Draws the mean gate of each pair of classes, and the maps of the dimensions whose gates vary most.

    Args:
      gates: ``[classes, classes, d]``.
      output: The PNG to write.
      class_names: Names of the classes; their numbers by default.
    """
    from matplotlib.figure import Figure

    relation = gates.mean(axis=-1)
    order = class_order(relation)
    names = [str(i) if not class_names else class_names[i] for i in order]
    ordered = gates[np.ix_(order, order)]
    dims = np.argsort(-ordered.std(axis=(0, 1)), kind="stable")[:_LARGEST_SHOWN]
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.4))
    axis = left.subplots()
    image = axis.imshow(relation[np.ix_(order, order)], cmap="viridis")
    left.colorbar(image, ax=axis, shrink=0.7, label="mean gate")
    axis.set(title="relation of classes", xlabel="class", ylabel="paired with")
    if len(names) <= 40:
        axis.set_xticks(range(len(names)), names, rotation=90 if class_names else 0)
        axis.set_yticks(range(len(names)), names)
    columns = max(1, -(-len(dims) // 4))
    right.suptitle("gates of single dimensions, 0 (dark) to 1 (bright)")
    for axis in right.subplots(4, columns, squeeze=False).flat:
        axis.set_axis_off()
    for axis, dim in zip(right.axes, dims, strict=False):
        axis.imshow(ordered[..., dim], vmin=0, vmax=1, cmap="viridis")
        axis.set_title(str(dim), fontsize="small", pad=2)
    with train.replacing(Path(output)) as partial:
        figure.savefig(partial, dpi=110)
