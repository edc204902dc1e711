"""SubspaceAD on images: fit, update, score, save; tiles, rotations, backbones, devices, bad input."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import metrics, nn, train
from subspace_jax.anomaly import subspacead
from subspace_jax.anomaly.subspacead import model as model_module
from subspace_jax.anomaly.subspacead.core import init_moments

PIXELS = subspacead.PixelPatches(side=16, patch=4, stride=2, gray=True)
PLAIN = subspacead.SubspaceADSettings(rotations=0)


def stripes(count, seed=0, size=(16, 16), defects=0):
    """Images of a wave with random phases, the last ones with a square of noise; and their masks."""
    rng = np.random.default_rng(seed)
    at = np.arange(size[1])[None, None] + rng.uniform(0, 8, (count, 1, 1))
    waves = np.broadcast_to(128 + 60 * np.sin(at * np.pi / 4), (count, *size)) + rng.normal(0, 2, (count, *size))
    masks = np.zeros((count, *size), bool)
    masks[count - defects :, 4:10, 5:11] = True
    waves = np.where(masks, rng.uniform(0, 255, waves.shape), waves)
    return np.repeat(waves[..., None], 3, axis=-1).astype(np.uint8), masks


@pytest.fixture(scope="module")
def fitted():
    return subspacead.SubspaceAD(PIXELS, settings=PLAIN, batch_size=4).fit(stripes(6)[0])


def test_score_finds_the_defects_of_images_and_their_pixels(fitted):
    images, masks = stripes(7, seed=1, defects=3)
    found = fitted.score(images)
    assert found.scores.shape == (7,)
    assert found.maps.shape == (7, 16, 16)
    assert metrics.auroc(found.scores, masks.any((1, 2))) == 1
    assert metrics.auroc(found.maps, masks) > 0.95
    features = fitted.features(images)
    assert features.shape == (7, 7, 7, 16)
    patch = features[2, 1, 3].reshape(4, 4)
    np.testing.assert_allclose(patch, images[2, 2:6, 6:10, 0] / np.float32(255), atol=1e-6)
    # By hand: the same residuals, maps and scores.
    rows = jnp.asarray(features.reshape(-1, 16))
    maps = subspacead.anomaly_map(subspacead.residual_score(fitted.subspace, rows).reshape(7, 7, 7), (16, 16))
    np.testing.assert_allclose(found.maps, maps, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.scores, subspacead.image_scores(maps), rtol=1e-3)


def test_update_with_more_images_equals_a_fit_to_all(fitted, tmp_path):
    images = stripes(6)[0]
    grown = subspacead.SubspaceAD(PIXELS, settings=PLAIN, batch_size=4).fit(images[:2]).update(images[2:])
    chex.assert_trees_all_close(grown.moments, fitted.moments, rtol=1e-5, atol=1e-4)
    subspacead.save_subspacead(fitted, tmp_path, note="kept")
    loaded = subspacead.load_subspacead(tmp_path, batch_size=4)
    assert json.loads((tmp_path / "subspacead.json").read_text())["note"] == "kept"
    tests = stripes(3, seed=2, defects=1)[0]
    np.testing.assert_array_equal(loaded.score(tests).scores, fitted.score(tests).scores)
    loaded.update(tests)
    assert float(loaded.moments.count) == float(fitted.moments.count) + 3 * 49


def test_load_subspacead_refuses_what_is_damaged_and_other_backbones(fitted, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no subspacead\.safetensors"):
        subspacead.load_subspacead(tmp_path)
    with pytest.raises(ValueError, match="model: expected a fitted one"):
        subspacead.save_subspacead(subspacead.SubspaceAD(PIXELS, settings=PLAIN), tmp_path)
    subspacead.save_subspacead(fitted, tmp_path)
    with pytest.raises(ValueError, match=r"backbone: .*expected .*'stride': 2.*, got .*'stride': 4"):
        subspacead.load_subspacead(tmp_path, subspacead.PixelPatches(16, 4, 4, True))
    record = tmp_path / "subspacead.json"
    record.write_text(record.read_text().replace("PixelPatches", "VisionPatches"))
    with pytest.raises(ValueError, match=r"backbone: .*expected the one that was fitted with"):
        subspacead.load_subspacead(tmp_path)
    record.write_text("{}")
    with pytest.raises(ValueError, match="damaged, or of another version: KeyError"):
        subspacead.load_subspacead(tmp_path)


def test_rotations_add_copies_by_their_key():
    settings = subspacead.SubspaceADSettings(rotations=3)
    model = subspacead.SubspaceAD(PIXELS, settings=settings, batch_size=4)
    images = stripes(1)[0]
    one, again, other = (model.moments_of(images, jax.random.key(seed)) for seed in (0, 0, 1))
    assert float(one.count) == 4 * 49
    chex.assert_trees_all_equal(one, again)
    assert not np.allclose(one.m2, other.m2)
    with pytest.raises(ValueError, match="key: expected a random key for 3 rotations of each image, got None"):
        model.fit(images)


def test_images_of_mixed_sizes_and_a_single_normal_one_are_taken(fitted):
    model = subspacead.SubspaceAD(PIXELS, settings=PLAIN, batch_size=4)
    images = [stripes(1, seed=i, size=(16 + 8 * i, 16))[0][0] for i in range(3)]
    assert model.fit(images[:1]).score(images).scores.shape == (3,)
    assert model.score([images[0][:, :, 0]]).scores[0] == pytest.approx(model.score(images[:1]).scores[0])  # gray
    with pytest.raises(ValueError, match="features: expected rows that differ, got 49 equal ones"):
        model.fit([np.full((16, 16, 3), 7, np.uint8)])
    with pytest.raises(ValueError, match="images: expected at least one normal image, got none"):
        model.fit([])
    with pytest.raises(ValueError, match="images: expected at least one image, got none"):
        fitted.score([])
    with pytest.raises(ValueError, match="score: expected a fitted model"):
        subspacead.SubspaceAD(PIXELS).score(images)
    with pytest.raises(TypeError, match="image: expected uint8"):
        model.fit([np.zeros((16, 16, 3))])


def test_tiles_of_a_canvas_are_scored_and_merged():
    settings = subspacead.SubspaceADSettings(rotations=0, canvas=24, overlap=0.5)
    model = subspacead.SubspaceAD(PIXELS, settings=settings, batch_size=4)
    model.fit(stripes(3, size=(24, 24))[0])
    images, masks = stripes(4, seed=1, size=(24, 24), defects=2)
    found = model.score(images)
    assert found.maps.shape == (4, 24, 24)
    assert metrics.auroc(found.scores, masks.any((1, 2))) == 1
    assert metrics.auroc(found.maps, masks) > 0.95


def test_fit_score_finds_a_defect_among_unlabelled_images():
    images, _ = stripes(8, defects=1)
    found = subspacead.SubspaceAD(PIXELS, settings=PLAIN, batch_size=4).fit_score(images)
    assert np.argmax(found.scores) == 7


@pytest.fixture(scope="module")
def vision():
    sizes = {"width": 16, "num_layers": 4, "num_heads": 2, "mlp_size": 32, "patch_size": 4}
    config = nn.VisionTransformerConfig.dinov2("small", 2, image_size=(12, 12), **sizes)
    return config, nn.init_params(jax.random.key(0), config)


def test_features_of_a_vision_transformer_are_means_of_its_middle_states(vision):
    config, params = vision
    assert subspacead.middle_layers(40) == tuple(range(23, 30))
    assert subspacead.middle_layers(12) == (7, 8, 9)
    backbone, own = subspacead.prepared_vision(config, params, 16, layers=(1, 2, 3), saliency=1)
    assert (backbone.side, backbone.width, backbone.config.num_layers) == (16, 16, 3)
    images = jnp.asarray(stripes(2)[0])
    found, saliency = jax.jit(backbone.features)(own, images)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = jnp.asarray((np.asarray(images) / 255 - mean) / std, jnp.float32)
    whole = jax.jit(lambda p, x: nn.vision_apply(config, p, x, resample=True, capture="all").hidden)(params, pixels)
    wanted = (whole[1] + whole[2] + whole[3])[:, 3:] / 3
    np.testing.assert_allclose(found.reshape(2, 16, 16), wanted, atol=2e-5)
    assert saliency.shape == (2, 4, 4)
    parts = {"concat": 48, "group": 16}
    for combine, width in parts.items():
        other, _ = subspacead.prepared_vision(config, params, 16, layers=(1, 2, 3), combine=combine)
        assert other.width == width
        assert jax.eval_shape(other.features, own, images)[0].shape == (2, 4, 4, width)


@pytest.mark.slow
def test_bfloat16_and_background_masks_score_as_float32_up_to_rounding(vision):
    images, _ = stripes(8, defects=3)
    scores = []
    for dtype, background in (("float32", ""), ("bfloat16", ""), ("float32", "otsu"), ("float32", "quantile")):
        saliency = 1 if background else None
        backbone, params = subspacead.prepared_vision(*vision, 16, layers=(1, 2), dtype=dtype, saliency=saliency)
        settings = subspacead.SubspaceADSettings(rotations=0, rank=4, background=background)
        model = subspacead.SubspaceAD(backbone, params, settings, batch_size=8).fit(images[:4])
        scores.append(model.score(images))
    np.testing.assert_allclose(scores[1].scores, scores[0].scores, rtol=0.1)
    assert np.sum(scores[3].maps) < np.sum(scores[0].maps)
    assert np.all(scores[2].scores <= scores[0].scores + 1e-6)


@pytest.mark.eight_devices
def test_fit_and_score_on_eight_devices_equal_one():
    images = stripes(11, defects=3)[0]
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        model = subspacead.SubspaceAD(PIXELS, settings=PLAIN, batch_size=8, mesh=train.make_mesh(devices=devices))
        model.fit(images[:5])
        found.append((jax.device_get(model.moments), model.score(images)))
    chex.assert_trees_all_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-4)
    chex.assert_trees_all_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_dinov2_giant_and_its_scores_fit_sixteen_chips_of_v5e():
    mesh = train.make_mesh(devices=topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices)
    config = nn.VisionTransformerConfig.dinov2("giant", 4, image_size=(672, 672))
    backbone = subspacead.VisionPatches(config.replace(num_layers=29), subspacead.middle_layers(40), dtype="bfloat16")
    whole, rows = NamedSharding(mesh, P()), train.batch_sharding(mesh)
    shape = jax.ShapeDtypeStruct
    params = jax.tree.map(lambda x: shape(x.shape, jnp.bfloat16, sharding=whole), nn.param_shapes(backbone.config))
    images = shape((16, 672, 672, 3), jnp.uint8, sharding=rows)
    moments = jax.tree.map(
        lambda x: shape(x.shape, x.dtype, sharding=whole), jax.eval_shape(lambda: init_moments(1536))
    )
    subspace = subspacead.PCASubspace(
        shape((1536,), jnp.float32, sharding=whole),
        shape((1536, 832), jnp.float32, sharding=whole),
        shape((1536,), jnp.float32, sharding=whole),
        shape((), jnp.int32, sharding=whole),
    )
    scorer = model_module._Scorer(subspace, None, shape((1536, 736), jnp.float32, sharding=whole))
    weights = shape((16,), jnp.float32, sharding=rows)
    for what, lowered in (
        ("fit", model_module._add.lower(backbone, params, moments, images, weights)),
        ("score", model_module._score.lower(backbone, PLAIN, params, scorer, images)),
    ):
        memory = lowered.compile().memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        print(f"\nDINOv2 giant at 672 pixels, {what}: {held / 1e9:.2f} GB a chip")
        assert 2 * 0.8e9 < held < 16e9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: subspacead.SubspaceADSettings(explained_variance=0), r"explained_variance: expected a share"),
        (lambda v: subspacead.SubspaceADSettings(method="whiten"), "method: expected one of"),
        (lambda v: subspacead.SubspaceADSettings(aggregate="median"), "aggregate: expected one of"),
        (lambda v: subspacead.SubspaceADSettings(rotations=-1), "rotations: expected at least 0, got -1"),
        (lambda v: subspacead.PixelPatches(side=4), "patch: expected at most the side 4 of an image, got 8"),
        (lambda v: subspacead.PixelPatches(stride=0), "stride: expected a positive number of pixels, got 0"),
        (lambda v: subspacead.SubspaceAD(PIXELS, batch_size=0), "batch_size: expected at least 1, got 0"),
        (
            lambda v: subspacead.SubspaceAD(PIXELS, settings=subspacead.SubspaceADSettings(canvas=8)),
            "canvas: expected at least the side 16 of a tile, got 8",
        ),
        (
            lambda v: subspacead.SubspaceAD(PIXELS, settings=subspacead.SubspaceADSettings(rank=17)),
            "rank: expected 0 to 16, the width of the features, got 17",
        ),
        (
            lambda v: subspacead.SubspaceAD(PIXELS, settings=subspacead.SubspaceADSettings(background="otsu")),
            "background: 'otsu' needs a backbone with a saliency",
        ),
        (lambda v: subspacead.prepared_vision(*v, 18), "side: expected a multiple of the patch of 4 pixels, got 18"),
        (
            lambda v: subspacead.prepared_vision(*v, 16, layers=(5,)),
            r"layers: expected hidden states 0 to 4, got \(5,\)",
        ),
        (lambda v: subspacead.prepared_vision(*v, 16, combine="sum"), "combine: expected one of"),
        (lambda v: subspacead.prepared_vision(*v, 16, dtype="float16"), "dtype: expected 'float32' or 'bfloat16'"),
        (lambda v: subspacead.prepared_vision(*v, 16, saliency=4), "saliency: expected a block 0 to 3, got 4"),
    ],
)
def test_models_and_settings_refuse_what_is_out_of_range(vision, make, message):
    with pytest.raises(ValueError, match=message):
        make(vision)


@pytest.mark.parametrize("name", ["rank", "drop_leading", "rotations", "canvas"])
def test_settings_refuse_counts_that_are_no_integers(name):
    with pytest.raises(TypeError, match=f"{name}: expected an integer, got 1.5"):
        subspacead.SubspaceADSettings(**{name: 1.5})
