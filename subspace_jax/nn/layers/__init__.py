"""Layers, as pure functions of arrays, and the Flax NNX modules Linear and the classification heads."""
