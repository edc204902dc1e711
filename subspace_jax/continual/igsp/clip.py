"""Experts beside the perceptrons of both towers of CLIP, on a stream of image sets: the protocol of MTIL.

A reconstruction of iGSP from its abstract (arXiv 2605.19301); order, smoothing and schedule are those of the
benchmark's closest published code (arXiv 2403.11549).
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from subspace_jax import data, interop, train
from subspace_jax.continual.igsp.classes import ClassStream, class_summary
from subspace_jax.continual.igsp.config import expert_settings, stream_config, task_config
from subspace_jax.continual.igsp.model import ExpertKernel
from subspace_jax.continual.igsp.phases import task_phases
from subspace_jax.continual.igsp.state import ExpertSettings, Site
from subspace_jax.continual.stream import Examples, Part, Stream, TaskData, examples_of, make_stream, task_data
from subspace_jax.data.images import transforms
from subspace_jax.data.text import FileTokenizer
from subspace_jax.interop.config_fields import read_fields
from subspace_jax.interop.hf.clip import dual_config_from_fields
from subspace_jax.nn.models.clip.dual_tower import (
    DualTowerConfig,
    dual_tower_specs,
    encode_image,
    encode_text,
    similarity,
)
from subspace_jax.nn.params import draw_params
from subspace_jax.train.fields import check_at_least, check_share

PyTree = Any
_TOWERS = {"image": "vision", "text": "text"}


class ClipStream(ClassStream):
    """CLIP with experts beside the first kernel of each perceptron of both towers.

    The router of an image reads its class token, and that of a text its first token, which is the same for all texts.
    The model is replicated over the mesh, and kept in no checkpoint where it comes from a folder.

    Args:
      config: The model.
      tokens: Prompts of all classes ``[tasks, classes, length]`` int32, any text beyond the classes of a task.
      num_classes: Classes of each task.
      settings: See :class:`ExpertSettings`.
      processor: Its mean and standard deviation standardize 8-bit images; None for images that are.
      folder: Checkpoint folder of the model; empty for random weights.
      label_smoothing: Of the cross-entropy.
    """

    def __init__(
        self,
        config: DualTowerConfig,
        tokens: np.ndarray,
        num_classes: Sequence[int],
        settings: ExpertSettings,
        *,
        processor: data.ImageProcessor | None = None,
        folder: str | os.PathLike = "",
        label_smoothing: float = 0.2,
    ):
        towers = {"image": config.vision, "text": config.text}
        sites = {name: Site(tower.num_layers, tower.width, tower.mlp_size) for name, tower in towers.items()}
        width = config.projection_size or config.vision.width
        super().__init__(num_classes, label_smoothing, sites=sites, settings=settings, width=width)
        expected = (len(num_classes), int(max(num_classes)))
        if tokens.ndim != 3 or tokens.shape[:2] != expected:
            raise ValueError(f"tokens: expected [{expected[0]}, {expected[1]}, length], got {tokens.shape}")
        self.config, self.class_rows = config, tokens.shape[1]
        self._tokens, self._processor, self._folder = np.asarray(tokens, np.int32), processor, folder
        self.frozen = ("base",) if folder else ()

    def init_base(self, key):
        """Returns random weights, and the prompts."""
        return {"model": draw_params(key, dual_tower_specs(self.config)), "tokens": jnp.asarray(self._tokens)}

    def load(self, shardings):
        """Returns fresh experts beside the model of the folder."""
        if not self._folder:
            return None
        mesh = jax.tree.leaves(shardings)[0].mesh
        others = {name: s for name, s in shardings[1].items() if name != "base"}

        def fresh(key):
            params, variables = self.init(key)
            return params, {name: x for name, x in variables.items() if name != "base"}

        params, variables = train.jit_on_mesh(fresh, mesh, (shardings[0], others))(
            jax.random.key(0)
        )  # drawn again by begun
        return params, {**variables, **self.restore_frozen(variables, shardings[1])}

    def restore_frozen(self, variables, shardings):
        """Returns the model of the folder, and the prompts."""
        own = shardings["base"]
        _, model = interop.load_dual(self._folder, jnp.float32, own["model"])
        return {"base": {"model": model, "tokens": jax.device_put(self._tokens, own["tokens"])}}

    def base_kernels(self, base):
        """Returns the first kernels of all perceptrons."""
        return {name: base["model"][tower]["layers"]["mlp"]["up"]["kernel"] for name, tower in _TOWERS.items()}

    def rows(self, site, batch):
        """Returns the number of images, or of classes."""
        return self.class_rows if site == "text" else batch["inputs"].shape[0]

    def features(self, base, batch):
        """Returns the image vectors of the frozen model."""
        return encode_image(self.config, base["model"], self._pixels(batch["inputs"]))

    def class_vectors(self, base, kernels, task):
        """Returns the text vectors of a task's prompts."""
        return encode_text(self.config, _with(base["model"], kernels, "text"), base["tokens"][task])

    def embed(self, base, kernels, inputs):
        """Returns image vectors."""
        return encode_image(self.config, _with(base["model"], kernels, "image"), self._pixels(inputs))

    def logits(self, base, vectors, classes):
        """Returns CLIP's similarities."""
        own = base["model"]
        if classes.shape[0] == 1:
            return similarity(self.config, own, vectors, classes[0])
        return jax.vmap(lambda v, c: similarity(self.config, own, v[None], c)[0])(vectors, classes)

    def _pixels(self, inputs):
        if self._processor is None:
            return inputs
        own = self._processor
        return transforms.standardize(inputs, own.mean, own.std, own.scale)


def _with(model: PyTree, kernels: Mapping[str, ExpertKernel], site: str) -> PyTree:
    """The model with experts in one tower."""
    tower = model[_TOWERS[site]]
    layers, perceptron = tower["layers"], tower["layers"]["mlp"]
    perceptron = {**perceptron, "up": {**perceptron["up"], "kernel": kernels[site]}}
    return {**model, _TOWERS[site]: {**tower, "layers": {**layers, "mlp": perceptron}}}


def prompt_tokens(tokenizer: Any, names: Sequence[str], prompt: str, length: int) -> np.ndarray:
    """Returns the tokens of class prompts ``[classes, length]`` int32, with start and end token, padded by the latter.

    Args:
      tokenizer: Has ``encode``, ``bos_id`` and ``eos_id``.
      names: Class names; underscores are read as spaces.
      prompt: A text with ``{}`` for the name.
      length: Tokens of a text; longer ones are truncated.

    Raises:
      ValueError: The prompt has no place for the name, or the tokenizer no start or end token.
    """
    if "{}" not in prompt:
        raise ValueError(f"prompt: expected {{}} where the name of a class belongs, got {prompt!r}")
    first, last = tokenizer.bos_id, tokenizer.eos_id
    if first is None or last is None:
        raise ValueError("tokenizer: expected one with a token before and one after a text")
    rows = np.full((len(names), length), last, np.int32)
    for row, name in zip(rows, names, strict=True):
        tokens = [first, *tokenizer.encode(prompt.replace("{}", name.replace("_", " ")))[: length - 2]]
        row[: len(tokens)] = tokens
    return rows


def default_config() -> ConfigDict:
    """Returns the fields of a run, see :func:`stream_config`.

    ``model.path`` is a folder of CLIP with its tokenizer.  ``data.sets`` are image sets of TensorFlow Datasets, or
    folders below ``data.data_dir``, in the order in which they arrive, with their splits; ``data.statistics`` training
    examples of a task tell which experts it uses, and what its images look like.
    """
    config = stream_config()
    config.task = "subspace_jax.continual.igsp.clip"
    config.model = ConfigDict({"path": "", "label_smoothing": 0.2})
    config.data = ConfigDict(
        {
            "data_dir": "",
            "sets": (),
            "train_splits": (),
            "eval_splits": (),
            "prompt": "a photo of a {}.",
            "batch_size": 64,
            "eval_batch_size": 256,
            "statistics": 2048,
        }
    )
    config.optim.update({"name": "adamw", "learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 100})
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, for :func:`subspace_jax.train.build`: two phases for each image set.

    Its summary has MTIL's Transfer, Avg and Last where nobody says which set an image is of, and the forgetting given
    the set.

    Raises:
      ValueError: A field can't serve.
      FileNotFoundError: The model, its tokenizer or a set is not there.
    """
    own = config.data
    check_share("model.label_smoothing", config.model.label_smoothing)
    for name in ("batch_size", "eval_batch_size", "statistics"):
        check_at_least(f"data.{name}", own[name], 1)
    if not own.sets or not len(own.sets) == len(own.train_splits) == len(own.eval_splits):
        raise ValueError(
            "data.sets: expected at least one set, and a split of each in train_splits and eval_splits, got "
            f"{len(own.sets)}, {len(own.train_splits)}, {len(own.eval_splits)}"
        )
    if not config.model.path:
        raise ValueError("model.path: expected a folder of CLIP, got none")
    folder = Path(config.model.path).expanduser()
    model = dual_config_from_fields(read_fields(folder))
    processor = dataclasses.replace(data.ImageProcessor.from_json(folder), as_bytes=True)
    stream, names = image_sets(own, processor)
    tokenizer, length = FileTokenizer(folder), model.text.max_length
    prompts = [prompt_tokens(tokenizer, of_set, own.prompt, length) for of_set in names]
    most = max(stream.num_classes)
    tokens = np.stack([np.concatenate([rows, np.repeat(rows[:1], most - len(rows), axis=0)]) for rows in prompts])
    task = ClipStream(
        model,
        tokens,
        stream.num_classes,
        expert_settings(config),
        processor=processor,
        folder=folder,
        label_smoothing=config.model.label_smoothing,
    )
    specs = [
        task_data(
            stream,
            [t],
            batch_size=own.batch_size,
            eval_batch_size=own.eval_batch_size,
            sets={"train": examples_of([_sample(of_set.train, own.statistics, t)], [t])},
        )
        for t, of_set in enumerate(stream.tasks)
    ]
    return train.Run(task_phases(task, specs, task_config(config)), lambda rows: class_summary(rows, len(stream)))


def image_sets(fields: ConfigDict, processor: data.ImageProcessor) -> tuple[Stream, list[tuple[str, ...]]]:
    """Returns the stream of the sets of a config, and the names of their classes."""
    tasks, names = [], []
    for name, *splits in zip(fields.sets, fields.train_splits, fields.eval_splits, strict=True):
        below = Path(fields.data_dir).expanduser() / name
        if fields.data_dir and (below / splits[0]).is_dir():
            learn = data.image_folder(below / splits[0])
            parts = [learn, data.image_folder(below / splits[1], class_names=learn.class_names)]
        else:
            parts = [data.image_set(name, split, fields.data_dir or None) for split in splits]
        names.append(parts[0].class_names)
        classes = tuple(range(len(names[-1])))
        tasks.append(TaskData(name, *(part.map(processor) for part in parts), classes))
    return make_stream(tasks), names


def _sample(source: Examples, count: int, seed: int) -> Examples:
    order = np.sort(np.random.default_rng(seed).permutation(len(source))[:count])
    return Part(source, order)
