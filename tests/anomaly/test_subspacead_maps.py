"""From scores of patches to maps and scores of images: golden vectors, tiles, masks, saliency."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from subspace_jax import interop, nn
from subspace_jax.anomaly import image_sets, subspacead
from subspace_jax.anomaly.subspacead import detect, report

from ..variants import rest_slow

anomaly_map = jax.jit(subspacead.anomaly_map, static_argnums=1, static_argnames=("sigma", "kernel_size", "close"))
image_scores = jax.jit(subspacead.image_scores, static_argnums=1)
background_mask = jax.jit(subspacead.background_mask, static_argnums=1)


@pytest.mark.parametrize("i", [0, 1])
def test_anomaly_map_and_image_scores_give_the_golden_values(i, golden):
    data = golden("subspacead/postprocess")
    scores, size = jnp.asarray(data[f"map{i}"])[None], tuple(int(n) for n in data[f"res{i}"])
    for blur in (0, 1):
        for close in (0, 1):
            found = anomaly_map(scores, size, sigma=4.0 * blur, close=5 if close else None)
            np.testing.assert_allclose(found[0], data[f"map{i}_blur{blur}_close{close}"], atol=2e-5)
    blurred = jnp.asarray(data[f"map{i}_blur1_close0"])[None]
    for how in subspacead.AGGREGATIONS:
        found = image_scores(blurred, how)
        np.testing.assert_allclose(found[0], data[f"map{i}_agg_{how}"], atol=2e-5)


def test_tile_origins_are_the_golden_ones(golden):
    data = golden("subspacead/postprocess")
    for j, (height, width, tile, overlap) in enumerate(data["coords_args"]):
        found = subspacead.tile_origins(int(height), int(width), int(tile), overlap / 100)
        np.testing.assert_array_equal(found, data[f"coords{j}"])


@pytest.mark.parametrize("name", rest_slow(["dinov2_swiglu_reg", "dinov2_mlp_plain"]))
def test_attention_saliency_gives_the_golden_values(golden, name):
    data = golden(f"subspacead/{name}")
    width, heads, layers, side, patch, registers, ratio, swiglu = (int(n) for n in data["config"])
    gated = {"gated_mlp": True, "activation": "silu", "mlp_size": 64} if swiglu else {"mlp_size": ratio * width}
    sizes = {"width": width, "num_layers": layers, "num_heads": heads, "patch_size": patch}
    config = nn.VisionTransformerConfig.dinov2("small", registers, image_size=(side, side), **sizes, **gated)
    flat = {key.removeprefix("ckpt/"): value for key, value in data.items() if key.startswith("ckpt/")}
    params = interop.load_dino_params(flat, config)
    for j in (0, 1)[: 2 if name == "dinov2_mlp_plain" else 1]:
        hidden = jnp.asarray(data[f"hidden_states{j}"][1])
        found = jax.jit(subspacead.attention_saliency, static_argnums=(0, 3))(config, params, hidden, 1)
        np.testing.assert_allclose(found, data[f"saliency{j}_layer1"], atol=2e-4)


def test_anomaly_map_blurs_over_the_full_width_where_there_is_no_window():
    spike = jnp.zeros((1, 65, 65)).at[0, 32, 32].set(1)
    wide = np.asarray(anomaly_map(spike, (65, 65), sigma=2.0, kernel_size=None))[0]
    assert wide.sum() == pytest.approx(1, abs=1e-5)
    spread = np.sum(wide * (np.arange(65) - 32.0)[None] ** 2)
    assert spread == pytest.approx(4, rel=0.02)
    narrow = np.asarray(anomaly_map(spike, (65, 65)))[0]
    np.testing.assert_allclose(narrow[31:34, 32] / narrow[32, 32], [0.32984 / 0.34031, 1, 0.32984 / 0.34031], atol=1e-4)


def test_merge_tiles_of_an_image_gives_the_image_back():
    image = np.random.default_rng(0).random((12, 20)).astype(np.float32)
    origins = subspacead.tile_origins(12, 20, 8, 0.5)
    tiles = np.stack([image[top:bottom, left:right] for left, top, right, bottom in origins])
    np.testing.assert_allclose(subspacead.merge_tiles(jnp.asarray(tiles), origins, (12, 20)), image, rtol=1e-6)


def test_background_mask_separates_an_object_from_its_background():
    saliency = (
        np.full((1, 8, 8), 0.1, np.float32) + np.random.default_rng(0).random((1, 8, 8)).astype(np.float32) * 0.05
    )
    saliency[0, 2:6, 2:6] += 1
    inside = np.zeros((1, 8, 8), bool)
    inside[0, 2:6, 2:6] = True
    np.testing.assert_array_equal(background_mask(jnp.asarray(saliency), "otsu"), inside)
    kept = np.asarray(background_mask(jnp.asarray(saliency)))
    assert kept.mean() == pytest.approx(0.85, abs=0.02)
    assert kept[inside].all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: subspacead.anomaly_map(x[0], (8, 8)), r"scores: expected \[batch, h, w\], got shape \[4, 4\]"),
        (lambda x: subspacead.anomaly_map(x, (0, 8)), r"size: expected height and width, got \(0, 8\)"),
        (lambda x: subspacead.anomaly_map(x, (8, 8), kernel_size=4), "kernel_size: expected an odd number"),
        (lambda x: subspacead.anomaly_map(x, (8, 8), close=2), "close: expected an odd number"),
        (lambda x: subspacead.anomaly_map(x, (8, 8), sigma=-1), "sigma: expected at least 0, got -1"),
        (lambda x: subspacead.image_scores(x, "median"), "how: expected one of"),
        (lambda x: subspacead.background_mask(x, "mean"), "how: expected 'quantile' or 'otsu', got 'mean'"),
        (lambda x: subspacead.background_mask(x, quantile=2), r"quantile: expected a share in \[0, 1\], got 2"),
        (lambda x: subspacead.tile_origins(8, 8, 4, 1), r"overlap: expected a share in \[0, 1\)"),
        (lambda x: subspacead.tile_origins(8, 3, 4, 0), "tile: expected at most the sides of the image, 8 x 3, got 4"),
    ],
)
def test_maps_refuse_options_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((1, 4, 4)))


def test_write_overlays_writes_a_map_for_each_of_two_images_whose_names_differ_by_the_suffix(tmp_path):
    pixels, rows = np.full((8, 8, 3), 100, np.uint8), []
    for i, name in enumerate(("a.bmp", "a.png")):
        Image.fromarray(pixels).save(tmp_path / name)
        rows.append(detect.Row(image_sets.TestImage(tmp_path / name, name, None, None), float(i), None))
    found = detect.Detection("own", rows, {}, 1, 1, None, {}, 0.0)
    np.stack([np.zeros((8, 8)), np.eye(8)]).astype(np.float32).tofile(tmp_path / "maps.raw")
    thumbnails = report.write_overlays(found, tmp_path / "maps.raw", 8, tmp_path / "maps")
    written = [np.asarray(Image.open(tmp_path / "maps" / name)) for name in ("a.bmp.png", "a.png")]
    assert thumbnails.keys() == {"a.bmp", "a.png"}
    assert np.ptp(written[0], axis=(0, 1)).max() == 0 < np.ptp(written[1], axis=(0, 1)).max()
