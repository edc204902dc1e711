"""Sparse autoencoders: what the authors' code computed, and the identities of the specification."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax.interpret import polysae
from subspace_jax.interpret.polysae import core, retraction, sparsify

CONFIG = polysae.PolySAEConfig(8, 24, 3, (8, 4, 3))


def params_of(g, prefix):
    """Parameters of a golden file; ``U_shared`` is U here."""
    found = {name.removeprefix(f"{prefix}/"): jnp.asarray(g[name]) for name in g if name.startswith(f"{prefix}/")}
    return {name.replace("_shared", ""): x for name, x in found.items()}


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("form", ["shared", "sep"])
@pytest.mark.parametrize("seed", ["a", pytest.param("b", marks=pytest.mark.slow)])
def test_decode_norms_and_gradients_are_those_of_the_authors_code(x64, golden, form, order, seed):
    g = golden("polysae/decode")
    prefix = f"{form}_o{order}_{seed}"
    own = params_of(g, prefix)
    ranks = tuple(int(r) for r in own["ranks"])
    params = {n: x for n, x in own.items() if f"grad_{n}" in own}
    poly = polysae.poly_decode if form == "shared" else polysae.poly_decode_separate
    config = polysae.PolySAEConfig(8, 24, 3, ranks, order, decoder="shared" if form == "shared" else "separate")
    x, z = jnp.asarray(g["x"]), jnp.asarray(g["z"])

    def loss(params, z):
        return jnp.mean(jnp.sum((poly(params, z, order) - x) ** 2, axis=1))

    value, (grads, grad_z) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, z)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    close(poly(params, z, order), own["y"])
    close(value, own["loss"])
    close(grad_z, own["grad_z"])
    for name, grad in grads.items():
        close(grad, own[f"grad_{name}"], err_msg=name)
    close(polysae.decoder_norms(config, params), own["decoder_norms"])
    close(polysae.linear_directions(config, params), own["linear_directions"])


def test_retractions_are_those_of_the_authors_code(x64, golden):
    g = golden("polysae/retraction")
    np.testing.assert_allclose(
        polysae.qr_positive(jnp.asarray(g["shared/in_U_shared"])), g["shared/out_U_shared"], atol=1e-9
    )
    for form in ("sep_equal", "sep_nested"):
        found = jax.jit(retraction.retract_separate)({f"U{j}": jnp.asarray(g[f"{form}/in_U{j}"]) for j in (1, 2, 3)})
        for j in (1, 2, 3):
            np.testing.assert_allclose(found[f"U{j}"], g[f"{form}/out_U{j}"], atol=1e-9, err_msg=f"{form} {j}")


def test_sparsifiers_are_those_of_the_authors_code(x64, golden):
    g = golden("polysae/sparsify")
    pre, k = jnp.asarray(g["pre"]), int(g["k"])
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12)
    close(polysae.topk(pre, k), g["topk"])
    close(polysae.topk(pre, pre.shape[1] - 2), g["topk_big_k"])
    close(polysae.batch_topk(pre, k), g["batchtopk"])
    close(polysae.batch_topk(pre, float(g["batchtopk_frac_k"])), g["batchtopk_frac"])
    threshold = jnp.zeros(())
    for code, expected in zip(g["ema_acts"], g["ema_threshold"], strict=True):
        threshold = sparsify.next_threshold(threshold, jnp.asarray(code))
        close(threshold, expected)
    x, theta, w = (jnp.asarray(g[f"jr_{name}"]) for name in ("x", "thr", "w"))
    for function, name in ((polysae.jumprelu, "jr"), (polysae.step_fn, "step")):
        apply = functools.partial(lambda f, x, theta: f(x, theta, float(g["jr_bw"])), function)
        y, back = jax.vjp(apply, x, theta)
        close(y, g[f"{name}_y"])
        grad_x, grad_theta = back(w)
        close(grad_theta, g[f"{name}_grad_thr"])
        close(grad_x, g["jr_grad_x"] if name == "jr" else np.zeros_like(grad_x))
    close(polysae.auxk_code(pre, jnp.asarray(g["aux_dead"]), int(g["aux_k"])), g["aux_acts"])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("topk_norescale", marks=pytest.mark.slow),
        "topk_rescale",
        pytest.param("batchtopk", marks=pytest.mark.slow),
        "matryoshka",
    ],
)
def test_six_steps_of_training_are_those_of_the_authors_code(x64, golden, name):
    g = golden(f"polysae/train_{name}")
    config = polysae.PolySAEConfig(
        8,
        24,
        int(g["k"]),
        tuple(int(r) for r in g["ranks"]),
        sparsifier=name.partition("_")[0],
        rescale=name == "topk_rescale",
        widths=tuple(int(w) for w in g["widths"]) if name == "matryoshka" else None,
        inner="linear",
    )
    tx = core.poly_sae_optimizer(float(g["lr"]))

    @jax.jit
    def step(params, opt_state, state, x):
        loss = functools.partial(polysae.poly_sae_loss, config)
        (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(params, x, state)
        with jax.numpy_dtype_promotion("standard"):  # Optax raises float64 to int32 powers
            updates, opt_state = tx.update(grads, opt_state)
        new = core.retract(config, optax.apply_updates(params, updates))
        return new, opt_state, (value, parts), optax.tree.norm(grads)

    params = params_of(g, "init")
    if not config.has_dictionary:
        del params["W_dec"]
    opt_state, state = tx.init(params), core.init_state(config)._replace(threshold=jnp.zeros((), jnp.float64))
    for i in range(6):
        state = state._replace(steps_since_fired=jnp.where(g["dead"][i], 1001, 0).astype(jnp.int32))
        params, opt_state, (loss, parts), norm = step(params, opt_state, state, jnp.asarray(g["X"][i]))
        state = core.next_state(state, parts)
        codes = parts.codes.dense(24) if config.sparsifier == "topk" else parts.codes
        found = {"loss": loss, "mse": parts.mse, "aux": parts.aux, "inner": parts.inner, "grad_norm": norm}
        for key, value in (found | {"acts": codes}).items():
            np.testing.assert_allclose(value, g[key][i], rtol=1e-9, atol=1e-11, err_msg=f"{key} {i}")
        if i in (0, 5):
            expected = params_of(g, f"after{i + 1}")
            for key, value in params.items():
                np.testing.assert_allclose(value, expected[key], atol=1e-8, err_msg=f"{key} {i}")
    if config.whole_batch:
        np.testing.assert_allclose(state.threshold, g["topk_threshold"], rtol=1e-9)
