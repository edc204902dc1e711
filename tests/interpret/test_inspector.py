"""What an update did to a weight: spectra, ranks above rounding, and intruder dimensions with their bounds."""

import math

import ml_dtypes
import numpy as np
import pytest

from subspace_jax.interpret import inspector
from subspace_jax.interpret.inspector import changes, matrix

# All of one shape, and its transpose, as each compiles.
M, N = 48, 32


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_spectrum(seed, s, shape=(M, N)):
    """A matrix with these singular values, and its vectors."""
    u, v = (np.linalg.qr(gaussian(seed + i, n, len(s)).astype(np.float64))[0] for i, n in enumerate(shape))
    return (u * s) @ v.T, u, v


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_decompose_agrees_with_the_svd_exactly_and_from_below(shape):
    s = 0.8 ** np.arange(N)
    w, u, v = with_spectrum(0, s, shape)
    exact = inspector.decompose(w, 4, block=4, steps=2)
    assert exact.complete
    np.testing.assert_allclose(exact.s, s, rtol=1e-5)
    krylov = inspector.decompose(w, 4, block=5, steps=3, exact=8)
    assert not krylov.complete
    assert krylov.s.shape == (15,)
    assert (krylov.s <= s[:15] * (1 + 1e-6)).all()
    np.testing.assert_allclose(krylov.s[:4], s[:4], rtol=1e-4)
    for found in (exact.leading(4), krylov.leading(4)):
        np.testing.assert_allclose(np.abs(found.left.T @ u[:, :4]), np.eye(4), atol=0.02)
        np.testing.assert_allclose(np.abs(found.right.T @ v[:, :4]), np.eye(4), atol=0.02)
        np.testing.assert_allclose(np.sum((found.left.T @ w) * found.right.T, axis=1), s[:4], rtol=1e-3)


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_decompose_of_blocks_of_rows_is_that_of_the_matrix(shape):
    w = gaussian(1, *shape)
    whole = inspector.decompose(w, 4, block=6, steps=3, exact=8)
    rows = inspector.Rows(shape, lambda start, stop: w[start:stop], 20)
    blocks = inspector.decompose(rows, 4, block=6, steps=3, exact=8)
    np.testing.assert_allclose(blocks.s, whole.s, rtol=1e-4)
    np.testing.assert_allclose(np.abs(np.sum(blocks.left[:, :4] * whole.left[:, :4], axis=0)), 1, atol=1e-3)


def test_decompose_product_has_the_singular_values_of_the_product_without_forming_it():
    left, right = gaussian(2, M, 3), gaussian(3, 3, N)
    found = inspector.decompose_product(left, right)
    np.testing.assert_allclose(found.s, np.linalg.svd(left @ right, compute_uv=False)[:3], rtol=1e-5)
    np.testing.assert_allclose((found.left * found.s) @ found.right.T, left @ right, atol=1e-4)


def test_update_spectrum_has_the_numbers_of_its_singular_values():
    s = np.array([3.0, 2.0, 1.0])
    found = inspector.update_spectrum(with_spectrum(4, s)[0])
    p = s / s.sum()
    assert (found.rank, found.rank_is_bound, found.complete) == (3, False, True)
    assert found.norm == pytest.approx(math.sqrt(14), rel=1e-5)
    assert found.stable_rank == pytest.approx(14 / 9, rel=1e-4)
    # The zeros are rounding: 1e-6 of the largest, which the entropy counts.
    assert found.effective_rank == pytest.approx(math.exp(-np.sum(p * np.log(p))), rel=1e-3)
    assert found.kept == pytest.approx({1: 9 / 14, 2: 13 / 14, **{2**i: 1.0 for i in range(2, 6)}}, rel=1e-4)


def test_update_spectrum_of_a_part_of_the_singular_values_says_so():
    s = np.ones(N)
    part = inspector.Decomposition(s[:8], np.zeros((M, 8)), np.zeros((N, 8)), False)
    found = inspector.update_spectrum(part, (M, N), norm=math.sqrt(N))
    assert (found.rank, found.rank_is_bound) == (8, True)
    # The tail of equal ones is found.
    assert found.effective_rank == pytest.approx(N)
    assert found.stable_rank == pytest.approx(N)
    assert found.kept[8] == pytest.approx(0.25)


def test_update_spectrum_guesses_the_effective_rank_of_a_gaussian_matrix_from_its_leading_values():
    s = np.linalg.svd(gaussian(20, 200, 160), compute_uv=False)
    part = inspector.Decomposition(s[:40], np.zeros((200, 40)), np.zeros((160, 40)), False)
    whole = inspector.Decomposition(s, np.zeros((200, 160)), np.zeros((160, 160)), True)
    norm = float(np.linalg.norm(s))
    found, true = (inspector.update_spectrum(d, (200, 160), norm=norm).effective_rank for d in (part, whole))
    assert found == pytest.approx(true, rel=0.05)


@pytest.mark.parametrize(
    ("error", "update"),
    [
        ("is zero", np.zeros((M, N), np.float32)),
        (r"expected floating point \[m, n\], got float32 \[48\]", np.zeros(M, np.float32)),
        ("expected floating point", np.zeros((M, N), np.int32)),
        ("expected finite values, got NaN", np.full((M, N), np.nan, np.float32)),
    ],
)
def test_update_spectrum_refuses_what_has_none(error, update):
    with pytest.raises(ValueError, match=error):
        inspector.update_spectrum(update)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_update_spectrum_finds_a_planted_rank_above_the_rounding_floor(dtype, rank):
    base = (0.02 * gaussian(5, M, N)).astype(dtype)
    # Some times the spacing of bfloat16 at the weights, 1e-4.
    tuned = (base.astype(np.float32) + 0.01 * gaussian(6, M, rank) @ gaussian(7, rank, N)).astype(dtype)
    delta = tuned.astype(np.float32) - base.astype(np.float32)
    spacing = 2.0 ** np.floor(np.log2(np.abs(tuned.astype(np.float64)))) * 2.0 ** -np.finfo(np.float32).nmant
    spacing *= 2.0 ** (23 - {np.float32: 23, np.float16: 10}.get(dtype, 7))
    noise = inspector.rounding_floor((spacing**2 / 12).sum(1), (spacing**2 / 12).sum(0))
    assert inspector.update_spectrum(delta, noise=noise).rank == rank


@pytest.mark.slow
@pytest.mark.parametrize("relative", [0.003, 0.01, 0.03, 0.1])
def test_a_planted_rank_of_one_in_a_wide_bfloat16_weight_is_not_joined_by_errors_that_follow_it(relative):
    # Where an edit is about the spacing, its rounding is a function of it, of a higher rank.
    base = (0.02 * gaussian(21, 1536, 1536)).astype(ml_dtypes.bfloat16).astype(np.float32)
    edit = 0.02 * relative * gaussian(22, 1536, 1) @ gaussian(23, 1, 1536)
    tuned = (base + edit).astype(ml_dtypes.bfloat16).astype(np.float32)
    variance = sum(changes._rounding_variance(x, np.dtype(ml_dtypes.bfloat16)) for x in (base, tuned))
    coarse = variance[(tuned - base) ** 2 <= 13.5 * variance].sum()
    floor = inspector.rounding_floor(variance.sum(1), variance.sum(0), coarse)
    s = inspector.decompose(tuned - base, 2, block=16, steps=4).s
    assert int(np.sum(s > floor)) == 1


def test_rounding_floor_bounds_the_singular_values_of_rounding_closely():
    rng = np.random.default_rng(8)
    spacing = rng.choice([0.5, 1.0, 2.0], (M, N))
    floor = inspector.rounding_floor((spacing**2 / 12).sum(1), (spacing**2 / 12).sum(0))
    largest = [np.linalg.norm(spacing * rng.uniform(-0.5, 0.5, (M, N)), 2) for _ in range(50)]
    assert max(largest) < floor < 1.6 * np.mean(largest)


@pytest.mark.parametrize("shape", [(M, N), (N, M)])
def test_cosine_bound_is_one_for_singular_vectors_and_above_the_cosine_of_others(shape):
    w, u, v = with_spectrum(9, 0.9 ** np.arange(N), shape)
    own = v if shape == (M, N) else u
    np.testing.assert_allclose(inspector.cosine_bound(w, own[:, [0, 5, 31]]), 1, atol=1e-2)
    others = gaussian(10, N, 12)
    others /= np.linalg.norm(others, axis=0)
    true = np.max(np.abs(own.T @ others), axis=0)
    for steps in (2, 8, 24):
        bound = inspector.cosine_bound(w, others, steps)
        assert (bound >= true - 1e-4).all()
    # After steps enough the space is everything, and the bound the cosine.
    np.testing.assert_allclose(inspector.cosine_bound(w, others, N), true, atol=0.05)


def test_intruder_dimensions_counts_planted_ones_and_none_in_a_scaled_weight():
    base, _, _ = with_spectrum(11, 0.8 ** np.arange(N))
    assert inspector.intruder_dimensions(base, 1.5 * base).count == 0
    u, v = (np.linalg.qr(gaussian(i, n, 2))[0] for i, n in ((12, M), (13, N)))
    found = inspector.intruder_dimensions(base, base + 0.7 * u @ v.T)
    _, _, base_right = np.linalg.svd(base)
    _, _, tuned_right = np.linalg.svd(base + 0.7 * u @ v.T)
    true = np.max(np.abs(base_right @ tuned_right[:10].T), axis=0)
    np.testing.assert_allclose(found.high, true, atol=1e-3)
    assert (found.side, found.undecided, found.count) == ("right", 0, int(np.sum(true < 0.5)))
    assert found.count >= 1


def test_intruder_dimensions_without_all_of_the_base_counts_only_the_certain_ones():
    base, _, _ = with_spectrum(14, 1.0 / (1 + np.arange(N)))
    tuned = base + 1.5 * np.outer(*(np.linalg.qr(gaussian(i, n, 1))[0] for i, n in ((15, M), (16, N))))
    exact = inspector.intruder_dimensions(base, tuned)
    part = inspector.decompose(base, 8, block=8, steps=3, exact=8)
    found = inspector.intruder_dimensions(base, tuned, decomposed=part)
    assert (found.low <= exact.low + 0.02).all()
    assert (found.high >= exact.high - 0.02).all()
    assert 1 <= found.count <= exact.count <= found.count + found.undecided


def test_intruder_dimensions_refuses_other_shapes_and_arguments_out_of_range():
    w = gaussian(17, M, N)
    with pytest.raises(ValueError, match="expected one shape"):
        inspector.intruder_dimensions(w, w.T)
    with pytest.raises(ValueError, match="top: expected at least 1, got 0"):
        inspector.intruder_dimensions(w, w, top=0)
    for threshold in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="threshold: expected a cosine"):
            inspector.intruder_dimensions(w, w, threshold=threshold)


def test_block_rows_of_a_large_matrix_are_a_part_of_it():
    assert matrix.block_rows((100, 200)) == 100
    assert matrix.block_rows((32000, 2048)) == 32000
    assert matrix.block_rows((128256, 2048)) == 2**10
    assert matrix.block_rows((4, 2**30)) == 1
