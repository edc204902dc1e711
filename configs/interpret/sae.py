"""A sparse autoencoder on activations of any language model, or on vectors: what `subspace-jax sae` starts from.

    subspace-jax sae --model work/models/smollm2 --layer 15 --workdir work/sae
    subspace-jax sae --config interpret/sae --data vectors.npy --workdir work/sae_vectors

TopK and a linear decoder; ``--config.model.FIELD=VALUE`` sets all else.  1,200 steps; the time is that of the model.
"""

from subspace_jax.interpret.polysae import run


def get_config():
    config = run.default_config()
    config.model.decoder = "linear"
    config.data.eval_rows = 64
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "linear"
    config.train.steps = 1200
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    return config
