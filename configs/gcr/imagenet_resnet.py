"""ImageNet-1K with ResNet, ResNet-D and ResNeXt, vector and Grassmann heads (arXiv 2308.01547).

    python -m subspace_jax.data.prepare imagenet2012
    subspace-jax train --config gcr/imagenet_resnet:resnet50d_k8 --workdir work/resnet50d_k8

Variants: ``NETWORK_HEAD``, a network of ``resnet50``, ``resnet50d``, ``resnet101d``, ``resnet152d``, ``resnext50`` and
a head of ``softmax``, ``cosine``, ``k1``, ``k4``, ``k8``, ``k16``, ``k32``, such as ``resnet50d_k8``.

For a folder of images instead of the first command: ``data.name=folder data.data_dir=DIR data.eval_split=val``.

Published top-1 (not run here): resnet50 softmax 76.58, k8 77.77; resnet50d softmax 78.04, cosine 78.30, k1 78.42, k4
78.68, k8 79.26, k16 79.21, k32 78.63; resnet101d softmax 79.32, k8 80.24; resnet152d softmax 80.00, k8 80.44; resnext50
softmax 78.02, k8 79.00.
"""

from subspace_jax.represent.gcr import task as classify

NETWORKS = ("resnet50", "resnet50d", "resnet101d", "resnet152d", "resnext50")
HEADS = ("softmax", "cosine", "k1", "k4", "k8", "k16", "k32")


def get_config(variant="resnet50d_k8"):
    network, _, head = variant.partition("_")
    if network not in NETWORKS or head not in HEADS:
        raise ValueError(f"variant: expected one of {NETWORKS}, '_' and one of {HEADS}, got {variant!r}")
    config = classify.default_config()
    config.data.name = "imagenet2012"
    config.data.eval_split = "validation"
    config.data.batch_size = 256
    config.data.image.size = 224
    config.data.image.method = "bilinear"
    config.model.backbone = network
    config.model.head = head if head in ("softmax", "cosine") else "grassmann"
    config.model.dims = (int(head[1:]),) if config.model.head == "grassmann" else (1,)
    config.model.dtype = "bfloat16"
    config.optim.learning_rate = 0.1
    config.optim.kwargs = {"weight_decay": 1e-4}
    config.train.epochs = 100.0
    return config
