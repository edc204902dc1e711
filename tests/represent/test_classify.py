import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import losses, represent, train
from subspace_jax.manifolds import grassmann
from subspace_jax.represent.gcr import task as classify

from ..variants import rest_slow

SHAPE = {"input_shape": (4, 4, 1), "num_classes": 5}
KEY = jax.random.key(1)


def built(config):
    """The task and the data of a run."""
    (phase,) = classify.build(config).phases
    return phase.task, phase.data


def small_config(**model):
    config = classify.default_config()
    config.data.name = "union_of_subspaces"
    config.model.features = (8,)
    config.model.dims = (2,)
    config.model.update(model)
    return config


@pytest.mark.parametrize("head", rest_slow(["softmax", "cosine", "grassmann"], "grassmann"))
@pytest.mark.parametrize("backbone", rest_slow(["mlp", "convnet"]))
def test_make_classifier_combines_every_backbone_and_head(backbone, head):
    model = represent.make_classifier(jax.random.key(0), backbone=backbone, head=head, features=(8, 8), dims=2, **SHAPE)
    assert model(jnp.ones((3, 4, 4, 1))).shape == (3, 5)


@pytest.mark.parametrize("field", ["backbone", "head", "dtype"])
def test_make_classifier_refuses_unknown_names(field):
    with pytest.raises(ValueError, match=rf"model\.{field}: expected one of .*got 'nonsense'"):
        represent.make_classifier(jax.random.key(0), **{field: "nonsense"}, **SHAPE)


@pytest.mark.slow
def test_classifier_with_bfloat16_activations_gives_float32_logits():
    model = represent.make_classifier(jax.random.key(0), dtype="bfloat16", features=(8,), dims=2, **SHAPE)
    assert model.backbone(jnp.ones((3, 4, 4, 1))).dtype == jnp.bfloat16
    assert model(jnp.ones((3, 4, 4, 1))).dtype == jnp.float32


def test_evaluate_ignores_masked_examples():
    task, data = built(small_config())
    params, variables = task.init(jax.random.key(0))
    batch = next(iter(data.evaluate["eval"]()))
    half = {**batch, "mask": batch["mask"] * (np.arange(len(batch["mask"])) < 10)}
    sums = task.evaluate(params, variables, half, key=KEY)
    assert sums["count"] == 10
    # Masked examples hold NaN and invalid labels.
    real = half["mask"] > 0
    noisy = {
        "inputs": np.where(real[:, None], half["inputs"], np.nan),
        "labels": np.where(real, half["labels"], -1),
        "mask": half["mask"],
    }
    for name, value in task.evaluate(params, variables, noisy, key=KEY).items():
        np.testing.assert_allclose(value, sums[name], rtol=1e-6)


@pytest.mark.slow
def test_label_smoothing_changes_loss_and_not_evaluate():
    plain, data = built(small_config())
    smooth, _ = built(small_config(label_smoothing=0.1))
    params, variables = plain.init(jax.random.key(0))
    batch = next(data.train(0))
    assert (
        plain.loss(params, variables, batch, key=KEY, step=0)[0]
        != smooth.loss(params, variables, batch, key=KEY, step=0)[0]
    )
    rows = next(iter(data.evaluate["eval"]()))
    assert (
        plain.evaluate(params, variables, rows, key=KEY)["loss"]
        == smooth.evaluate(params, variables, rows, key=KEY)["loss"]
    )


@pytest.mark.slow
def test_sigmoid_loss_is_binary_cross_entropy_and_evaluate_takes_softmax():
    softmax, data = built(small_config(head="softmax"))
    sigmoid, _ = built(small_config(head="softmax", loss="sigmoid"))
    params, variables = softmax.init(jax.random.key(0))
    batch = next(data.train(0))
    logits = sigmoid.module(params, variables)(batch["inputs"])
    expected = jnp.mean(losses.binary_cross_entropy(logits, jnp.asarray(batch["labels"])))
    np.testing.assert_allclose(sigmoid.loss(params, variables, batch, key=KEY, step=0)[0], expected, rtol=1e-5)
    rows = next(iter(data.evaluate["eval"]()))
    assert (
        softmax.evaluate(params, variables, rows, key=KEY)["loss"]
        == sigmoid.evaluate(params, variables, rows, key=KEY)["loss"]
    )


def test_build_refuses_an_unknown_loss():
    with pytest.raises(ValueError, match=r"model\.loss: expected one of .*got 'hinge'"):
        classify.build(small_config(loss="hinge"))


@pytest.mark.slow
def test_dims_of_each_class_give_one_group_of_bases_per_dimension_on_the_manifold():
    dims = (1, 2, 2, 3, 3, 3, 1, 2, 4, 4)
    task, _ = built(small_config(dims=dims))
    params, _ = task.init(jax.random.key(0))
    assert sorted(b.shape for b in jax.tree.leaves(params["head"])) == [(2, 8, 1), (2, 8, 4), (3, 8, 2), (3, 8, 3)]
    tx = train.make_optimizer(train.default_config().optim, 10, task.roles())

    @jax.jit
    def moved(params):
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    for bases in jax.tree.leaves(moved(params)["head"]):
        np.testing.assert_allclose(grassmann.orthonormality_error(bases), 0, atol=1e-5)


def test_features_of_drops_padding_and_keeps_the_order():
    config = small_config()
    config.data.eval_batch_size = 768  # 2000 examples: the last batch is padded
    run = train.build(config)
    (phase,) = run.phases
    state = train.init_state(phase.task, phase.tx, run.mesh)
    features, labels = represent.features_of(phase.task, state, phase.data.evaluate["eval"]())
    assert features.shape == (2000, 8)
    rows = next(iter(phase.data.evaluate["eval"]()))
    np.testing.assert_array_equal(labels[:768], rows["labels"])
    # Batches of other sizes differ in the order of sums of 32.
    expected = phase.task.features(state.params, state.variables, rows["inputs"])
    np.testing.assert_allclose(features[:768], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("data", "batch_size", 5000, "batch_size: expected at most the 4000 examples"),
        ("data", "name", "no_such_set", "no set 'no_such_set'"),
        ("model", "label_smoothing", 1.0, "label_smoothing: expected"),
        ("model", "dims", (9,), "dims: a class subspace of R.8"),
        ("model", "dims", (1, 2), "dims: expected one for each of the 10 classes, got 2"),
        ("model", "dims", (0,), "dims: .* got 0"),
        ("model", "features", (8, 0), r"features: expected widths of at least 1, got \(8, 0\)"),
        ("model", "backbone", "convnet", r"'convnet' expects images .* got shape \[32\]"),
        ("model", "dtype", "int32", "dtype: expected one of"),
    ],
)
def test_build_refuses_invalid_values(group, field, value, message, tmp_path):
    config = small_config()
    config.data.data_dir = str(tmp_path)
    config[group][field] = value
    with pytest.raises(ValueError, match=message):
        classify.build(config)


@pytest.mark.slow
def test_augment_changes_inputs_and_keeps_labels(tmp_path):
    config = classify.default_config()
    config.data.data_dir = str(tmp_path)
    plain = next(built(config)[1].train(0))
    config.data.augment = True
    changed = next(built(config)[1].train(0))
    np.testing.assert_array_equal(plain["labels"], changed["labels"])
    assert plain["inputs"].shape == changed["inputs"].shape == (64, 8, 8, 1)
    assert np.mean(plain["inputs"] != changed["inputs"]) > 0.1


@pytest.mark.slow
def test_build_gives_the_same_batches_for_a_set_read_by_index(tmp_path, monkeypatch):
    config = classify.default_config()
    config.data.data_dir = str(tmp_path)
    in_memory = next(built(config)[1].train(0))
    monkeypatch.setattr(classify, "IN_MEMORY_BYTES", 0)
    by_index = next(built(config)[1].train(0))
    for name in in_memory:
        np.testing.assert_array_equal(in_memory[name], by_index[name])
