"""Deep subspace clustering: the authors' golden vectors, the checks of the losses, and what is refused."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subspace_jax import metrics, train
from subspace_jax.cluster import dsc
from subspace_jax.cluster.dsc import task as dsc_task
from subspace_jax.linalg import spectral_embedding
from subspace_jax.methods import METHODS

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "dsc" / "pieces.npz"
NAMES = {
    "ConvAutoencoder", "DSCResult", "column_affinity", "default_config", "distance_preserving_loss", "fit", "predict",
    "reconstruction_loss", "relative_stop", "self_expression_loss", "subspace_structured_loss",
}  # fmt: skip


def test_dsc_exports_its_public_surface():
    assert NAMES <= set(dsc.__all__) == set(dir(dsc))
    assert all(hasattr(dsc, name) for name in dsc.__all__)
    assert any(method.name == "dsc" for method in METHODS)


@functools.cache
def encoder(channels=(1, 3, 4), kernels=(5, 3), pretrain="reconstruction"):
    return dsc.Autoencoding(lambda key: dsc.ConvAutoencoder(channels, kernels, rngs=nnx.Rngs(params=key)), pretrain)


def golden_params(g):
    """The authors' weights in the module's form."""

    def layer(name, i, axes):
        kernel = g[f"{name}{i}_w_{axes}"].transpose(2, 3, 1, 0)
        return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(g[f"{name}{i}_b"])}

    return {
        "encoder": {i: layer("enc", i, "oihw") for i in range(2)},
        "decoder": {i: layer("dec", i, "iohw") for i in range(2)},
    }


@functools.partial(jax.jit, static_argnames="keep")
def pieces(params, x, coef, labels, clusters_key, *, keep):
    """All losses of one autoencoder, with the gradients that the golden vectors have."""

    def layers(params):
        x_hat, outputs = encoder().module(params)(x)
        return x_hat, (x, *outputs)

    def distances(params):
        return dsc.distance_preserving_loss(layers(params)[1])

    def expression(params, coef):
        return dsc.self_expression_loss(coef, layers(params)[1])

    x_hat, outputs = layers(params)
    dp = jax.value_and_grad(distances)(params)
    se = jax.value_and_grad(expression, argnums=(0, 1))(params, coef)
    lq = [jax.value_and_grad(dsc.subspace_structured_loss)(coef, y) for y in labels]
    affinity = dsc.column_affinity(coef, keep)
    embedding = spectral_embedding(affinity, 3)
    return {
        "recon": x_hat,
        "layers": outputs[1:],
        "reconstruction": dsc.reconstruction_loss(x, x_hat),
        "dp": dp,
        "se": se,
        "gram": dsc.self_expression_loss(coef, outputs, gram=True),
        "lq": lq,
        "affinity": affinity,
        "embedding": embedding,
        "lsr": dsc.lsr_coefficients(x, 0.1),
        "clusters": dsc.spectral_labels(clusters_key, affinity, 3),
        "identity": expression(params, jnp.eye(x.shape[0])),
    }


@pytest.fixture(scope="module")
def authors():
    with jax.enable_x64(True), np.load(GOLDEN) as archive:
        g = dict(archive)
        labels = (jnp.asarray(g["lq_true_labels"]), jnp.asarray(g["lq_rand_labels"]))
        x = jnp.asarray(g["x_nchw"].transpose(0, 2, 3, 1))
        found = pieces(golden_params(g), x, jnp.asarray(g["C"]), labels, jax.random.key(0), keep=int(g["d_keep"]))
        return g, jax.device_get(found)


def close(found, expected, rtol=1e-8, atol=0.0):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def test_conv_autoencoder_gives_the_authors_layers_and_reconstruction(authors):
    g, found = authors
    close(found["recon"].transpose(0, 3, 1, 2), g["recon"], atol=1e-14)
    for i, layer in enumerate(found["layers"], start=1):
        close(layer.transpose(0, 3, 1, 2), g[f"latent{i}_nchw"], atol=1e-14)
    close(found["reconstruction"], g["loss_recon_sum"])


def test_distance_preserving_loss_and_its_gradient_are_the_authors(authors):
    g, found = authors
    loss, grads = found["dp"]
    close(loss, g["loss_dp"])
    close(grads["encoder"][0]["kernel"].transpose(3, 2, 0, 1), g["loss_dp_grad_enc0_w"], atol=1e-10)
    assert not np.any(grads["decoder"][0]["kernel"])  # it has no gradient


def test_self_expression_loss_and_its_gradients_are_the_authors(authors):
    g, found = authors
    loss, (of_params, of_coef) = found["se"]
    close(loss, g["loss_se"])
    close(of_coef, g["loss_se_grad_C"], atol=1e-12)
    close(of_params["encoder"][0]["kernel"].transpose(3, 2, 0, 1), g["loss_se_grad_enc0_w"], atol=1e-12)
    v = np.concatenate([g["x_nchw"].reshape(24, -1), *(x.reshape(24, -1) for x in found["layers"])], axis=1)
    close(of_coef, 2 * (g["C"] - np.eye(24)) @ v @ v.T, rtol=1e-6, atol=1e-12)
    close(found["gram"], loss, rtol=1e-10)
    assert found["identity"] == 0


def test_subspace_structured_loss_and_its_gradient_are_the_authors_and_the_sum_over_pairs(authors):
    g, found = authors
    for name, (loss, grad) in zip(("true", "rand"), found["lq"], strict=True):
        close(loss, g[f"lq_{name}"], rtol=1e-7)
        close(grad, g[f"lq_{name}_grad_C"], rtol=1e-7)
        labels = g[f"lq_{name}_labels"]
        pairs = [(i, j) for i in range(24) for j in range(24) if labels[i] != labels[j]]
        close(loss, sum(np.sqrt(abs(g["C"][i, j]) + abs(g["C"][j, i])) for i, j in pairs), rtol=1e-6)


def test_affinity_embedding_start_and_scores_are_the_authors(authors):
    g, found = authors
    close(found["affinity"], g["affinity"], atol=1e-8)
    close(1 + found["embedding"].eigenvalues, g["shifted_lap_top_eigs"], atol=1e-8)
    close(found["embedding"].vectors @ found["embedding"].vectors.T, g["shifted_lap_top_projector"], atol=1e-8)
    close(found["lsr"], g["init_C_lsr_nodiag"], atol=1e-8)
    assert g["init_lambda"] == 0.1
    close(metrics.clustering_accuracy(g["labels"], g["metric_pred"]), g["metric_acc"])
    close(metrics.pair_f_score(g["labels"], g["metric_pred"]).f, g["metric_pairF"])
    top = np.sort(np.abs(g["C"]), axis=1)[:, -int(g["d_keep"])]
    close(np.where(np.abs(g["C"]) >= top[:, None], g["C"], 0), g["topk_rows"])


def test_spectral_labels_number_clusters_by_their_first_example(authors):
    _, found = authors
    labels = found["clusters"]
    _, first = np.unique(labels, return_index=True)
    assert labels[0] == 0
    assert len(first) == 3
    assert np.all(np.diff(first) > 0)


def test_five_steps_of_self_expression_are_those_of_the_authors_adam(x64, golden):
    g = golden("dsc/pieces")
    options = dsc.ExpressionOptions(24, 24, 3, 4)
    task, tx, zero = dsc.SelfExpression(encoder(), options), optax.adam(1e-3), jnp.zeros((), jnp.int32)
    params = {"autoencoder": golden_params(g), "coef": jnp.full((24, 24), 1e-8)}
    state = train.TrainState(zero, zero, params, {}, tx.init(params), jax.random.key_data(jax.random.key(0)), zero)
    batch = {"inputs": jnp.asarray(g["x_nchw"].transpose(0, 2, 3, 1)), "mask": jnp.ones(24)}
    step, losses = jax.jit(train.make_train_step(task, tx)), []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(5):
            state, row = step(state, batch)
            losses.append(row["loss"])
    close(losses, g["adam_losses"])
    close(state.params["coef"], g["adam_C_after5"], rtol=0, atol=1e-9)
    kernel = state.params["autoencoder"]["encoder"][0]["kernel"].transpose(3, 2, 0, 1)
    close(kernel, g["adam_enc0_w_after5"], rtol=0, atol=1e-9)
    before = params["autoencoder"]["decoder"][0]["kernel"]
    moved = jnp.max(jnp.abs(state.params["autoencoder"]["decoder"][0]["kernel"] - before))
    assert float(moved) == float(g["adam_dec0_w_changed"]) == 0


def test_subspace_structured_loss_of_matching_blocks_is_zero_with_finite_gradients():
    labels = np.repeat([0, 1, 2], 4)
    blocks = jnp.asarray((labels[:, None] == labels[None]) * np.float32(0.3))
    loss, grad = jax.value_and_grad(dsc.subspace_structured_loss)(blocks, jnp.asarray(labels))
    assert loss == 0
    assert not np.any(grad)
    one = blocks.at[0, 5].set(-0.25)  # the other entries between clusters stay 0
    loss, grad = jax.value_and_grad(dsc.subspace_structured_loss)(one, jnp.asarray(labels))
    assert float(loss) == pytest.approx(2 * 0.5)
    assert np.all(np.isfinite(grad))
    assert float(grad[0, 5]) == pytest.approx(-1 / 0.5)
    assert np.count_nonzero(grad) == 1


def test_self_expression_loss_by_grams_is_that_of_the_layers_in_float32():
    rng = np.random.default_rng(0)
    layers = [jnp.asarray(rng.standard_normal(s).astype(np.float32)) for s in ((12, 4, 4, 2), (12, 2, 2, 3))]
    coef = jnp.asarray(0.1 * rng.standard_normal((12, 12)).astype(np.float32))
    direct = dsc.self_expression_loss(coef, layers)
    close(dsc.self_expression_loss(coef, layers, gram=True), direct, rtol=1e-5)
    half = dsc.self_expression_loss(coef, [v.astype(jnp.bfloat16) for v in layers])
    assert half.dtype == jnp.float32
    close(half, direct, rtol=2e-2)


def test_column_affinity_keeps_all_or_column_maxima_and_ties():
    rng = np.random.default_rng(1)
    coef = rng.standard_normal((7, 7)).astype(np.float32)
    sizes = (np.abs(coef) + np.abs(coef.T)) / 2
    close(dsc.column_affinity(jnp.asarray(coef), 7), sizes, rtol=1e-6)
    most = np.where(sizes == sizes.max(0, keepdims=True), sizes, 0)
    close(dsc.column_affinity(jnp.asarray(coef), 1), (most + most.T) / 2, rtol=1e-6)
    assert np.all(dsc.column_affinity(jnp.ones((7, 7)), 1) == 1)  # all are ties


def test_self_expression_of_the_input_alone_ends_at_the_identity_or_at_least_squares():
    """Gradient descent on ``C`` alone; with a ridge the minimum is that of LSR with its diagonal."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((6, 32)).astype(np.float32)

    def minimum(x, ridge):
        def loss(c):
            return dsc.self_expression_loss(c, [x]) + ridge * jnp.sum(jnp.square(c))

        rate = 0.5 / (jnp.sum(jnp.square(x)) + ridge)
        return jax.lax.fori_loop(0, 4000, lambda _, c: c - rate * jax.grad(loss)(c), jnp.full((6, 6), 1e-8))

    minimum = jax.jit(minimum)
    close(minimum(jnp.asarray(x), 0.0), np.eye(6), rtol=0, atol=2e-3)
    flat = x @ np.diag(np.arange(32) < 2).astype(np.float32)  # of rank 2
    found = minimum(jnp.asarray(flat), 0.0)
    close(found @ flat, flat, rtol=0, atol=1e-4)
    assert np.abs(found - np.eye(6)).max() > 0.1
    h = x @ np.linalg.solve(x.T @ x + 0.5 * np.eye(32), x.T)
    close(minimum(jnp.asarray(x), 0.5), h, rtol=0, atol=1e-3)


def rows(values, **more):
    return [{"split": "train", "loss": value, **more} for value in values]


def test_relative_stop_waits_for_rounds_in_a_row_below_the_tolerance():
    stop = dsc.relative_stop(1e-2, 3)
    assert not stop(rows([100, 50, 49.9, 49.8]))
    assert stop(rows([100, 50, 49.9, 49.8, 49.7]))
    assert not stop(rows([49.9, 49.8, 49.7, 40, 40]))
    assert not stop([])
    assert stop(rows([0, 0, 0, 0]))
    by_change = dsc.relative_stop(1e-2, 2, "coef_change", steps=True)
    assert by_change(rows([1, 1], coef_change=0.009))
    assert not by_change(rows([1, 1], coef_change=0.011))


def test_subspace_images_are_of_length_one_and_of_the_rank_of_their_subspaces():
    found = dsc.subspace_images(0, 30)
    assert found.inputs.shape == (90, 8, 8, 1)
    assert found.inputs.dtype == np.float32
    flat = found.inputs.reshape(90, -1)
    close(np.linalg.norm(flat, axis=1), np.ones(90), rtol=1e-5)
    assert [np.linalg.matrix_rank(flat[found.labels == c], tol=1e-4) for c in range(3)] == [3, 3, 3]
    bent = dsc.subspace_images(0, 30, bend="relu").inputs
    assert np.min(bent) == 0
    assert np.linalg.matrix_rank(bent.reshape(90, -1), tol=1e-4) > 9


def test_open_images_draws_as_many_of_each_class_or_takes_the_first():
    drawn, first = (dsc.open_images("digits", 50, 1, draw=draw) for draw in ("balanced", "first"))
    for images in (drawn, first):
        np.testing.assert_array_equal(np.bincount(images.labels), np.full(10, 5))
    np.testing.assert_array_equal(first.labels[:10], np.arange(10))
    assert not np.array_equal(drawn.labels, dsc.open_images("digits", 50, 2, draw="balanced").labels)
    uniform = dsc.open_images("digits", 50, 1)
    assert uniform.inputs.shape == (50, 8, 8, 1)
    assert len(np.unique(uniform.inputs.reshape(50, -1), axis=0)) == 50


IMAGES = np.ones((6, 8, 8, 1), np.float32)
MODEL = nnx.eval_shape(lambda: dsc.ConvAutoencoder((1, 2), (3,), rngs=nnx.Rngs(params=0)))


def config_with(*changes):
    return train.override(dsc.default_config(), list(changes))


@pytest.mark.parametrize(
    ("message", "act"),
    [
        ("n_clusters: expected 2 to 6, the number of examples, got 1", lambda: dsc.fit(IMAGES, 1, 2)),
        ("n_clusters: expected 2 to 6, the number of examples, got 7", lambda: dsc.fit(IMAGES, 7, 2)),
        ("keep: expected 1 to 6, the number of examples, got 0", lambda: dsc.fit(IMAGES, 2, 0)),
        ("keep: expected 1 to 6, the number of examples, got 7", lambda: dsc.fit(IMAGES, 2, 7)),
        ("x: expected images .n, height, width, channels., got shape .6, 8, 8.", lambda: dsc.fit(IMAGES[..., 0], 2, 2)),
        ("x: expected sides that are multiples of 2, .* got 7 x 8", lambda: dsc.fit(IMAGES[:, :7], 2, 2)),
        ("x: expected finite numbers", lambda: dsc.fit(IMAGES * np.nan, 2, 2)),
        ("x: expected finite numbers", lambda: dsc.fit(IMAGES * np.inf, 2, 2)),
        ("model.kernels: expected numbers", lambda: dsc.fit(IMAGES, 2, 2, config_with("model.kernels=(1,)"))),
        ("model.channels, model.kernels", lambda: dsc.fit(IMAGES, 2, 2, config_with("model.kernels=(3,3)"))),
        ("expected images .n, height, width, 1., got", lambda: MODEL.encode(jnp.ones((2, 8, 8, 3)))),
        ("multiples of 2", lambda: MODEL.encode(jnp.ones((2, 8, 9, 1)))),
        ("channels, kernels: expected those of", lambda: dsc.ConvAutoencoder((1,), (), rngs=nnx.Rngs(0))),
        ("channels, kernels: expected at least 1", lambda: dsc.ConvAutoencoder((1, 0), (3,), rngs=nnx.Rngs(0))),
        ("coef: expected .n, n. for layers of 6", lambda: dsc.self_expression_loss(jnp.ones((5, 5)), [IMAGES])),
        ("layers: expected layers", lambda: dsc.self_expression_loss(jnp.ones((6, 6)), [IMAGES, IMAGES[:5]])),
        ("layers: expected layers", lambda: dsc.distance_preserving_loss([])),
        ("coef, labels: expected", lambda: dsc.subspace_structured_loss(jnp.ones((6, 6)), jnp.zeros(5))),
        ("keep: expected 1 to 6", lambda: dsc.column_affinity(jnp.ones((6, 6)), 7)),
        ("coef: expected a square", lambda: dsc.column_affinity(jnp.ones((6, 5)), 2)),
        ("x, x_hat: expected one shape", lambda: dsc.reconstruction_loss(IMAGES, IMAGES[:2])),
        ("ridge: expected more than 0", lambda: dsc.lsr_coefficients(jnp.asarray(IMAGES), 0.0)),
        ("tol, patience: expected", lambda: dsc.relative_stop(1e-2, 0)),
        ("bend: expected one of", lambda: dsc.subspace_images(0, 3, bend="square")),
        ("clusters, dim: expected at most 64", lambda: dsc.subspace_images(0, 3, clusters=30)),
        ("data.num_examples: expected a multiple of 10", lambda: dsc.open_images("digits", 55, 0, draw="first")),
        ("multiple of 10 classes up to 1740", lambda: dsc.open_images("digits", 1750, 0, draw="balanced")),
        ("data.num_examples: expected 2 to 1797, got 1798", lambda: dsc.open_images("digits", 1798, 0)),
        ("data.draw: expected one of", lambda: dsc.open_images("digits", 10, 0, draw="last")),
        ("data.num_examples: expected a multiple of 3", lambda: dsc.open_images("subspaces", 40, 0)),
        ("data.name: expected one of", lambda: dsc_task.build(config_with("data.name=faces"))),
        ("data.name: expected one of", lambda: dsc_task.outline(config_with("data.name=faces"))),
        ("phases.criterion: expected one of", lambda: dsc_task.build(config_with("phases.criterion=labels"))),
        ("phases.patience: expected at least 1", lambda: dsc_task.build(config_with("phases.patience=0"))),
        ("expression.ridge: expected a finite", lambda: dsc_task.build(config_with("expression.ridge=0."))),
    ],
)  # fmt: skip
def test_dsc_refuses_what_can_not_serve(message, act):
    with pytest.raises(ValueError, match=message):
        act()
