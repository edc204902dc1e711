"""Effort's layer against what the authors' code returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, nn

every_layer = pytest.mark.parametrize(
    "name", ["layer_tall", *(pytest.param(f"layer_{name}", marks=pytest.mark.slow) for name in ("wide", "square"))]
)


@every_layer
def test_effort_layers_and_gradients_are_those_of_the_authors(name, golden, x64):
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


@every_layer
def test_effort_penalties_and_their_gradients_are_those_of_the_authors(name, golden, x64):
    g = {k: jnp.asarray(v) for k, v in golden(f"effort/{name}").items()}
    rules = {"w": adapters.Effort(g["S_res0"].shape[0], bases=True)}
    base, start = adapters.prepare(jax.random.key(0), {"w": g["W"].T}, rules)
    energy = jnp.sum(jnp.square(g["S_res0"]))
    bases = adapters.PrincipalBases(g["V_main"].T, g["U_main"].T, energy)

    @jax.jit
    def both(u, s, vt, bases):
        def orth(u, s, vt):
            return adapters.orthogonality_loss(u, vt, bases)

        def keep(u, s, vt):
            return adapters.energy_loss(g["weight_main"].T, u, s, vt, bases)

        return [jax.value_and_grad(f, (0, 1, 2))(u, s, vt) for f in (orth, keep)]

    for kind, (value, (du, ds, dvt)) in zip(("orth", "keep"), both(g["V1"].T, g["S1"], g["U1"].T, bases), strict=True):
        np.testing.assert_allclose(value, g[kind], rtol=1e-9)
        np.testing.assert_allclose(du, g[f"{kind}_dV"].T, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(dvt, g[f"{kind}_dU"].T, rtol=1e-9, atol=1e-12)
        if f"{kind}_dS" in g:
            np.testing.assert_allclose(ds, g[f"{kind}_dS"], rtol=1e-9, atol=1e-12)
    own = start["w"]
    at_start = both(own["u"], own["s"], own["vt"], base["w"].bases)
    np.testing.assert_allclose([value for value, _ in at_start], [g["orth0"], g["keep0"]], atol=1e-10)


@pytest.mark.slow
def test_effort_penalty_has_no_gradient_at_the_start():
    w = jax.random.normal(jax.random.key(0), (2, 10, 16))
    rules = {"w": adapters.Effort(2, bases=True)}
    base, start = adapters.prepare(jax.random.key(0), {"w": w}, rules)

    @jax.jit
    def penalty(trainable):
        return jax.value_and_grad(lambda t: adapters.effort_penalty(base, t, rules))(trainable)

    value, grads = penalty(start)
    # There are six more outputs than the rank: half of the root of six.
    np.testing.assert_allclose(value, 6**0.5 / 2, rtol=1e-4)
    # The norm of the outputs is smooth here, with rounding for a gradient; the others would have a slope of one.
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-5
    value, grads = penalty({"w": {**start["w"], "u": 1.1 * start["w"]["u"]}})
    assert value > 6**0.5 / 2 + 0.05
    assert float(jnp.abs(grads["w"]["u"]).max()) > 1e-2
    with pytest.raises(ValueError, match="no singular vectors"):
        adapters.effort_penalty({"w": w}, start, rules)


@pytest.mark.slow
def test_a_projected_residual_leaves_the_principal_directions_to_the_weight(x64):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)))
    rules = {"w": adapters.Effort(2, project=True)}
    base, start = adapters.prepare(jax.random.key(0), {"w": w}, rules)
    np.testing.assert_allclose(adapters.merge(base, start, rules)["w"], w, atol=1e-13)
    draw = np.random.default_rng(1).normal
    moved = {"w": {k: v + jnp.asarray(draw(size=v.shape)) for k, v in start["w"].items()}}
    merged, kept = adapters.merge(base, moved, rules, keep=True)
    assert float(jnp.abs(merged["w"] - w).max()) > 0.1
    bases = base["w"].bases
    np.testing.assert_allclose(bases.u.T @ merged["w"], bases.u.T @ w, atol=1e-12)
    np.testing.assert_allclose(merged["w"] @ bases.vt.T, w @ bases.vt.T, atol=1e-12)
    weight = adapters.bind(base, moved, rules)["w"]
    np.testing.assert_allclose(bases.u.T @ weight.u, 0, atol=1e-12)
    np.testing.assert_allclose(nn.linear(jnp.eye(7), weight), merged["w"], atol=1e-12)
    back = adapters.unmerge(merged, moved, rules, kept)["w"]
    np.testing.assert_allclose(back.weight, base["w"].weight, atol=1e-12)
    with pytest.raises(ValueError, match="needs the tree that prepare returned"):
        adapters.bind({"w": w}, moved, rules)


def test_effort_refuses_fields_and_weights_that_do_not_fit():
    with pytest.raises(ValueError, match="residual: expected"):
        adapters.Effort(0)
    with pytest.raises(ValueError, match="residual: 4 triplets"):
        adapters.prepare(jax.random.key(0), {"w": jnp.eye(3)}, {"w": adapters.Effort(4)})
