"""Compression of kernels: golden vectors, identities, and the problems on which methods differ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, nn
from subspace_jax.compress import cospadi
from subspace_jax.compress.cospadi.core import sparse_factors
from subspace_jax.compress.cospadi.data import digits_layer, planted_union

from ..variants import rest_slow

FILE = "cospadi/compress"
ROUNDS = functools.partial(jax.jit, static_argnames=("k", "sparsity", "n_iter", "solver"))(linalg.fit_dictionary)


def test_cospadi_has_every_name_of_its_public_surface():
    names = "GramState update_gram gram_factor allocate allocate_rank storage_bits omp densify ksvd_update mod_update"
    names += " fit_dictionary DictState compress compress_group svd_compress asvd_compress svd_llm_compress"
    names += " basis_sharing_compress SparseFactor truncate_bf16 compress_params"
    assert set(names.split()) <= set(dir(cospadi))
    assert "SparseDictDense" in dir(nn)


def error(x, w, factor):
    return jnp.linalg.norm(x @ (w - factor.dense()))


def test_low_rank_methods_are_golden(golden, x64):
    g = {name: jnp.asarray(x) for name, x in golden(FILE).items()}
    x, w, factor = g["X"], g["W"], g["L"]
    np.testing.assert_allclose(cospadi.gram_factor(x.T @ x, 0.0), factor, atol=1e-8)
    found = {
        "svd": cospadi.svd_compress(w, 0.2),
        "asvd": cospadi.asvd_compress(w, jnp.mean(jnp.abs(x), axis=0), 0.2),
        "svdllm": cospadi.svd_llm_compress(w, factor, 0.2),
    }
    scales = jnp.sqrt(jnp.mean(jnp.abs(x), axis=0)) + 1e-6
    transformed = {"svd": w, "asvd": scales[:, None] * w, "svdllm": factor @ w}
    for name, kernel in found.items():
        assert kernel.a.shape[1] == g["r"]
        np.testing.assert_allclose(kernel.dense(), g[f"{name}/W"], atol=1e-8)
        np.testing.assert_allclose(error(x, w, kernel), g[f"{name}/func_err"], atol=1e-8)
        values = jnp.linalg.svd(transformed[name], compute_uv=False)
        np.testing.assert_allclose(values, g[f"{name}/sv"], atol=1e-8)
    # The least error of that rank: what was dropped.
    dropped = jnp.sqrt(jnp.sum(g["svdllm/sv"][g["r"] :] ** 2))
    np.testing.assert_allclose(g["svdllm/func_err"], dropped, rtol=1e-8)
    np.testing.assert_allclose(error(x, w, found["svdllm"]), dropped, rtol=1e-8)


def test_basis_sharing_is_golden_with_one_basis(golden, x64):
    g = golden(FILE)
    ws, xs = (list(map(jnp.asarray, g[f"basis_sharing/{name}"])) for name in ("Ws", "Xs"))
    factor = cospadi.gram_factor(sum(x.T @ x for x in xs), 0.0)
    singular = jnp.linalg.svd(factor @ jnp.concatenate(ws, axis=1), compute_uv=False)
    np.testing.assert_allclose(singular, g["basis_sharing/sv"], atol=1e-8)
    found = cospadi.basis_sharing_compress(ws, factor, 0.35)  # rank 9, that of the vectors
    np.testing.assert_allclose(jnp.stack([kernel.dense() for kernel in found]), g["basis_sharing/W"], atol=1e-8)
    assert all(np.array_equal(kernel.a, found[0].a) for kernel in found)


@pytest.mark.parametrize("solver", rest_slow(["power", "svd", "mod"]))
def test_omp_one_update_and_eight_rounds_are_golden(golden, x64, solver):
    g = {name: jnp.asarray(x) for name, x in golden(FILE).items()}
    y, dictionary, s = g["omp/Y"], g["omp/D"], g["omp/S"]
    if solver == "power":
        values, indices = linalg.omp(dictionary, y, int(g["omp/s"]))
        np.testing.assert_allclose(linalg.densify(values, indices, dictionary.shape[1]), s, atol=1e-8)
    update = linalg.mod_update if solver == "mod" else linalg.ksvd_update
    new, coefficients = update(y, dictionary, s, *(["svd"] if solver == "svd" else []))
    np.testing.assert_allclose(new, g[f"update_{solver}/D"], atol=1e-8)
    np.testing.assert_allclose(coefficients, g[f"update_{solver}/S"], atol=1e-8)
    rounds = int(g[f"full_{solver}/T"])
    found = ROUNDS(y, k=14, sparsity=7, n_iter=rounds, solver=solver, init=dictionary)
    np.testing.assert_allclose(found.trace, g[f"full_{solver}/trace"], atol=1e-6)
    [kernel] = sparse_factors(found, g["L"], 1, jnp.float64)
    np.testing.assert_allclose(error(g["X"], g["W"], kernel), g[f"full_{solver}/func_err"], atol=1e-6)
    np.testing.assert_allclose(kernel.dictionary, g[f"full_{solver}/Da"], atol=1e-6)
    np.testing.assert_allclose(kernel.coefficients(), g[f"full_{solver}/S"], atol=1e-6)


def test_a_group_of_layers_with_one_dictionary_is_golden(golden, x64):
    g = golden(FILE)
    ws, xs = (list(map(jnp.asarray, g[f"basis_sharing/{name}"])) for name in ("Ws", "Xs"))
    factor = cospadi.gram_factor(sum(x.T @ x for x in xs), 0.0)
    y, start = factor @ jnp.concatenate(ws, axis=1), jnp.asarray(g["group/D0"])
    rounds = len(g["group/trace"])
    learnt = ROUNDS(y, k=14, sparsity=7, n_iter=rounds, solver="power", init=start)
    np.testing.assert_allclose(learnt.trace, g["group/trace"], atol=1e-6)
    s = linalg.densify(learnt.values, learnt.indices, 14)
    np.testing.assert_allclose(s, g["group/S"], atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.solve(factor, learnt.dictionary), g["group/Da"], atol=1e-6)
    found = sparse_factors(learnt, factor, 3, jnp.float64)
    assert [kernel.shape for kernel in found] == [(16, 40)] * 3
    assert all(np.array_equal(kernel.dictionary, found[0].dictionary) for kernel in found)
    np.testing.assert_allclose(jnp.concatenate([kernel.coefficients() for kernel in found], axis=1), s)


@pytest.mark.slow
def test_compress_group_learns_one_dictionary_for_kernels_side_by_side(golden, x64):
    g = golden(FILE)
    ws = list(map(jnp.asarray, g["basis_sharing/Ws"]))
    found = cospadi.compress_group(ws, g["L"], 0.5, n_iter=2, key=jax.random.key(0))
    whole = cospadi.compress(jnp.concatenate(ws, axis=1), g["L"], 0.5, n_iter=2, key=jax.random.key(0))
    np.testing.assert_allclose(jnp.concatenate([kernel.dense() for kernel in found], axis=1), whole.dense(), atol=1e-9)


def test_truncated_coefficients_and_sizes_are_golden(golden):
    g = golden(FILE)
    for bits in (0, 2, 4):
        cut = nn.truncate_bf16(jnp.asarray(g["trunc/x"]), bits)
        np.testing.assert_array_equal(np.asarray(cut).astype(np.float32), g[f"trunc/{bits}"])
        np.testing.assert_array_equal(np.asarray(cut).view(np.uint16), g[f"trunc_bits/{bits}"])
    for ratio, d1, d2, rho, r, k, s, k_mask, s_mask in g["alloc"]:
        d1, d2 = int(d1), int(d2)
        assert cospadi.allocate_rank(d1, d2, ratio) == r
        assert cospadi.allocate(d1, d2, ratio, rho) == (k, s)
        assert cospadi.allocate(d1, d2, ratio, rho, mask=True) == (k_mask, s_mask)
        if rho == 2:
            assert cospadi.storage_bits(d1, d2, int(k), int(s)) <= 16 * (1 - ratio) * d1 * d2 + d2
    assert cospadi.storage_bits(16, 40, 14, 7) == 16 * (16 * 14 + 7 * 40)


def test_a_singular_gram_matrix_is_damped_and_keeps_the_norm_of_outputs(golden, x64):
    g = golden(FILE)
    x, w = jnp.asarray(g["singular/X"]), jnp.asarray(g["W"])
    assert x.shape[0] < x.shape[1]
    factor = cospadi.gram_factor(x.T @ x)
    assert np.isfinite(factor).all()
    assert (np.diagonal(factor) > 0).all()
    np.testing.assert_allclose(jnp.linalg.norm(factor @ w), jnp.linalg.norm(x @ w), rtol=1e-4)
    kernel = cospadi.svd_llm_compress(w, factor, 0.2)
    assert error(x, w, kernel) < 1e-2 * jnp.linalg.norm(x @ w)  # eight inputs lie in a space of rank nine
    full = jnp.asarray(g["X"])
    whole, v = cospadi.gram_factor(full.T @ full, 0.0), jnp.asarray(np.random.default_rng(1).standard_normal(w.shape))
    np.testing.assert_allclose(jnp.linalg.norm(whole @ (w - v)), jnp.linalg.norm(full @ (w - v)), rtol=1e-8)


@pytest.mark.slow
def test_as_many_coefficients_as_atoms_reach_the_error_of_the_low_rank(golden, x64):
    g = {name: jnp.asarray(x) for name, x in golden(FILE).items()}
    y = g["L"] @ g["W"]
    rank = int(g["r"])
    found = ROUNDS(
        y, k=rank, sparsity=rank, n_iter=40, solver="mod", init=linalg.first_atoms(jax.random.key(0), y, rank, "svd")
    )
    np.testing.assert_allclose(found.trace[-1, 1], g["svdllm/func_err"], rtol=1e-8)
    far = ROUNDS(y, k=rank, sparsity=rank, n_iter=40, solver="mod", init=linalg.first_atoms(jax.random.key(0), y, rank))
    np.testing.assert_allclose(far.trace[-1, 1], g["svdllm/func_err"], rtol=1e-2)


def test_gram_sums_do_not_depend_on_batches_and_leave_out_padding():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 3)), jnp.float32)
    whole = cospadi.update_gram(cospadi.GramState.zeros(3), x)
    parts = cospadi.GramState.zeros(3)
    for row in x:
        parts = cospadi.update_gram(parts, jnp.concatenate([row, row + 9]), jnp.repeat(jnp.array([1.0, 0.0]), 6))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.gram, np.einsum("abi,abj->ij", x, x), rtol=1e-5, atol=1e-5)
    assert whole.count == 12


@pytest.mark.eight_devices
def test_gram_sums_of_sharded_inputs_equal_those_of_one_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((16, 4, 5)), jnp.float32)
    alone = cospadi.update_gram(cospadi.GramState.zeros(5), x)
    sharded = jax.jit(cospadi.update_gram)(cospadi.GramState.zeros(5), jax.device_put(x, rows))
    for one, other in zip(alone, sharded, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        assert other.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda w, l: cospadi.compress(w, l, 0.0), r"ratio: expected a share removed in \(0, 1\), got 0.0"),
        (lambda w, l: cospadi.svd_compress(w, 1.0), "ratio"),
        (lambda w, l: cospadi.compress(w, l, 0.999), "leaves 0 atoms"),
        (lambda w, l: cospadi.svd_llm_compress(w, l, 0.999), "leaves no rank"),
        (lambda w, l: cospadi.compress(w, l, 0.2, rho=0.5), "rho: expected at least 1"),
        (lambda w, l: cospadi.compress(w, l[1:, 1:], 0.2), r"l: expected shape \(6, 6\)"),
        (lambda w, l: cospadi.compress_group([w, w[:, 1:]], l, 0.2), "ws: expected kernels of one shape"),
        (lambda w, l: cospadi.compress_group([], l, 0.2), "ws: expected at least one"),
        (lambda w, l: cospadi.compress(w[0], l, 0.2), "w: expected a kernel"),
        (lambda w, l: cospadi.asvd_compress(w, jnp.ones(5), 0.2), "mean_absolute: expected shape"),
        (lambda w, l: cospadi.gram_factor(w), "gram: expected a square matrix"),
        (lambda w, l: cospadi.gram_factor(l + jnp.triu(jnp.ones((6, 6)), 1)), "gram: expected a symmetric matrix"),
        (lambda w, l: cospadi.gram_factor(l.at[0, 0].set(jnp.nan)), "gram: expected finite"),
        (lambda w, l: cospadi.gram_factor(0 * l), "gram: expected some inputs"),
        (lambda w, l: cospadi.update_gram(cospadi.GramState.zeros(6), w.T.at[0, 0].set(jnp.inf)), "x: expected finite"),
        (lambda w, l: cospadi.update_gram(cospadi.GramState.zeros(6), w), "x: expected inputs"),
        (lambda w, l: cospadi.allocate(0, 4, 0.5), "d1, d2: expected at least 1"),
        (lambda w, l: nn.truncate_bf16(w, 8), "bits: expected 0 to 7"),
        (lambda w, l: cospadi.compress_params({"a": w}, {"b": l}, 0.2), "grams: no parameters at"),
    ],
)
def test_compressions_refuse_what_does_not_fit(call, match):
    rng = np.random.default_rng(0)
    w, l = jnp.asarray(rng.standard_normal((6, 8)), jnp.float32), jnp.eye(6)
    with pytest.raises(ValueError, match=match):
        call(w, l)


@functools.partial(jax.jit, static_argnums=2, static_argnames="init")
def fifteen_rounds(w, factor, ratio, init="data"):
    return cospadi.compress(w, factor, ratio, init=init, n_iter=15)


@pytest.mark.slow
def test_cospadi_is_below_six_tenths_of_svd_llm_on_a_planted_union_of_subspaces(x64, record_property):
    """The spec's oracle has 0.021 to 0.026 and 0.048 to 0.061 at 0.2, 0.050 to 0.058 and 0.131 to 0.155 at 0.4."""
    for ratio in (0.2, 0.4):
        shares = []
        for seed in range(3):
            x, w = map(jnp.asarray, planted_union(seed))
            factor = cospadi.gram_factor(x.T @ x)
            low_rank = error(x, w, cospadi.svd_llm_compress(w, factor, ratio))
            shares.append(error(x, w, fifteen_rounds(w, factor, ratio)) / low_rank)
        record_property(f"planted_share_{ratio}", max(shares))
        assert max(shares) < 0.6


@pytest.mark.slow
def test_cospadi_is_below_svd_llm_at_equal_storage_on_held_out_digits(x64, record_property):
    w, calibration, held_out = map(jnp.asarray, digits_layer())
    factor = cospadi.gram_factor(calibration.T @ calibration)
    whole = jnp.linalg.norm(held_out @ w)
    for ratio in (0.2, 0.4):
        low_rank = error(held_out, w, cospadi.svd_llm_compress(w, factor, ratio)) / whole
        own, from_kernel = (
            error(held_out, w, fifteen_rounds(w, factor, ratio, init=init)) / whole for init in ("data", "weight")
        )
        plain = error(held_out, w, cospadi.svd_compress(w, ratio)) / whole
        scaled = error(held_out, w, cospadi.asvd_compress(w, jnp.mean(jnp.abs(calibration), axis=0), ratio)) / whole
        record_property(f"digits_cospadi_{ratio}", own)
        record_property(f"digits_svd_llm_{ratio}", low_rank)
        record_property(f"digits_difference_{ratio}", own - low_rank)
        assert own < low_rank < min(plain, scaled)
        assert from_kernel > 2 * own  # the paper's wording of the start


@pytest.mark.slow
def test_compress_params_replaces_kernels_that_have_gram_matrices():
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": jnp.asarray(rng.standard_normal((6, 8)), jnp.float32), "bias": jnp.ones(8)}}
    params["stack"] = {"kernel": jnp.stack([params["a"]["kernel"]] * 2)}
    x = rng.standard_normal((40, 6)).astype(np.float32)
    grams = {"a/kernel": x.T @ x, "stack/kernel": np.stack([x.T @ x, 2 * x.T @ x])}
    made = cospadi.compress_params(params, grams, 0.2, n_iter=1, solver="mod")
    kernel, stacked = made["a"]["kernel"], made["stack"]["kernel"]
    assert made["a"]["bias"] is params["a"]["bias"]
    assert stacked.shape == (2, 6, 8)
    np.testing.assert_allclose(stacked.dense()[0], kernel.dense(), atol=1e-5)
    np.testing.assert_allclose(nn.linear(x, kernel), x @ kernel.dense(), atol=1e-4)
    kept = cospadi.compress_params(params, grams, 0.2, filter=lambda path: False)
    assert kept["a"]["kernel"] is params["a"]["kernel"]
