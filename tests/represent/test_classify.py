import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import losses, represent, train
from subspace_jax.represent.gcr import task as classify

SHAPE = {"input_shape": (4, 4, 1), "num_classes": 5}


def small_config(**model):
    config = classify.default_config()
    config.data.name = "union_of_subspaces"
    config.model.features = (8,)
    config.model.dims = (2,)
    config.model.update(model)
    return config


@pytest.mark.parametrize("head", ["softmax", "cosine", "grassmann"])
@pytest.mark.parametrize("backbone", ["mlp", "convnet"])
def test_every_backbone_takes_every_head(backbone, head):
    model = represent.make_classifier(jax.random.key(0), backbone=backbone, head=head, features=(8, 8), dims=2, **SHAPE)
    assert model(jnp.ones((3, 4, 4, 1))).shape == (3, 5)


@pytest.mark.parametrize("field", ["backbone", "head", "dtype"])
def test_unknown_names_are_refused_with_the_known_ones(field):
    with pytest.raises(ValueError, match=rf"model\.{field}: expected one of .*got 'nonsense'"):
        represent.make_classifier(jax.random.key(0), **{field: "nonsense"}, **SHAPE)


def test_bfloat16_activations_give_float32_logits_from_float32_parameters():
    model = represent.make_classifier(jax.random.key(0), dtype="bfloat16", features=(8,), dims=2, **SHAPE)
    assert model.backbone(jnp.ones((3, 4, 4, 1))).dtype == jnp.bfloat16
    assert model(jnp.ones((3, 4, 4, 1))).dtype == jnp.float32


def test_masked_rows_do_not_count_in_evaluation():
    task, data = classify.build(small_config())
    params, variables = task.init(jax.random.key(0))
    batch = next(iter(data.evaluate()))
    half = {**batch, "mask": batch["mask"] * (np.arange(len(batch["mask"])) < 10)}
    sums = task.evaluate(params, variables, half)
    assert sums["count"] == 10
    # What stands in masked rows must not matter at all.
    real = half["mask"] > 0
    noisy = {
        "inputs": np.where(real[:, None], half["inputs"], np.nan),
        "labels": np.where(real, half["labels"], -1),
        "mask": half["mask"],
    }
    for name, value in task.evaluate(params, variables, noisy).items():
        np.testing.assert_allclose(value, sums[name], rtol=1e-6)


def test_label_smoothing_changes_the_training_loss_and_not_the_evaluation():
    plain, data = classify.build(small_config())
    smooth, _ = classify.build(small_config(label_smoothing=0.1))
    params, variables = plain.init(jax.random.key(0))
    batch = next(data.train(0))
    key = jax.random.key(1)
    assert plain.loss(params, variables, batch, key)[0] != smooth.loss(params, variables, batch, key)[0]
    rows = next(iter(data.evaluate()))
    assert plain.evaluate(params, variables, rows)["loss"] == smooth.evaluate(params, variables, rows)["loss"]


def test_sigmoid_loss_trains_on_it_and_evaluates_by_softmax():
    softmax, data = classify.build(small_config(head="softmax"))
    sigmoid, _ = classify.build(small_config(head="softmax", loss="sigmoid"))
    params, variables = softmax.init(jax.random.key(0))
    batch = next(data.train(0))
    key = jax.random.key(1)
    logits = sigmoid.module(params, variables)(batch["inputs"])
    expected = jnp.mean(losses.binary_cross_entropy(logits, jnp.asarray(batch["labels"])))
    np.testing.assert_allclose(sigmoid.loss(params, variables, batch, key)[0], expected, rtol=1e-5)
    rows = next(iter(data.evaluate()))
    assert softmax.evaluate(params, variables, rows)["loss"] == sigmoid.evaluate(params, variables, rows)["loss"]


def test_an_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"model\.loss: expected one of .*got 'hinge'"):
        classify.build(small_config(loss="hinge"))


def test_one_dimension_for_each_class_gives_one_group_for_each_dimension():
    dims = (1, 2, 2, 3, 3, 3, 1, 2, 4, 4)
    task, _ = classify.build(small_config(dims=dims))
    params, _ = task.init(jax.random.key(0))
    assert sorted(b.shape for b in jax.tree.leaves(params["head"])) == [(2, 8, 1), (2, 8, 4), (3, 8, 2), (3, 8, 3)]


def test_features_of_leaves_the_filling_out_and_keeps_the_order():
    config = small_config()
    config.data.eval_batch_size = 768  # 2000 rows: the last batch is filled up
    experiment = train.build(config)
    state = train.init_state(experiment.task, experiment.tx, experiment.mesh)
    features, labels = represent.features_of(experiment.task, state, experiment.data.evaluate())
    assert features.shape == (2000, 8)
    rows = next(iter(experiment.data.evaluate()))
    np.testing.assert_array_equal(labels[:768], rows["labels"])
    # One pass over all rows rounds like three passes over a part of them, up to the order of sums of 32.
    expected = experiment.task.features(state.params, state.variables, rows["inputs"])
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
        ("model", "backbone", "convnet", r"'convnet' takes images .* got shape \[32\]"),
        ("model", "dtype", "int32", "dtype: expected one of"),
    ],
)
def test_values_that_can_not_serve_are_refused_when_the_task_is_built(group, field, value, message, tmp_path):
    config = small_config()
    config.data.data_dir = str(tmp_path)
    config[group][field] = value
    with pytest.raises(ValueError, match=message):
        classify.build(config)


def test_augmented_batches_differ_from_plain_ones_and_keep_their_labels(tmp_path):
    config = classify.default_config()
    config.data.data_dir = str(tmp_path)
    plain = next(classify.build(config)[1].train(0))
    config.data.augment = True
    changed = next(classify.build(config)[1].train(0))
    np.testing.assert_array_equal(plain["labels"], changed["labels"])
    assert plain["inputs"].shape == changed["inputs"].shape == (64, 8, 8, 1)
    assert np.mean(plain["inputs"] != changed["inputs"]) > 0.1


def test_a_set_that_does_not_fit_into_memory_is_read_by_index_with_the_same_batches(tmp_path, monkeypatch):
    config = classify.default_config()
    config.data.data_dir = str(tmp_path)
    in_memory = next(classify.build(config)[1].train(0))
    monkeypatch.setattr(classify, "IN_MEMORY_BYTES", 0)
    by_index = next(classify.build(config)[1].train(0))
    for name in in_memory:
        np.testing.assert_array_equal(in_memory[name], by_index[name])
