"""Features of image sets by a pretrained model."""

import difflib
import functools
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm.auto import tqdm

from subspace_jax import data, interop, nn, train
from subspace_jax.represent.features_file import Features

PyTree = Any
FeatureStep = Callable[[PyTree, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array, jax.Array]]

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})
# Batches in flight while the host reads the results of earlier ones.
_IN_FLIGHT = 2


@runtime_checkable
class FeatureTask(Protocol):
    """A :class:`subspace_jax.train.Task` whose model computes features."""

    def features(self, params: PyTree, variables: PyTree, inputs: jax.Array) -> jax.Array:
        """Returns the features ``[batch, n]`` of inputs ``[batch, ...]``."""


@dataclass(frozen=True)
class FeatureModel:
    """A model that computes features, and the preparation of its images or texts.

    Attributes:
      step: Compiled function from :func:`make_feature_step`.
      params: Parameters for ``step``, on the devices of ``mesh``.
      prepare: Maps the pixels of an image, uint8 ``[height, width, 3]``, or a text to an input of the model.
      mesh: Mesh over which batches are sharded.
    """

    step: FeatureStep
    params: PyTree
    prepare: Callable[[Any], np.ndarray]
    mesh: Mesh


def make_feature_step(compute: Callable[[PyTree, jax.Array], jax.Array], mesh: Mesh) -> FeatureStep:
    """Returns a jitted function that computes the features of a sharded batch.

    Args:
      compute: Pure function from parameters and inputs ``[batch, ...]`` to features ``[batch, n]``.
      mesh: Mesh over which batches are sharded.

    Returns:
      A jitted function from parameters and a batch with ``inputs``, ``labels`` and ``mask`` to features (float32),
      labels and mask, replicated on all devices.

    Raises:
      ValueError: At the first call, if the features of an example are not a vector.
    """

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, P()))
    def step(params, batch):
        found = compute(params, batch["inputs"])
        if found.ndim != 2:
            raise ValueError(f"compute: expected features [batch, n], got shape {list(found.shape)}")
        return found.astype(jnp.float32), batch["labels"], batch["mask"]

    return step


def extract_features(
    step: FeatureStep,
    params: PyTree,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: Mesh,
    num_batches: int | None = None,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the features of one pass over a set.

    Each of several processes calls it with batches of its own examples, and gets the features of all examples.

    Args:
      step: Function from :func:`make_feature_step`.
      params: Its parameters, on the devices of ``mesh``.
      batches: One pass of batches with ``inputs``, ``labels`` and ``mask``, all of one shape, as from
        :func:`subspace_jax.data.eval_batches`.
      mesh: Mesh over which batches are sharded.
      num_batches: Length of the progress bar.
      progress: Whether to show a progress bar.

    Returns:
      Features ``[examples, n]`` float32 and labels ``[examples]`` int32, without padding.

    Raises:
      ValueError: There are no examples, or the features of an example are not a vector.
    """
    rows = train.batch_sharding(mesh)
    done: list[tuple[np.ndarray, np.ndarray]] = []
    waiting: deque = deque()

    def fetch():
        features, labels, mask = (np.asarray(x) for x in waiting.popleft())
        done.append((features[mask > 0], labels[mask > 0].astype(np.int32)))

    hidden = not progress or jax.process_index() != 0
    for batch in tqdm(batches, total=num_batches, disable=hidden, unit="batch", miniters=1):
        fields = {name: batch[name] for name in ("inputs", "labels", "mask")}
        waiting.append(step(params, train.to_device(fields, rows)))
        if len(waiting) > _IN_FLIGHT:
            fetch()
    while waiting:
        fetch()
    if not sum(len(labels) for _, labels in done):
        raise ValueError("batches: expected at least one example, got none")
    return tuple(np.concatenate(column) for column in zip(*done, strict=True))


def features_of(
    task: FeatureTask, state: train.TrainState, batches: Iterable[Mapping[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the features of one pass with the model of a train state, on the mesh of that state.

    Args:
      task: Task of the train state.
      state: The train state.
      batches: As in :func:`extract_features`.

    Returns:
      Features ``[examples, n]`` and labels ``[examples]``, as from :func:`extract_features`.
    """
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh
    return extract_features(_task_step(task, mesh), (state.params, state.variables), batches, mesh=mesh)


def open_feature_model(
    path: str | os.PathLike,
    *,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    resample: bool = False,
    step: int | Literal["best"] | None = None,
    trust_remote_code: bool = False,
) -> FeatureModel:
    """Opens a feature model: a checkpoint folder of Hugging Face or timm, or the workdir of a classifier's run.

    The features of a folder's model are its pooled output; images are prepared as the files of the folder specify
    (:meth:`subspace_jax.data.ImageProcessor.from_json`).  The features of a run are the inputs of the classifier's
    head; images are prepared as in the evaluation of the run.

    Args:
      path: Path of the folder.
      mesh: Mesh over which batches are sharded and the model is replicated; all devices along ``data`` by default.
      dtype: Dtype of the activations of a folder's model; the dtype of its files by default.
      resample: Whether a vision transformer resamples its position embeddings for images of another size.
      step: Step of a run's checkpoint, or "best"; the latest by default.
      trust_remote_code: See :func:`subspace_jax.train.restore`.

    Returns:
      The model.

    Raises:
      FileNotFoundError: The folder does not exist, holds neither a model nor a run, or has no description of its image
        preparation.
      ValueError: The model is not supported or has no pooled output, or the run trains no classifier of images.
    """
    path = pathlib.Path(path).expanduser()
    mesh = train.make_mesh() if mesh is None else mesh
    if (path / "checkpoints").is_dir():
        return _of_run(path, mesh, step, trust_remote_code)
    prepare = None
    if (path / "config.json").is_file():
        # Before the weights are read, so that a missing file is reported at once.
        prepare = data.ImageProcessor.from_json(path)
    replicated = NamedSharding(mesh, P())

    def shardings(shapes, axes):
        del axes
        return jax.tree.map(lambda _: replicated, shapes)

    config, params = interop.load_vision(path, shardings=shardings)
    options = {} if dtype is None else {"dtype": dtype}

    def compute(params: PyTree, pixels: jax.Array) -> jax.Array:
        pooled = nn.vision_apply(config, params, pixels, resample=resample, **options).pooled
        if pooled is None:
            raise ValueError(f"model: {path} has no pooled output, expected one")
        return pooled

    return FeatureModel(make_feature_step(compute, mesh), params, prepare, mesh)


def _of_run(path: pathlib.Path, mesh: Mesh, at: int | Literal["best"] | None, trust: bool) -> FeatureModel:
    # A single process reads the checkpoint on one device, whatever the mesh of the run was.
    settings = [f"mesh.{axis}=1" for axis in train.MESH_AXES] if jax.process_count() == 1 else ()
    run, phase, state, _ = train.restore(path, step=at, settings=settings, trust_remote_code=trust)
    task, config = phase.task, run.config
    if not isinstance(task, FeatureTask):
        raise ValueError(f"model: {path} is a run of {config.task}, expected a run of a classifier")
    image = config.data.get("image")
    if image is None or not image.size:
        raise ValueError(f"model: the run in {path} does not resize its images; expected data.image.size above 0")
    side = image.eval_size or image.size
    prepare = data.ImageProcessor.evaluation(side, crop=image.eval_crop, method=image.method, as_bytes=True)
    params = jax.device_put((state.params, state.variables), NamedSharding(mesh, P()))
    return FeatureModel(_task_step(task, mesh), params, prepare, mesh)


def _task_step(task: FeatureTask, mesh: Mesh) -> FeatureStep:
    return make_feature_step(lambda arrays, inputs: task.features(*arrays, inputs), mesh)


def open_labelled_images(
    name: str | os.PathLike,
    split: str,
    data_dir: str | os.PathLike | None = None,
    *,
    class_names: Iterable[str] | None = None,
    on_unreadable: str = "raise",
) -> data.Images:
    """Opens a TFDS set by name, or a folder with one subfolder per class.

    Args:
      name: TFDS name or path; a path that exists takes precedence.
      split: Split of a TFDS set, or subfolder of a folder; empty for the folder itself.
      data_dir: Folder of prepared TFDS sets; TFDS's default by default.
      class_names: Classes of a folder in the order of their labels; all, sorted by name, by default.
      on_unreadable: "raise" or "skip"; see :func:`subspace_jax.data.image_folder`.

    Returns:
      The images.

    Raises:
      FileNotFoundError: The folder does not exist, or the set is not prepared; the message says how to prepare it.
      ValueError: The name or split is unknown, the examples are not labelled images, or the subfolders are splits
        rather than classes.
    """
    if not os.fspath(name):
        raise ValueError("name: expected the name of a TFDS set or a folder, got ''")
    folder = pathlib.Path(name).expanduser()
    if not folder.is_dir():
        try:
            return data.image_set(os.fspath(name), split, data_dir, on_unreadable=on_unreadable)
        except ValueError as error:
            if not str(error).startswith("name: TFDS knows no set"):
                raise
            near = difflib.get_close_matches(folder.name, [entry.name for entry in pathlib.Path().iterdir()])
            hint = f"or the folder {' or '.join(map(repr, near))}?" if near else "and there is no such folder"
            raise ValueError(f"{error}; {hint}") from error
    names = None if class_names is None else list(class_names)
    images = data.image_folder(folder / split, class_names=names, on_unreadable=on_unreadable)
    if not split and images.num_classes > 1 and set(images.class_names) <= _SPLITS:
        raise ValueError(f"split: expected one of the folders {images.class_names} in {folder}, got none")
    return images


def features_of_images(
    model: FeatureModel, images: data.Images, *, batch_size: int = 64, progress: bool = False
) -> Features:
    """Computes the features of a set of images.

    Args:
      model: The model.
      images: The set, as from :func:`open_labelled_images`.
      batch_size: Examples of a batch over all processes, rounded up to a multiple of the devices of the mesh.
      progress: Whether to show a progress bar.

    Returns:
      The features of all images, in the order of the set.

    Raises:
      ValueError: An image can't be decoded, or its shape does not fit the model.
    """
    ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    batch_size = -(-batch_size // ways) * ways
    batches = data.eval_batches(images.map(model.prepare), batch_size=batch_size)
    num_batches = -(-len(images) // batch_size)
    found = extract_features(
        model.step, model.params, batches, mesh=model.mesh, num_batches=num_batches, progress=progress
    )
    return Features(*found, images.class_names)
