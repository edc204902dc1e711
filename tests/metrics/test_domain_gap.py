"""Distances between two samples: an oracle's numbers, and what makes them distances."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import metrics


@jax.jit
def GAPS(x, y):
    return {
        "mmd2_unbiased_sigma1": metrics.mmd2(x, y),
        "mmd2_biased_sigma1": metrics.mmd2(x, y, biased=True),
        "coral": metrics.coral(x, y),
        "frechet": metrics.frechet_distance(x, y),
        "mean_gap": metrics.mean_gap(x, y),
    }


def test_domain_gaps_are_those_of_the_oracle(golden, x64):
    file = golden("few-shot-survey/bound_oracle")
    found = GAPS(jnp.asarray(file["source"]), jnp.asarray(file["target"]))
    found["proxy_a_from_err"] = metrics.proxy_a_distance(file["proxy_errs"])
    for name, value in found.items():
        chex.assert_trees_all_close(value, file[name], atol=1e-8)


def test_gaps_are_symmetric_not_negative_and_zero_for_equal_samples():
    rng = np.random.default_rng(0)
    # More examples than one block of rows; those of y vary in three directions only.
    x = jnp.asarray(0.5 * rng.standard_normal((300, 9)).astype(np.float32))
    y = x * jnp.array([1.0] * 3 + [0.0] * 6)[None] + 0.2
    there, back, none, near = GAPS(x, y), GAPS(y, x), GAPS(y, y), GAPS(x, y - 0.2)
    chex.assert_trees_all_close(there, back, rtol=1e-3)
    for name, value in there.items():
        # Roots of rounded eigenvalues: sqrt(1e-7) beside a trace of 1; an unbiased estimate is negative.
        assert -5e-3 < none[name] < min(3e-3, value / 10)
    assert near["mmd2_biased_sigma1"] < there["mmd2_biased_sigma1"]
    # An unbiased estimate leaves out pairs of an example with itself.
    assert none["mmd2_unbiased_sigma1"] < 0 <= none["mmd2_biased_sigma1"] + 1e-6


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
