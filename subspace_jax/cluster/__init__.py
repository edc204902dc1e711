"""Clustering by subspaces: classical methods, and (in packages of their own) those of single papers."""

import subspace_jax._train_extra  # noqa: F401
