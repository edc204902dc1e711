"""All methods, area by area."""

from subspace_jax.methods import adapters, interpret, language, optim, represent

METHODS = (
    *represent.METHODS,
    *adapters.METHODS,
    *optim.METHODS,
    *interpret.METHODS,
    *language.METHODS,
)
