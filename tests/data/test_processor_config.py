"""Which file says how images are prepared, what its fields mean, and what is refused by name."""

import json

import numpy as np
import pytest
from PIL import Image

from subspace_jax import data

READ = data.ImageProcessor.from_json
VIT = {"image_processor_type": "ViTImageProcessor"}
CLIP = {"image_processor_type": "CLIPImageProcessor"}
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor"}
TIMM = {"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 1.0}}


def written(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_from_json_takes_the_file_that_transformers_takes(tmp_path):
    old = {**CLIP, "size": {"shortest_edge": 48}}
    nested = {"processor_class": "CLIPProcessor", "image_processor": {**CLIP, "size": {"shortest_edge": 64}}}
    written(
        tmp_path, config={"model_type": "clip"}, preprocessor_config=old, processor_config={"image_processor": None}
    )
    assert READ(tmp_path).size == 48
    written(tmp_path, config=TIMM)
    assert READ(tmp_path).size == 32
    written(tmp_path, processor_config=nested)
    assert READ(tmp_path).size == READ(tmp_path / "processor_config.json").size == READ(nested).size == 64


def test_from_json_knows_the_processor_of_a_model_whose_files_name_none(tmp_path):
    written(tmp_path, config={"model_type": "dinov2"}, preprocessor_config={"size": 56})
    assert READ(tmp_path) == READ({"image_processor_type": "BitImageProcessor", "size": 56})
    written(tmp_path, config={"model_type": "unheard_of"})
    with pytest.raises(ValueError, match=r"preprocessor_config.json: image_processor_type: None is not supported"):
        READ(tmp_path)


@pytest.mark.parametrize(
    ("fields", "size", "crop"),
    [
        ({**VIT, "size": 20}, (20, 20), None),
        ({**VIT, "size": 20, "default_to_square": False}, 20, None),
        ({**VIT, "size": [20, 24]}, (20, 24), None),
        ({**VIT, "size": {"shortest_edge": 20, "longest_edge": None}}, 20, None),
        ({**VIT, "do_center_crop": True, "crop_size": [16, 18]}, (224, 224), (16, 18)),
        ({**VIT, "do_resize": None}, None, None),
        ({**VIT, "do_resize": False, "resample": None, "size": None}, None, None),
        ({**VIT, "patch_size": 16, "crop_pct": 0.9, "offset": True, "_keys": ["size"]}, (224, 224), None),
        ({**CLIP, "size": 20, "crop_size": 16}, 20, (16, 16)),
        ({**CLIP, "size": {"height": 20, "width": 24}, "do_center_crop": None}, (20, 24), None),
        ({**CONVNEXT, "size": 224, "crop_pct": 0.875}, 256, (224, 224)),
        ({**CONVNEXT, "size": 400, "do_center_crop": True, "crop_size": 300}, (400, 400), (300, 300)),
        ({"pretrained_cfg": {"input_size": [3, 28, 28]}}, 32, (28, 28)),
        ({"pretrained_cfg": {"input_size": [3, 28, 20], "crop_mode": "squash"}}, (32, 22), (28, 20)),
    ],
)
def test_sizes_mean_what_they_mean_to_transformers_and_timm(fields, size, crop):
    processor = READ(fields)
    assert (processor.size, processor.crop) == (size, crop)


def test_steps_that_are_null_are_off_and_one_number_serves_all_channels():
    image = np.full((2, 2, 3), 51, np.uint8)
    fields = {**VIT, "do_resize": False, "image_mean": 0.1, "image_std": 0.5}
    np.testing.assert_allclose(READ(fields)(image), 0.2, atol=1e-6)
    np.testing.assert_allclose(READ({**fields, "do_rescale": None})(image), (51 - 0.1) / 0.5, rtol=1e-6)
    np.testing.assert_allclose(READ({**fields, "do_normalize": None})(image), 0.2, atol=1e-6)
    timm = {"input_size": [3, 2, 2], "crop_pct": 1.0, "mean": [0.1], "std": [0.5]}
    processor = READ({"pretrained_cfg": timm})
    assert processor.method == "bicubic"  # timm's default
    np.testing.assert_allclose(processor(image), 0.2, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "'Siglip2ImageProcessor' is not supported"),
        ({"image_processor_type": "ViTHybridImageProcessor"}, "'ViTHybridImageProcessor' is not supported"),
        ({"image_processor_type": ["ViT"]}, "image_processor_type: .* is not supported"),
        ({**VIT, "do_pad": True}, "do_pad: True is not supported"),
        ({**VIT, "do_flip_channel_order": True}, "do_flip_channel_order: True is not supported"),
        ({**VIT, "image_meen": [0.5] * 3}, "image_meen: .* did you mean 'image_mean'"),
        ({**CLIP, "use_square_size": True}, "use_square_size: True is not supported"),
        ({**VIT, "do_resize": "false"}, "do_resize: expected true or false, got 'false'"),
        ({**VIT, "size": "224"}, "size: expected whole numbers of pixels"),
        ({**VIT, "size": {"height": 224.0, "width": 224}}, "size: expected whole numbers of pixels"),
        ({**VIT, "size": {"shortest_edge": 0}}, "size: expected whole numbers of pixels, at least 1"),
        ({**CLIP, "size": {"shortest_edge": 224, "longest_edge": 336}}, "shortest_edge alone"),
        ({**CLIP, "size": {"max_height": 224, "max_width": 336}}, "size: expected height and width"),
        ({**CLIP, "size": {"longest_edge": 336}}, "size: expected height and width"),
        ({**CLIP, "size": 10**9}, "size: 1000000000 x 1000000000 pixels"),
        ({**CLIP, "crop_size": {"height": 10**9, "width": 3}}, "crop: 3 x 1000000000 pixels"),
        ({**CLIP, "crop_size": {"shortest_edge": 224}}, "crop_size: expected height and width"),
        ({**VIT, "do_center_crop": True}, "crop_size: expected whole numbers of pixels, at least 1, got None"),
        ({**VIT, "resample": "bicubic"}, "resample: expected one of"),
        ({**VIT, "resample": True}, "resample: expected one of"),
        ({**VIT, "rescale_factor": 0}, "rescale_factor: expected a finite number above 0, got 0"),
        ({**VIT, "image_std": [0.5, 0, 0.5]}, "image_std: expected a finite number above 0, got 0"),
        ({**VIT, "image_std": None}, "image_std: expected a finite number"),
        ({**VIT, "image_mean": [float("nan")] * 3}, "image_mean: expected a finite number, got nan"),
        ({**VIT, "image_mean": [0.5, 0.5]}, "image_mean: expected a number for each of 3 channels"),
        ({**CONVNEXT, "size": {"height": 224, "width": 224}}, "size: expected the shortest_edge"),
        ({**CONVNEXT, "size": 224, "crop_pct": 0}, "crop_pct: expected a finite number above"),
        ({**CONVNEXT, "size": 224, "do_center_crop": True, "crop_size": 200}, "crop_size: a crop after that of 224"),
        ({"image_processor": [1]}, "image_processor: expected an object"),
        ({"pretrained_cfg": "vit"}, "pretrained_cfg: expected an object"),
        ({"pretrained_cfg": {"input_size": 224}}, "input_size: expected channels, height and width, got 224"),
        ({"pretrained_cfg": {"input_size": [1, 28, 28]}}, "input_size: expected 3 channels"),
        ({"pretrained_cfg": {"input_size": [3, 8, 8], "interpolation": "random"}}, "interpolation: expected one of"),
        ({"pretrained_cfg": {"input_size": [3, 8, 8], "std": [0.0] * 3}}, "std: expected a finite number above 0"),
        ({"pretrained_cfg": {"input_size": [3, 8, 8], "crop_pct": 0.0}}, "crop_pct: expected a finite number above"),
    ],
)
def test_fields_that_are_not_supported_are_named_with_their_file(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        READ(fields)
    file = written(tmp_path, preprocessor_config=fields) / "preprocessor_config.json"
    with pytest.raises(ValueError, match=rf"preprocessor_config.json: .*{message}") as caught:
        READ(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1]", "{", "null", "[" * 100_000, '{"size": 1,}', "\ud800"])
def test_a_file_that_is_no_json_object_is_named(content, tmp_path):
    for name in ("preprocessor_config", "processor_config", "config"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.json").write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match=rf"{name}.json: ") as caught:
            READ(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((4, 4, 3), bool), TypeError, "expected uint8"),
        (np.full((4, 4, 3), 300, np.uint16), TypeError, "expected uint8"),
        (np.full((4, 4, 3), np.nan), TypeError, "expected uint8"),
        (np.full((4, 4, 3), 200.0), TypeError, "expected uint8"),
        ("x.png", TypeError, "expected uint8"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, "expected .height, width, 1, 3 or 4"),
        (np.zeros((1, 4, 4, 3), np.uint8), ValueError, "expected .height, width, 1, 3 or 4"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "4 x 0 pixels; expected at least one"),
        (np.zeros((1, 2_000_000, 3), np.uint8), ValueError, "image of 2000000 x 1, resized: 448000000 x 224 pixels"),
    ],
)
def test_image_processor_refuses_arrays_that_are_no_8_bit_images(image, error, message):
    with pytest.raises(error, match=message):
        READ(CLIP)(image)


def test_image_processor_takes_thin_images_and_gray_arrays():
    wide = np.arange(50, dtype=np.uint8)[None]
    processor = data.ImageProcessor(size=4, crop=(4, 4), scale=1.0)
    for image in (wide, wide[..., None], Image.fromarray(wide)):
        assert processor(image).shape == (4, 4, 3)
        np.testing.assert_array_equal(processor(image), processor(np.repeat(wide[..., None], 3, -1)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 2.5}, "size: expected positive sides in pixels, got 2.5"),
        ({"size": (2, 3, 4)}, "size: expected positive sides"),
        ({"crop": (2, 0)}, "crop: expected positive sides"),
        ({"std": (1.0, 0.0, 1.0)}, "std: expected positive finite numbers"),
        ({"mean": (float("inf"), 0.0, 1.0)}, "mean: expected finite numbers"),
        ({"scale": float("nan")}, "scale: expected positive finite numbers"),
    ],
)
def test_image_processor_refuses_settings_that_can_not_serve(fields, message):
    with pytest.raises(ValueError, match=message):
        data.ImageProcessor(**fields)
