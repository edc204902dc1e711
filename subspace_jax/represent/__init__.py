"""Representation learning: classifiers whose classes are vectors, directions or subspaces."""

from subspace_jax.represent.classifier import Classifier, make_classifier
from subspace_jax.represent.classify import ClassifierTask, features_of

__all__ = ["Classifier", "ClassifierTask", "features_of", "make_classifier"]
