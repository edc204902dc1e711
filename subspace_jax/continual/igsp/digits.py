"""A stream of image tasks for a small frozen network with experts: the stand-in for a vision-language model.

The network has random features, and classes are random vectors, so that all that is learnt is in the experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from subspace_jax import linalg, nn, train
from subspace_jax.continual.igsp.classes import ClassStream, class_summary
from subspace_jax.continual.igsp.config import expert_settings, stream_config, task_config
from subspace_jax.continual.igsp.phases import task_phases
from subspace_jax.continual.igsp.state import ExpertSettings, Site
from subspace_jax.continual.stream import Stream, default_data, examples_of, load_stream, task_data
from subspace_jax.train.fields import check_at_least

_TEMPERATURE = 10.0


class RandomFeatureStream(ClassStream):
    """``x -> relu(x W) -> (experts beside a kernel) -> cosine with a fixed vector of each class``.

    Args:
      stream: The tasks.
      hidden: Random features, which the router reads and by which tasks are told apart.
      embedding: Width of the class vectors.
      settings: See :class:`ExpertSettings`.
    """

    def __init__(self, stream: Stream, hidden: int, embedding: int, settings: ExpertSettings):
        sites = {"kernel": Site(1, hidden, embedding)}
        super().__init__(stream.num_classes, sites=sites, settings=settings, width=hidden)
        self._sizes = int(np.prod(stream.shape)), hidden, embedding
        self.class_rows = 1

    def init_base(self, key):
        """Returns random features, the kernel, and vectors of classes, the same for all tasks."""
        inputs, hidden, embedding = self._sizes
        keys = jax.random.split(key, 3)
        vectors = jax.random.normal(keys[2], (int(self.num_classes.max()), embedding))
        return {
            "features": jax.random.normal(keys[0], (inputs, hidden)) * np.float32(np.sqrt(2 / inputs)),
            "kernel": jax.random.normal(keys[1], (1, hidden, embedding)) / np.float32(np.sqrt(hidden)),
            "classes": linalg.unit_vectors(vectors),
        }

    def base_kernels(self, base):
        """Returns the frozen kernel."""
        return {"kernel": base["kernel"]}

    def features(self, base, batch):
        """Returns the random features."""
        inputs = batch["inputs"].reshape(len(batch["inputs"]), -1)
        return jax.nn.relu(nn.linear(inputs, base["features"]))

    def class_vectors(self, base, kernels, task):
        """Returns the vectors of all classes."""
        return base["classes"]

    def embed(self, base, kernels, inputs):
        """Returns unit vectors."""
        hidden = self.features(base, {"inputs": inputs})
        return linalg.unit_vectors(nn.linear(hidden, jax.tree.map(lambda x: x[0], kernels["kernel"])))

    def logits(self, base, vectors, classes):
        """Returns scaled cosines."""
        classes = jnp.broadcast_to(classes, (len(vectors), *classes.shape[1:]))
        return _TEMPERATURE * jnp.einsum("bd,bcd->bc", vectors, classes)


def default_config() -> ConfigDict:
    """Returns the fields of a run, see :func:`stream_config` and :func:`subspace_jax.continual.stream.default_data`.

    ``model.hidden`` random features, and class vectors of ``model.embedding``.
    """
    config = stream_config()
    config.task = "subspace_jax.continual.igsp.digits"
    config.data = default_data()
    config.model = ConfigDict({"hidden": 256, "embedding": 64})
    config.optim.learning_rate = 5e-3
    config.stream.update({"identify_steps": 150, "tune_steps": 250, "router_rate": 1.0})
    config.train.update({"log_every": 50, "eval_every": 400, "checkpoint_every": 400})
    return config.lock()


def build(config: ConfigDict) -> train.Run:
    """Returns the run of a config, for :func:`subspace_jax.train.build`: two phases for each task.

    Its summary has MTIL's Transfer, Avg and Last where nobody says which task an image is of, and the forgetting given
    the task.

    Raises:
      ValueError: A field can't serve.
    """
    for name in ("hidden", "embedding"):
        check_at_least(f"model.{name}", config.model[name], 1)
    stream = load_stream(config.data)
    task = RandomFeatureStream(stream, config.model.hidden, config.model.embedding, expert_settings(config))
    sizes = config.data
    data = [
        task_data(
            stream,
            [t],
            batch_size=sizes.batch_size,
            eval_batch_size=sizes.eval_batch_size,
            sets={"train": examples_of([of_task.train], [t])},
        )
        for t, of_task in enumerate(stream.tasks)
    ]
    return train.Run(task_phases(task, data, task_config(config)), lambda rows: class_summary(rows, len(stream)))
