"""XFactors on people of OpenMoji: a subspace each for concept, gender and skin tone (arXiv 2601.21688).

    pip install 'subspace-jax[real]'     # the pictures, CC BY-SA 4.0, and what rasterises them
    subspace-jax train --config represent/openmoji --workdir work/openmoji
    subspace-jax factors --workdir work/openmoji

Variants: ``xfactors``, and ``vae`` without the contrastive terms.

1,368 pictures of 32 x 32 pixels, a fifth of the combinations held out; training images are shifted by up to a pixel.
Perceptrons 256-256, 8000 steps of 64 images, some 10 minutes on two free CPU cores.  There is no figure to reach:
``factors`` draws the swaps.  Residual convolutions are set by ``model.network=conv model.widths=48,96,192``, and are
meant for an accelerator.
"""

from subspace_jax.represent.xfactors import task

VARIANTS = ("xfactors", "vae")


def get_config(variant="xfactors"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = task.default_config()
    config.data.name = "openmoji"
    config.data.targets = ("concept", "gender", "tone")
    config.data.test_share = 0.2
    config.data.size = 32
    config.data.shift = 1
    config.data.batch_size = 64
    config.model.widths = (256, 256)
    config.model.residual_dim = 4
    config.model.factor_dims = (8, 2, 3)
    if variant == "vae":
        config.loss.nce_weight = 0.0
    config.optim.schedule = "cosine"
    config.train.steps = 8000
    config.train.eval_every = 2000
    config.train.checkpoint_every = 1000
    return config
