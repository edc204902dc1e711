"""Attention as heads with operators: golden vectors, Jacobians, gradients over distance, and the layer that trains."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subspace_jax.interpret import attention_ssm as ops

jacobian = jax.jit(ops.attention_jacobian)


def heads_of(g):
    return ops.AttentionHead(*(jnp.asarray(g[name]) for name in ("WQ_heads", "WK_heads", "V_heads")))


@functools.cache
def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def layer(kind, causal=True, heads=2, d=5, p=3):
    """A layer whose parameters are float64."""
    own = ops.FactorizedAttention(d, p, heads, kind, causal, length=9, rngs=nnx.Rngs(0))
    nnx.update(own, jax.tree.map(lambda x: x.astype(jnp.float64), nnx.state(own, nnx.Param)))
    return own


@jax.jit
def ranks_of(coef, values):
    found = ops.interaction_operator(lambda _: ops.Factors(coef, values), None)
    return ops.interaction_rank(found), ops.factored_interaction_rank(ops.Factors(coef, values))


def test_causal_attention_and_its_interaction_rank_are_golden(golden, x64):
    g = golden("attention-ssm/attention_ops")
    x, heads = jnp.asarray(g["X"]), heads_of(g)
    single = ops.AttentionHead(jnp.asarray(g["WQ"]), jnp.asarray(g["WK"]), heads.value[0])
    values = heads.value
    attend = jax.jit(ops.causal_attention)
    for params, name in ((single, "single"), (heads, "multi")):
        chex.assert_trees_all_close(attend(params, x), g[f"{name}_y"], atol=1e-11)
        # One head beside two that no token attends to.
        coef = np.zeros((3, 12, 12))
        coef[: 1 if name == "single" else 3] = g[f"{name}_alpha"]
        report, factored = ranks_of(coef, values)
        assert int(report.k) == int(factored.k) == g[f"{name}_span"]
        chex.assert_trees_all_close(factored.singular_values, report.singular_values[:3], atol=1e-11)
        chex.assert_trees_all_close(factored.effective_rank, report.effective_rank, atol=1e-9)
    chex.assert_trees_all_close(report.singular_values[:6], g["multi_singular_values"], atol=1e-10)
    tied = np.broadcast_to(g["V_heads"][:1], values.shape)
    assert [int(report.k) for report in ranks_of(coef, tied)] == [1, 1]
    # An output projection mixes heads into operators of lower rank, and their number stays.
    low = np.einsum("hpk,hkd->hpd", drawn(3, 4, 2), drawn(3, 2, 5, seed=1))
    assert [int(report.k) for report in ranks_of(coef, low)] == [3, 3]


def test_attention_jacobian_is_golden_and_that_of_reverse_mode(golden, x64):
    g = golden("attention-ssm/attention_jacobian")
    head = ops.AttentionHead(*(jnp.asarray(g[name]) for name in ("WQ", "WK", "V")))
    x = jnp.asarray(g["X"])
    assert jnp.max(jnp.abs(jacobian(head, x, int(g["i"]), int(g["j"])) - g["jacobian"])) < 1e-11
    exact = jax.jit(lambda x: ops.effective_jacobian(lambda x: ops.causal_attention(head, x), x))(x)
    pairs = jnp.indices((12, 12)).reshape(2, -1)
    found = jax.jit(jax.vmap(lambda i, j: ops.attention_jacobian(head, x, i, j)))(*pairs)
    chex.assert_trees_all_close(found.reshape(exact.shape), exact, atol=1e-10)
    several = heads_of(golden("attention-ssm/attention_ops"))
    exact = jax.jit(jax.jacrev(lambda x: ops.causal_attention(several, x)[7]))(x)
    for j in (3, 7, 9):
        chex.assert_trees_all_close(jacobian(several, x, 7, j), exact[:, j], atol=1e-10)


def test_gradient_profile_of_a_layer_of_states_is_the_norms_of_its_operators(golden, x64):
    g = golden("attention-ssm/linear_ssm")
    ssm, x = ops.LinearSSM(*(jnp.asarray(g[f"c_dense_{m}"]) for m in "ABCD")), jnp.asarray(g["X"])
    fn = functools.partial(ops.ssm_scan, ssm)
    profile, earlier = jax.jit(lambda x: [ops.gradient_profile(fn, x, query=q) for q in (-1, 4)])(x)
    chex.assert_trees_all_close(profile, g["c_dense_grad_norm_by_lag"], atol=1e-10)
    chex.assert_trees_all_close(earlier, g["c_dense_grad_norm_by_lag"][:5], atol=1e-10)


def test_gradient_decay_gives_half_distance_and_slope():
    decay, halves = jax.jit(ops.gradient_decay), 0.5 ** np.arange(8, dtype=np.float32)
    found = decay(8 * halves)
    assert found.half_distance == 1
    assert found.log_slope == pytest.approx(np.log(0.5), rel=1e-5)
    assert decay(np.asarray([1.0, 0.2, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1], np.float32)).half_distance == 3
    assert decay(np.ones(8, np.float32)) == (8, 0)
    windowed = np.where(np.arange(8) < 4, halves, 0)
    assert decay(windowed).log_slope == pytest.approx(np.log(0.5), rel=1e-5)


def test_highway_input_has_half_the_attention_at_every_distance(golden, x64):
    g = golden("attention-ssm/attention_ops")
    n, d, v = 12, 5, jnp.asarray(g["V_heads"][0])
    head = ops.AttentionHead(jnp.eye(d), jnp.eye(d), v)

    @jax.jit
    def of_last(x, j):
        attended = ops.causal_attention(head._replace(value=jnp.eye(d)), x)[-1]
        return jnp.linalg.norm(ops.attention_jacobian(head, x, n - 1, j), 2), attended

    for distance, alpha in zip(g["highway_distance"], g["highway_alpha_last_row"], strict=True):
        x = np.asarray(ops.highway_input(jax.random.key(int(distance)), n, d, int(distance)))
        assert x.dtype == np.float64
        scores = x @ x[-1] / np.sqrt(d)
        assert scores[-1] == pytest.approx(64)
        assert np.max(np.abs(np.delete(scores, [n - 1 - distance, n - 1]))) < 1e-12
        weights = np.exp(scores - scores[-1])
        assert weights[n - 1 - distance] / np.sum(weights) == pytest.approx(float(alpha), abs=1e-6)
        norm, attended = of_last(x, n - 1 - int(distance))
        np.testing.assert_allclose(attended, x[-1], atol=1e-9)
        assert norm >= float(g["highway_bound"]) * np.linalg.norm(v, 2) - 1e-6


@pytest.mark.parametrize("kind", ["softmax", "linear", "toeplitz"])
@pytest.mark.parametrize("causal", [True, False])
def test_factorized_attention_is_the_sum_of_its_operators(kind, causal, x64, monkeypatch):
    monkeypatch.setattr(ops.model, "_CHUNK", 4)  # a sequence of several chunks
    # A narrow query beside a wide output, and the other way round.
    graph, params = nnx.split(layer(kind, causal, p=3 if causal else 7))

    @jax.jit
    def run(params, x):
        own = nnx.merge(graph, params)
        operators = ops.interaction_operator(own.factors, x[1])
        return own(x)[1], operators, ops.factored_interaction_rank(own.factors(x[1])).k

    x = drawn(2, 9, 5)
    y, operators, k = run(params, x)
    np.testing.assert_allclose(y, np.einsum("ijpd,jd->ip", operators, x[1]), atol=1e-10)
    assert k == 2
    later = np.triu(np.ones((9, 9), bool), 1)
    assert np.any(np.asarray(operators)[later] != 0) != causal


def test_heads_trained_by_gradient_descent_do_not_beat_the_tail_of_the_spectrum(x64):
    ssm = ops.LinearSSM(*(jnp.asarray(m) for m in (np.asarray([0.9, 0.5, -0.4]), drawn(3, 4), drawn(3, 3, seed=1))))
    lags = ops.lag_operators(ssm, 9)
    own = layer("toeplitz", heads=2, d=4)
    graph, params = nnx.split(own, nnx.Param)
    tx = optax.adam(optax.cosine_decay_schedule(0.05, 1500))

    def error(params):
        bank = nnx.merge(graph, params).bank()
        return jnp.linalg.norm(jnp.einsum("nk,kpd->npd", bank.coef, bank.values) - lags) / jnp.linalg.norm(lags)

    def step(carry, _):
        updates, state = tx.update(jax.grad(error)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], updates), state), error(carry[0])

    with jax.numpy_dtype_promotion("standard"):  # Optax multiplies integers and floats
        errors = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=1500)[1])(params)
    bound = ops.truncated_heads_error(lags, 2)
    assert bound > 0.01
    assert jnp.min(errors) >= bound - 1e-6
    assert errors[-1] <= 1.01 * bound


@pytest.mark.slow
def test_a_layer_trains_on_tokens():
    own, x = ops.FactorizedAttention(4, 4, 2, rngs=nnx.Rngs(0)), jnp.asarray(drawn(4, 8, 4), jnp.float32)
    target = jnp.cumsum(x, axis=1) / jnp.arange(1.0, 9)[None, :, None]
    graph, params = nnx.split(own, nnx.Param)
    tx = optax.sgd(0.5)

    def loss(params):
        return jnp.mean(jnp.square(nnx.merge(graph, params)(x) - target))

    def step(params, _):
        value, gradients = jax.value_and_grad(loss)(params)
        return optax.apply_updates(params, tx.update(gradients, tx.init(params))[0]), value

    values = jax.jit(lambda params: jax.lax.scan(step, params, length=60)[1])(params)
    assert values[-1] < 0.3 * values[0]


EYE = np.eye(3, dtype=np.float32)
HEAD = ops.AttentionHead(EYE, EYE, EYE)
X = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("error", "call"),
    [
        ("i: expected a position from 0 to 3, got 4", lambda: ops.attention_jacobian(HEAD, X, 4, 0)),
        ("j: expected a position from 0 to 3, got -1", lambda: ops.attention_jacobian(HEAD, X, 3, -1)),
        ("x: expected finite", lambda: ops.attention_jacobian(HEAD, np.full_like(X, np.nan), 3, 0)),
        ("query, key, value: expected", lambda: ops.causal_attention(HEAD._replace(key=np.ones((2, 3))), X)),
        (
            "value: expected a matrix|query: expected a matrix",
            lambda: ops.causal_attention(HEAD._replace(value=X[0]), X),
        ),
        (r"x: expected tokens \[..., n, 3\]", lambda: ops.causal_attention(HEAD, np.ones((4, 2), np.float32))),
        ("query: expected a position of 4 tokens", lambda: ops.gradient_profile(lambda x: x, X, query=4)),
        (r"x: expected tokens \[n, d\]", lambda: ops.gradient_profile(lambda x: x, X[0])),
        ("profile: expected norms", lambda: ops.gradient_decay(jnp.ones(3))),
        ("distance: expected 1 to 3", lambda: ops.highway_input(jax.random.key(0), 4, 3, 4)),
        ("score", lambda: ops.highway_input(jax.random.key(0), 4, 3, 1, 0.0)),
        ("n, d: expected", lambda: ops.highway_input(jax.random.key(0), 1, 3, 1)),
        ("n: expected a length", lambda: ops.highway_input(jax.random.key(0), 0, 3, 1)),
        ("kind: expected one of", lambda: ops.FactorizedAttention(3, 3, 1, "cosine", rngs=nnx.Rngs(0))),
        ("heads: expected at least 1", lambda: ops.FactorizedAttention(3, 3, 0, rngs=nnx.Rngs(0))),
        ("length: 'toeplitz'", lambda: ops.FactorizedAttention(3, 3, 1, "toeplitz", rngs=nnx.Rngs(0))),
        ("kind: only 'toeplitz'", lambda: ops.FactorizedAttention(3, 3, 1, rngs=nnx.Rngs(0)).bank()),
        (r"x: expected tokens \[batch, n, 3\]", lambda: ops.FactorizedAttention(3, 3, 1, rngs=nnx.Rngs(0))(X)),
        ("coef: expected", lambda: ops.interaction_operator(lambda x: ops.Factors(X[None], EYE[None]), X)),
        ("values: expected", lambda: ops.factored_interaction_rank(ops.Factors(X[None], EYE))),
    ],
)
def test_bad_heads_positions_and_tokens_are_refused(error, call):
    with pytest.raises(ValueError, match=error):
        call()
