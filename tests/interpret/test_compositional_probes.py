"""Probes over combinations, what bounds say of them, and the generators of grids."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from subspace_jax.interpret import compositional_linear as cl

N_VALUES = (4, 3, 2)
PREDICTED = jax.jit(cl.ConceptProbes.predict)
QUICK = cl.ProbeSettings(epochs=40, batch=8, learning_rate=0.05)


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        yield


@pytest.mark.slow
def test_fit_concept_probes_separates_an_additive_grid_on_any_scale_and_weights_have_no_common_part():
    grid = cl.orthogonal_factor_embedding(jax.random.key(1), N_VALUES, 12)
    done = []
    probes = cl.fit_concept_probes(
        jax.random.key(0), grid.x, grid.labels, N_VALUES, QUICK, lambda *stage: done.append(stage)
    )
    assert np.array_equal(probes.predict(grid.x), grid.labels)
    assert done == [(i, 10) for i in range(1, 11)]
    for w in probes.weights:
        assert float(jnp.max(jnp.abs(jnp.sum(w, axis=0)))) < 1e-5
    assert cl.probe_span(probes.weights).shape == (12, 6)
    # Training reads no direction in which nothing varies.
    assert (
        abs(cl.linear_factorization_r2(grid.x, grid.labels, N_VALUES, True, cl.probe_span(probes.weights)).r2 - 1)
        < 1e-4
    )
    other = cl.fit_concept_probes(jax.random.key(0), 100 * grid.x + 5, grid.labels, N_VALUES, QUICK)
    chex.assert_trees_all_close(other.logits(100 * grid.x + 5), probes.logits(grid.x), atol=2e-2)


@pytest.mark.slow
def test_fit_concept_probes_keeps_the_best_stage_of_each_concept_on_examples_held_out():
    grid = cl.orthogonal_factor_embedding(jax.random.key(1), N_VALUES, 12, noise=0.3)
    held = cl.ProbeSettings(epochs=40, batch=8, learning_rate=0.05, validation=0.25)
    probes = cl.fit_concept_probes(jax.random.key(0), grid.x, grid.labels, N_VALUES, held)
    own = jax.random.permutation(jax.random.split(jax.random.key(0))[0], 24)[:6]
    right = np.mean(np.asarray(probes.predict(grid.x[own])) == np.asarray(grid.labels[own]), axis=0)
    assert np.all(right >= 0.5)


def test_probe_settings_out_of_range_are_refused():
    for name, value in (("epochs", 0), ("batch", 0), ("learning_rate", 0.0), ("validation", 1.0), ("validation", -0.1)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            cl.ProbeSettings(**{name: value})
    x, labels = jnp.asarray([[0.0], [1.0]]), jnp.asarray([[0], [1]])
    with pytest.raises(ValueError, match="validation: expected examples to train on, got 2 of 2 held out"):
        cl.fit_concept_probes(jax.random.key(0), x, labels, (2,), cl.ProbeSettings(validation=0.9))
    with pytest.raises(ValueError, match="expected embeddings that differ"):
        cl.fit_concept_probes(jax.random.key(0), 0 * x, labels, (2,))


def test_split_combinations_puts_each_combination_on_one_side():
    labels = np.tile(cl.full_grid((4, 5)), (3, 1))
    split = cl.split_combinations(jax.random.key(0), labels, 0.1)
    sides = {tuple(row) for row in labels[split.train]}, {tuple(row) for row in labels[split.test]}
    assert [len(side) for side in sides] == [2, 18]
    assert not sides[0] & sides[1]
    assert split.train.sum() == 6
    paper = cl.split_combinations(jax.random.key(0), labels, 0.1, 0.1)
    assert (paper.train.sum(), paper.test.sum()) == (6, 6)
    for fractions in ((0.0,), (1.0,), (0.6, 0.6)):
        with pytest.raises(ValueError, match="expected one combination or more of 20"):
            cl.split_combinations(jax.random.key(0), labels, *fractions)
    with pytest.raises(ValueError, match=r"labels: expected \[examples, concepts\]"):
        cl.split_combinations(jax.random.key(0), labels[:, 0])


@pytest.mark.slow
def test_compositional_accuracy_of_an_ideal_grid_is_1_and_of_noise_that_of_chance():
    grid = cl.orthogonal_factor_embedding(jax.random.key(2), (2, 2, 2, 2), 12)
    found = cl.compositional_accuracy(jax.random.key(0), grid.x, grid.labels, (2, 2, 2, 2), 9 / 16, QUICK)
    assert (found.mean, found.train_examples, found.test_examples) == (1, 9, 7)
    noise = jax.random.normal(jax.random.key(3), (16, 12))
    assert cl.compositional_accuracy(jax.random.key(0), noise, grid.labels, (2, 2, 2, 2), 9 / 16, QUICK).mean < 0.9


def hard_margin(x, labels):
    """Probes by hard-margin support vector machines, one for each binary concept.

    Solved exactly, as least-distance programs by non-negative least squares; a libsvm with a C that large never ends.
    """
    weights, biases, size = [], [], 30.0  # the bias is a weight of a constant so large that it costs little
    for own in labels.T:
        rows = np.where(own, 1.0, -1.0)[:, None] * np.c_[x, np.full(len(x), size)]
        matrix, goal = np.r_[rows.T, np.ones((1, len(x)))], np.zeros(rows.shape[1] + 1)
        goal[-1] = 1
        residual = matrix @ nnls(matrix, goal)[0] - goal
        *normal, offset = -residual[:-1] / residual[-1]
        weights.append(np.outer([-0.5, 0.5], normal))
        biases.append(np.asarray([-0.5, 0.5]) * size * offset)
    return cl.ConceptProbes(tuple(weights), tuple(biases))


def test_margin_probes_of_any_valid_support_agree_on_orthogonal_factors_alone(x64):
    n_values, rng = (2, 2, 2, 2), np.random.default_rng(0)
    grid = cl.orthogonal_factor_embedding(jax.random.key(4), n_values, 12)
    signs = jnp.sum(2.0 * grid.labels - 1, axis=1, keepdims=True)
    x = {
        "orthogonal": grid.x,
        "oblique": grid.x + signs * jax.random.normal(jax.random.key(5), (1, 12)),
        "non-linear": jax.random.normal(jax.random.key(6), (16, 12)),
    }
    supports = [rng.permutation(16)[:9] for _ in range(20)]  # 2^(k-1) + 1: each value occurs
    labels, found = np.asarray(grid.labels), {}
    for name, points in x.items():
        probes = [hard_margin(np.asarray(points)[own], labels[own]) for own in supports]
        right = np.mean([np.asarray(PREDICTED(own, points)) == labels for own in probes])
        gap = cl.stability_gap(probes, points)
        score = cl.linear_factorization_r2(points, grid.labels, n_values, False).r2
        found[name] = float(right), float(jnp.min(gap.direction)), float(jnp.max(gap.posterior)), float(score)
    accuracy, direction, posterior, _ = found["orthogonal"]
    assert accuracy == 1
    assert direction > 0.99999
    assert posterior < 1e-3
    accuracy, direction, posterior, score = found["oblique"]
    assert abs(score - 1) < 1e-9
    assert accuracy < 1
    assert direction < 0.9
    assert posterior > 0.1
    accuracy, direction, _, score = found["non-linear"]
    assert accuracy < 0.95
    assert direction < 0.5
    assert score < 0.9


def test_stability_gap_refuses_probes_that_can_not_be_compared():
    probes = cl.ConceptProbes((jnp.ones((2, 3)),), (jnp.ones(2),))
    with pytest.raises(ValueError, match="probes: expected 2 or more of the same shapes, got 1"):
        cl.stability_gap([probes], jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"x: expected points \[points, 3\]"):
        cl.stability_gap([probes, probes], jnp.ones((4, 2)))


def test_check_divisibility_finds_every_combination_in_k_dimensions_and_misses_some_in_fewer():
    rng = np.random.default_rng(0)
    weights, biases = [np.outer([-1, 1], row) for row in np.eye(3)], [np.zeros(2)] * 3
    assert cl.check_divisibility(weights, biases).shape == (2, 2, 2)
    assert cl.check_divisibility(weights, biases).all()
    for _ in range(3):
        flat = [rng.standard_normal((2, 2)) for _ in range(3)]
        reachable = cl.check_divisibility(flat, [rng.standard_normal(2) for _ in range(3)])
        assert 0 < reachable.sum() < 8
    # Three values in one dimension: the middle one is reachable where its line is on top somewhere.
    steep = np.asarray([[-1.0], [0.0], [1.0]])
    assert cl.check_divisibility([steep], [np.asarray([0.0, 1.0, 0.0])]).tolist() == [True, True, True]
    assert cl.check_divisibility([steep], [np.asarray([0.0, -1.0, 0.0])]).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="biases: expected one number for each row of weights"):
        cl.check_divisibility(weights, biases[:2])
    with pytest.raises(ValueError, match="biases: expected finite numbers"):
        cl.check_divisibility([steep], [np.full(3, np.nan)])
    with pytest.raises(ValueError, match="at most 4096 combinations, got 8192"):
        cl.check_divisibility([np.ones((2, 1))] * 13, [np.ones(2)] * 13)


def test_min_dimension_is_k_and_of_two_levels_1_plus_k_times_n_minus_1():
    assert [cl.min_dimension(k) for k in (1, 4)] == [1, 4]
    assert [cl.two_level_min_dimension(k, n) for k, n in ((1, 2), (3, 4))] == [2, 10]
    for call in (lambda: cl.min_dimension(0), lambda: cl.two_level_min_dimension(2, 1)):
        with pytest.raises(ValueError, match="expected 1 concept or more"):
            call()


def test_two_level_logits_have_the_rank_of_the_bound():
    k, n = 3, 4
    labels = cl.full_grid((n,) * k)
    logits = np.concatenate([np.eye(n)[labels[:, i]] for i in range(k)], axis=1)
    assert np.linalg.matrix_rank(logits) == cl.two_level_min_dimension(k, n)
    # Averages of such logits are additive (proposition 7).
    score = cl.linear_factorization_r2(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), (n,) * k, False)
    assert abs(score.r2 - 1) < 1e-5


def test_shape_pictures_are_a_full_grid():
    pictures = cl.shape_pictures()
    assert (pictures.x.shape, pictures.n_values) == ((225, 400), (3, 3, 5, 5))
    assert len(np.unique(pictures.x, axis=0)) == 225
    by_label = {tuple(map(int, row)): x.reshape(20, 20) for row, x in zip(pictures.labels, pictures.x, strict=True)}
    assert by_label[0, 0, 0, 0].sum() == 25
    assert by_label[2, 0, 0, 0].sum() == 13
    assert np.array_equal(by_label[1, 2, 3, 0], by_label[1, 2, 0, 3].T)
    features = cl.random_relu_features(jax.random.key(0), pictures.x, 2, 8)
    assert features.shape == (225, 8)
    assert float(jnp.min(features)) == 0


@pytest.mark.slow
def test_transformed_digits_are_a_full_grid():
    digits = cl.transformed_digits(2)
    assert (digits.x.shape, digits.n_values) == ((160, 64), (10, 4, 2))
    counts = cl.concept_factors(digits.x, digits.labels, digits.n_values).counts
    assert [set(map(int, c)) for c in counts] == [{16}, {40}, {80}]
    assert np.allclose(digits.x[:20] + digits.x[20:40], 1)
