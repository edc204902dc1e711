import numpy as np
import pytest

from subspace_jax import data


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_true_subspaces_classify_as_well_as_the_spec_says(seed):
    made = data.union_of_subspaces(seed)
    lengths = np.linalg.norm(np.einsum("bn,cnd->bcd", made.test["inputs"], made.bases), axis=-1)
    assert 0.96 <= np.mean(lengths.argmax(-1) == made.test["labels"]) <= 0.99


def test_bases_are_orthonormal():
    bases = data.union_of_subspaces(0).bases
    assert bases.shape == (10, 32, 4)
    grams = np.einsum("cnd,cne->cde", bases, bases)
    np.testing.assert_allclose(grams, np.broadcast_to(np.eye(4), (10, 4, 4)), atol=1e-6)


def test_share_of_energy_off_the_subspace_is_that_of_the_noise():
    made = data.union_of_subspaces(0)
    x, labels = made.train["inputs"], made.train["labels"]
    off = 1 - np.sum(np.einsum("bn,bnd->bd", x, made.bases[labels]) ** 2, axis=-1)
    rng = np.random.default_rng(1)
    inside, outside = 1.04 * rng.chisquare(4, 200_000), 0.04 * rng.chisquare(28, 200_000)
    assert abs(off.mean() - np.mean(outside / (inside + outside))) < 0.01


def test_without_noise_points_lie_on_their_subspaces():
    made = data.union_of_subspaces(3, noise=0.0)
    inside = np.einsum("bn,bnd->bd", made.train["inputs"], made.bases[made.train["labels"]])
    np.testing.assert_allclose(np.sum(inside**2, axis=-1), 1, atol=1e-5)


def test_points_have_unit_length_and_labels_are_uniform():
    made = data.union_of_subspaces(0)
    for split, rows in ((made.train, 4000), (made.test, 2000)):
        assert split["inputs"].shape == (rows, 32)
        assert (split["inputs"].dtype, split["labels"].dtype) == (np.float32, np.int32)
        np.testing.assert_allclose(np.linalg.norm(split["inputs"], axis=-1), 1, atol=1e-6)
        assert np.abs(np.bincount(split["labels"], minlength=10) / rows - 0.1).max() < 0.025


def test_seed_decides_everything():
    first, again, other = (data.union_of_subspaces(seed, num_train=50, num_test=5) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.train["inputs"], again.train["inputs"])
    assert np.abs(first.bases - other.bases).max() > 0.1


def test_sizes_are_free():
    made = data.union_of_subspaces(0, num_classes=3, ambient_dim=6, subspace_dim=6, num_train=7, num_test=2)
    assert made.bases.shape == (3, 6, 6)
    assert next(data.train_batches(made.train, batch_size=7, seed=0))["inputs"].shape == (7, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subspace_dim": 33}, "subspace_dim: expected at most ambient_dim = 32, got 33"),
        ({"subspace_dim": 0}, "subspace_dim: expected at least 1"),
        ({"num_classes": 0}, "num_classes: expected at least 1"),
        ({"num_test": 0}, "num_test: expected at least 1"),
        ({"noise": -0.1}, "noise: expected 0 or more"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.union_of_subspaces(0, **arguments)
