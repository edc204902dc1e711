"""ImageNet-1K with VGG13-BN, vector and Grassmann heads (arXiv 2308.01547).

    python -m subspace_jax.data.prepare imagenet2012
    subspace-jax train --config gcr/imagenet_vgg:k8 --workdir work/vgg13_k8

Variants: ``softmax``, ``k1``, ``k4``, ``k8``, ``k16``, ``k32``.

Published top-1 (not run here): softmax 72.02, k8 73.40.  The learning rate drops to a tenth at epochs 30, 60 and 90;
there is no last dropout.
"""

from subspace_jax.represent.gcr import task as classify

VARIANTS = ("softmax", "k1", "k4", "k8", "k16", "k32")


def get_config(variant="k8"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = classify.default_config()
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.batch_size = 256
    config.data.image.size = 224
    config.data.image.method = "bilinear"
    config.model.backbone = "vgg13_bn"
    config.model.head = "softmax" if variant == "softmax" else "grassmann"
    config.model.dims = (1,) if variant == "softmax" else (int(variant[1:]),)
    config.model.dtype = "bfloat16"
    config.optim.learning_rate = 0.1
    config.optim.schedule = "step"
    config.optim.kwargs = {"weight_decay": 1e-4}
    config.train.epochs = 100.0
    return config
