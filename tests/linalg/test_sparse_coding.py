"""Orthogonal matching pursuit, and updates of dictionaries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import orthogonal_mp

from subspace_jax import linalg

from ..variants import rest_slow

D1, K, COLUMNS, S = 12, 20, 30, 5


def problem(seed=0, d1=D1, k=K, columns=COLUMNS):
    rng = np.random.default_rng(seed)
    dictionary = rng.standard_normal((d1, k))
    dictionary /= np.linalg.norm(dictionary, axis=0)
    return jnp.asarray(dictionary), jnp.asarray(rng.standard_normal((d1, columns)))


@functools.partial(jax.jit, static_argnums=2, static_argnames="tile")
def coded(dictionary, y, s, *, tile=64):
    values, indices = linalg.omp(dictionary, y, s, tile=tile)
    return linalg.densify(values, indices, dictionary.shape[1])


@pytest.mark.parametrize("tile", rest_slow([7, 64]))
def test_omp_equals_scikit_learn_whatever_the_tile(x64, tile):
    dictionary, y = problem()
    expected = orthogonal_mp(np.asarray(dictionary), np.asarray(y), n_nonzero_coefs=S)
    np.testing.assert_allclose(coded(dictionary, y, S, tile=tile), expected, atol=1e-8)


def test_omp_leaves_a_residual_orthogonal_to_the_chosen_atoms(x64):
    dictionary, y = problem()
    s = coded(dictionary, y, S)
    correlations = dictionary.T @ (y - dictionary @ s)
    assert (np.count_nonzero(s, axis=0) == S).all()
    assert np.abs(np.where(s != 0, correlations, 0)).max() < 1e-12


@pytest.mark.slow
def test_omp_with_a_basis_of_atoms_leaves_no_residual(x64):
    dictionary, y = problem()
    np.testing.assert_allclose(dictionary @ coded(dictionary, y, D1), y, atol=1e-8)


@pytest.mark.slow
def test_omp_with_one_atom_takes_the_most_correlated_and_of_an_orthonormal_dictionary_the_largest(x64):
    dictionary, y = problem()
    _, indices = linalg.omp(dictionary, y, 1)
    np.testing.assert_array_equal(indices[0], np.argmax(np.abs(dictionary.T @ y), axis=0))
    basis = jnp.linalg.qr(dictionary)[0][:, :8]
    inner = np.asarray(basis.T @ y)
    kept = np.argsort(-np.abs(inner), axis=0)[:3]
    expected = np.zeros_like(inner)
    np.put_along_axis(expected, kept, np.take_along_axis(inner, kept, axis=0), axis=0)
    np.testing.assert_allclose(coded(basis, y, 3), expected, atol=1e-12)


def test_omp_gives_vanished_columns_and_dependent_atoms_coefficients_of_zero():
    atoms = jnp.eye(3)[:, jnp.array([0, 0, 1, 2])]
    y = jnp.array([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    values, indices = jax.jit(linalg.omp, static_argnums=2)(atoms, y, 4)
    np.testing.assert_allclose(atoms @ linalg.densify(values, indices, 4), y, atol=1e-6)
    assert np.isfinite(values).all()
    assert (values[:, 1] == 0).all()
    assert (np.sort(indices, axis=0) == np.arange(4)[:, None]).all()


@pytest.mark.slow
def test_omp_codes_by_vmap_what_it_codes_one_by_one():
    problems = [problem(seed) for seed in (0, 1)]
    dictionaries, ys = (jnp.stack([p[i] for p in problems]).astype(jnp.float32) for i in (0, 1))
    values, indices = jax.vmap(lambda d, y: linalg.omp(d, y, 3))(dictionaries, ys)
    for i in (0, 1):
        own_values, own = linalg.omp(dictionaries[i], ys[i], 3)
        np.testing.assert_array_equal(indices[i], own)
        np.testing.assert_allclose(values[i], own_values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("update", rest_slow(["power", "svd", "mod"]))
def test_dictionary_updates_never_increase_the_error_and_keep_support_and_norms(x64, update):
    dictionary, y = problem()
    s = coded(dictionary, y, S).at[4].set(0)  # an atom that no column uses
    if update == "mod":
        new, coefficients = linalg.mod_update(y, dictionary, s)
    else:
        new, coefficients = linalg.ksvd_update(y, dictionary, s, 8 if update == "power" else "svd")
        np.testing.assert_array_equal(np.asarray(coefficients) != 0, np.asarray(s) != 0)
    before, after = (linalg.code_error(d, y, c) for d, c in ((dictionary, s), (new, coefficients)))
    assert after <= before + 1e-9
    assert after < 0.9 * before
    np.testing.assert_allclose(np.linalg.norm(new, axis=0), 1, atol=1e-12)
    np.testing.assert_array_equal(new[:, 4], dictionary[:, 4])


def test_fit_dictionary_ends_where_a_round_gains_too_little_and_fills_up_missing_atoms():
    _, y = problem(columns=9)
    y = y.astype(jnp.float32)
    fit = jax.jit(lambda tol: linalg.fit_dictionary(y, 12, 3, n_iter=6, solver="mod", tol=0.5))
    found = fit(0.5)
    ran = int(np.isfinite(found.trace[:, 0]).sum())
    assert 2 <= ran < 6
    assert np.isnan(np.asarray(found.trace)[ran:]).all()
    assert (np.diff(found.indices, axis=0) > 0).all()
    np.testing.assert_allclose(np.linalg.norm(found.dictionary, axis=0), 1, atol=1e-5)
    start = linalg.first_atoms(jax.random.key(0), y, 12, "data")
    assert np.linalg.matrix_rank(np.asarray(start)) == 12
    with pytest.raises(ValueError, match="12 atoms from 9 vectors need pad=True"):
        linalg.fit_dictionary(y, 12, 3, pad=False)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda d, y: linalg.omp(d, y, K + 1), r"sparsity: expected 1 to 20"),
        (lambda d, y: linalg.omp(d, y, 0), r"sparsity: expected 1 to 20"),
        (lambda d, y: linalg.omp(d, y[:-1], 2), r"dictionary, y: expected \[d1, k\] and \[d1, d2\]"),
        (lambda d, y: linalg.omp(d, y, 2, tile=0), "tile: expected at least 1"),
        (lambda d, y: linalg.omp_gram(d.T @ d, d.T @ y[:, :3], 2, tile=-1), "tile"),
        (lambda d, y: linalg.omp_gram(jnp.eye(3, dtype=d.dtype), d.T @ y, 2), "atoms_gram: expected"),
        (lambda d, y: linalg.densify(y, y[1:], 4), "values, indices"),
        (lambda d, y: linalg.ksvd_update(y, d, y), "y, dictionary, s"),
        (lambda d, y: linalg.ksvd_update(y, d, d.T @ y, 0), "n_power"),
        (lambda d, y: linalg.mod_update(y, d[1:], d.T @ y), "y, dictionary, s"),
        (lambda d, y: linalg.fit_dictionary(y, 4, 5), "k, sparsity: expected k >= sparsity"),
        (lambda d, y: linalg.fit_dictionary(y, 0, 0), "k, sparsity"),
        (lambda d, y: linalg.fit_dictionary(y, 4, 2, n_iter=0), "n_iter"),
        (lambda d, y: linalg.fit_dictionary(y, 4, 2, solver="lars"), "solver: expected one of"),
        (lambda d, y: linalg.fit_dictionary(y, 4, 2, init="zeros"), "init: expected 'data'"),
        (lambda d, y: linalg.fit_dictionary(y, 4, 2, init=d), "init: expected atoms"),
        (lambda d, y: linalg.fit_dictionary(y[0], 4, 2), "y: expected"),
    ],
)
def test_sparse_coding_refuses_what_does_not_fit(call, match):
    dictionary, y = problem()
    with pytest.raises(ValueError, match=match):
        call(dictionary.astype(jnp.float32), y.astype(jnp.float32))


def test_sparse_coding_refuses_integers():
    with pytest.raises(TypeError, match="float32 or float64"):
        linalg.omp(jnp.eye(3, dtype=jnp.int32), jnp.ones((3, 2)), 1)
