"""Features of images by a pretrained model, whole sets at a time."""

import difflib
import functools
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm.auto import tqdm

from subspace_jax import data, interop, nn, train
from subspace_jax.represent.features_file import Features
from subspace_jax.represent.gcr.task import ClassifierTask

PyTree = Any
FeatureStep = Callable[[PyTree, Mapping[str, jax.Array]], tuple[jax.Array, jax.Array, jax.Array]]

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})
# So many batches are computed while the host reads the results of earlier ones.
_IN_FLIGHT = 2


@dataclass(frozen=True)
class FeatureModel:
    """A model that makes features, with what brings images into its form.

    Attributes:
      step: What :func:`make_feature_step` made of it; one program for all sets.
      params: What it takes, on the devices of ``mesh``.
      prepare: From the pixels of an image, uint8 ``[height, width, 3]``, to an input.
      mesh: The mesh.
    """

    step: FeatureStep
    params: PyTree
    prepare: Callable[[np.ndarray], np.ndarray]
    mesh: Mesh


def make_feature_step(compute: Callable[[PyTree, jax.Array], jax.Array], mesh: Mesh) -> FeatureStep:
    """Compiles what computes the features of a batch whose rows are split over the devices.

    Args:
      compute: Pure function from parameters and inputs ``[batch, ...]`` to features ``[batch, n]``.
      mesh: The mesh.

    Returns:
      A jitted function from parameters and a batch with ``inputs``, ``labels`` and ``mask`` to features (float32),
      labels and mask.  They are whole on every device: with several processes, each has its own rows only before.

    Raises:
      ValueError: When it is called and the features of an example are not a vector.
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
    """Computes the features of one pass.

    With several processes all call this, each with batches of its own rows, and each gets the features of all.

    Args:
      step: From :func:`make_feature_step`.
      params: What it takes, on the devices of ``mesh``.
      batches: One pass with ``inputs``, ``labels`` and ``mask``, as :func:`subspace_jax.data.eval_batches` gives it:
        the last one filled up, so that all have one shape and one program serves them.
      mesh: The mesh.
      num_batches: Length of the progress bar.
      progress: Whether to show one.

    Returns:
      Features ``[examples, n]`` float32, and labels ``[examples]`` int32, of the rows whose mask is not 0.

    Raises:
      ValueError: There is no example, or the features of one are not a vector.
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
    task: ClassifierTask, state: train.TrainState, batches: Iterable[Mapping[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the features of one pass by a classifier as it is in training, on the mesh of its state.

    Args:
      task: The task.
      state: Its train state.
      batches: One pass, with a ``mask``: what ``Data.evaluate()`` gives.

    Returns:
      Features ``[examples, n]`` and labels ``[examples]``, of all processes' rows on every process.
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
    """Opens what makes features: a checkpoint folder of Hugging Face or timm, or the workdir of a classifier's run.

    Of a folder the pooled output is taken, and images are prepared as its files say
    (:meth:`subspace_jax.data.ImageProcessor.from_json`); of a run the features that the head sees, and images are
    prepared as its evaluation did.

    Args:
      path: The folder.
      mesh: The mesh, on whose every device the whole model lies; all devices along ``data`` by default.
      dtype: Type of the activations of a folder's model; that of its files by default.
      resample: Whether a vision transformer resamples its positions for images of another size.
      step: Step of a run's checkpoint, or "best"; the latest by default.
      trust_remote_code: See :func:`subspace_jax.train.restore`.

    Returns:
      The model.

    Raises:
      FileNotFoundError: There is no such folder, or it has neither a model nor a run; or nothing says how images are
        prepared.
      ValueError: The model is of no supported kind, has no pooled output, or the run is none of classifiers of images.
    """
    path = pathlib.Path(path).expanduser()
    mesh = train.make_mesh() if mesh is None else mesh
    if (path / "checkpoints").is_dir():
        return _of_run(path, mesh, step, trust_remote_code)
    prepare = None
    if (path / "config.json").is_file():
        # Before the weights: what is missing shows at once.
        prepare = data.ImageProcessor.from_json(path)
    whole = NamedSharding(mesh, P())
    config, params = interop.load_vision(path, shardings=lambda shapes, axes: jax.tree.map(lambda _: whole, shapes))
    options = {} if dtype is None else {"dtype": dtype}

    def compute(params: PyTree, pixels: jax.Array) -> jax.Array:
        pooled = nn.vision_apply(config, params, pixels, resample=resample, **options).pooled
        if pooled is None:
            raise ValueError(f"model: {path} has no pooled output that could serve as features")
        return pooled

    return FeatureModel(make_feature_step(compute, mesh), params, prepare, mesh)


def _of_run(path: pathlib.Path, mesh: Mesh, at: int | Literal["best"] | None, trust: bool) -> FeatureModel:
    # A single process needs no more than one device to read a checkpoint, whatever the mesh of the run was.
    alone = [f"mesh.{axis}=1" for axis in train.MESH_AXES] if jax.process_count() == 1 else ()
    experiment, state = train.restore(path, step=at, settings=alone, trust_remote_code=trust)
    task = experiment.task
    if not isinstance(task, ClassifierTask):
        raise ValueError(f"model: {path} is a run of {experiment.config.task}, expected one of represent.classify")
    image = experiment.config.data.image
    if not image.size:
        raise ValueError(
            f"model: the run in {path} takes its data as they come; expected one with data.image.size, which says how "
            "images of another set are brought to its size"
        )
    side = image.eval_size or image.size
    prepare = data.EvalImage(side, crop=image.eval_crop, method=image.method, as_bytes=True)
    params = jax.device_put((state.params, state.variables), NamedSharding(mesh, P()))
    return FeatureModel(_task_step(task, mesh), params, prepare, mesh)


def _task_step(task: ClassifierTask, mesh: Mesh) -> FeatureStep:
    return make_feature_step(lambda arrays, inputs: task.features(*arrays, inputs), mesh)


def open_labelled_images(
    name: str | os.PathLike,
    split: str,
    data_dir: str | os.PathLike | None = None,
    *,
    class_names: Iterable[str] | None = None,
    on_unreadable: str = "raise",
) -> data.Images:
    """Opens a set by its TFDS name, or a folder with one folder for each class.

    Args:
      name: TFDS name, or a path; a folder that is there goes before a name.
      split: Split of the set; of a folder the folder in it, which may be empty for the folder itself.
      data_dir: Folder of TFDS sets; the usual place by default.
      class_names: Names of the classes in the order of their labels, of a folder; all by name by default.
      on_unreadable: "raise", or "skip" to leave such images out; see :func:`subspace_jax.data.image_folder`.

    Returns:
      The images.

    Raises:
      FileNotFoundError: There is no such folder, or the set is not prepared; the message says how to.
      ValueError: Name or split is unknown, the set is not one of labelled images, or what look like the classes of a
        folder are its splits.
    """
    if not os.fspath(name):
        raise ValueError("name: expected a set of TensorFlow Datasets or a folder, got ''")
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
      images: The set, as :func:`open_labelled_images` opens it.
      batch_size: Rows of a batch, over all processes; it is raised to a multiple of the devices of the mesh.
      progress: Whether to show a progress bar.

    Returns:
      The features of all images, in the order of the set.

    Raises:
      ValueError: An image can't be read, or the images don't fit the model.
    """
    ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
    batch_size = -(-batch_size // ways) * ways
    batches = data.eval_batches(images.map(model.prepare), batch_size=batch_size)
    num_batches = -(-len(images) // batch_size)
    found = extract_features(
        model.step, model.params, batches, mesh=model.mesh, num_batches=num_batches, progress=progress
    )
    return Features(*found, images.class_names)
