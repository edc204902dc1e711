"""Interpretability: what models and objectives are made of."""
