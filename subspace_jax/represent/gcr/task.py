"""Image classification with a linear, cosine or Grassmann head (arXiv 2308.01547; Wang, Li, Zhang, ICCV 2023)."""

import difflib
import functools
import math
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from subspace_jax import data, losses, train
from subspace_jax.represent.gcr.model import Classifier, make_classifier
from subspace_jax.train.fields import check_choice

# An image set up to this size is decoded once and kept in memory; a larger one is read by index.
IN_MEMORY_BYTES = 2**30
LARGEST_SIDE = 4096
OWN_SETS = ("union_of_subspaces", "folder")
LOSSES = {"softmax": losses.cross_entropy, "sigmoid": losses.binary_cross_entropy}


class ClassifierTask(train.Task):
    """Classification as a :class:`subspace_jax.train.Task`.

    Batches hold ``inputs [batch, ...]``, ``labels [batch]`` and, for evaluation, ``mask [batch]``.

    Args:
      make: Builds the module from a key; the module has a ``backbone`` and a ``head``.
      loss: Training minimises "softmax" cross-entropy (:func:`subspace_jax.losses.cross_entropy`) or "sigmoid"
        (:func:`subspace_jax.losses.binary_cross_entropy`); evaluation reports the former.
      label_smoothing: Label smoothing of the training loss.
      mixing: Options of :func:`subspace_jax.data.mix_images`; training images are mixed if ``mixup`` or ``cutmix`` is
        above 0.
    """

    def __init__(
        self,
        make: Callable[[jax.Array], Classifier],
        *,
        loss: str = "softmax",
        label_smoothing: float = 0.0,
        mixing: Mapping[str, float] | None = None,
    ):
        if loss not in LOSSES:
            raise ValueError(f"model.loss: expected one of {tuple(LOSSES)}, got {loss!r}")
        self._make = make
        self._loss = functools.partial(LOSSES[loss], label_smoothing=label_smoothing)
        self._mixing = dict(mixing or {})
        self._graph, self._axes = train.split_module(make)

    def init(self, key):
        """Returns fresh parameters and variables."""
        return train.module_arrays(self._make(key))

    def axes(self):
        """Returns the logical axis names of parameters and variables."""
        return self._axes

    def module(self, params, variables) -> Classifier:
        """Returns the module with these arrays."""
        return nnx.merge(self._graph, params, variables)

    def roles(self):
        """Returns that the bases of a Grassmann head move on the manifold."""
        return {"head/bases": "grassmann"} if "bases" in self._axes[0]["head"] else {}

    def loss(self, params, variables, batch, *, key, step):
        """Returns the mean loss over the batch, and the accuracy as a metric (of mixed images, if any)."""
        model = self.module(params, variables)
        model.train()
        del step
        drop_key, mix_key = jax.random.split(key)
        inputs = _pixels(batch["inputs"])
        weight = None
        if self._mixing.get("mixup") or self._mixing.get("cutmix"):
            inputs, weight = data.mix_images(mix_key, inputs, **self._mixing)
        logits = model(inputs, drop_key)
        loss = self._loss(logits, batch["labels"])
        if weight is not None:
            other = self._loss(logits, data.partners(batch["labels"]))
            loss = weight * loss + (1 - weight) * other
        loss = jnp.mean(loss)
        accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == batch["labels"]).astype(jnp.float32))
        return loss, (train.module_arrays(model)[1], {"accuracy": accuracy})

    def evaluate(self, params, variables, batch, *, key):
        """Returns sums of cross-entropy (no smoothing) and correct predictions, and the number of examples."""
        del key
        logits = self.module(params, variables)(_pixels(batch["inputs"]))
        real = batch["mask"] > 0
        hits = (jnp.argmax(logits, axis=-1) == batch["labels"]).astype(jnp.float32)
        return {
            "loss": jnp.sum(losses.cross_entropy(logits, batch["labels"]), where=real),
            "accuracy": jnp.sum(hits, where=real),
            "count": jnp.sum(real.astype(jnp.float32)),
        }

    def features(self, params, variables, inputs: jax.Array) -> jax.Array:
        """Returns the features ``[batch, n]``, the inputs of the head."""
        return self.module(params, variables).backbone(_pixels(inputs))


def _pixels(inputs: jax.Array) -> jax.Array:
    """Standardizes images that were transferred as bytes, a quarter of the size of float32."""
    return data.standardize(inputs) if inputs.dtype == jnp.uint8 else inputs


def default_config() -> ConfigDict:
    """Returns the fields of a classification run.

    ``data.name`` is "union_of_subspaces" (synthetic, drawn from ``seed``), "digits", or an image set of TensorFlow
    Datasets that is prepared in ``data.data_dir`` (empty: TFDS's default).  ``model.dims`` holds one dimension for all
    classes, or one per class.  ``model.loss`` is described in :class:`ClassifierTask`.

    With ``data.image.size`` above 0, images of any size are resized: for training by
    :class:`subspace_jax.data.TrainImage` with the other fields of ``data.image``, for evaluation by
    :meth:`subspace_jax.data.ImageProcessor.evaluation` (``eval_size`` 0 stands for ``size``).  ``data.name`` may then
    be "folder": ``data.data_dir`` has one subfolder per split, with one subfolder per class.  ``data.repeats`` repeats
    each image in a batch with other augmentations.  ``model.mixup`` and ``model.cutmix`` are options of
    :func:`subspace_jax.data.mix_images`.
    """
    config = train.default_config()
    config.task = "subspace_jax.represent.gcr.task"
    config.train.best = "max:accuracy"
    config.data = ConfigDict(
        {
            "name": "digits",
            "data_dir": "",
            "train_split": "train",
            "eval_split": "test",
            "batch_size": 64,
            "eval_batch_size": 256,
            "augment": False,
            "repeats": 1,
            "image": {
                "size": 0,
                "eval_size": 0,
                "eval_crop": 0.875,
                "method": "bicubic",
                "scale": (0.08, 1.0),
                "flip": 0.5,
                "three_augment": False,
                "operations": 0,
                "magnitude": 9.0,
                "deviation": 0.5,
                "jitter": (0.0, 0.0, 0.0, 0.0),
                "erase": 0.0,
                "on_unreadable": "raise",
            },
        }
    )
    config.model = ConfigDict(
        {
            "backbone": "mlp",
            "features": (128, 64),
            "head": "grassmann",
            "dims": (8,),
            "gamma": 25.0,
            "loss": "softmax",
            "label_smoothing": 0.0,
            "dtype": "float32",
            "drop_path": 0.0,
            "mixup": 0.0,
            "cutmix": 0.0,
        }
    )
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, for :func:`subspace_jax.train.build`.

    Args:
      config: With the fields of :func:`default_config`.

    Returns:
      A run of one phase.

    Raises:
      ValueError: A name is unknown, or a size is invalid.
      FileNotFoundError: The data set is not prepared; the message says how to.
    """
    sizes = config.data
    transform = _transform(sizes)
    train_set, eval_set, num_classes = _sets(config)
    batches = functools.partial(
        data.train_batches,
        train_set,
        batch_size=sizes.batch_size,
        repeats=sizes.repeats,
        transform=transform,
    )
    shape = _input_shape(config, train_set)
    task = _task(config, shape, num_classes)
    batches(seed=config.seed)  # reports an invalid batch size or seed now
    return _run(
        task,
        train.DataSpec(
            batch=_batch(config, shape),
            train=lambda seed: batches(seed=seed),
            evaluate={"eval": data.eval_passes(eval_set, sizes.eval_batch_size)},
            steps_per_epoch=data.steps_per_epoch(_num_examples(train_set), sizes.batch_size),
        ),
    )


def outline(config: ConfigDict) -> train.Run:
    """Returns the run of a config without examples, for :func:`subspace_jax.planning.plan_run`.

    No image is read.  A set of TensorFlow Datasets need not be prepared; the files of a folder are listed.

    Args:
      config: As for :func:`build`.

    Raises:
      ValueError: A name is unknown, or a size is invalid.
      FileNotFoundError: The folder does not exist.
    """
    sizes, side = config.data, config.data.image.size
    _transform(sizes)
    if sizes.name in OWN_SETS:
        named = config.copy_and_resolve_references()
        named.data.image.on_unreadable = "raise"  # skipping needs all images to be decoded
        train_set, _, num_classes = _sets(named)
        shape = _input_shape(config, train_set)
    else:
        given, num_classes = data.describe_images(sizes.name, sizes.data_dir or None)
        shape = (side, side, 3) if side else given
    if None in shape:
        raise ValueError(f"data.image.size: images of {sizes.name!r} vary in size, expected the size to resize them to")
    return _run(_task(config, shape, num_classes), train.outlined(_batch(config, shape), sizes.eval_batch_size))


def _run(task: ClassifierTask, examples: train.DataSpec) -> train.Run:
    return train.Run((train.Phase("train", task, examples),))


def _batch(config: ConfigDict, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    batch_size = config.data.batch_size
    return {
        "inputs": jax.ShapeDtypeStruct((batch_size, *shape), jnp.uint8 if config.data.image.size else jnp.float32),
        "labels": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


def _task(config: ConfigDict, input_shape: tuple[int, ...], num_classes: int) -> ClassifierTask:
    settings = dict(config.model)
    loss, smoothing, dims = settings.pop("loss"), settings.pop("label_smoothing"), tuple(settings.pop("dims"))
    if not 0 <= smoothing < 1:
        raise ValueError(f"model.label_smoothing: expected a number in [0, 1), got {smoothing}")
    mixing = {name: settings.pop(name) for name in ("mixup", "cutmix")}
    make = functools.partial(
        make_classifier,
        input_shape=input_shape,
        num_classes=num_classes,
        dims=dims[0] if len(dims) == 1 else dims,
        **settings,
    )
    return ClassifierTask(make, loss=loss, label_smoothing=smoothing, mixing=mixing)


def _sets(config: ConfigDict) -> tuple[data.Source | Mapping, data.Source | Mapping, int]:
    """Returns training set, evaluation set and number of classes."""
    name, folder = config.data.name, config.data.data_dir or None
    if name == "union_of_subspaces":
        made = data.union_of_subspaces(config.seed)
        return made.train, made.test, len(made.bases)
    if name == "folder" and not (folder and config.data.image.size):
        raise ValueError(
            "data.name: 'folder' needs the folder as data.data_dir, and the size of its images as data.image.size, got "
            f"{config.data.data_dir!r} and {config.data.image.size}"
        )
    if name not in OWN_SETS and (near := difflib.get_close_matches(name, OWN_SETS, n=1, cutoff=0.8)):
        raise ValueError(f"data.name: no set {name!r}; did you mean {near[0]!r}?")
    if pathlib.Path(name).is_dir() and len(pathlib.Path(name).parts) > 1:
        raise ValueError(f"data.name: {name!r} is a folder; give data.name=folder and data.data_dir={name}")
    if config.data.image.size:
        return _images(config.data)
    sources = [data.image_source(name, split, folder) for split in (config.data.train_split, config.data.eval_split)]
    num_classes = sources[0].num_classes
    fits = [len(source) * math.prod(source.image_shape) * 4 <= IN_MEMORY_BYTES for source in sources]
    sets = [data.load_arrays(source) if fit else source for source, fit in zip(sources, fits, strict=True)]
    return *sets, num_classes


def _images(config: ConfigDict) -> tuple[data.Images, data.Images, int]:
    """Opens training images of any size, and evaluation images that are resized to one."""
    unreadable = {"on_unreadable": config.image.on_unreadable}
    if config.name == "folder":
        root = pathlib.Path(config.data_dir)
        train_set = data.image_folder(root / config.train_split, **unreadable)
        eval_set = data.image_folder(root / config.eval_split, class_names=train_set.class_names, **unreadable)
    else:
        train_set, eval_set = (
            data.image_set(config.name, split, config.data_dir or None, **unreadable)
            for split in (config.train_split, config.eval_split)
        )
    image = config.image
    shown = data.ImageProcessor.evaluation(
        image.eval_size or image.size, crop=image.eval_crop, method=image.method, as_bytes=True
    )
    return train_set, eval_set.map(shown), train_set.num_classes


def _transform(config: ConfigDict) -> data.Transform | None:
    image = config.image
    for name in ("size", "eval_size"):
        if not 0 <= image[name] <= LARGEST_SIDE:
            raise ValueError(f"data.image.{name}: expected a side of 0 to {LARGEST_SIDE}, got {image[name]}")
    check_choice("data.image.on_unreadable", image.on_unreadable, ("raise", "skip"))
    if not image.size:
        return data.random_crop_flip if config.augment else None
    fields = {k: v for k, v in image.items() if k not in ("eval_size", "eval_crop", "on_unreadable")}
    try:
        data.ImageProcessor.evaluation(image.eval_size or image.size, crop=image.eval_crop, method=image.method)
        return data.TrainImage(**fields, as_bytes=True)
    except (ValueError, TypeError) as error:
        raise ValueError(f"data.image.{error}") from error


def _input_shape(config: ConfigDict, source: data.Source | Mapping) -> tuple[int, ...]:
    if side := config.data.image.size:
        return side, side, 3
    return source["inputs"].shape[1:] if isinstance(source, Mapping) else source.image_shape


def _num_examples(source: data.Source | Mapping) -> int:
    return len(source["labels"]) if isinstance(source, Mapping) else len(source)
