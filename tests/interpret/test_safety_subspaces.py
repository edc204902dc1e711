"""Projections of updates and overlaps of subspaces: golden vectors, identities and errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, optim
from subspace_jax.interpret import safety_subspaces as ss
from subspace_jax.interpret.safety_subspaces.projection import part

from ..variants import rest_slow

FRACS = (0.01, 0.25, 0.5, 0.75, 0.99)
NAMES = ("a.w", "b.w", "b.norm")
mso_tree = jax.jit(ss.mso_tree, static_argnames="side")
project = jax.jit(ss.project_update, static_argnames=("frac", "method", "basis", "side"))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def tree_of(g, prefix):
    """A tree of the golden file, whose matrices are [out, in]."""
    return {name: jnp.asarray(g[f"{prefix}/{name}"]) for name in NAMES}


@functools.cache
def models(seed=0):
    """Base, aligned and fine-tuned parameters."""
    shapes = {"a": {"kernel": (7, 5), "bias": (5,)}, "b": {"kernel": (5, 6)}}
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    made = [jax.tree.map(lambda s, i=i: normal(seed + i, *s), shapes, **is_shape) for i in range(3)]
    return tuple({**tree, "step": jnp.int32(i)} for i, tree in enumerate(made))


@functools.cache
def modes(**options):
    return ss.task_modes(*models(), **options)


@pytest.mark.parametrize("frac", rest_slow([0.5, *(frac for frac in FRACS if frac != 0.5)]))
def test_project_params_is_golden(golden, frac):
    g = golden("safety-subspaces/projection")
    made = ss.task_modes(*(tree_of(g, name) for name in ("base", "aligned", "ft")), side="input")
    for method in ("same", "orth", "opp"):
        where = f"{method}_{frac}"
        params, found = made.project(frac, method)
        want = {name: g[f"{where}/w/{name}"] for name in NAMES}
        chex.assert_trees_all_close(params, want, rtol=0, atol=4e-3)
        assert all(x.dtype == jnp.float16 for x in params.values())
        chex.assert_trees_all_close(found.energy_kept, g[f"{where}/energy_kept_ratio"], rtol=0, atol=2e-4)
        chex.assert_trees_all_close(found.cos_task_proj, g[f"{where}/cosine_task_proj"], rtol=0, atol=2e-4)
        chex.assert_trees_all_close(found.cos_task_align, g["cosine_task_align_correct"], rtol=0, atol=2e-6)


def test_rank_fraction_basis_is_golden_on_either_side(golden):
    g = golden("safety-subspaces/projection")
    base, aligned = (tree_of(g, name) for name in ("base", "aligned"))
    for name in NAMES[:2]:
        v = aligned[name].astype(jnp.float32) - base[name].astype(jnp.float32)
        for frac in (0.01, 0.25, 0.99):
            q, k = ss.rank_fraction_basis(v.T, frac)
            assert k == g[f"basis/{frac}/k/{name}"] == q.shape[1]
            chex.assert_trees_all_close(np.asarray(q @ q.T), g[f"basis/{frac}/P/{name}"], rtol=0, atol=1e-3)
        same = ss.rank_fraction_basis(v, 0.25, side="input")
        chex.assert_trees_all_close(same, ss.rank_fraction_basis(v.T, 0.25), rtol=1e-6)


def test_controls_are_golden_with_the_references_draws(golden):
    g = golden("safety-subspaces/projection")
    base, aligned, tuned = (tree_of(g, name) for name in ("base", "aligned", "ft"))
    drawn = jax.tree.map(lambda x, v: x.astype(jnp.float32) - v, aligned, tree_of(g, "random/V"))
    made = ss.task_modes(drawn, jax.tree.map(lambda x: x.astype(jnp.float32), aligned), tuned, side="input")
    for method in ("same", "orth"):
        params, found = made.project(FRACS[1], method)
        want = {name: g[f"random_{method}/w/{name}"] for name in NAMES}
        chex.assert_trees_all_close(params, want, rtol=0, atol=4e-3)
        chex.assert_trees_all_close(found.energy_kept, g[f"random_{method}/energy_kept_ratio"], rtol=0, atol=2e-4)
    for name in NAMES[:2]:
        u, v = (
            x[name].astype(jnp.float32) - y[name].astype(jnp.float32) for x, y in ((tuned, aligned), (aligned, base))
        )
        q, _ = ss.rank_fraction_basis(v, 1.0, side="input")
        k = int(g[f"basis/{FRACS[1]}/k/{name}"])
        some = q[:, g[f"randomk_same/perm/{name}"][:k]]
        got = aligned[name].astype(jnp.float32) + part(u, some, linalg.gram(some, u), "same")
        chex.assert_trees_all_close(got, g[f"randomk_same/w/{name}"].astype(np.float32), rtol=0, atol=4e-3)


def test_activation_overlap_is_golden(golden):
    g = golden("safety-subspaces/mso")
    acts = [jnp.asarray(g[f"act/{name}"]) for name in ("u", "h")]
    for center in (False, True):
        of_all = jax.jit(functools.partial(ss.activation_overlap, center=center))
        for eta in g["etas"]:
            mso, ku, kh, rand = g[f"act/{eta}/c{int(center)}"]
            got = of_all(*acts, eta)
            chex.assert_trees_all_close(got.mso, mso, rtol=0, atol=1e-3)
            assert (int(got.k_a), int(got.k_b)) == (ku, kh)
            chex.assert_trees_all_close(got.random_baseline, rand, rtol=1e-6)


def test_mso_tree_is_golden_and_averages(golden):
    g = golden("safety-subspaces/mso")
    du, dh = ({name: jnp.asarray(g[f"{name}/{x}"]) for name in NAMES[:2]} for x in ("du", "dh"))
    got = mso_tree(du, dh, 0.5, side="input")
    for name, result in got.leaves.items():
        chex.assert_trees_all_close(result.mso, g[f"{name}/0.5/mso"], rtol=0, atol=1e-3)
        assert (result.k_a, result.k_b) == (g[f"{name}/0.5/ku"], g[f"{name}/0.5/kh"])
    chex.assert_trees_all_close(got.mso, np.mean([g[f"{name}/0.5/mso"] for name in NAMES[:2]]), rtol=0, atol=1e-3)
    chex.assert_trees_all_close(got.random_baseline, np.mean([g[f"{name}/0.5/rand"] for name in NAMES[:2]]), rtol=1e-6)


def test_mso_tree_takes_vectors_as_columns_and_flattens_other_axes():
    x = normal(0, 3, 4, 5)
    a = {"conv": x, "bias": x[0, 0], "none": jnp.zeros(3), "count": jnp.int32(1)}
    b = {"conv": x + normal(1, 3, 4, 5), "bias": -2 * x[0, 0], "none": jnp.ones(3), "count": jnp.int32(2)}
    got = mso_tree(a, b, 0.9)
    assert got.leaves.keys() == {"conv", "bias", "none"}
    want = jax.jit(linalg.mode_subspace_overlap)(x.reshape(12, 5).T, b["conv"].reshape(12, 5).T, 0.9)
    chex.assert_trees_all_close(got.leaves["conv"], want, rtol=1e-6)
    chex.assert_trees_all_close(got.leaves["bias"].mso, 1.0, rtol=1e-6)
    assert np.isnan(got.leaves["none"].mso)
    assert got.leaves["none"].k_a == 0
    chex.assert_trees_all_close(got.mso, (want.mso + 1) / 2, rtol=1e-6)
    first = mso_tree(a, b, 0.9, side="input").leaves["conv"]
    assert max(first.k_a, first.k_b) <= 3


@pytest.mark.parametrize("side", ["output", "input"])
def test_project_update_divides_an_update_once_and_for_all(side):
    u, v = normal(0, 7, 5), normal(1, 7, 5)
    same, orth, opp = (project(u, v, frac=0.5, method=method, side=side) for method in ("same", "orth", "opp"))
    chex.assert_trees_all_close(same + orth, u, atol=1e-6)
    chex.assert_trees_all_equal(opp, -same)
    chex.assert_trees_all_close(project(same, v, frac=0.5, method="same", side=side), same, atol=1e-5)
    q, k = ss.rank_fraction_basis(v, 0.5, side)
    assert k == 2
    left = orth.T if side == "output" else orth
    chex.assert_trees_all_close(q.T @ left, np.zeros((k, left.shape[1]), np.float32), atol=1e-5)


def test_energies_and_cosines_keep_their_identities():
    for frac in (0.2, 0.5):
        same, orth, opp = (modes().project(frac, method)[1] for method in ("same", "orth", "opp"))
        chex.assert_trees_all_close(same.energy_kept + orth.energy_kept, 1.0, rtol=1e-5)
        chex.assert_trees_all_close(same.cos_task_proj, np.sqrt(same.energy_kept), rtol=1e-5)
        chex.assert_trees_all_close(opp.cos_task_proj, -same.cos_task_proj, rtol=1e-6)
        assert same.removed_by_module.keys() == {"a", "b"}


def test_metrics_are_those_of_what_is_added():
    base, aligned, tuned = models()
    for method in ("same", "orth", "opp"):
        params, found = modes().project(0.5, method)
        flat = [
            np.concatenate([np.ravel(x) for x in jax.tree.leaves({k: t[k] for k in "ab"})])
            for t in (base, aligned, tuned, params)
        ]
        u, v, p = flat[2] - flat[1], flat[1] - flat[0], flat[3] - flat[1]
        chex.assert_trees_all_close(found.energy_kept, np.sum(p**2) / np.sum(u**2), rtol=1e-4)
        chex.assert_trees_all_close(found.cos_task_proj, u @ p / np.linalg.norm(u) / np.linalg.norm(p), rtol=1e-4)
        chex.assert_trees_all_close(found.cos_task_align, u @ v / np.linalg.norm(u) / np.linalg.norm(v), rtol=1e-4)
        left = sum(found.removed_by_module.values())
        chex.assert_trees_all_close(left, np.sum((u - p) ** 2), rtol=1e-4)
        assert params["step"] == tuned["step"]


def test_sweep_shares_one_decomposition_and_agrees_with_single_projections():
    rows = ss.sweep(
        modes(), (0.2, 0.5), ("orth", "opp"), lambda params: {"norm": float(jnp.linalg.norm(params["a"]["bias"]))}
    )
    assert [(row.method, row.frac) for row in rows] == [("orth", 0.2), ("orth", 0.5), ("opp", 0.2), ("opp", 0.5)]
    params, found = ss.project_params(*models(), 0.5, "orth")
    chex.assert_trees_all_close(rows[1].metrics, found, rtol=1e-6)
    chex.assert_trees_all_close(rows[1].scores["norm"], np.linalg.norm(params["a"]["bias"]), rtol=1e-6)
    measured = ss.sweep(modes(), (0.5,), ("orth",))[0]
    assert measured.scores == {}
    chex.assert_trees_all_equal(measured.metrics, rows[1].metrics)


def test_all_directions_of_a_full_rank_update_hold_the_whole_of_another():
    u, v = normal(0, 7, 5), normal(1, 7, 5)
    chex.assert_trees_all_close(project(u, v, frac=1.0, method="same"), u, atol=1e-5)


def test_an_update_of_rank_one_has_one_direction_at_any_fraction():
    out, u = normal(0, 5), normal(1, 7, 5)
    v = jnp.outer(normal(2, 7), out)
    want = np.outer(u @ out, out) / (out @ out)
    for frac in (0.01, 1.0):
        chex.assert_trees_all_close(project(u, v, frac=frac, method="same"), want, atol=1e-5)


def test_a_multiple_of_the_reference_keeps_its_share_of_the_spectrum():
    v, bias = normal(0, 7, 5), normal(1, 5)
    s = np.linalg.svd(np.asarray(v), compute_uv=False)
    kept = np.sum(np.square(project(-2 * v, v, frac=0.5, method="same")))
    chex.assert_trees_all_close(kept, 4 * np.sum(s[:2] ** 2), rtol=1e-5)
    chex.assert_trees_all_close(project(3 * bias, bias, frac=0.5, method="same"), 3 * bias, rtol=1e-5)
    chex.assert_trees_all_close(project(bias, 0 * bias, frac=0.5, method="same"), 0 * bias)


def test_fractions_round_half_to_even_and_never_to_none():
    for n, frac, k in ((10, 0.25, 2), (14, 0.25, 4), (10, 0.01, 1)):
        v = jax.ShapeDtypeStruct((n, n), jnp.float32)
        assert jax.eval_shape(lambda v, frac=frac: ss.rank_fraction_basis(v, frac).q, v).shape == (n, k)


def test_controls_are_reproducible_and_as_large_as_asked():
    u, v = normal(0, 7, 5), normal(1, 7, 5)
    keys = jax.random.split(jax.random.key(0), 200)
    for basis, expected in (("random", 2 / 5), ("random_k", 2 / 5)):
        f = jax.jit(
            jax.vmap(lambda key, basis=basis: jnp.sum(jnp.square(ss.project_update(u, v, 0.5, "same", basis, key))))
        )
        kept = f(keys) / np.sum(np.square(u))
        assert len(np.unique(np.round(kept, 4))) > 5
        assert abs(np.mean(kept) - expected) < 0.05
        chex.assert_trees_all_equal(f(keys), f(keys))


def test_random_k_draws_from_directions_that_there_are():
    u, v = normal(0, 7, 5), jnp.outer(normal(2, 7), normal(3, 5))
    for seed in range(3):
        drawn = project(u, v, frac=0.2, method="same", basis="random_k", key=jax.random.key(seed))
        chex.assert_trees_all_close(drawn, project(u, v, frac=0.2, method="same"), atol=1e-5)


def test_groups_share_the_directions_of_their_updates_side_by_side():
    made = modes(groups=lambda path: "a" if path.startswith("a/") else None)
    base, aligned, _ = models()
    v = jnp.concatenate([(aligned["a"][n] - base["a"][n]).reshape(-1, 5).T for n in ("bias", "kernel")], axis=1)
    want = np.linalg.svd(np.asarray(v))[0][:, :2]
    for path in ("a/kernel", "a/bias"):
        q = made.leaves[path].modes.q[:, :2]
        chex.assert_trees_all_close(np.asarray(q @ q.T), want @ want.T, atol=1e-5)
    chex.assert_trees_all_equal(made.leaves["b/kernel"].modes.q, modes().leaves["b/kernel"].modes.q)
    with pytest.raises(ValueError, match="groups: expected leaves of one dimension on the side output in 'all'"):
        ss.task_modes(*models(), groups=lambda path: "all")


def test_project_params_keeps_bfloat16_and_subtracts_in_float32():
    coarse = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), {"w": m["a"]["kernel"]}) for m in models()]
    fine = [jax.tree.map(lambda x: x.astype(jnp.float32), m) for m in coarse]
    got, found = ss.project_params(*coarse, 0.5, "same")
    want, exact = ss.project_params(*fine, 0.5, "same")
    assert got["w"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(got["w"], want["w"].astype(jnp.bfloat16))
    chex.assert_trees_all_equal(found, exact)


def test_last_token_is_the_last_that_is_no_padding():
    hidden = normal(0, 2, 3, 4, 5)
    mask = jnp.asarray([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    want = np.stack([hidden[:, 0, 1], hidden[:, 1, 3], hidden[:, 2, 3]], axis=1)
    chex.assert_trees_all_equal(ss.last_token(hidden, mask), want)
    chex.assert_trees_all_equal(jax.jit(ss.last_token)(hidden[0], mask != 0), want[0])


def test_activation_layers_are_those_of_the_paper():
    assert list(ss.activation_layers(33)) == list(range(21, 29))


@pytest.mark.eight_devices
def test_project_params_of_sharded_parameters_are_those_of_one_device():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    single = tuple({"w": normal(i, 8, 8), "b": normal(i, 8)} for i in range(3))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.device_put(single, jax.sharding.NamedSharding(mesh, spec))
    f = jax.jit(functools.partial(ss.project_params, frac=0.5, method="orth"))
    with jax.set_mesh(mesh):
        got = f(*sharded)
    chex.assert_trees_all_close(got, f(*single), atol=1e-5)
    assert got[0]["w"].shape == (8, 8)


BAD = [
    ("frac: expected a fraction", lambda u: ss.project_update(u, u, 0.0, "same")),
    ("frac: expected a fraction", lambda u: ss.rank_fraction_basis(u, 1.5)),
    ("frac: expected a fraction", lambda u: ss.sweep(modes(), (0.5, -0.1))),
    ("method: expected one of", lambda u: ss.project_update(u, u, 0.5, "away")),
    ("method: expected one of", lambda u: ss.sweep(modes(), (0.5,), ("away",))),
    ("basis: expected one of", lambda u: ss.project_update(u, u, 0.5, "same", "bottom")),
    ("side: expected one of", lambda u: ss.rank_fraction_basis(u, 0.5, side="left")),
    ("side: expected one of", lambda u: ss.mso_tree([u], [u], 0.5, side="left")),
    ("key: expected a random key", lambda u: ss.project_update(u, u, 0.5, "same", "random")),
    ("u, v: expected updates of one shape", lambda u: ss.project_update(u, u.T, 0.5, "same")),
    ("v: expected an update with entries", lambda u: ss.rank_fraction_basis(u[:0], 0.5)),
    ("v: expected finite numbers, got 1", lambda u: ss.rank_fraction_basis(u.at[0, 0].set(jnp.nan), 0.5)),
    ("base, finetuned: .* only one of them has x", lambda u: ss.task_modes({"w": u}, {"w": u}, {"w": u, "x": u})),
    (r"base, aligned: .* w is \(7, 5\) and \(5, 7\)", lambda u: ss.task_modes({"w": u}, {"w": u.T}, {"w": u})),
    ("aligned w: expected finite", lambda u: ss.task_modes({"w": u}, {"w": u / 0}, {"w": u})),
    ("finetuned: expected leaves of floating", lambda u: ss.task_modes(*([jnp.arange(3)] for _ in range(3)))),
    ("update_a, update_b: expected trees", lambda u: ss.mso_tree({"w": u}, {"x": u}, 0.5)),
    ("update_a: expected leaves of floating", lambda u: ss.mso_tree([jnp.arange(3)], [jnp.arange(3)], 0.5)),
    ("eta: expected a share", lambda u: ss.mso_tree([u], [u], 0.0)),
    ("eta: expected a share", lambda u: ss.activation_overlap(u, u, 1.01)),
    ("update_b 0: expected finite", lambda u: ss.mso_tree([u], [u / 0], 0.5)),
    ("acts_a, acts_b: expected .* of one width", lambda u: ss.activation_overlap(u, u[:, 1:], 0.5)),
    ("mask: expected", lambda u: ss.last_token(u[None], jnp.ones((1, 5)))),
    ("mask: expected a token in every prompt", lambda u: ss.last_token(u[None], jnp.zeros((1, 7)))),
]


@pytest.mark.parametrize(("error", "call"), BAD)
def test_bad_input_of_safety_subspaces_is_refused(error, call):
    with pytest.raises(ValueError, match=error):
        call(normal(0, 7, 5))


def test_rank_fraction_basis_refuses_integers():
    with pytest.raises(TypeError, match="v: expected floating point"):
        ss.rank_fraction_basis(jnp.ones((3, 3), jnp.int32), 0.5)


def test_every_name_of_the_public_surface_of_safety_subspaces_is_there():
    for room, names in {
        ss: (
            *("rank_fraction_basis", "project_update", "project_params", "ProjectionMetrics"),
            *("mso_tree", "activation_overlap", "last_token", "sweep"),
        ),
        linalg: ("energy_basis", "mode_subspace_overlap", "MSOResult", "principal_angles"),
        optim: ("project_gradient",),
    }.items():
        assert set(names) <= set(room.__all__)
        assert all(callable(getattr(room, name)) for name in names)
    assert ss.ProjectionMetrics._fields == ("energy_kept", "cos_task_proj", "cos_task_align", "removed_by_module")
    assert linalg.MSOResult._fields == ("mso", "k_a", "k_b", "random_baseline")
