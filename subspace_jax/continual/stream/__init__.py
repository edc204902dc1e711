"""Streams of tasks: what they are, how they are made, and the data of their phases."""

from subspace_jax.continual.stream.batches import TaskExamples, examples_of, task_data
from subspace_jax.continual.stream.body import Body, convnet_body, layer_inputs, mlp_body
from subspace_jax.continual.stream.evaluate import TaskAccuracy, accuracy_matrix
from subspace_jax.continual.stream.learner import StreamTask
from subspace_jax.continual.stream.load import default_data, load_stream
from subspace_jax.continual.stream.setup import Setup
from subspace_jax.continual.stream.splits import class_groups, permuted, rotated, split_classes
from subspace_jax.continual.stream.tasks import Examples, Part, Stream, TaskData, make_stream
from subspace_jax.continual.stream.teachers import Teachers, teacher_stream, teacher_tasks

__all__ = [
    "Body",
    "Examples",
    "Part",
    "Setup",
    "Stream",
    "StreamTask",
    "TaskAccuracy",
    "TaskData",
    "TaskExamples",
    "Teachers",
    "accuracy_matrix",
    "class_groups",
    "convnet_body",
    "default_data",
    "examples_of",
    "layer_inputs",
    "load_stream",
    "make_stream",
    "mlp_body",
    "permuted",
    "rotated",
    "split_classes",
    "task_data",
    "teacher_stream",
    "teacher_tasks",
]


def __dir__():
    return __all__
