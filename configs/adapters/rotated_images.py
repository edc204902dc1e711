"""A vision transformer or a residual network for digits, adapted to digits that are rotated by 90 degrees.

    subspace-jax train --config adapters/rotated_images:vit_dora --workdir work/vit

Variants: ``MODEL_METHOD``, a model of ``vit``, ``resnet`` and a method of ``lora``, ``dora``, ``flora``, such as
``vit_lora`` (rank 4, FLoRA 8, on attention and MLPs, or on the convolutions of the blocks).

Any other adapter by ``--config.adapter.*``.
"""

from examples import rotated_images as rotated_images


def get_config(variant="vit_lora"):
    model, _, method = variant.partition("_")
    if model not in rotated_images.CONFIGS or method not in ("lora", "dora", "flora"):
        raise ValueError(f"variant: expected 'vit' or 'resnet', '_' and 'lora', 'dora' or 'flora', got {variant!r}")
    config = rotated_images.default_config()
    config.model.name = model
    config.adapter.method = method
    config.adapter.rank = 4
    if model == "resnet":
        config.optim.learning_rate = 2e-2
    if method == "flora":
        config.adapter.rank = 8
    if model == "resnet" and method == "flora":
        config.adapter.target_modules = "stage*/*/layer?/conv=8x8x3x3"
    elif model == "resnet":
        config.adapter.window = 2
    config.train.eval_every = config.train.checkpoint_every = 90
    return config
