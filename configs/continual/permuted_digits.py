"""Five tasks of scikit-learn's digits, each with other permuted pixels, by any method of continual learning.

    subspace-jax continual --config continual/permuted_digits --workdir work/permuted_digits
    subspace-jax continual --config continual/permuted_digits:gpm --workdir work/permuted_digits_gpm

Variants: ``coso`` (arXiv 2505.11816, the default), ``coso_without_history``, ``gpm`` (2103.09762), ``ewc``, ``replay``,
``lora``, ``class_means``, ``sequential`` and ``joint``.

A network 64-64-64 with a head for each task, 15 epochs of 1,200 images a task: about a minute on two CPU cores.
Figures to reach with ``coso`` over the seeds 0, 1 and 2: ``final_accuracy`` at least 0.91, 0.10 above that of
``sequential``, and ``forgetting`` at most 0.02.
"""

from subspace_jax.continual import task


def get_config(variant="coso"):
    if variant not in task.METHODS:
        raise ValueError(f"variant: expected one of {tuple(task.METHODS)}, got {variant!r}")
    config = task.default_config()
    config.model.method = variant
    if variant.startswith("coso"):
        config.optim.name = "coso"
        config.optim.kwargs = {"proj_rank": 8, "sketch_rank": 24}
    if variant == "coso_without_history":
        config.model.certificate.on = False  # nothing is held still
    if variant == "gpm":
        config.model.threshold = 0.95
    return config
