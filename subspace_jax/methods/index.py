"""All methods, area by area."""

from subspace_jax.methods import (
    adapters,
    anomaly,
    cluster,
    compress,
    continual,
    interpret,
    language,
    merge,
    optim,
    represent,
)

METHODS = (
    *represent.METHODS,
    *adapters.METHODS,
    *optim.METHODS,
    *interpret.METHODS,
    *language.METHODS,
    *compress.METHODS,
    *merge.METHODS,
    *anomaly.METHODS,
    *cluster.METHODS,
    *continual.METHODS,
)
