import jax
import numpy as np
import pytest

from subspace_jax import metrics

# Of the authors' measured curves: with the mean of the full-space runs as baseline, and with a fixed one.
PUBLISHED = {
    "mnist_fc_784_200_200_10": (575, 1.0, 725),
    "mnist_fc_784_200_200_10_repeats": (625, 1.0, 850),
    "mnist_fc_784_400_400_10": (525, 1.0, 750),
    "mnist_lenet": (275, 1.0, 290),
    "mnist_shuffled_pixel_lenet": (750, 1.0, 1400),
    "mnist_untied_lenet": (450, 1.0, 600),
    "mnist_fctied_lenet": (400, 1.0, 425),
    "mnist_fc_lenet": (1400, 1.0, 2000),
    "cifar10_fc": (8000, 0.5, 7000),
    "cifar10_lenet": (2900, 0.5, 1000),
    "mnist_shuffled_label_10pct": (100000, 1.0, 100000),
    "mnist_shuffled_label_50pct": (140000, 1.0, 140000),
    "mnist_shuffled_label_100pct": (190000, 1.0, 190000),
}


def runs(curve):
    return curve[curve[:, 0] > 0].T


def test_published_curves_have_the_published_dimensions(golden):
    curves = golden("intrinsic-dimension/curves")
    for name, (own, fixed, expected) in PUBLISHED.items():
        dims, scores = runs(curves[name])
        full = curves[name][curves[name][:, 0] == 0, 1]
        assert metrics.d_int(dims, scores, full.mean())[0] == own, name
        assert metrics.d_int(dims, scores, fixed)[0] == expected, name
    assert metrics.d_int(*runs(curves["cartpole_reward"]), 195.0)[0] == 25


def test_the_first_mean_above_the_line_counts_and_none_where_there_is_none():
    assert metrics.d_int([30, 10, 20, 20], [0.95, 0.5, 1.0, 0.8], 0.99) == (20, 0.9)
    assert metrics.d_int([10, 20], [0.9, 0.91], 1.0) == (20, 0.91)  # at the line is not above it
    assert metrics.d_int([10, 20], [0.5, 0.6], 1.0) == (None, None)
    assert metrics.d_int([10, 20], [0.95, 1.01], 1.0, fraction=1.0)[0] == 20


def test_bootstrap_of_the_repeats_agrees_with_the_published_table(golden):
    dims, scores = runs(golden("intrinsic-dimension/curves")["mnist_fc_784_200_200_10_repeats"])
    mean, std = metrics.d_int_bootstrap(jax.random.key(0), dims, scores, 1.0)
    # The table says 750: a mean of samples that are 25 or more apart.
    assert abs(mean - 750) < 60
    assert 0 < std < 120
    assert metrics.d_int_bootstrap(jax.random.key(0), dims, scores, 9.0) == (None, None)
    alone = metrics.d_int_bootstrap(jax.random.key(0), [1, 2, 3], [0.1, 0.95, 1.0], 1.0)
    assert alone == (2.0, 0.0)


@pytest.mark.parametrize("method", ["ascending", "bisect"])
@pytest.mark.parametrize("solved_at", [1, 5, 8, 9])
def test_search_finds_the_first_dimension_that_is_enough(method, solved_at):
    dims = [8, 1, 3, 5, 7, 6, 2, 4]
    found, tried = metrics.search_d_int(lambda d: float(d >= solved_at), dims, 1.0, method=method)
    assert found == (solved_at if solved_at <= 8 else None)
    assert len(tried) <= (4 if method == "bisect" else solved_at)


def test_length_of_a_description_is_that_of_its_numbers():
    assert metrics.mdl_bits(750) == 24000


@pytest.mark.parametrize(
    ("error", "dims", "scores", "baseline"),
    [
        ("one score for each", [1, 2], [0.5], 1.0),
        ("one score for each", [], [], 1.0),
        ("scores: expected finite numbers, got nan", [1, 2], [0.5, np.nan], 1.0),
        ("baseline: expected a finite number, got inf", [1], [0.5], np.inf),
        ("dims: expected integers of at least 1", [0, 1], [0.5, 0.5], 1.0),
    ],
)
def test_bad_runs_are_refused(error, dims, scores, baseline):
    with pytest.raises(ValueError, match=error):
        metrics.d_int(dims, scores, baseline)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="method: expected one of"):
        metrics.search_d_int(float, [1], 1.0, method="golden section")
    with pytest.raises(ValueError, match="num_samples: expected at least 1"):
        metrics.d_int_bootstrap(jax.random.key(0), [1], [1.0], 1.0, num_samples=0)
    with pytest.raises(ValueError, match="d, bits"):
        metrics.mdl_bits(0)
