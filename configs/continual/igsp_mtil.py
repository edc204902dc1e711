"""MTIL in order I for CLIP ViT-B/16 with shared experts: a reconstruction of iGSP from its abstract (arXiv 2605.19301).

    subspace-jax train --config continual/igsp_mtil --config.model.path CLIP --config.data.data_dir DATA

``CLIP`` is a folder of Hugging Face with both towers and ``tokenizer.json``, ``DATA`` holds the prepared sets of
TensorFlow Datasets, and Aircraft as folders of classes ``aircraft/train`` and ``aircraft/test``.  Not run by this
project: there are neither the weights nor the sets.  For accelerators; 1,000 steps a set.

Published in the abstract, not rerun: 42.7 % fewer trainable parameters than the best method before, and 86.9 % fewer
parameters at the end than others.
"""

from subspace_jax.continual.igsp import clip

# Name, split for training, split for evaluation; alphabetical.
SETS = (
    ("aircraft", "train", "test"),
    ("caltech101", "train", "test"),
    ("cifar100", "train", "test"),
    ("dtd", "train", "test"),
    ("eurosat", "train[:80%]", "train[80%:]"),
    ("oxford_flowers102", "train", "test"),
    ("food101", "train", "validation"),
    ("mnist", "train", "test"),
    ("oxford_iiit_pet", "train", "test"),
    ("cars196", "train", "test"),
    ("sun397", "train", "test"),
)


def get_config():
    config = clip.default_config()
    config.data.sets, config.data.train_splits, config.data.eval_splits = (tuple(x) for x in zip(*SETS, strict=True))
    config.experts.max_experts = 24
    config.train.log_every = 100
    config.train.eval_every = 1000
    config.train.checkpoint_every = 500
    return config
