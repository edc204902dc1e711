"""Deep subspace clustering of a small set: three phases, labels from the host, self-stopping."""

from subspace_jax import train
from subspace_jax.cluster import dsc
from subspace_jax.cluster.dsc import task
from subspace_jax.train.experiment import complete_run


def build(steps=(30, 150, 20)):
    """Returns the run; ``steps`` are the caps of the phases.

    Without any noise the loss falls for ever, and nothing ends the second phase but its cap.
    """
    config = dsc.default_config()
    for name, count in zip(("pretrain_steps", "expression_steps", "structured_steps"), steps, strict=True):
        config.phases[name] = count
    config.model.channels = (4,)
    config.clusters.update({"number": 3, "keep": 9})
    images = dsc.subspace_images(0, 32, noise=0.008)
    return complete_run(task.run_of(train.override(config, []), images), config)
