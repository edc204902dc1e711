"""Clustering by subspaces."""
