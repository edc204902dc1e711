"""The command ``subspace-jax``."""
