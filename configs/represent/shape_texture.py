"""Dynamic subspace learners with spatial attention on images with a shape and a texture (arXiv 2206.09068).

    subspace-jax train --config represent/shape_texture:dynamic --workdir work/shapes
    subspace-jax attention --workdir work/shapes        # the picture attention.png

Variants: ``dynamic`` splits the newest learner where the validation NMI stalls, ``fixed`` is divide and conquer with
two slices of the embedding.

Images of 16 x 16, four shapes with four textures, sixteen labels; two convolution blocks, attention, an embedding of
32, batches of 8 classes x 4, 30 epochs: about a minute on two CPU cores.  ``clusters/texture_nmi`` and
``clusters/shape_nmi`` tell by which attribute the learners divide the images.
"""

from subspace_jax.represent.dynamic_subspace_learners import task as learners

VARIANTS = ("dynamic", "fixed")


def get_config(variant="dynamic"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = learners.default_config()
    config.data.name = "shape_texture"
    config.data.batch_size = 32
    config.data.per_class = 4
    config.data.eval_batch_size = 400
    config.model.backbone = "convnet"
    config.model.features = (32, 64)
    config.model.embedding = 32
    config.learners.patience = 4
    config.learners.finetune_epoch = 24
    if variant == "fixed":
        config.learners.dynamic = False
        config.model.learners = 2
    config.optim.learning_rate = 2e-3
    config.train.epochs = 30.0
    config.train.log_every = 42
    config.train.checkpoint_every = 420
    return config
