"""ImageNet-1K with DeiT3-S, vector and Grassmann heads (arXiv 2308.01547).

    python -m subspace_jax.data.prepare imagenet2012
    subspace-jax train --config gcr/imagenet_deit3:k8 --workdir work/deit3_k8

Variants: ``softmax``, ``k1``, ``k4``, ``k8``, ``k16``, ``k32``.

Published top-1 (not run here): vector head 81.53, k8 82.18.  As in the published runs, the vector head is trained with
sigmoid cross-entropy, the Grassmann head with softmax; weight decay applies to kernels only.  The subspaces' peak
learning rate is 0.3, beside LAMB's 4e-3.
"""

from subspace_jax.represent.gcr import task as classify

VARIANTS = ("softmax", "k1", "k4", "k8", "k16", "k32")
STEPS_PER_EPOCH = 1_281_167 // 2048


def get_config(variant="k8"):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    config = classify.default_config()
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.batch_size = 2048
    config.data.repeats = 3
    image = config.data.image
    image.size, image.eval_crop = 224, 1.0
    image.three_augment = True
    image.jitter = (0.3, 0.3, 0.3, 0.0)
    config.model.backbone = "deit3_small"
    config.model.head = "softmax" if variant == "softmax" else "grassmann"
    config.model.loss = "sigmoid" if variant == "softmax" else "softmax"
    config.model.dims = (1,) if variant == "softmax" else (int(variant[1:]),)
    config.model.dtype = "bfloat16"
    config.model.drop_path = 0.05
    config.model.mixup, config.model.cutmix = 0.8, 1.0
    config.optim.name = "lamb"
    config.optim.learning_rate = 4e-3
    config.optim.kwargs = {"weight_decay": 0.05}
    config.optim.decay = "kernels"
    config.optim.warmup_steps = 5 * STEPS_PER_EPOCH
    config.optim.clip_norm = 1.0
    config.optim.manifold.kwargs = {"lr_factor": 0.3 / 4e-3, "reorth_every": 1}
    config.train.epochs = 800.0
    return config
