"""Random changes of images, and mixtures of a batch."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from subspace_jax import data, train
from subspace_jax.data.images import augment as image_augment


@pytest.fixture
def image():
    # A gradient, so that crops and mirrors show.
    rows, columns = np.indices((40, 60))
    return np.stack([4 * rows, 4 * columns, 255 - 4 * columns], axis=2).astype(np.uint8)


CHANGES = {
    "crop": functools.partial(data.random_resized_crop, size=16),
    "jitter": functools.partial(data.color_jitter, hue=0.2),
    "rand_augment": data.rand_augment,
    "three_augment": data.three_augment,
    "erasing": data.random_erasing,
    "whole": lambda image, rng: data.TrainImage(16, three_augment=True, operations=2, erase=0.3, as_bytes=True)(
        {"inputs": image}, rng
    )["inputs"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_generator_state_gives_one_image_and_the_input_stays(image, name):
    before = image.copy()
    outs = [CHANGES[name](image, np.random.default_rng(seed)) for seed in (0, 0, *range(1, 12))]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert any(np.any(out != outs[0]) for out in outs[2:])
    assert {(out.dtype, out.shape) for out in outs} == {(image.dtype, outs[0].shape)}
    np.testing.assert_array_equal(image, before)


def test_crops_have_areas_and_shapes_in_range(image, monkeypatch):
    cuts = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a: cuts.append(self.size) or resize(self, *a))
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert data.random_resized_crop(image, rng, 8, scale=(0.2, 0.8)).shape == (8, 8, 3)
    areas = np.array([w * h for w, h in cuts]) / 2400
    ratios = np.array([w / h for w, h in cuts])
    # Sides are whole pixels of at least 18, so that areas are off by up to 1/18 and a bit.
    assert 0.18 < areas.min() < 0.25
    assert 0.7 < areas.max() < 0.85
    assert 0.7 < ratios.min() < 0.85
    assert 1.2 < ratios.max() < 1.42


def test_a_crop_that_never_fits_is_the_largest_in_the_middle():
    flat = np.arange(4 * 100 * 3, dtype=np.uint32).reshape(4, 100, 3).astype(np.uint8)
    out = data.random_resized_crop(flat, np.random.default_rng(0), 4, scale=(1.0, 1.0))
    expected = Image.fromarray(flat[:, 47:52]).resize((4, 4), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(out, expected)


def test_erasing_fills_one_rectangle_with_standard_noise():
    flat = np.full((64, 64, 3), 7, np.uint8)
    out = data.random_erasing(flat, np.random.default_rng(0), area=(0.2, 0.2), mean=(0.5,) * 3, std=(0.1,) * 3)
    rows, columns = np.nonzero((out != 7).any(2))
    inside = out[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert abs(inside[..., 0].size / 64**2 - 0.2) < 0.01
    noise = data.standardize(inside, (0.5,) * 3, (0.1,) * 3)
    # 2400 numbers, rounded to steps of 1 / 25.
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1


def test_rand_augment_of_magnitude_zero_moves_nothing(image):
    moved = [
        image_augment._OPERATIONS[i](Image.fromarray(image), 0.0, 1.0) for i in (3, 5, 7, 8, 9, 10, 11, 12, 13, 14)
    ]
    for out in moved:
        np.testing.assert_array_equal(np.asarray(out), image)


def test_every_operation_of_rand_augment_changes_an_image_at_full_magnitude(image):
    # With noise, for a smooth gradient is as sharp as can be.
    noise = np.random.default_rng(0).integers(0, 40, image.shape, np.uint8)
    picture = Image.fromarray(image // 2 + 20 + noise)
    for operation in image_augment._OPERATIONS:
        for sign in (-1.0, 1.0):
            out = np.asarray(operation(picture, 1.0, sign))
            assert out.shape == image.shape
            assert np.any(out != np.asarray(picture))


def test_standardised_pixels_are_those_of_the_definition_on_host_and_device(image):
    mean, std = np.array(data.IMAGENET_MEAN), np.array(data.IMAGENET_STD)
    expected = (image / 255 - mean) / std
    np.testing.assert_allclose(data.standardize(image), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(data.standardize)(image), expected, atol=1e-6)
    assert data.standardize(image).dtype == np.float32
    whole = data.TrainImage(8, scale=(1.0, 1.0), flip=0.0)
    bytes_out, floats = (
        change({"inputs": image, "labels": np.int32(3)}, np.random.default_rng(0))
        for change in (data.TrainImage(8, scale=(1.0, 1.0), flip=0.0, as_bytes=True), whole)
    )
    np.testing.assert_array_equal(data.standardize(bytes_out["inputs"]), floats["inputs"])
    assert floats["labels"] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "size: expected at least 1 pixel"),
        ({"scale": (0.0, 1.0)}, "scale: expected 0 < low <= high <= 1"),
        ({"ratio": (2.0, 1.0)}, "ratio: expected 0 < low <= high"),
        ({"flip": 2.0}, "flip: expected a probability"),
        ({"magnitude": 11.0}, "magnitude: expected 0 to 10"),
        ({"jitter": (0.1, 0.1, 0.1, 0.6)}, "jitter: expected four numbers"),
        ({"method": "area"}, "method: expected one of"),
        ({"std": (1.0, 0.0, 1.0)}, "mean and std: expected three numbers each"),
    ],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        data.TrainImage(**{"size": 8, **fields})


def test_what_is_not_bytes_of_three_channels_is_refused():
    for bad in (np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="inputs: expected uint8"):
            data.TrainImage(8)({"inputs": bad}, np.random.default_rng(0))


# One program for all tests of mixtures, for the sampler of the Beta distribution takes seconds to compile.
mix = jax.jit(functools.partial(data.mix_images, probability=0.5))


@pytest.fixture
def batch():
    """Image ``i`` is all ``i``."""
    images = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None, None, None], (8, 16, 16, 1))
    return np.ascontiguousarray(images)


@pytest.mark.slow
def test_half_the_batches_are_mixed_by_either_kind_and_the_weight_is_the_share_of_own_pixels(batch):
    kinds = {"mixup": 0, "cutmix": 0, "none": 0}
    for seed in range(60):
        images, share = (np.asarray(x) for x in mix(jax.random.key(seed), batch))
        # Image 0 has only its partner's fours, so its mean tells how much of them is in it.
        np.testing.assert_allclose(np.mean(images[0]) / 4, 1 - share, atol=1e-5)
        np.testing.assert_allclose(images + images[[4, 5, 6, 7, 0, 1, 2, 3]], batch + data.partners(batch), atol=1e-5)
        values = np.unique(images[0])
        kind = "none" if values.max() == 0 else "cutmix" if set(values) == {0.0, 4.0} else "mixup"
        kinds[kind] += 1
        if kind == "cutmix":
            rows, columns = np.nonzero(images[0, :, :, 0])
            assert np.all(images[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == 4)
        elif kind == "mixup":
            assert len(values) == 1
    # Of 60, a half is mixed and a quarter each way; CutMix sometimes pastes nothing or all.
    assert kinds["none"] > 20
    assert min(kinds.values()) > 5


def test_nothing_is_done_where_both_kinds_are_off(batch):
    assert data.mix_images(jax.random.key(0), batch, mixup=0.0, cutmix=0.0)[0] is batch


@pytest.mark.slow
@pytest.mark.eight_devices
def test_mix_images_of_a_sharded_batch_equals_that_of_one_device(batch):
    rows = NamedSharding(train.make_mesh(2, 4, 1), P(("data", "fsdp")))
    whole, split = (mix(jax.random.key(3), x) for x in (batch, jax.device_put(batch, rows)))
    chex.assert_trees_all_close(split, whole, rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "order"),
    [(32, [i ^ 8 for i in range(32)]), (24, [i ^ 4 for i in range(24)]), (6, [1, 0, 3, 2, 5, 4]), (3, [2, 1, 0])],
)
def test_partners_are_half_a_group_away(rows, order):
    np.testing.assert_array_equal(data.partners(jnp.arange(rows)), order)


@pytest.mark.eight_devices
def test_partners_need_no_communication_where_devices_hold_full_groups():
    rows = NamedSharding(train.make_mesh(8, devices=jax.devices()), P("data"))
    images = jax.ShapeDtypeStruct((8 * 16, 16, 16, 1), jnp.float32, sharding=rows)
    text = jax.jit(data.partners, out_shardings=rows).lower(images).compile().as_text()
    assert not any(f" {kind}" in text for kind in ("collective-permute", "all-to-all", "all-gather", "all-reduce"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mixup": -1.0}, "mixup and cutmix: expected at least 0"), ({"switch": 2.0}, "switch: expected a number")],
)
def test_mixtures_out_of_range_are_refused(batch, options, message):
    with pytest.raises(ValueError, match=message):
        data.mix_images(jax.random.key(0), batch, **options)
    with pytest.raises(ValueError, match="mix_images: expected images"):
        data.mix_images(jax.random.key(0), batch[0])
