"""Representation learning: classifiers whose classes are vectors, directions or subspaces."""

from subspace_jax.represent.classifier import Classifier, make_classifier
from subspace_jax.represent.classify import ClassifierTask, features_of
from subspace_jax.represent.fully_connected import FullyConnectedTask
from subspace_jax.represent.transfer import TransferTask, train_whole

__all__ = [
    "Classifier",
    "ClassifierTask",
    "FullyConnectedTask",
    "TransferTask",
    "features_of",
    "make_classifier",
    "train_whole",
]
