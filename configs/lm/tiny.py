"""A Llama of 0.8 M parameters, trained from scratch on the docstrings of the standard library.

    subspace-jax pretrain --config lm/tiny --workdir work/tiny

The base model of experiments that need no download: tokens are bytes, rows have 256 of them, about 1.4 M characters in
all.  At this size the number of steps counts more than the number of bytes in each: hence batches of 4 rows.  On two
CPU cores it takes some minutes, and must reach 1.55 nats a byte on the validation split (counts of four bytes in a
row give 1.84).
"""

from subspace_jax.language import finetune


def get_config():
    config = finetune.default_config()
    config.data.batch_size = 4
    config.data.eval_batch_size = 16
    config.train.steps = 2500
    config.train.eval_every = 500
    config.train.checkpoint_every = 500
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 100
    config.optim.kwargs = {"weight_decay": 0.1}
    config.optim.clip_norm = 1.0
    return config
