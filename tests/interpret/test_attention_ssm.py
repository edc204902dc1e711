"""Linear state-space layers as heads: golden vectors, ranks, and bases."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.interpret import attention_ssm as ops

CASES = ("c_generic", "c_repeat", "c_identity", "c_rot", "c_nil", "c_dense", "c_skip")
NAMES = (
    "LinearSSM ssm_scan ssm_associative_scan ssm_convolve lag_operators interaction_operator effective_jacobian "
    "interaction_rank RankReport heads_from_lags HeadBank apply_heads truncated_heads_error FactorizedAttention "
    "attention_jacobian gradient_profile highway_input ssm_decay_bound"
)
scan, convolve, associative = (jax.jit(f) for f in (ops.ssm_scan, ops.ssm_convolve, ops.ssm_associative_scan))
lags_of = jax.jit(ops.lag_operators, static_argnums=1)
rank_of = jax.jit(ops.interaction_rank, static_argnums=1)


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def ssm_of(a, d=5, p=4, skip=False, seed=1):
    a = jnp.asarray(a)
    matrices = drawn(len(a), d, seed=seed), drawn(p, len(a), seed=seed + 1)
    return ops.LinearSSM(a, *matrices, drawn(p, d, seed=seed + 2) if skip else None)


def rank(ssm, n=12):
    """The interaction rank of the first lags; zeros in place of the others leave it, and save a compilation."""
    lags = np.asarray(lags_of(ssm, 12)).copy()
    lags[n:] = 0
    return int(rank_of(lags, 1e-9).k)


def test_every_name_of_the_public_surface_exists():
    assert set(NAMES.split()) <= set(ops.__all__)
    assert all(hasattr(ops, name) for name in ops.__all__)


@pytest.mark.parametrize("case", CASES)
def test_lag_operators_scan_convolution_and_heads_are_golden(case, golden, x64):
    g = golden("attention-ssm/linear_ssm")
    ssm, x, n = ops.LinearSSM(*(jnp.asarray(g[f"{case}_{m}"]) for m in "ABCD")), jnp.asarray(g["X"]), int(g["n"])
    assert case in g["case_names"]
    y, lags = g[f"{case}_y"], lags_of(ssm, n)
    chex.assert_trees_all_close((lags, scan(ssm, x), convolve(ssm, x)), (g[f"{case}_lags"], y, y), atol=1e-11)
    report = rank_of(lags, 1e-9)
    assert int(report.k) == g[f"{case}_span_dim"]
    values = g[f"{case}_singular_values"]
    chex.assert_trees_all_close(report.singular_values, values, atol=1e-10)
    share = values**2 / np.sum(values**2)
    assert report.effective_rank == pytest.approx(np.exp(-np.sum(share * np.log(np.maximum(share, 1e-300)))))
    norms = np.linalg.norm(lags, 2, axis=(1, 2))
    chex.assert_trees_all_close(norms, g[f"{case}_grad_norm_by_lag"], atol=1e-10)
    assert ops.spectral_radius(ssm) == pytest.approx(float(g[f"{case}_spectral_radius"]), abs=1e-9)

    bank = ops.heads_from_lags(lags)
    assert bank.coef.shape == (n, int(report.k))
    if case == "c_generic":
        chex.assert_trees_all_close(ops.apply_heads(bank, x, "toeplitz"), y, atol=1e-10)
    for k in range(1, n + 1):
        fewer = ops.heads_from_lags(lags, k)
        made = np.einsum("nk,kpd->npd", *map(np.asarray, fewer[:2]))
        error = np.linalg.norm(made - lags) / np.linalg.norm(lags)
        assert error == pytest.approx(g[f"{case}_head_residual_by_count"][k], abs=1e-10)


@pytest.mark.parametrize(
    "basis", ["pivoted", "modal", *(pytest.param(x, marks=pytest.mark.slow) for x in ("svd", "companion"))]
)
def test_heads_of_every_basis_equal_the_layer_and_a_nilpotent_one_has_no_modes(basis, golden, x64):
    g = golden("attention-ssm/linear_ssm")
    x = jnp.asarray(g["X"])
    for case in CASES:
        ssm = ops.LinearSSM(*(jnp.asarray(g[f"{case}_{m}"]) for m in "ABCD"))
        for lags in (g[f"{case}_lags"], None):

            def make(lags=lags, ssm=ssm):
                if lags is None:
                    return ops.heads_from_ssm(ssm, 12, basis=basis)
                return ops.heads_from_lags(lags, basis=basis)

            if basis == "modal" and case == "c_nil":
                with pytest.raises(ValueError, match="'svd' serves"):
                    make()
                continue
            bank = make()
            assert bank.coef.shape == (12, g[f"{case}_span_dim"])
            made = np.einsum("nk,kpd->npd", *map(np.asarray, bank[:2]))
            np.testing.assert_allclose(made, g[f"{case}_lags"], atol=1e-11)
            if case == "c_skip":
                for mode in ("fft", "recurrent")[: 1 + (basis == "modal")]:
                    chex.assert_trees_all_close(ops.apply_heads(bank, x, mode), g[f"{case}_y"], atol=1e-10)
        if basis == "pivoted":
            distances = np.abs(np.asarray(bank.values)[:, None] - g[f"{case}_lags"][None]).max(axis=(2, 3))
            assert np.max(distances.min(axis=1)) < 1e-12


def test_interaction_rank_counts_decays_states_lags_and_a_skip(x64):
    assert rank(ssm_of([0.9, 0.5, -0.3])) == 3
    assert rank(ssm_of([0.9, 0.5, 0.5])) == 2
    assert rank(ssm_of(0.7 * np.ones(3))) == 1
    shift = ssm_of(np.eye(3, k=1))
    assert [rank(shift, n) for n in (1, 2, 3, 5)] == [1, 2, 3, 3]
    assert [rank(ssm_of([0.9, 0.5, -0.3]), n) for n in (1, 2, 3, 9)] == [1, 2, 3, 3]
    assert rank(ssm_of([0.9, 0.5, -0.3], skip=True)) == 4
    # No more than operators have entries.
    assert rank(ssm_of(np.linspace(0.1, 0.9, 6), d=2, p=2)) == 4


def test_interaction_rank_is_invariant_to_a_change_of_the_states(x64):
    ssm, t = ssm_of(np.diag([0.9, 0.5, -0.3])), drawn(3, 3, seed=7)
    inverse = jnp.linalg.inv(t)
    other = ops.LinearSSM(t @ ssm.A @ inverse, t @ ssm.B, ssm.C @ inverse)
    chex.assert_trees_all_close(lags_of(other, 12), lags_of(ssm, 12), atol=1e-9)
    assert rank(other) == rank(ssm) == 3


def test_truncated_heads_error_is_the_tail_of_the_spectrum_and_weighs_pairs(x64):
    lags = lags_of(ssm_of([0.9, 0.5, -0.3], skip=True), 6)
    s = np.linalg.svd(np.reshape(lags, (6, -1)), compute_uv=False)
    for k in (0, 2, 4):
        assert ops.truncated_heads_error(lags, k) == pytest.approx(np.linalg.norm(s[k:]) / np.linalg.norm(s), abs=1e-12)
    # Of all pairs of six tokens, as operators of their own.
    pairs = np.reshape([lags[i - j] for i in range(6) for j in range(i + 1)], (21, -1))
    s = np.linalg.svd(pairs, compute_uv=False)
    expected = np.linalg.norm(s[2:]) / np.linalg.norm(s)
    assert ops.truncated_heads_error(lags, 2, pairs=True) == pytest.approx(expected)


def test_associative_scan_complex_layers_and_float32_agree_with_the_scan(x64):
    decay = 0.9 * np.exp(1j * np.asarray([0.3, 1.0, 2.0]))
    ssm = ops.LinearSSM(jnp.asarray(decay), jax.lax.complex(drawn(3, 5), drawn(3, 5, seed=4)), drawn(4, 3), drawn(4, 5))
    x = drawn(2, 12, 5, seed=5)
    y = scan(ssm, x)
    assert y.dtype == x.dtype
    chex.assert_trees_all_close((associative(ssm, x), convolve(ssm, x)), (y, y), atol=1e-11)
    chex.assert_trees_all_close(ops.ssm_associative_scan(ssm._replace(A=jnp.diag(ssm.A)), x), y, atol=1e-11)
    bank = ops.heads_from_ssm(ssm, 12, basis="modal")
    assert len(bank.values) == 7  # a pair of real heads for each decay, and the skip
    chex.assert_trees_all_close(ops.apply_heads(bank, x, "recurrent"), y, atol=1e-11)
    low = jax.tree.map(lambda m: m.astype(np.result_type(np.complex64 if jnp.iscomplexobj(m) else np.float32)), ssm)
    x32 = x.astype(jnp.float32)
    bank = ops.heads_from_ssm(low, 12, basis="modal")
    assert bank.coef.dtype == bank.values.dtype == jnp.float32
    found = scan(low, x32), associative(low, x32), convolve(low, x32), ops.apply_heads(bank, x32, "recurrent")
    for own in found:
        chex.assert_trees_all_close(own.astype(y.dtype), y, atol=1e-4 * float(jnp.max(jnp.abs(y))))
    bfloat = ops.apply_heads(bank, x.astype(jnp.bfloat16), "recurrent")
    assert bfloat.dtype == jnp.bfloat16
    error = jnp.max(jnp.abs(bfloat.astype(y.dtype) - y)) / jnp.max(jnp.abs(y))
    assert error < 0.02


def test_heads_from_ssm_serve_slow_decays_over_long_sequences(x64):
    n = 3000
    ssm = ssm_of(1 - np.geomspace(1e-3, 1e-1, 6), d=2, p=3, skip=True)
    x = drawn(n, 2, seed=9)
    y = scan(ssm, x)
    for basis in ("svd", "pivoted", "modal"):
        bank = ops.heads_from_ssm(ssm, n, basis=basis)
        for mode in ("fft", "recurrent")[: 1 + (basis == "modal")]:
            error = jnp.linalg.norm(ops.apply_heads(bank, x, mode) - y) / jnp.linalg.norm(y)
            assert error < 1e-10, (basis, mode)
    chex.assert_trees_all_close(ops.coefficients_of(bank.modes, n), bank.coef, atol=1e-11)


def test_apply_heads_sees_later_tokens_where_coefficients_are_of_both_signs(x64):
    coef, values, x = drawn(2 * 7 - 1, 2), drawn(2, 3, 4, seed=1), drawn(5, 4, seed=2)
    lag = np.arange(5)[:, None] - np.arange(5)[None] + 6
    expected = jnp.einsum("ijk,kpd,jd->ip", coef[lag], values, x)
    for mode in ("toeplitz", "fft"):
        chex.assert_trees_all_close(ops.apply_heads(ops.HeadBank(coef, values), x, mode, causal=False), expected)


def test_hippo_legs_are_heads_that_reconstruct_what_its_states_hold(x64):
    ssm = ops.hippo_legs(6, 0.01)
    assert np.all(np.abs(np.linalg.eigvals(ssm.A)) < 1)
    # The continuous operator: -(n + 1) on the diagonal, -sqrt((2 n + 1)(2 m + 1)) below it.
    eye = np.eye(6)
    a = np.linalg.solve((ssm.A + eye).T, (ssm.A - eye).T).T / 0.005
    chex.assert_trees_all_close(np.diag(a), -np.arange(1.0, 7))
    assert a[2, 1] == pytest.approx(-np.sqrt(15))
    assert a[1, 2] == pytest.approx(0, abs=1e-9)
    x = drawn(300, 1)
    chex.assert_trees_all_close(ops.apply_heads(ops.heads_from_ssm(ssm, 300), x), scan(ssm, x), atol=1e-10)


def test_ssm_decay_bound_holds_and_has_the_rate_of_a_normal_matrix(x64):
    normal = ssm_of([0.9, -0.5, 0.2], skip=True)
    skewed = ssm_of(0.8 * np.eye(4) + 2 * np.eye(4, k=1))
    for ssm in (normal, skewed):
        bound, norms = ops.ssm_decay_bound(ssm, 60), np.linalg.norm(lags_of(ssm, 60), 2, axis=(1, 2))
        assert np.all(bound >= norms * (1 - 1e-12))
        assert bound[-1] < bound[0]
    assert np.diff(np.log(ops.ssm_decay_bound(normal, 20)[1:])) == pytest.approx(np.log(0.9))
    assert norms.max() > 5 * norms[0]  # it grows first
    with pytest.raises(ValueError, match="A: expected a spectral radius below 1"):
        ops.ssm_decay_bound(ssm_of([1.0, 0.5]), 4)


GOOD = functools.partial(ssm_of, [0.9, 0.5])
LAGS = np.ones((3, 2, 2))
BANK = ops.HeadBank(np.ones((3, 2), np.float32), np.ones((2, 4, 5), np.float32))


@pytest.mark.parametrize(
    ("error", "call"),
    [
        (r"B: expected shape \[3, 5\]", lambda: ops.lag_operators(GOOD()._replace(A=jnp.ones(3)), 2)),
        (r"D: expected shape \[4, 5\]", lambda: ops.ssm_scan(GOOD()._replace(D=jnp.ones((5, 4))), jnp.ones((3, 5)))),
        (r"A: expected finite", lambda: ops.lag_operators(GOOD()._replace(A=jnp.asarray([jnp.nan, 1.0])), 2)),
        (r"x: expected tokens \[..., n, 5\]", lambda: ops.ssm_convolve(GOOD(), jnp.ones((3, 4)))),
        ("A: an associative scan", lambda: ops.ssm_associative_scan(ssm_of(np.ones((2, 2))), jnp.ones((3, 5)))),
        ("n: expected a length of at least 1, got 0", lambda: ops.lag_operators(GOOD(), 0)),
        ("n: expected a length of at least 1, got 0", lambda: ops.heads_from_ssm(GOOD(), 0)),
        ("margin", lambda: ops.ssm_decay_bound(GOOD(), 3, margin=1.0)),
        ("states, step", lambda: ops.hippo_legs(3, 0.0)),
        ("ops: expected operators", lambda: ops.interaction_rank(jnp.ones((3, 3)))),
        ("ops: expected finite", lambda: ops.interaction_rank(jnp.full((3, 2, 2), jnp.nan))),
        ("tol: expected a number above 0, got 0", lambda: ops.interaction_rank(jnp.asarray(LAGS), 0.0)),
        ("tol: expected a number above 0, got -1", lambda: ops.heads_from_lags(LAGS, tol=-1.0)),
        ("k: expected 1 to 3 heads, got 4", lambda: ops.heads_from_lags(LAGS, 4)),
        ("k: expected 1 to 3 heads, got 0", lambda: ops.heads_from_lags(LAGS, 0)),
        ("k: expected 0 to 3 heads, got 4", lambda: ops.truncated_heads_error(jnp.asarray(LAGS), 4)),
        ("lags: expected operators by lag", lambda: ops.heads_from_lags(np.ones((3, 2)))),
        ("basis: expected one of", lambda: ops.heads_from_lags(LAGS, basis="qr")),
        ("k: the basis 'modal'", lambda: ops.heads_from_ssm(GOOD(), 5, 1, "modal")),
        ("basis: 'modal' finds no recurrence", lambda: ops.heads_from_lags(drawn(6, 2, 2), basis="modal")),
        ("mode: expected one of", lambda: ops.apply_heads(BANK, jnp.ones((3, 5)), "scan")),
        ("mode: 'recurrent' is for causal", lambda: ops.apply_heads(BANK, jnp.ones((3, 5)), "recurrent", causal=False)),
        ("bank: expected modes", lambda: ops.apply_heads(BANK, jnp.ones((3, 5)), "recurrent")),
        ("x: expected at most 3 tokens", lambda: ops.apply_heads(BANK, jnp.ones((4, 5)))),
        ("x: expected at most 2 tokens", lambda: ops.apply_heads(BANK, jnp.ones((3, 5)), causal=False)),
        (r"x: expected tokens \[..., n, 5\]", lambda: ops.apply_heads(BANK, jnp.ones((3, 4)))),
        ("axis_name", lambda: ops.apply_heads(BANK, jnp.ones((3, 5)), axis_name="data")),
    ],
)
def test_bad_layers_operators_and_options_are_refused(error, call):
    with pytest.raises(ValueError, match=error):
        call()


@pytest.mark.eight_devices
def test_sharded_heads_batches_and_sequences_equal_a_single_device():
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    ssm = jax.tree.map(lambda m: m.astype(jnp.float32), ssm_of(1 - np.geomspace(1e-3, 0.3, 4), skip=False))
    bank, x = ops.heads_from_ssm(ssm, 64, basis="modal"), drawn(2, 64, 5).astype(jnp.float32)
    expected = ops.apply_heads(bank, x, "recurrent")
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = ops.HeadBank(P(None, "tensor"), P("tensor"), ops.Modes(P("tensor"), P("tensor"), P("tensor")))
    placed = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), bank, specs)
    own = jax.device_put(x, NamedSharding(mesh, P("data")))
    chex.assert_trees_all_close(ops.apply_heads(placed, own, "fft"), expected, atol=1e-4)

    def part(bank, x):
        return ops.apply_heads(bank, x, "recurrent", axis_name="tensor")

    sharded = jax.shard_map(part, mesh=mesh, in_specs=(P(), P("data", "tensor")), out_specs=P("data", "tensor"))
    chex.assert_trees_all_close(jax.jit(sharded)(bank, x), expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_the_recurrence_of_sharded_heads_equals_a_single_device():
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    bank, x = ops.heads_from_ssm(ssm_of([0.9, 0.5, -0.3, 0.2]), 64, basis="modal"), drawn(2, 64, 5)
    expected = ops.apply_heads(bank, x, "recurrent")
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = ops.HeadBank(P(None, "tensor"), P("tensor"), ops.Modes(P("tensor"), P("tensor"), P("tensor")))
    placed = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), bank, specs)
    y = ops.apply_heads(placed, jax.device_put(x, NamedSharding(mesh, P("data"))), "recurrent")
    chex.assert_trees_all_close(y, expected, atol=1e-4)
