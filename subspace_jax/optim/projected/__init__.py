"""Optimizers in low-rank subspaces of the gradients."""
