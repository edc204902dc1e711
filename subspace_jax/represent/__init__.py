"""Representation learning: classifiers with vector or subspace classes, and the evaluation of features."""

from subspace_jax.represent.features import (
    FeatureModel,
    FeatureTask,
    extract_features,
    features_of,
    features_of_images,
    make_feature_step,
    open_feature_model,
    open_labelled_images,
)
from subspace_jax.represent.features_file import Features, read_features, save_features
from subspace_jax.represent.few_shot import FewShot, few_shot
from subspace_jax.represent.gcr.model import Classifier, make_classifier
from subspace_jax.represent.gcr.task import ClassifierTask
from subspace_jax.represent.layer_features import layer_features_of_images, layer_features_of_texts
from subspace_jax.represent.linear_probe import (
    Examples,
    LinearProbe,
    Scores,
    fit_linear,
    linear_probe,
    probe_logits,
    scores_of,
)
from subspace_jax.represent.neighbors import nearest_classes
from subspace_jax.represent.text_features import Texts, features_of_texts, open_text_model, read_labelled_texts
from subspace_jax.represent.transfer_sets import TRANSFER_SETS, ProbeReport, open_transfer_set, probe_features

__all__ = [
    "TRANSFER_SETS",
    "Classifier",
    "ClassifierTask",
    "Examples",
    "FeatureModel",
    "FeatureTask",
    "Features",
    "FewShot",
    "LinearProbe",
    "ProbeReport",
    "Scores",
    "Texts",
    "extract_features",
    "features_of",
    "features_of_images",
    "features_of_texts",
    "few_shot",
    "fit_linear",
    "layer_features_of_images",
    "layer_features_of_texts",
    "linear_probe",
    "make_classifier",
    "make_feature_step",
    "nearest_classes",
    "open_feature_model",
    "open_labelled_images",
    "open_text_model",
    "open_transfer_set",
    "probe_features",
    "probe_logits",
    "read_features",
    "read_labelled_texts",
    "save_features",
    "scores_of",
]


def __dir__():
    return __all__
