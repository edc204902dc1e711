"""Preprocessing of images: the very numbers of Pillow, and of the processors of Hugging Face and timm."""

import json
import pathlib

import numpy as np
import PIL
import pytest
from PIL import Image

from subspace_jax import data

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "interop_vision" / "preprocess"
TIMM = {
    "vit": {"input_size": [3, 32, 32], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3},
    "odd": {"input_size": [3, 27, 27], "crop_pct": 0.875},
    "squash": {"input_size": [3, 32, 32], "crop_pct": 1.0, "crop_mode": "squash"},
}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "io.npz") as archive:
        return dict(archive)


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="earlier versions take the axes in another order")
@pytest.mark.parametrize("i", range(3))
def test_resize_gives_the_bits_of_pillow_13(golden, i):
    image = golden[f"image_{i}"]
    for method in ("bicubic", "bilinear", "lanczos"):
        np.testing.assert_array_equal(data.resize(image, (17, 29), method), golden[f"resize_{method}_{i}"])
    np.testing.assert_array_equal(data.resize(image, (83, 77), "bicubic"), golden[f"upsize_bicubic_{i}"])


@pytest.mark.parametrize("name", ["clip", "clip_odd", "siglip", "vit", "deit", "resnet"])
def test_hugging_face_s_processors_give_the_same_pixels(golden, name):
    processor = data.ImageProcessor.from_json(GOLDEN / f"{name}_preprocessor_config.json")
    for i in range(3):
        got = processor(golden[f"image_{i}"])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got.transpose(2, 0, 1), golden[f"{name}_{i}"], atol=1e-6)
    if name == "clip":
        np.testing.assert_allclose(processor(golden["gray_image"]).transpose(2, 0, 1), golden["gray_clip"], atol=1e-6)
        np.testing.assert_allclose(processor(golden["rgba_image"]).transpose(2, 0, 1), golden["rgba_clip"], atol=1e-6)


@pytest.mark.parametrize("name", list(TIMM))
def test_timm_s_transforms_give_the_same_pixels(golden, name):
    processor = data.ImageProcessor.from_json({"pretrained_cfg": {"interpolation": "bicubic", **TIMM[name]}})
    for i in range(3):
        got = processor(golden[f"image_{i}"]).transpose(2, 0, 1)
        np.testing.assert_allclose(got, golden[f"timm_{name}_{i}"], atol=1e-6)


def test_image_processor_takes_pillow_images(golden):
    processor = data.ImageProcessor.from_json(json.loads((GOLDEN / "clip_preprocessor_config.json").read_text()))
    image = golden["image_0"]
    np.testing.assert_array_equal(processor(Image.fromarray(image)), processor(image))
    palette = Image.fromarray(image).convert("P")
    np.testing.assert_array_equal(processor(palette), processor(np.asarray(palette.convert("RGB"))))


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (5, 9), (32, 32)])
def test_evaluation_keeps_the_center(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    out = data.ImageProcessor.evaluation(28, crop=0.875, as_bytes=True)(image)
    assert out.shape == (28, 28, 3)
    if shape == (32, 32):
        np.testing.assert_array_equal(out, image[2:30, 2:30])
    standardized = data.ImageProcessor.evaluation(28, crop=0.875)(image)
    np.testing.assert_array_equal(standardized, data.standardize(out))
    with pytest.raises(ValueError, match=r"crop: expected a fraction in \(0, 1\]"):
        data.ImageProcessor.evaluation(28, crop=0.0)


def test_absent_fields_have_the_defaults_of_the_processor_and_old_integers_their_meaning():
    read = data.ImageProcessor.from_json
    clip = read({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224})
    assert (clip.size, clip.crop, clip.method, clip.mean[0]) == (224, (224, 224), "bicubic", 0.48145466)
    vit = read({"feature_extractor_type": "ViTFeatureExtractor", "size": 224})
    assert (vit.size, vit.crop, vit.method) == ((224, 224), None, "bilinear")
    deit = read({"image_processor_type": "DeiTImageProcessorFast"})
    assert (deit.size, deit.crop) == ((256, 256), (224, 224))
    resnet = read({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 224}})
    assert (resnet.size, resnet.crop) == (256, (224, 224))
    large = read({"image_processor_type": "ConvNextImageProcessor"})
    assert (large.size, large.crop) == ((384, 384), None)
    raw = read(
        {"image_processor_type": "ViTImageProcessor", "do_normalize": False, "do_resize": False, "do_rescale": False}
    )
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(raw(image), image.astype(np.float32))


def test_an_image_smaller_than_the_crop_gets_a_border():
    image = np.full((3, 4, 3), 255, np.uint8)
    for rounding, rows in (("floor", [0, 0, 1, 1, 1, 0]), ("even", [0, 1, 1, 1, 0, 0])):
        processor = data.ImageProcessor(size=None, crop=(6, 4), crop_rounding=rounding)
        np.testing.assert_array_equal(processor(image)[:, 0, 0], np.float32(rows))


def test_what_is_no_image_or_no_known_processor_is_named(tmp_path):
    processor = data.ImageProcessor()
    with pytest.raises(TypeError, match=r"image: expected uint8 in \[0, 255\], got float32"):
        processor(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"expected \[height, width, 1, 3 or 4\], got shape \(4, 4, 2\)"):
        processor(np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config.json: no such file"):
        data.ImageProcessor.from_json(tmp_path)
    with pytest.raises(ValueError, match="image_processor_type: 'BeitImageProcessor' is not supported"):
        data.ImageProcessor.from_json({"image_processor_type": "BeitImageProcessor"})
    with pytest.raises(ValueError, match="resample: expected one of"):
        data.ImageProcessor.from_json({"image_processor_type": "ViTImageProcessor", "resample": 5})
    with pytest.raises(ValueError, match="crop_mode: 'border' is not supported"):
        data.ImageProcessor.from_json({"pretrained_cfg": {"input_size": [3, 8, 8], "crop_mode": "border"}})
    with pytest.raises(ValueError, match="method: expected one of"):
        data.ImageProcessor(method="box")
    with pytest.raises(ValueError, match="std: expected a number for each of 3 channels"):
        data.ImageProcessor(std=(1.0,))
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"input_size": [3, 8, 8], "crop_pct": 1.0}}))
    assert data.ImageProcessor.from_json(tmp_path).crop == (8, 8)
