import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from subspace_jax import linalg

from ..variants import rest_slow
from .cases import few, gaussian, seeds

FUNCTIONS = {
    linalg.cos_sqrt: lambda x: np.cos(np.sqrt(x)),
    linalg.sinc_sqrt: lambda x: np.sinc(np.sqrt(x) / np.pi),
    linalg.versine_sqrt: lambda x: np.sinc(np.sqrt(x) / 2 / np.pi) ** 2 / 2,
    linalg.arcsine_ratio: lambda x: np.arcsin(np.sqrt(x)) / np.sqrt(x * (1 - x)),
}
every_function = pytest.mark.parametrize("f", rest_slow(FUNCTIONS), ids=lambda f: f.__name__)


def with_eigenvalues(seed, lead, values):
    q = np.linalg.qr(gaussian(seed, *lead, len(values), len(values)))[0]
    return (q * values) @ q.mT


def matrix_function(f, values, seed, lead):
    q = np.linalg.qr(gaussian(seed, *lead, len(values), len(values)))[0]
    return (q * f(np.asarray(values))) @ q.mT


@every_function
@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 3e-7), (np.float64, 3e-15)])
def test_scalar_functions_match_numpy_across_their_branches(x64, f, dtype, bound):
    top = 0.9 if f is linalg.arcsine_ratio else 30.0
    x = np.concatenate([np.geomspace(1e-30, 0.02, 60), np.linspace(0.02, top, 40)]).astype(dtype)
    got = f(jnp.asarray(x))
    assert got.dtype == dtype
    chex.assert_trees_all_close(got, FUNCTIONS[f](x.astype(np.float64)), rtol=bound, atol=bound)


@every_function
def test_scalar_functions_and_slopes_are_smooth_at_zero(x64, f):
    below, at, above = (jnp.asarray(x) for x in (-1e-9, 0.0, 1e-9))
    slope = jax.grad(f)(at)
    chex.assert_trees_all_close([f(below), f(above)], [f(at) - 1e-9 * slope, f(at) + 1e-9 * slope], rtol=1e-15)
    chex.assert_trees_all_close(jax.grad(f)(below), jax.grad(f)(above), rtol=1e-7, atol=1e-8)
    # Both sides of the change from series to closed form.
    chex.assert_trees_all_close(jax.grad(f)(0.01 - 1e-13), jax.grad(f)(0.01 + 1e-13), rtol=1e-7, atol=1e-11)


@every_function
@few
@given(seeds, st.sampled_from([(0.0, 0.2, 0.9), (0.3, 0.3, 0.3), (0.0, 0.0, 0.5)]))
def test_matrix_functions_match_the_eigenvalues_they_were_built_from(x64, f, seed, values):
    lead = (2,)
    (got,) = linalg.spectral(lambda x: (f(x),), jnp.asarray(with_eigenvalues(seed, lead, values)))
    with np.errstate(invalid="ignore"):
        want = matrix_function(lambda x: np.where(x == 0, f(jnp.zeros(())), FUNCTIONS[f](x)), values, seed, lead)
    chex.assert_trees_all_close(got, want, rtol=1e-7, atol=1e-14)


@every_function
@few
@given(seeds, st.sampled_from([(0.1, 0.4, 0.7), (0.3, 0.3, 0.3), (0.0, 0.0, 0.5), (0.2, 0.2 + 1e-6, 0.2 + 1e-4)]))
def test_derivative_is_that_of_the_matrix_function_also_where_eigenvalues_meet(x64, f, seed, values):
    m = jnp.asarray(with_eigenvalues(seed, (), values))
    change = gaussian(seed + 1, 3, 3)
    change = jnp.asarray(change + change.T)

    def apply(m):
        return linalg.spectral(lambda x: (f(x),), m)[0]

    h = 1e-4  # the difference has an error of O(h^4) and, where it is well inside the domain, little rounding
    steps = [apply(m + i * h * change) for i in (-2, -1, 1, 2)]
    want = (steps[0] - 8 * steps[1] + 8 * steps[2] - steps[3]) / (12 * h)
    chex.assert_trees_all_close(jax.jvp(apply, (m,), (change,))[1], want, rtol=1e-8, atol=2e-9)


def test_derivative_is_linear_and_can_be_transposed(x64):
    m = jnp.asarray(with_eigenvalues(0, (2,), (0.1, 0.4, 0.4)))
    check_grads(
        jax.jit(lambda x: linalg.spectral(lambda v: (linalg.cos_sqrt(v), linalg.sinc_sqrt(v)), x + x.mT)),
        (m / 2,),
        order=1,
        rtol=1e-5,
        atol=1e-6,
    )


def test_square_root_matches_scipy(x64):
    m = with_eigenvalues(0, (), (0.1, 0.4, 2.0))
    got, inverse = linalg.spectral(lambda x: (jnp.sqrt(x), jax.lax.rsqrt(x)), jnp.asarray(m))
    chex.assert_trees_all_close(got, scipy.linalg.sqrtm(m), rtol=1e-7, atol=1e-14)
    chex.assert_trees_all_close(got @ inverse, np.eye(3), rtol=1e-7, atol=1e-13)


@pytest.mark.slow
def test_jit_and_vmap_agree(x64):
    m = jnp.asarray(with_eigenvalues(0, (3,), (0.1, 0.4, 2.0)))

    def apply(m):
        return linalg.spectral(lambda x: (linalg.cos_sqrt(x),), m)[0]

    chex.assert_trees_all_close(jax.jit(jax.vmap(apply))(m), apply(m), rtol=1e-7, atol=1e-15)
    gradients = jax.grad(lambda m: jnp.sum(apply(m) ** 2))
    chex.assert_trees_all_close(jax.jit(jax.vmap(gradients))(m), gradients(m), rtol=1e-7, atol=1e-14)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="square"):
        linalg.spectral(lambda x: (x,), jnp.ones((3, 2)))
    with pytest.raises(TypeError, match="bfloat16"):
        linalg.spectral(lambda x: (x,), jnp.ones((2, 2), jnp.bfloat16))
