"""Sparse autoencoders: identities of the specification, scores beside their oracles, and what is refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import wasserstein_distance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from subspace_jax import linalg, metrics
from subspace_jax.interpret import polysae
from subspace_jax.interpret.polysae import core, decoder

CONFIG = polysae.PolySAEConfig(8, 24, 3, (8, 4, 3))


@pytest.fixture(scope="module")
def params():
    return jax.jit(polysae.init_params, static_argnums=1)(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def codes():
    rng = np.random.default_rng(0)
    return jnp.asarray((rng.random((10, 24)) * (rng.random((10, 24)) < 0.3)).astype(np.float32))


def test_qr_positive_is_orthonormal_has_a_positive_diagonal_and_changes_nothing_again():
    u = jax.random.normal(jax.random.key(1), (40, 6))
    q = jax.jit(polysae.qr_positive)(u)
    assert np.max(np.abs(linalg.gram(q, q) - np.eye(6))) < 1e-6
    r = np.asarray(linalg.gram(q, u))
    assert (np.diag(r) > 0).all()
    np.testing.assert_allclose(np.tril(r, -1), 0, atol=1e-5)
    np.testing.assert_allclose(jax.jit(polysae.qr_positive)(q), q, atol=1e-6)
    projected = polysae.stiefel_retract({"u": True, "v": False})({"u": u, "v": u})
    np.testing.assert_array_equal(projected["v"], u)
    np.testing.assert_allclose(projected["u"], q, atol=1e-6)


def test_poly_decode_is_the_polynomial_of_the_whole_tensors(x64):
    rng = np.random.default_rng(0)
    own = {"U": rng.standard_normal((5, 3)), "b_dec": rng.standard_normal(4), "lambda2": -0.5, "lambda3": 0.7}
    own |= {f"C{j}": rng.standard_normal((4, r)) for j, r in enumerate((3, 2, 2), start=1)}
    z, u = rng.random((6, 5)), own["U"]
    a = own["C1"] @ u.T
    b = np.einsum("dr,ir,jr->dij", own["C2"], u[:, :2], u[:, :2])
    gamma = np.einsum("dr,ir,jr,kr->dijk", own["C3"], u[:, :2], u[:, :2], u[:, :2])
    expected = own["b_dec"] + z @ a.T - 0.5 * np.einsum("dij,ni,nj->nd", b, z, z)
    expected = expected + 0.7 * np.einsum("dijk,ni,nj,nk->nd", gamma, z, z, z)
    given = {name: jnp.asarray(x) for name, x in own.items()}
    np.testing.assert_allclose(polysae.poly_decode(given, jnp.asarray(z)), expected, atol=1e-10)
    strength = polysae.interaction_strength(given)
    np.testing.assert_allclose(strength, 0.5 * np.linalg.norm(b, axis=0), atol=1e-10)
    pairs = jnp.asarray(list(itertools.combinations(range(5), 2)))
    of_pairs = polysae.interaction_strength(given, pairs)
    np.testing.assert_allclose(of_pairs, strength[pairs[:, 0], pairs[:, 1]], atol=1e-10)


def test_poly_decode_without_higher_orders_is_any_linear_decoder(x64):
    rng = np.random.default_rng(0)
    dictionary, bias, z = rng.standard_normal((12, 5)), rng.standard_normal(5), rng.random((7, 12))
    u, s, vt = np.linalg.svd(dictionary, full_matrices=False)
    given = {"U": u, "C1": vt.T * s, "C2": np.ones((5, 2)), "C3": np.ones((5, 2)), "b_dec": bias}
    given = {name: jnp.asarray(x) for name, x in given.items()} | {"lambda2": 0.0, "lambda3": 0.0}
    found = jax.jit(polysae.poly_decode)(given, jnp.asarray(z))
    np.testing.assert_allclose(found, z @ dictionary + bias, atol=1e-12)
    linear = polysae.linear_decode({"W_dec": jnp.asarray(dictionary), "b_dec": jnp.asarray(bias)}, jnp.asarray(z))
    np.testing.assert_allclose(linear, found, atol=1e-12)


@pytest.mark.parametrize("form", ["shared", pytest.param("separate", marks=pytest.mark.slow), "linear"])
def test_decoder_norms_are_those_of_what_single_features_add(form):
    config = polysae.PolySAEConfig(8, 24, 3, (8, 4, 3), decoder=form)

    @jax.jit
    def both(key):
        params = polysae.init_params(key, config)
        alone = decoder.decode(config, params, jnp.eye(24)) - params["b_dec"][None]
        return polysae.decoder_norms(config, params), jnp.linalg.norm(alone, axis=1)

    norms, expected = both(jax.random.key(0))
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


def test_fold_scale_keeps_codes_and_divides_reconstructions(params):
    x = jax.random.normal(jax.random.key(2), (10, 8))
    folded = polysae.fold_scale(params, 3.0)
    run = jax.jit(lambda params, x: _as_module(params)(x))
    trained, plain = run(params, 3 * x), run(folded, x)
    np.testing.assert_allclose(plain.codes, trained.codes, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plain.recon, trained.recon / 3, rtol=1e-5, atol=1e-5)


def _as_module(params):
    return polysae.PolySAE(CONFIG, params)


def test_sparse_codes_decode_as_dense_ones_with_equal_gradients(params):
    pre = jax.random.normal(jax.random.key(3), (10, 24))

    def value(params, pre, dense):
        z = polysae.topk(pre, 4) if dense else polysae.topk_code(pre, 4)
        return jnp.sum(jnp.sin(polysae.poly_decode(params, z)))

    of_both = jax.jit(jax.value_and_grad(value, argnums=(0, 1)), static_argnums=2)

    names = ("U", "C1", "C2", "C3", "lambda2", "lambda3", "b_dec")
    own = {name: params[name] for name in names}
    found, expected = (of_both(own, pre, dense) for dense in (False, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), found, expected)


def test_no_array_of_all_features_is_made_in_the_decoder_of_a_sparse_code(params):
    code = polysae.SparseCode(jnp.ones((10, 3)), jnp.zeros((10, 3), jnp.int32))

    def value(values):
        return jnp.sum(polysae.poly_decode(params, code._replace(values=values)))

    made = jax.make_jaxpr(jax.grad(value))(code.values)
    assert "10,24]" not in str(made)
    assert "10,3,8]" not in str(made)


def test_batch_topk_of_one_example_is_topk_and_topk_of_all_features_is_relu():
    pre = jax.random.normal(jax.random.key(4), (5, 24))
    np.testing.assert_array_equal(polysae.batch_topk(pre[:1], 6), polysae.topk(pre[:1], 6))
    np.testing.assert_array_equal(polysae.topk(pre, 24), jax.nn.relu(pre))


@pytest.mark.parametrize("k", [2.5, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 7))])
def test_batch_topk_keeps_what_a_stable_sort_keeps(k):
    rng = np.random.default_rng(0)
    pre = rng.integers(-3, 4, (6, 8)).astype(np.float32)  # with ties
    weights = np.array([1, 1, 0, 1, 1, 0], np.float32)
    kept = np.maximum(pre, 0) * weights[:, None]
    order = np.argsort(-kept.reshape(-1), kind="stable")[: int(k * 4)]
    expected = np.zeros(48, np.float32)
    expected[order] = kept.reshape(-1)[order]
    found = polysae.batch_topk(jnp.asarray(pre), k, weights=jnp.asarray(weights))
    np.testing.assert_array_equal(found, expected.reshape(6, 8))


@pytest.mark.parametrize("sparsify", [polysae.topk, polysae.batch_topk])
def test_gradients_of_codes_reach_kept_entries_alone(sparsify):
    pre = jax.random.normal(jax.random.key(5), (5, 24))
    grads = jax.grad(lambda pre: jnp.sum(sparsify(pre, 3)))(pre)
    np.testing.assert_array_equal(grads, (sparsify(pre, 3) > 0).astype(np.float32))


def test_features_fire_only_at_examples_that_count(params):
    x = jax.random.normal(jax.random.key(6), (6, 8))
    weights = jnp.asarray([1.0, 0, 1, 0, 0, 1])
    state = core.init_state(CONFIG)
    loss = jax.jit(functools.partial(polysae.poly_sae_loss, CONFIG))
    found = loss(params, x, state, weights=weights)
    expected = loss(params, x[np.array([0, 2, 5])], state)
    assert found[0] == pytest.approx(float(expected[0]), rel=1e-6)
    np.testing.assert_array_equal(found[1].fired, expected[1].fired)
    after = core.next_state(state, found[1])
    np.testing.assert_array_equal(after.steps_since_fired, np.where(found[1].fired, 0, 1))


@pytest.mark.slow
def test_bfloat16_matmuls_decode_to_their_precision(params, codes):
    exact, rounded = (
        jax.jit(functools.partial(decoder.decode, polysae.PolySAEConfig(8, 24, 3, (8, 4, 3), dtype=dtype)))(
            params, codes
        )
        for dtype in ("float32", "bfloat16")
    )
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.05 * float(jnp.max(jnp.abs(exact))))


def test_the_module_decodes_what_it_encodes_and_has_the_parameters_of_its_config():
    config = polysae.PolySAEConfig(8, 24, 2.5, (8, 4, 3), sparsifier="batchtopk", rescale=True)
    sae = polysae.PolySAE(config, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(7), (6, 8))
    out = sae(x)
    np.testing.assert_allclose(sae.decode(sae.encode(x)), out.recon, rtol=1e-6)
    assert int(jnp.sum(out.codes > 0)) == 15
    alone = sae(x, threshold=0.05).codes
    np.testing.assert_array_equal(alone, jnp.where(out.pre_acts > 0.05, out.pre_acts, 0))
    assert sae.params().keys() == polysae.init_params(jax.random.key(0), config).keys()


def test_explained_variance_and_cooccurrence_count_what_they_say(codes):
    x = jax.random.normal(jax.random.key(8), (10, 4))
    assert metrics.explained_variance(x, x) == 1
    mean = jnp.broadcast_to(jnp.mean(x, axis=0)[None], x.shape)
    assert metrics.explained_variance(x, mean) == pytest.approx(0, abs=1e-6)
    active = np.asarray(codes) > 0
    expected = sum(np.outer(row, row).astype(int) for row in active)
    np.testing.assert_array_equal(metrics.cooccurrence(codes), expected)


@pytest.mark.parametrize("positive", [5, 3])
def test_mean_wasserstein1_is_that_of_scipy_column_by_column(codes, positive):
    labels = np.arange(10) < positive
    z = np.asarray(codes)
    expected = [wasserstein_distance(z[labels, j], z[~labels, j]) for j in range(24)]
    found = metrics.mean_wasserstein1(codes, jnp.asarray(labels))
    assert found == pytest.approx(np.mean(expected), abs=1e-6)
    if positive == 5:
        gaps = np.abs(np.sort(z[labels], axis=0) - np.sort(z[~labels], axis=0))
        assert found == pytest.approx(gaps.mean(), abs=1e-6)


def test_sparse_probe_f1_is_that_of_scikit_learn_on_the_same_draws():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [40, 60])
    acts = np.maximum(rng.standard_normal((100, 6)) + 0.8 * labels[:, None] * np.arange(6) / 5, 0)
    found = metrics.sparse_probe_f1(acts, labels, ks=(1, 3), train=48, test=12)
    draws, expected = np.random.default_rng(0), {1: [], 3: []}
    for c in (0, 1):
        pools = [draws.permutation(np.flatnonzero(part)) for part in (labels == c, labels != c)]
        fit, held = (np.concatenate([pool[part] for pool in pools]) for part in (slice(6, 30), slice(6)))
        y, truth = (labels[rows] == c for rows in (fit, held))
        gap = np.abs(acts[fit][y].mean(axis=0) - acts[fit][~y].mean(axis=0))
        for k in expected:
            kept = np.argsort(-gap)[:k]
            probe = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(acts[fit][:, kept], y)
            expected[k].append(f1_score(truth, probe.predict(acts[held][:, kept])))
    assert found == pytest.approx({k: np.mean(values) for k, values in expected.items()}, abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (25, 4, 3)}, "ranks: expected R1 of at most the 24 features, got 25"),
        ({"ranks": (4, 5, 3)}, "ranks: expected R2 and R3 of at most R1"),
        ({"ranks": (4, 3, 5)}, "ranks: expected R2 and R3 of at most R1"),
        ({"ranks": (4, 2, 3), "decoder": "separate"}, "ranks: expected R1 >= R2 >= R3"),
        ({"ranks": (4, 2)}, "ranks: expected three integers"),
        ({"k": 25}, "k: expected a number above 0 and at most the 24 features, got 25"),
        ({"k": 0}, "k: expected a number above 0"),
        ({"k": 2.5}, "k: expected an integer"),
        ({"widths": (8, 8, 24)}, "widths: expected increasing"),
        ({"widths": (8, 16)}, "widths: expected increasing widths that end with the 24"),
        ({"order": 4}, "order: expected 1, 2 or 3, got 4"),
        ({"sparsifier": "top"}, "sparsifier: expected one of"),
        ({"bandwidth": 0.0}, "bandwidth: expected a number above 0"),
        ({"l0_coefficient": -1.0}, "l0_coefficient: expected at least 0"),
        ({"d_in": 0}, "d_in: expected an integer of at least 1"),
    ],
)
def test_polysae_config_refuses_what_can_not_serve(changes, message):
    with pytest.raises(ValueError, match=message):
        polysae.PolySAEConfig(**({"d_in": 8, "d_sae": 24, "k": 3, "ranks": (8, 4, 3)} | changes))


def test_activations_and_codes_of_another_kind_are_refused(params, codes):
    state = core.init_state(CONFIG)
    with pytest.raises(ValueError, match=r"x: expected activations \[B, 8\], got shape \[2, 9\]"):
        polysae.poly_sae_loss(CONFIG, params, jnp.zeros((2, 9)), state)
    with pytest.raises(ValueError, match="x: expected floating-point activations, got int32"):
        polysae.poly_sae_loss(CONFIG, params, jnp.zeros((2, 8), jnp.int32), state)
    with pytest.raises(ValueError, match="order: expected 1, 2 or 3, got 0"):
        polysae.poly_decode(params, codes, 0)
    with pytest.raises(ValueError, match="z: expected codes of 24 features"):
        polysae.poly_decode(params, codes[:, :20])
    with pytest.raises(ValueError, match="k: expected a number above 0 and at most the 24 features, got 25"):
        polysae.topk(codes, 25)
    with pytest.raises(ValueError, match="params: expected a decoder of order 2 or 3"):
        polysae.interaction_strength({"U": params["U"], "C1": params["C1"]})
    with pytest.raises(ValueError, match="PolySAE: expected params"):
        polysae.PolySAE(CONFIG)
    with pytest.raises(ValueError, match="acts, labels: expected"):
        metrics.mean_wasserstein1(codes, jnp.zeros(3, bool))
    for bad, message in (
        ({"labels": np.zeros(10, int)}, "labels: expected two classes or more, got 1"),
        ({"ks": (25,)}, "ks: expected 1 to 24 features, got 25"),
        ({"acts": np.full((10, 24), np.nan)}, "acts: expected finite features"),
        ({"labels": np.arange(10)}, "labels: expected two examples or more"),
    ):
        given = {"acts": np.asarray(codes), "labels": np.arange(10) % 2} | bad
        with pytest.raises(ValueError, match=message):
            metrics.sparse_probe_f1(given.pop("acts"), given.pop("labels"), **given)


def test_default_widths_are_those_of_the_authors():
    assert polysae.default_widths(4096) == (4096,)
    assert polysae.default_widths(16384) == (512, 2048, 16384)
    assert polysae.default_widths(65536) == (1024, 4096, 16384, 32768, 65536)
    assert polysae.default_widths(100_000) == (2048, 8192, 32768, 65536, 100_000)


def test_every_name_of_the_specification_is_public():
    here = {"PolySAEConfig", "PolySAE", "PolySAEOutput", "SAEState", "poly_decode", "poly_decode_separate", "topk"}
    here |= {"decoder_norms", "linear_directions", "interaction_strength", "batch_topk", "jumprelu", "step_fn"}
    here |= {"auxk_code", "poly_sae_loss", "stiefel_retract", "qr_positive", "poly_sae_optimizer"}
    assert here <= set(polysae.__all__)
    assert all(hasattr(polysae, name) for name in polysae.__all__)
    scores = {"sparse_probe_f1", "mean_wasserstein1", "explained_variance", "cooccurrence"}
    assert scores <= set(metrics.__all__)
