"""Factors and their scores: golden vectors of the authors' functions, identities, shards, and bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg
from subspace_jax.interpret import compositional_linear as cl

N_VALUES = (4, 3, 2)


def additive(d=12, noise=0.0):
    return cl.orthogonal_factor_embedding(jax.random.key(0), N_VALUES, d, (2, 2, 1), noise)


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("exact", "noisy")), "noisy_hole"]
)
def test_factors_scores_cosines_and_ranks_are_golden(name, golden, x64):
    g = golden(f"compositional-linear/factorization_{name}")
    x, labels, n_values = jnp.asarray(g["X"]), jnp.asarray(g["labels"]), tuple(map(int, g["n_values"]))
    concepts = range(int(g["num_concepts"]))
    weights = [jnp.asarray(g[f"probe_{i}"]) for i in concepts]
    basis = cl.probe_span(weights)
    assert basis.shape[1] == g["probe_rank"]
    chex.assert_trees_all_close(basis @ basis.T, g["probe_projector"], atol=1e-9)
    factors = cl.concept_factors(x, labels, n_values)
    for i in concepts:
        chex.assert_trees_all_close(factors.means[i], g[f"means_{i}"].astype(float), atol=1e-6)
        assert np.array_equal(factors.counts[i], g[f"counts_{i}"])
    chex.assert_trees_all_close(
        cl.span_r2(x, labels, n_values, weights), jnp.stack([g[f"span_r2_{i}"] for i in concepts]), atol=1e-9
    )
    found = cl.decompose(cl.array_blocks(np.asarray(x), np.asarray(labels), rows=24), n_values)
    for kind, projector in (("raw", None), ("projected", basis)):
        for whiten, suffix in ((False, ""), (True, "_whitened")):
            sst = float(g[f"{kind}_sst{suffix}"])
            tolerances = {"r2": 1e-4 if whiten else 1e-5, "sse": 1e-5 * sst, "sst": 1e-5 * sst}
            for score in (
                cl.linear_factorization_r2(x, labels, n_values, whiten, projector),
                cl.decomposition_r2(found, whiten, projector),
            ):
                for which, tolerance in tolerances.items():
                    assert abs(float(getattr(score, which)) - g[f"{kind}_{which}{suffix}"]) < tolerance
        own = cl.Factors(tuple(m @ basis for m in factors.means), factors.counts) if kind == "projected" else factors
        suffix = "_projected" if kind == "projected" else ""
        assert [int(rank) for rank in cl.effective_rank(own)] == [int(g[f"k95{suffix}_{i}"]) for i in concepts]
        cosines = cl.factor_cosines(own)
        chex.assert_trees_all_close(cosines.matrix, g[f"{kind}_abs_cos_matrix"], atol=1e-5)
        assert abs(cosines.within - g[f"{kind}_within_abs_cos"]) < 1e-5
        assert abs(cosines.across - g[f"{kind}_across_abs_cos"]) < 1e-5
    chex.assert_trees_all_close(
        cl.factor_cosines(factors, "difference").matrix, g["difference_abs_cos_matrix"], atol=1e-5
    )


def test_an_orthogonal_additive_grid_has_every_score_1_and_every_angle_right(x64):
    grid = additive()
    assert grid.x.dtype == jnp.float64
    for whiten in (False, True):
        score = cl.linear_factorization_r2(grid.x, grid.labels, N_VALUES, whiten)
        assert abs(score.r2 - 1) < 1e-9
    factors = cl.concept_factors(grid.x, grid.labels, N_VALUES)
    assert cl.factor_cosines(factors).across < 1e-8
    assert cl.factor_cosines(factors, "difference").across < 1e-8
    assert [int(rank) for rank in cl.effective_rank(factors, 1.0)] == [2, 2, 1]
    oblique = grid.x @ jax.random.normal(jax.random.key(1), (12, 12))
    assert abs(cl.linear_factorization_r2(oblique, grid.labels, N_VALUES).r2 - 1) < 1e-9
    assert cl.factor_cosines(cl.concept_factors(oblique, grid.labels, N_VALUES)).across > 0.05


def test_r2_of_a_balanced_grid_falls_by_the_share_of_the_interaction_and_sums_of_squares_add_up(x64):
    grid = additive()
    both = (grid.labels[:, 1] * grid.labels[:, 2]).astype(float)
    # What of the product no sum of two functions explains.
    table = np.outer(np.arange(3.0), np.arange(2.0))
    table = table - table.mean(0, keepdims=True) - table.mean(1, keepdims=True) + table.mean()
    interaction = jnp.asarray(table)[grid.labels[:, 1], grid.labels[:, 2]]
    x = grid.x + 3 * both[:, None] * jax.random.normal(jax.random.key(1), (1, 12))
    direction = jnp.sum(jnp.square(3 * jax.random.normal(jax.random.key(1), (1, 12))))
    score = cl.linear_factorization_r2(x, grid.labels, N_VALUES, whiten=False)
    assert abs(score.sse - direction * jnp.sum(interaction**2)) < 1e-9
    factors = cl.concept_factors(x, grid.labels, N_VALUES)
    parts = sum(jnp.sum(c[:, None].astype(float) * m**2) for m, c in zip(factors.means, factors.counts, strict=True))
    assert abs(score.sse + parts - score.sst) < 1e-9
    assert max(float(jnp.max(jnp.abs(jnp.sum(m, axis=0)))) for m in factors.means) < 1e-12


def test_whitened_r2_survives_linear_maps_and_raw_r2_rotations_shifts_and_scales(x64):
    grid = additive(noise=0.5)
    raw, white = (cl.linear_factorization_r2(grid.x, grid.labels, N_VALUES, w).r2 for w in (False, True))
    turns = [linalg.random_orthonormal(jax.random.key(i), 12, 12, dtype=jnp.float64) for i in (2, 3)]
    mapped = grid.x @ turns[0] @ jnp.diag(jnp.linspace(0.2, 5, 12)) @ turns[1] + 7
    assert abs(cl.linear_factorization_r2(mapped, grid.labels, N_VALUES).r2 - white) < 1e-6
    rotated = 1e-6 * (grid.x @ turns[0] - 2)
    assert abs(cl.linear_factorization_r2(rotated, grid.labels, N_VALUES, False).r2 - raw) < 1e-9
    assert abs(raw - white) > 0.01


def test_r2_of_labels_at_random_is_that_of_chance_and_bfloat16_agrees_with_float32():
    keys = jax.random.split(jax.random.key(4), 4)
    labels = jnp.stack([jax.random.randint(k, (600,), 0, n) for k, n in zip(keys, N_VALUES, strict=False)], axis=1)
    x = jax.random.normal(keys[3], (600, 12))
    found = cl.linear_factorization_r2(x, labels, N_VALUES, False)
    assert abs(found.r2 - 6 / 600) < 0.01
    small = cl.linear_factorization_r2(x.astype(jnp.bfloat16), labels, N_VALUES, False)
    assert small.sse.dtype == jnp.float32
    assert abs(small.r2 - found.r2) < 1e-3


def test_concept_factors_by_least_squares_are_exact_where_combinations_are_unbalanced(x64):
    grid = additive()
    rows = np.flatnonzero((np.asarray(grid.labels[:, 0]) + np.asarray(grid.labels[:, 1])) % 3 < 2)
    rows = np.concatenate([rows, rows[:5], rows[:3]])
    x, labels = grid.x[rows], grid.labels[rows]
    assert cl.linear_factorization_r2(x, labels, N_VALUES, False).r2 < 0.99
    assert abs(cl.linear_factorization_r2(x, labels, N_VALUES, False, method="lstsq").r2 - 1) < 1e-9
    blocks = cl.array_blocks(np.asarray(x), np.asarray(labels), rows=7)
    streamed = cl.decompose(blocks, N_VALUES, "lstsq")
    assert abs(cl.decomposition_r2(streamed, whiten=False).r2 - 1) < 1e-9
    factors = cl.concept_factors(x, labels, N_VALUES, "lstsq")
    chex.assert_trees_all_close(cl.reconstruct(factors, labels), x - jnp.mean(x, axis=0)[None], atol=1e-9)
    for means, counts in zip(factors.means, factors.counts, strict=True):
        assert float(jnp.max(jnp.abs(counts.astype(float) @ means))) < 1e-9
    assert cl.factor_cosines(factors).across < 0.05


def test_values_without_examples_are_zero_rows_that_no_cosine_counts(x64):
    grid = additive()
    factors = cl.concept_factors(grid.x, grid.labels, N_VALUES)
    wider = cl.concept_factors(grid.x, grid.labels, (6, 3, 2))
    assert not np.any(wider.means[0][4:])
    assert np.array_equal(wider.counts[0][4:], [0, 0])
    for kind in ("factor", "difference"):
        chex.assert_trees_all_close(cl.factor_cosines(wider, kind), cl.factor_cosines(factors, kind), atol=1e-12)
    assert cl.factor_cosines(factors, "difference").matrix[2, 2] == 1  # two values have a single difference
    one = cl.Factors((factors.means[0], factors.means[1][:1]), (factors.counts[0], factors.counts[1][:1]))
    assert np.isnan(cl.factor_cosines(one).matrix[1, 1])
    assert np.isfinite(cl.factor_cosines(one).within)


@functools.partial(jax.jit, static_argnums=2)
def losses_of(x, labels, n_values):
    return (
        jax.value_and_grad(cl.factorization_loss)(x, labels, n_values),
        jax.value_and_grad(lambda x: cl.orthogonality_loss(cl.concept_factors(x, labels, n_values), "factor"))(x),
    )


@pytest.mark.slow
def test_losses_are_the_scores_and_their_gradients_are_finite_also_with_values_without_examples(x64):
    grid = additive()
    x = grid.x + jax.random.normal(jax.random.key(5), grid.x.shape)
    (loss, gradient), (cosine, slope) = losses_of(x, grid.labels, (5, 3, 2))
    assert abs(loss - 1 + cl.linear_factorization_r2(x, grid.labels, N_VALUES, False).r2) < 1e-9
    factors = cl.concept_factors(x, grid.labels, N_VALUES)
    unit = [m / jnp.linalg.norm(m, axis=1, keepdims=True) for m in factors.means]
    squares = [(a @ b.T) ** 2 for i, a in enumerate(unit) for b in unit[i + 1 :]]
    assert abs(cosine - sum(map(jnp.sum, squares)) / sum(s.size for s in squares)) < 1e-6
    for value, own, which in ((loss, gradient, 0), (cosine, slope, 1)):
        moved = losses_of(x + 1e-6 * own, grid.labels, (5, 3, 2))[which][0]
        assert np.isclose((moved - value) / 1e-6, jnp.sum(own**2), rtol=1e-4)
    (loss, gradient), _ = losses_of(grid.x, grid.labels, (5, 3, 2))
    assert loss < 1e-9
    assert float(jnp.max(jnp.abs(gradient))) < 1e-9
    assert cl.orthogonality_loss(cl.concept_factors(grid.x, grid.labels, N_VALUES)) < 1e-12


@pytest.mark.eight_devices
def test_factors_scores_and_decomposition_of_sharded_examples_equal_those_of_one_device():
    grid = additive(noise=0.5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x, labels = jax.device_put((grid.x, grid.labels), NamedSharding(mesh, P("data")))
    for method in ("means", "lstsq"):
        chex.assert_trees_all_close(
            cl.concept_factors(x, labels, N_VALUES, method),
            cl.concept_factors(grid.x, grid.labels, N_VALUES, method),
            atol=1e-5,
        )
    one, many = (cl.decompose(lambda pair=pair: [pair], N_VALUES) for pair in ((grid.x, grid.labels), (x, labels)))
    chex.assert_trees_all_close(many, one, atol=1e-4)
    for whiten in (False, True):
        expected = cl.linear_factorization_r2(grid.x, grid.labels, N_VALUES, whiten)
        assert abs(cl.linear_factorization_r2(x, labels, N_VALUES, whiten).r2 - expected.r2) < 1e-5
        assert abs(cl.decomposition_r2(many, whiten).r2 - expected.r2) < 1e-5


X, LABELS = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32), np.asarray([[0, 1], [1, 0]] * 3)
FACTORS = cl.Factors((jnp.ones((2, 3)), jnp.ones((2, 3))), (jnp.ones(2, jnp.int32), jnp.ones(2, jnp.int32)))


def with_nan():
    x = X.copy()
    x[4, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cl.concept_factors(X[0], LABELS, (2, 2)), ValueError, r"x: expected embeddings \[examples, d\]"),
        (
            lambda: cl.concept_factors(LABELS, LABELS, (2, 2)),
            TypeError,
            "x: expected floating-point embeddings, got in",
        ),
        (lambda: cl.concept_factors(X[:1], LABELS[:1], (2, 2)), ValueError, "x: expected 2 examples or more, got 1"),
        (lambda: cl.concept_factors(with_nan(), LABELS, (2, 2)), ValueError, "got NaN or infinity in example 4"),
        (lambda: cl.concept_factors(X, LABELS[:5], (2, 2)), ValueError, "labels: expected those of 6 examples, got 5"),
        (lambda: cl.concept_factors(X, LABELS[:, 0], (2, 2)), ValueError, r"labels: expected \[examples, concepts\]"),
        (lambda: cl.concept_factors(X, X, (2, 2, 2)), TypeError, "labels: expected integers, got float32"),
        (lambda: cl.concept_factors(X, -LABELS, (2, 2)), ValueError, "expected 0 to 1 for concept 0, got -1 to 0"),
        (lambda: cl.concept_factors(X, LABELS, (2, 1)), ValueError, "expected 0 to 0 for concept 1, got 0 to 1"),
        (lambda: cl.concept_factors(X, LABELS, (2,)), ValueError, "n_values: expected a number above 0 for each of 2"),
        (lambda: cl.concept_factors(X, LABELS, (2, 2), "mean"), ValueError, "method: expected one of"),
        (lambda: cl.reconstruct(FACTORS, LABELS[:, :1]), ValueError, r"labels: expected \[examples, 2\]"),
        (lambda: cl.linear_factorization_r2(0 * X, LABELS, (2, 2)), ValueError, "expected embeddings that differ"),
        (
            lambda: cl.linear_factorization_r2(X, LABELS, (2, 2), projector=np.eye(2)),
            ValueError,
            r"projector: expected \[3, r\], got shape \[2, 2\]",
        ),
        (lambda: cl.factor_cosines(FACTORS, "sum"), ValueError, "kind: expected one of"),
        (
            lambda: cl.factor_cosines(cl.Factors(FACTORS.means[:1], FACTORS.counts[:1])),
            ValueError,
            "factors: expected those of 2 concepts or more, got 1",
        ),
        (
            lambda: cl.orthogonality_loss(cl.Factors(FACTORS.means[:1], FACTORS.counts[:1])),
            ValueError,
            "factors: expected those of 2 concepts or more, got 1",
        ),
        (lambda: cl.orthogonality_loss(FACTORS, "sum"), ValueError, "kind: expected 'factor' or 'difference'"),
        (lambda: cl.effective_rank(FACTORS, 0.0), ValueError, "share: expected a number above 0"),
        (lambda: cl.probe_span([]), ValueError, "weights: expected those of one concept or more"),
        (lambda: cl.probe_span([X, X[:, :2]]), ValueError, r"weights: expected \[values, 3\] for concept 1"),
        (lambda: cl.probe_span([with_nan()]), ValueError, "NaN or infinity in concept 0"),
        (lambda: cl.probe_span([0 * X]), ValueError, "expected a singular value above"),
        (lambda: cl.span_r2(X, LABELS, (2, 2), [X]), ValueError, "weights: expected those of 2 concepts, got 1"),
        (lambda: cl.decompose(lambda: [], (2, 2)), ValueError, "blocks: expected 2 examples or more, got 0"),
        (
            lambda: cl.decompose(iter([[(X, LABELS)], []]).__next__, (2, 2)),
            ValueError,
            "blocks: expected the 6 examples of the first pass in the second, got 0",
        ),
        (
            lambda: cl.decomposition_r2(cl.decompose(lambda: [(0 * X, LABELS)], (2, 2))),
            ValueError,
            "expected embeddings that differ",
        ),
        (lambda: cl.orthogonal_factor_embedding(jax.random.key(0), (2, 1), 4), ValueError, "n_values: expected 2"),
        (lambda: cl.orthogonal_factor_embedding(jax.random.key(0), (3, 2), 2), ValueError, "d: expected at least the"),
        (
            lambda: cl.orthogonal_factor_embedding(jax.random.key(0), (3, 2), 9, (3, 1)),
            ValueError,
            "ranks: expected 1 to n - 1",
        ),
        (lambda: cl.random_relu_features(jax.random.key(0), X, 0), ValueError, "depth, width: expected 1 or more"),
        (lambda: cl.transformed_digits(0), ValueError, "per_digit: expected 1 to 100, got 0"),
    ],
)
def test_input_that_can_not_serve_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_names_of_the_specification_are_public():
    names = """Factors concept_factors reconstruct FactorizationScore linear_factorization_r2 probe_span span_r2
    factor_cosines effective_rank fit_concept_probes split_combinations compositional_accuracy min_dimension
    two_level_min_dimension check_divisibility stability_gap orthogonal_factor_embedding factorization_loss
    orthogonality_loss"""
    assert set(names.split()) <= set(cl.__all__)
    assert all(callable(getattr(cl, name)) for name in cl.__all__)
