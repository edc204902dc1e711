"""Factors of people of OpenMoji in the features of DINOv2-small."""

import pathlib

import jax
import numpy as np
import pytest

from subspace_jax import data, interop, nn, represent
from subspace_jax.interpret import compositional_linear as cl
from subspace_jax.interpret.compositional_linear import label_table
from subspace_jax.represent import xfactors

pytestmark = pytest.mark.slow

DINO = pathlib.Path(__file__).parents[2] / "work" / "models" / "dinov2-small"


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        yield


def dino_features(images, params=None):
    """Pooled outputs of DINOv2-small for pictures of 112 x 112, with its weights or with those of an untrained one."""
    model = represent.open_feature_model(DINO, resample=True)
    params = model.params if params is None else params
    inputs = data.standardize(images)
    ones = np.ones(len(images), np.float32)
    batches = (
        {"inputs": inputs[i : i + 72], "labels": np.zeros(len(inputs[i : i + 72]), np.int32), "mask": ones[i : i + 72]}
        for i in range(0, len(images), 72)
    )
    return represent.extract_features(model.step, params, batches, mesh=model.mesh)[0]


def test_factors_of_openmoji_in_dinov2_small_beside_an_untrained_encoder_and_pixels(record_property, tmp_path):
    if not DINO.is_dir():
        pytest.skip("needs `subspace-jax fetch dinov2-small`")
    people = xfactors.openmoji(112)
    chosen = people.factors[:, 0] % 3 == 0  # 26 of 76 concepts, to be done in minutes
    images, factors = people.images[chosen], people.factors[chosen]
    table = label_table.numbered(list(factors.T), people.names)
    config, _ = interop.load_vision(DINO)
    untrained = nn.init_params(jax.random.key(0), config)
    small = images.reshape(len(images), 14, 8, 14, 8, 3).mean(axis=(2, 4)).reshape(len(images), -1)
    pictures = np.round(255 * images).astype(np.uint8)
    sets = {"dinov2": dino_features(pictures), "untrained": dino_features(pictures, untrained), "pixels": small}
    settings = cl.ReportSettings(0.5, 1, cl.ProbeSettings(epochs=100))
    found = {}
    for name, x in sets.items():
        found[name] = cl.measure_geometry(jax.random.key(0), np.asarray(x, np.float32), table, name, settings)
        record_property(f"{name}_r2_raw", found[name].r2["raw"])
        record_property(f"{name}_r2_projected", found[name].r2["projected"])
        record_property(f"{name}_across", found[name].factor_cosines["across"])
        record_property(f"{name}_accuracy", found[name].accuracy["mean"])
    print(cl.geometry_table(list(found.values()), table))
    cl.plot_geometry(list(found.values()), table, tmp_path / "geometry.png")
    assert found["dinov2"].factor_cosines["across"] < found["dinov2"].factor_cosines["within"]
    assert found["dinov2"].accuracy["mean"] > found["untrained"].accuracy["mean"]
