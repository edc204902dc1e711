"""ImageNet-1K with Swin-T, vector and Grassmann heads (arXiv 2308.01547).

    python -m subspace_jax.data.prepare imagenet2012
    subspace-jax train --config gcr/imagenet_swin:k8 --workdir work/swin_k8

Variants: ``softmax``, ``k1``, ``k4``, ``k8``, ``k16``, ``k32``.

Published top-1 (not run here): softmax 81.06, k8 81.63.  The subspaces' peak learning rate is 0.1, beside AdamW's 1e-3;
weight decay applies to kernels only.
"""

from subspace_jax.represent.gcr import task as classify

VARIANTS = ("softmax", "k1", "k4", "k8", "k16", "k32")
STEPS_PER_EPOCH = 1_281_167 // 1024


def get_config(variant="k8"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = classify.default_config()
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.batch_size = 1024
    image = config.data.image
    image.size = 224
    image.operations, image.magnitude, image.deviation = 2, 9.0, 0.5
    image.erase = 0.25
    config.model.backbone = "swin_tiny"
    config.model.head = "softmax" if variant == "softmax" else "grassmann"
    config.model.dims = (1,) if variant == "softmax" else (int(variant[1:]),)
    config.model.dtype = "bfloat16"
    config.model.drop_path = 0.2
    config.model.label_smoothing = 0.1
    config.model.mixup, config.model.cutmix = 0.8, 1.0
    config.optim.name = "adamw"
    config.optim.learning_rate = 1e-3
    config.optim.kwargs = {"weight_decay": 0.05}
    config.optim.decay = "kernels"
    config.optim.warmup_steps = 20 * STEPS_PER_EPOCH
    config.optim.final_scale = 0.01
    config.optim.clip_norm = 5.0
    config.optim.manifold.kwargs = {"lr_factor": 0.1 / 1e-3, "reorth_every": 1}
    config.train.epochs = 300.0
    return config
