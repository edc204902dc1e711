"""Streams of tasks: what they are, how they are made, and the data of their phases."""

from subspace_jax.continual.stream.batches import TaskExamples, examples_of, task_data
from subspace_jax.continual.stream.load import default_data, load_stream
from subspace_jax.continual.stream.splits import class_groups, permuted, rotated, split_classes
from subspace_jax.continual.stream.tasks import Examples, Part, Stream, TaskData, make_stream
from subspace_jax.continual.stream.teachers import Teachers, teacher_stream, teacher_tasks

__all__ = [
    "Examples",
    "Part",
    "Stream",
    "TaskData",
    "TaskExamples",
    "Teachers",
    "class_groups",
    "default_data",
    "examples_of",
    "load_stream",
    "make_stream",
    "permuted",
    "rotated",
    "split_classes",
    "task_data",
    "teacher_stream",
    "teacher_tasks",
]


def __dir__():
    return __all__
