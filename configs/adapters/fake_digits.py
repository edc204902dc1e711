"""Real digits or fakes: training shows one kind of fake, the test set has four others (Effort, arXiv 2411.15633).

    subspace-jax train --config adapters/fake_digits:effort_blur --workdir work/effort_blur

Variants: ``METHOD_KIND``, a method of ``effort``, ``probe`` (the head alone), ``full`` (everything trains) and the kind
of fake in training of ``blur``, ``pca``, such as ``effort_blur``.

A vision transformer of 86 thousand parameters is first trained to read digits: a minute or so on two busy CPU cores.
Figures to reach: the mean area ``auc`` over the four unseen kinds, for ``effort`` above that for ``probe``: over the
seeds 0 to 2 0.855 and 0.786 on ``blur``, at least 0.036 apart, and 0.962 and 0.820 on ``pca``, at least 0.099 apart.
"""

from examples import fake_digits

METHODS = {
    "effort": ("effort", "head,head/bias", 2e-3),
    "probe": ("", "head,head/bias", 1e-2),
    "full": ("", "**", 1e-3),
}


def get_config(variant="effort_blur"):
    method, _, kind = variant.partition("_")
    if method not in METHODS or kind not in ("blur", "pca"):
        raise ValueError(f"variant: expected one of {tuple(METHODS)}, '_' and 'blur' or 'pca', got {variant!r}")
    config = fake_digits.default_config()
    config.adapter.method, config.adapter.modules_to_save, config.optim.learning_rate = METHODS[method]
    config.data.fake = kind
    config.train.eval_every = config.train.checkpoint_every = 450
    return config
