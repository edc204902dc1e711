"""Effort's layer against what the authors' code returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, nn


@pytest.mark.parametrize("name", ["layer_tall", "layer_wide", "layer_square"])
def test_layers_and_gradients_are_those_of_the_authors(name, golden, x64):
    g = {k: jnp.asarray(v) for k, v in golden(f"effort/{name}").items()}
    rules = {"w": adapters.Effort(g["S_res0"].shape[0])}
    # Their weights are [out, in].
    base, start = adapters.prepare(jax.random.key(0), {"w": g["W"].T}, rules)
    np.testing.assert_allclose(base["w"], g["weight_main"].T, atol=1e-12)
    np.testing.assert_allclose(start["w"]["s"], g["S_res0"], rtol=1e-10)
    np.testing.assert_allclose((start["w"]["u"] * start["w"]["s"][None]) @ start["w"]["vt"], g["res0"].T, atol=1e-12)
    np.testing.assert_allclose(adapters.merge(base, start, rules)["w"], g["W"].T, atol=1e-12)

    def apply(x, u, s, vt):
        return nn.linear(x, adapters.bind(base, {"w": {"u": u, "s": s, "vt": vt}}, rules)["w"], g["b"])

    y, back = jax.vjp(apply, g["x"], g["V1"].T, g["S1"], g["U1"].T)
    np.testing.assert_allclose(y, g["y"], rtol=1e-9, atol=1e-11)
    expected = (g["dx"], g["dV"].T, g["dS"], g["dU"].T)
    for got, wanted in zip(back(g["dout"]), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-11)


def test_settings_and_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="residual: expected"):
        adapters.Effort(0)
    with pytest.raises(ValueError, match="residual: 4 triplets"):
        adapters.prepare(jax.random.key(0), {"w": jnp.eye(3)}, {"w": adapters.Effort(4)})
