"""Tasks of scikit-learn's digits for a frozen network of random features with experts (reconstruction of iGSP).

    subspace-jax train --config continual/igsp_digits:split --workdir work/igsp_digits

Variants: ``split`` has five tasks of two digits each, ``permuted`` five tasks of ten digits whose pixels have another
order in each.  150 + 250 steps a task.  The
first reached 0.995 given the task, and forgot nothing.
"""

from subspace_jax.continual.igsp import digits

VARIANTS = ("split", "permuted")


def get_config(variant="split"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = digits.default_config()
    config.data.kind = variant
    config.experts.max_experts = 12
    config.experts.rank = 4
    return config
