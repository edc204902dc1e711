"""Patches of pixels on a photograph of bricks: discs of noise are found and located."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import metrics
from subspace_jax.anomaly import subspacead, textures

pytestmark = pytest.mark.slow


def test_discs_of_noise_on_brick_are_found_with_pixel_patches(record_property):
    pytest.importorskip("skimage")
    photo = textures.load_texture("brick")
    backbone = subspacead.PixelPatches(side=128, patch=8, stride=2, gray=True)
    features = jax.jit(lambda images: backbone.features((), images)[0])
    upper = np.repeat(photo[None, :256, :, None], 3, axis=-1)
    subspace = subspacead.fit_pca(features(jnp.asarray(upper)).reshape(-1, 64), explained_variance=0.95)
    drawn = textures.texture_set("brick", "noise", num_test=32, side=128, radius=10)
    found = features(jnp.asarray(drawn.test))
    scores = jax.jit(subspacead.residual_score)(subspace, found.reshape(-1, 64)).reshape(found.shape[:3])
    maps = subspacead.anomaly_map(scores, (128, 128))
    reached = {
        "brick_image_auroc": metrics.auroc(np.asarray(subspacead.image_scores(maps)), drawn.labels),
        "brick_pixel_auroc": metrics.auroc(np.asarray(maps), drawn.masks),
        "brick_aupro": metrics.aupro(np.asarray(maps), drawn.masks),
    }
    for name, value in reached.items():
        record_property(name, value)
    assert reached["brick_image_auroc"] >= 0.99
    assert reached["brick_pixel_auroc"] >= 0.99
    assert reached["brick_aupro"] >= 0.98
