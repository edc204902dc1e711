"""Data: image sets through TensorFlow Datasets, Grain pipelines, synthetic sets."""

from subspace_jax.data.augment import random_crop_flip
from subspace_jax.data.image_processor import ImageProcessor
from subspace_jax.data.pipeline import Source, Transform, eval_batches, load_arrays, steps_per_epoch, train_batches
from subspace_jax.data.resize import resize_uint8
from subspace_jax.data.sources import ImageSource, default_data_dir, image_source
from subspace_jax.data.synthetic import UnionOfSubspaces, union_of_subspaces

__all__ = [
    "ImageProcessor",
    "ImageSource",
    "Source",
    "Transform",
    "UnionOfSubspaces",
    "default_data_dir",
    "eval_batches",
    "image_source",
    "load_arrays",
    "random_crop_flip",
    "resize_uint8",
    "steps_per_epoch",
    "train_batches",
    "union_of_subspaces",
]
