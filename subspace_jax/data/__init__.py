"""Datasets and input pipelines: TensorFlow Datasets, image folders, synthetic sets, Grain batches."""

import subspace_jax._train_extra  # noqa: F401
from subspace_jax.data.graphs import Graph, as_adjacency, read_graph
from subspace_jax.data.images.augment import (
    color_jitter,
    rand_augment,
    random_crop_flip,
    random_erasing,
    random_resized_crop,
    three_augment,
)
from subspace_jax.data.images.decode import decode_image
from subspace_jax.data.images.mixing import mix_images, partners
from subspace_jax.data.images.processor import ImageProcessor
from subspace_jax.data.images.train_image import TrainImage
from subspace_jax.data.images.transforms import IMAGENET_MEAN, IMAGENET_STD, resize, standardize
from subspace_jax.data.json_object import read_json_object
from subspace_jax.data.pipeline import (
    Source,
    Transform,
    eval_batches,
    eval_passes,
    load_arrays,
    steps_per_epoch,
    train_batches,
)
from subspace_jax.data.sources.folders import image_files, image_folder
from subspace_jax.data.sources.images import Images
from subspace_jax.data.sources.mnist_digits import mnist_digits
from subspace_jax.data.sources.synthetic import UnionOfSubspaces, union_of_subspaces
from subspace_jax.data.sources.tfds import ImageSource, default_data_dir, describe_images, image_set, image_source
from subspace_jax.data.vector_shards import VectorShards
from subspace_jax.data.vectors import StoredVectors, check_informative, map_blocks, open_vectors, read_labels

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Graph",
    "ImageProcessor",
    "ImageSource",
    "Images",
    "Source",
    "StoredVectors",
    "TrainImage",
    "Transform",
    "UnionOfSubspaces",
    "VectorShards",
    "as_adjacency",
    "check_informative",
    "color_jitter",
    "decode_image",
    "default_data_dir",
    "describe_images",
    "eval_batches",
    "eval_passes",
    "image_files",
    "image_folder",
    "image_set",
    "image_source",
    "load_arrays",
    "map_blocks",
    "mix_images",
    "mnist_digits",
    "open_vectors",
    "partners",
    "rand_augment",
    "random_crop_flip",
    "random_erasing",
    "random_resized_crop",
    "read_graph",
    "read_json_object",
    "read_labels",
    "resize",
    "standardize",
    "steps_per_epoch",
    "three_augment",
    "train_batches",
    "union_of_subspaces",
]


def __dir__():
    return __all__
