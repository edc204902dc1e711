"""The intrinsic dimension of a fully connected network for MNIST (arXiv 1804.08838, section 3).

    subspace-jax intrinsic-dimension --config optim/intrinsic_mnist --workdir work/mnist_dim

A network 784-200-200-10 with 199210 parameters, 100 epochs of Adam at the learning rate of the released scripts.  MNIST
has to be prepared for TensorFlow Datasets.  Figure of the paper, with the baseline 1: d_int90 750.
"""

from subspace_jax.interpret.intrinsic_dimension import fully_connected


def get_config():
    config = fully_connected.default_config()
    config.data.name = "mnist"
    config.model.features = (200, 200)
    config.model.l2 = 1e-5
    config.optim.learning_rate = 1e-3
    config.train.epochs = 100.0
    config.intrinsic.dims = (50, 100, 200, 300, 400, 500, 600, 650, 700, 750, 800, 900, 1000)
    config.intrinsic.repeats = 3
    config.intrinsic.baseline = 1.0
    return config
