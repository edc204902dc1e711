"""Grassmann class representation (arXiv 2308.01547)."""
