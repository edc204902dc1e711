"""XFactors: layout, loss against golden vectors, networks, pictures with known factors."""

import builtins

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from subspace_jax import losses, metrics
from subspace_jax.represent import xfactors
from subspace_jax.represent.xfactors import data

LAYOUT = xfactors.SubspaceLayout(2, (1, 2))
SHAPE = (8, 8, 1)


def golden_arguments(g, dtype):
    """Outputs from leaves that gradients are taken of, and the rest of the loss's arguments."""
    layout = xfactors.SubspaceLayout(4, tuple(g["dims_by_factor"].tolist()))
    # The golden weight is of each of two factors, 0.1 / 2.
    config = xfactors.XFactorsConfig(
        temperature=float(g["temperature"]), nce_weight=2 * float(g["nce_weight"]), beta_s=100.0, beta_t=1.0
    )
    names = ("mu_s", "logvar_s", "mu_t", "logvar_t", "x_hat")
    leaves = {name: jnp.asarray(g[name], dtype) for name in names}

    def loss(leaves):
        codes = xfactors.Codes(*(leaves[name] for name in names[:4]))
        z_t = codes.mu_t + jnp.exp(codes.logvar_t / 2) * jnp.asarray(g["eps_t"], dtype)
        outputs = xfactors.Outputs(codes, z_t, leaves["x_hat"])
        return xfactors.xfactors_loss(outputs, jnp.asarray(g["x"], dtype), jnp.asarray(g["labels"]), layout, config)

    return leaves, loss


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-8), ("float32", 1e-4)])
def test_golden_xfactors_loss_terms_and_gradients(golden, x64, dtype, tolerance):
    # In float32 a temperature of 0.03 amplifies rounding (the spec's tolerance).
    g = golden("xfactors/loss")
    leaves, loss = golden_arguments(g, dtype)
    (value, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(leaves)
    assert value.dtype == dtype
    close = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(value, g["loss"], **close)
    for name, theirs in (("kl_s",) * 2, ("kl_t",) * 2, ("reconstruction",) * 2, ("nce", "nce_per_factor")):
        np.testing.assert_allclose(aux[name], g[theirs], err_msg=name, **close)
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, g[f"grad_{name}"], err_msg=name, **close)


def test_golden_cross_correlation_and_samples(golden, x64):
    g = golden("xfactors/loss")
    chex.assert_trees_all_close(losses.cross_correlation(g["mu_s"], g["mu_t"]), g["cross_correlation"], atol=1e-8)
    chex.assert_trees_all_close(losses.cross_correlation_penalty(g["mu_s"], g["mu_t"]), g["decorrelation"])
    drawn = jax.random.normal(jax.random.key(0), g["mu_s"].shape, "float64")
    spread = (losses.reparameterize(jax.random.key(0), g["mu_s"], g["logvar_s"]) - g["mu_s"]) / drawn
    chex.assert_trees_all_close(spread, (g["z_s"] - g["mu_s"]) / g["eps_s"], rtol=1e-8)


def test_layout_slices_splits_and_swaps_blocks():
    a, b = jnp.arange(6.0).reshape(2, 3), -jnp.ones((2, 3))
    assert LAYOUT.slices() == (slice(0, 1), slice(1, 3))
    chex.assert_trees_all_equal(LAYOUT.split(a), (a[:, :1], a[:, 1:]))
    chex.assert_trees_all_equal(LAYOUT.swap(a, b, 1), jnp.asarray([[0.0, -1, -1], [3, -1, -1]]))
    chex.assert_trees_all_equal(LAYOUT.swap(a, a, 0), a)


INFONCE = jax.jit(lambda z, y: xfactors.factor_infonce(z, y, LAYOUT, 0.03))
SLOPE = jax.jit(jax.value_and_grad(lambda z, y: jnp.sum(xfactors.factor_infonce(z, y, LAYOUT, 0.03))))
WIDE = xfactors.SubspaceLayout(0, (4,))


def test_factor_infonce_is_zero_where_all_labels_are_equal_or_distinct():
    z = jax.random.normal(jax.random.key(0), (6, 3)).at[0].set(0)
    chex.assert_trees_all_close(INFONCE(z, jnp.zeros((6, 2), jnp.int32)), jnp.zeros(2), atol=1e-6)
    value, grad = SLOPE(z, jnp.tile(jnp.arange(6)[:, None], (1, 2)))
    assert value == 0
    assert not grad.any()


def test_factor_infonce_ignores_order_and_length_and_is_finite_at_zero():
    z = jax.random.normal(jax.random.key(0), (6, 3)).at[0].set(0)
    labels = jnp.asarray([[0, 1], [0, 0], [1, 1], [1, 0], [2, 1], [0, 2]])
    order = jnp.asarray([5, 0, 3, 1, 4, 2])
    chex.assert_trees_all_close(INFONCE(z[order], labels[order]), INFONCE(z, labels), rtol=1e-5)
    chex.assert_trees_all_close(INFONCE(3 * z, labels), INFONCE(z, labels), rtol=1e-5)
    assert jnp.all(jnp.isfinite(SLOPE(z, labels)[1]))


def test_factor_infonce_of_two_alike_and_the_rest_orthogonal_vanishes_at_a_low_temperature():
    z = jnp.eye(4)[jnp.asarray([0, 0, 1, 2])]
    labels = jnp.asarray([[0], [0], [1], [2]])
    assert xfactors.factor_infonce(z, labels, WIDE, 0.03)[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.eight_devices
def test_factor_infonce_of_eight_devices_is_that_of_one():
    z = jax.random.normal(jax.random.key(0), (16, 3))
    labels = jax.random.randint(jax.random.key(1), (16, 2), 0, 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, P("data"))
    # At temperature 0.5; 0.03 would amplify the order of sums.
    loss = jax.jit(jax.value_and_grad(lambda z, y: jnp.sum(xfactors.factor_infonce(z, y, LAYOUT, 0.5))))
    one, eight = (loss(*arrays) for arrays in ((z, labels), jax.device_put((z, labels), place)))
    chex.assert_trees_all_close(jax.device_get(eight), jax.device_get(one), rtol=1e-5, atol=1e-6)


class Picks(nnx.Module):
    """An encoder of somebody's own: the first pixels are means, the next ones log-variances."""

    def __init__(self, dim):
        self.dim = dim

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        return x[:, : self.dim], x[:, self.dim : 2 * self.dim]


class Tiles(nnx.Module):
    """A decoder of somebody's own: the code, repeated."""

    def __call__(self, z):
        return jax.nn.sigmoid(jnp.tile(z, (1, 64))[:, :64].reshape(-1, *SHAPE))


X = np.random.default_rng(0).random((4, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    made = xfactors.XFactors(Picks(2), Picks(3), Tiles(), LAYOUT)
    # Both encoders would pick the same pixels.
    return made, xfactors.encode(made, X)._replace(mu_t=X[:, 3, 2:5, 0])


def test_swap_factor_with_itself_reconstructs_and_swapping_everything_gives_the_other_image(model):
    made, codes = model
    a, b = (jax.tree.map(lambda x, i=i: x[i : i + 1], codes) for i in range(2))
    decoded = [xfactors.decode(made, one.mu_s, one.mu_t) for one in (a, b)]
    for k in (0, 1, None):
        chex.assert_trees_all_close(xfactors.swap_factor(made, a, a, k), decoded[0])
    both = a._replace(mu_s=b.mu_s, mu_t=LAYOUT.swap(a.mu_t, b.mu_t, 0))
    chex.assert_trees_all_close(xfactors.swap_factor(made, both, b, 1), decoded[1])
    # And one factor changes something, but not all.
    swapped = xfactors.swap_factor(made, a, b, 1)
    assert jnp.max(jnp.abs(swapped - decoded[0])) > 1e-4
    assert jnp.max(jnp.abs(swapped - decoded[1])) > 1e-4


def test_without_factors_xfactors_loss_is_that_of_a_beta_vae():
    layout = xfactors.SubspaceLayout(3)
    x, outputs = X, xfactors.XFactors(Picks(3), None, Tiles(), layout)(X, jax.random.key(2))
    config = xfactors.XFactorsConfig(nce_weight=0.0, kl_weight=0.01, beta_s=5.0)
    loss, _ = xfactors.xfactors_loss(outputs, x, jnp.zeros((4, 0), jnp.int32), layout, config)
    kl = losses.gaussian_kl(outputs.codes.mu_s, outputs.codes.logvar_s)
    chex.assert_trees_all_close(loss, jnp.mean(jnp.square(outputs.x_hat - x)) + 0.05 * kl)
    assert outputs.codes.mu_t.shape == (4, 0)


def test_decorrelation_adds_the_penalty_of_the_means(model):
    made, _ = model
    x, labels = jax.random.uniform(jax.random.key(1), (4, *SHAPE)), jnp.zeros((4, 2), jnp.int32)
    outputs = made(x, jax.random.key(2))
    plain, weighted = (
        xfactors.xfactors_loss(outputs, x, labels, LAYOUT, xfactors.XFactorsConfig(decorrelation=w)) for w in (0.0, 0.5)
    )
    penalty = losses.cross_correlation_penalty(outputs.codes.mu_s, outputs.codes.mu_t)
    chex.assert_trees_all_close(weighted[0] - plain[0], 0.5 * penalty, rtol=1e-5)
    assert weighted[1].keys() - plain[1].keys() == {"decorrelation"}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(16, 16, 3), (12, 20, 1)])
def test_convolutional_networks_give_codes_and_images_and_update_their_statistics(shape):
    made = xfactors.make_xfactors(jax.random.key(0), LAYOUT, shape, widths=(4, 6, 8))
    x = jax.random.uniform(jax.random.key(1), (3, *shape))
    before = nnx.to_pure_dict(nnx.state(made, nnx.BatchStat))
    made.train()
    outputs = made(x, jax.random.key(2))
    assert outputs.x_hat.shape == x.shape
    assert jnp.all((outputs.x_hat > 0) & (outputs.x_hat < 1))
    assert outputs.codes.mu_t.shape == (3, 3)
    after = nnx.to_pure_dict(nnx.state(made, nnx.BatchStat))
    assert all(jnp.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    made.eval()
    chex.assert_trees_all_close(xfactors.encode(made, x[:1]).mu_s, xfactors.encode(made, x).mu_s[:1], atol=1e-5)


def test_any_modules_serve_as_encoders_and_one_of_another_width_is_refused(model):
    assert model[0](X, jax.random.key(0)).x_hat.shape == X.shape
    with pytest.raises(ValueError, match=r"encoder_t: expected means and log-variances \[batch, 3\]"):
        xfactors.encode(xfactors.XFactors(Picks(2), Picks(4), Tiles(), LAYOUT), X)


def test_sprites_are_all_combinations_of_their_factors():
    found = xfactors.sprites()
    assert found.images.shape == (768, 16, 16, 1)
    assert len(np.unique(found.factors, axis=0)) == 768
    assert len(np.unique(found.images.reshape(768, -1), axis=0)) == 768
    assert [len(values) for values in found.values] == [3, 8, 8, 4]
    pixels = (found.images > 0).sum(axis=(1, 2, 3))
    np.testing.assert_array_equal(pixels, np.asarray([25, 16, 9])[found.factors[:, 0]])
    top = found.images.max(axis=(2, 3)).argmax(axis=1)
    np.testing.assert_array_equal(top - top.min(), found.factors[:, 2])
    np.testing.assert_allclose(found.images.max(axis=(1, 2, 3)), 0.4 + 0.2 * found.factors[:, 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("1F468-1F3FD-200D-1F33E", ("1F33E", 1, 3)),
        ("1F9D1-200D-2695-FE0F", ("2695", 0, 0)),
        ("1F3C3-1F3FF-200D-2640-FE0F", ("1F3C3", 2, 5)),
        ("26F9-FE0F-200D-2642-FE0F", ("26F9", 1, 0)),
        ("1F3C3", ("1F3C3", 0, 0)),
        ("1F3FB", None),
        ("1F468-1F3FB-200D-1F430-200D-1F468-1F3FC", None),
    ],
)
def test_names_of_openmoji_files_say_concept_gender_and_tone(name, cell):
    assert data._cell(name) == cell


@pytest.mark.slow
def test_openmoji_gives_1368_pictures_of_all_combinations():
    found = xfactors.openmoji(16)
    assert found.images.shape == (1368, 16, 16, 3)
    assert found.names == ("concept", "gender", "tone")
    assert [len(set(values)) for values in found.values] == [76, 3, 6]
    assert len(np.unique(found.factors, axis=0)) == 1368
    # Some concepts look the same for two genders or tones, at any size.
    assert len(np.unique(found.images.reshape(1368, -1), axis=0)) == 1237
    # Darker tones have darker pictures.
    brightness = [found.images[found.factors[:, 2] == tone].mean() for tone in (1, 3, 5)]
    assert sorted(brightness, reverse=True) == brightness


def test_openmoji_without_its_packages_names_the_extra(monkeypatch):
    true = builtins.__import__
    monkeypatch.setattr(data.importlib, "import_module", lambda name: true("no_such_module_of_openmoji"))
    with pytest.raises(ImportError, match=r"pip install 'subspace-jax\[real\]'"):
        xfactors.openmoji()


@pytest.mark.slow
def test_factor_scores_of_codes_that_are_the_factors():
    found = xfactors.sprites()
    rows = np.random.default_rng(0).permutation(768)
    layout = xfactors.SubspaceLayout(1, (1, 1, 1))
    sets = []
    for own in (rows[:500], rows[500:]):
        factors = found.factors[own]
        codes = factors.astype(np.float32)
        sets.append({"mu_s": codes[:, 3:], "mu_t": codes[:, :3], "factors": factors})
    scores = xfactors.factor_scores(*sets, layout, (0, 1, 2), found.names)
    assert scores["shape_from_shape"] == scores["x_from_x"] == scores["intensity_from_rest"] == 1
    assert scores["x_from_y"] < 0.3
    for name in ("mig", "modularity", "sap", "dci_disentanglement", "dci_completeness", "dci_informativeness"):
        assert scores[name] > 0.9, name
    assert scores["factor_vae"] > 0.99


@pytest.mark.slow
def test_boosted_importance_finds_the_dimension_of_each_factor():
    factors = np.random.default_rng(0).integers(0, 3, (200, 2))
    codes = factors[:, ::-1].astype(np.float32)
    importance, accuracy = xfactors.boosted_importance(codes[:150], factors[:150], codes[150:], factors[150:])
    np.testing.assert_allclose(importance, [[0, 1], [1, 0]], atol=1e-6)
    np.testing.assert_array_equal(accuracy, 1)


LABELS = jnp.zeros((4, 2), jnp.int32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: xfactors.SubspaceLayout(-1, (2,)), "residual_dim, factor_dims: expected"),
        (lambda: xfactors.SubspaceLayout(2, (2, 0)), "residual_dim, factor_dims: expected"),
        (lambda: xfactors.SubspaceLayout(0), "residual_dim, factor_dims: expected"),
        (lambda: LAYOUT.split(jnp.zeros((4, 4))), r"z_t: expected \[..., 3\], the sum of factor_dims \(1, 2\)"),
        (lambda: LAYOUT.swap(jnp.zeros((4, 3)), jnp.zeros((4, 2)), 0), r"z_t_b: expected \[..., 3\]"),
        (lambda: LAYOUT.swap(jnp.zeros((4, 3)), jnp.zeros((4, 3)), 2), "k: expected a factor from 0 to 1, got 2"),
        (lambda: xfactors.factor_infonce(jnp.zeros((4, 3)), LABELS[:, 0], LAYOUT, 0.1), r"labels: expected \[batch"),
        (lambda: xfactors.factor_infonce(jnp.zeros((4, 3)), LABELS[:, :1], LAYOUT, 0.1), r"labels: expected \[batch"),
        (lambda: xfactors.factor_infonce(jnp.zeros((4, 5)), LABELS, LAYOUT, 0.1), r"z_t: expected \[..., 3\]"),
        (lambda: xfactors.factor_infonce(jnp.zeros((4, 3)), LABELS, LAYOUT, 0.0), "temperature: expected a positive"),
        (lambda: xfactors.XFactorsConfig(temperature=0.0), "temperature: expected a positive number"),
        (lambda: xfactors.XFactorsConfig(beta_s=-1.0), "beta_s: expected at least 0"),
        (lambda: xfactors.make_xfactors(jax.random.key(0), LAYOUT, SHAPE, network="vit"), "network: expected"),
        (lambda: xfactors.make_xfactors(jax.random.key(0), LAYOUT, SHAPE, widths=(4,)), "widths: expected 3 numbers"),
        (lambda: xfactors.openmoji(4), "size: expected 8 to 512 pixels"),
        (lambda: data.open_factor_images("shapes3d", 64), "data.name: expected one of"),
        (lambda: data.held_out(xfactors.sprites(), 1.0, 0), "data.test_share: expected a share"),
    ],
)
def test_xfactors_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_xfactors_loss_refuses_images_of_another_shape(model):
    outputs = model[0](X, jax.random.key(0))
    with pytest.raises(ValueError, match="x: expected images like the decoded ones"):
        xfactors.xfactors_loss(outputs, jnp.zeros((4, 64)), LABELS, LAYOUT, xfactors.XFactorsConfig())


def test_every_public_name_of_the_spec_exists():
    for name in ("gaussian_kl", "reparameterize", "supervised_infonce", "cross_correlation_penalty"):
        assert callable(getattr(losses, name))
    ours = "SubspaceLayout XFactorsConfig XFactors ConvEncoder ConvDecoder factor_infonce xfactors_loss swap_factor"
    for name in (*ours.split(), "encode", "decode", "XFactorsTask"):
        assert name in xfactors.__all__
    scores = "factor_vae_votes factor_vae_score dci_from_importance dci_scores histogram_discretize"
    scores += " mutual_information_matrix mig modularity sap_from_scores sap_continuous"
    assert set(scores.split()) <= set(metrics.__all__)
