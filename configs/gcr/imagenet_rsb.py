"""ImageNet-1K with ResNet50 under the recipes A1, A2 and A3 of "ResNet strikes back" (arXiv 2110.00476).

    python -m subspace_jax.data.prepare imagenet2012
    subspace-jax train --config gcr/imagenet_rsb:a3_k8 --workdir work/rsb_a3_k8

Variants: ``RECIPE_HEAD``, a recipe of ``a1``, ``a2``, ``a3`` and a head of ``softmax``, ``k1``, ``k4``, ``k8``,
``k16``, ``k32``, such as ``a3_k8``.

Published top-1 (arXiv 2308.01547; not run here), vector head and k8: a3 79.36 and 79.64, a2 80.29 and 80.75, a1 80.53
and 81.00.  As in the published runs, the vector head is trained with sigmoid cross-entropy, the Grassmann head with
softmax; weight decay applies to kernels only.  The subspaces' peak learning rate is 0.3; for a1 and a2 this is a guess,
after a3.
"""

from subspace_jax.represent.gcr import task as classify

RECIPES = ("a1", "a2", "a3")
HEADS = ("softmax", "k1", "k4", "k8", "k16", "k32")


def get_config(variant="a3_k8"):
    recipe, _, head = variant.partition("_")
    if recipe not in RECIPES or head not in HEADS:
        raise ValueError(f"variant: expected one of {RECIPES}, '_' and one of {HEADS}, got {variant!r}")
    config = classify.default_config()
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.batch_size = 2048
    image = config.data.image
    image.size, image.eval_size, image.eval_crop = 160 if recipe == "a3" else 224, 224, 0.95
    image.operations, image.magnitude, image.deviation = 2, 6.0 if recipe == "a3" else 7.0, 0.5
    config.model.backbone = "resnet50"
    config.model.head = "softmax" if head == "softmax" else "grassmann"
    config.model.loss = "sigmoid" if head == "softmax" else "softmax"
    config.model.dims = (1,) if head == "softmax" else (int(head[1:]),)
    config.model.dtype = "bfloat16"
    config.model.mixup, config.model.cutmix = 0.2 if recipe == "a1" else 0.1, 1.0
    if recipe != "a3":
        config.data.repeats = 3
        config.model.drop_path = 0.05
    if recipe == "a1":
        config.model.label_smoothing = 0.1
    config.optim.name = "lamb"
    config.optim.learning_rate = 8e-3 if recipe == "a3" else 5e-3
    config.optim.kwargs = {"weight_decay": 0.01 if recipe == "a1" else 0.02}
    config.optim.decay = "kernels"
    config.optim.warmup_steps = 5 * (1_281_167 // 2048)
    config.optim.manifold.kwargs = {"lr_factor": 0.3 / config.optim.learning_rate, "reorth_every": 1}
    config.train.epochs = {"a1": 600.0, "a2": 300.0, "a3": 100.0}[recipe]
    return config
