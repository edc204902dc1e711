import numpy as np
import pytest

from subspace_jax import data


@pytest.fixture
def example():
    return {"inputs": np.random.default_rng(0).random((32, 32, 3), np.float32) + 1, "labels": np.int32(3)}


def test_shape_dtype_and_other_fields_stay(example):
    out = data.random_crop_flip(example, np.random.default_rng(1))
    assert out["inputs"].shape == (32, 32, 3)
    assert out["inputs"].dtype == np.float32
    assert out["labels"] == 3
    assert (example["inputs"] >= 1).all()


def test_one_generator_state_gives_one_image(example):
    first, again, other = (data.random_crop_flip(example, np.random.default_rng(s))["inputs"] for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_result_is_a_crop_of_the_padded_image_or_its_mirror(example):
    padded = np.pad(example["inputs"], ((4, 4), (4, 4), (0, 0)))
    crops = {}
    for dy in range(9):
        for dx in range(9):
            crop = padded[dy : dy + 32, dx : dx + 32]
            crops[crop.tobytes()] = (dy, dx, False)
            crops[crop[:, ::-1].tobytes()] = (dy, dx, True)
    rng = np.random.default_rng(0)
    found = [crops[data.random_crop_flip(example, rng)["inputs"].tobytes()] for _ in range(3000)]
    assert len(set(found)) == 162
    assert abs(np.mean([flipped for *_, flipped in found]) - 0.5) < 0.04


def test_no_padding_only_mirrors(example):
    image = example["inputs"]
    outs = [data.random_crop_flip(example, np.random.default_rng(s), padding=0)["inputs"] for s in range(20)]
    kinds = [np.array_equal(out, image) + 2 * np.array_equal(out, image[:, ::-1]) for out in outs]
    assert set(kinds) == {1, 2}


def test_pipeline_augments_deterministically_and_anew_each_epoch(tfds_dir):
    source = data.load_arrays(data.image_source("tiny_rgb", "train", tfds_dir))

    def make():
        return data.train_batches(source, batch_size=20, seed=0, num_epochs=2, transform=data.random_crop_flip)

    first, second = list(make()), list(make())
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
    assert (first[0]["inputs"][first[0]["labels"].argsort()] != first[1]["inputs"][first[1]["labels"].argsort()]).any()


def test_what_is_no_image_or_a_padding_out_of_range_is_refused(example):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"inputs: expected an image"):
        data.random_crop_flip({"inputs": np.zeros((3, 3))}, rng)
    with pytest.raises(ValueError, match=r"padding: expected 0 to 31"):
        data.random_crop_flip(example, rng, padding=32)
