"""Distances between two samples: an oracle's numbers, and what makes them distances."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import metrics


def test_domain_gaps_are_those_of_the_oracle(golden, x64):
    file = golden("few-shot-survey/bound_oracle")
    pair = jnp.asarray(file["source"]), jnp.asarray(file["target"])
    found = {
        "mmd2_unbiased_sigma1": metrics.mmd2(*pair),
        "mmd2_biased_sigma1": metrics.mmd2(*pair, biased=True),
        "coral": metrics.coral(*pair),
        "frechet": metrics.frechet_distance(*pair),
        "mean_gap": metrics.mean_gap(*pair),
        "proxy_a_from_err": metrics.proxy_a_distance(file["proxy_errs"]),
    }
    for name, value in found.items():
        chex.assert_trees_all_close(value, file[name], atol=1e-8)


def test_gaps_are_symmetric_not_negative_and_zero_for_equal_samples():
    rng = np.random.default_rng(0)
    # More examples than one block of rows, and fewer than features.
    x, y = (jnp.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in ((300, 9), (6, 9)))
    frechet = jax.jit(metrics.frechet_distance)
    chex.assert_trees_all_close(frechet(x, y), frechet(y, x), rtol=1e-4)
    assert frechet(x, y) > 1.0
    # Roots of rounded eigenvalues: sqrt(1e-7) beside a trace of 9.
    chex.assert_trees_all_close(frechet(y, y), jnp.zeros(()), atol=3e-3)
    assert abs(float(metrics.mmd2(x, x, 2.0, biased=True))) < 1e-5
    assert metrics.mmd2(x, y + 1.0, 2.0) > metrics.mmd2(x, y, 2.0)


def test_proxy_a_distance_is_in_0_to_2():
    found = metrics.proxy_a_distance(jnp.array([0.0, 0.3, 0.5, 0.6, 1.0]))
    chex.assert_trees_all_close(found, jnp.array([2.0, 0.8, 0.0, 0.0, 0.0]), atol=1e-6)
    with pytest.raises(ValueError, match=r"err: expected errors in \[0, 1\]"):
        metrics.proxy_a_distance(1.1)


@pytest.mark.parametrize("shapes", [((5, 2), (5, 3)), ((5,), (5,)), ((1, 2), (5, 2))])
@pytest.mark.parametrize("measure", [metrics.mmd2, metrics.coral, metrics.frechet_distance, metrics.mean_gap])
def test_gaps_refuse_samples_of_other_widths_or_of_one_example(measure, shapes):
    with pytest.raises(ValueError, match=r"x, y: expected \[examples, n\]"):
        measure(*(jnp.ones(shape) for shape in shapes))
