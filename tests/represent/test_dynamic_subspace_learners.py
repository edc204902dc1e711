"""Dynamic subspace learners: arrays against golden vectors of the authors' code, batches, networks, pictures."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subspace_jax import metrics, nn
from subspace_jax.represent import dynamic_subspace_learners as learners
from subspace_jax.represent.dynamic_subspace_learners import task as learning


@pytest.fixture
def pieces(golden):
    return golden("dynamic-subspace-learners/pieces")


def test_the_public_surface_of_the_spec_exists():
    names = {
        "SpatialAttention", "SubspaceEmbedding", "normalize_per_learner", "ScoreState", "score_update",
        "neuron_scores", "split_learner", "plateau_update", "recluster", "class_balanced_batches",
    }  # fmt: skip
    assert names <= set(learners.__all__)
    assert all(hasattr(learners, name) for name in learners.__all__)
    from subspace_jax import losses

    assert {"pairwise_distances", "sample_pairs", "margin_loss"} <= set(losses.__all__)
    assert {"match_assignments", "recall_at_k", "normalized_mutual_info"} <= set(metrics.__all__)


def embeddings(seed=0, rows=5, neurons=12):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, neurons)), jnp.float32)


NORMALIZE = jax.jit(learners.normalize_per_learner, static_argnums=2)


def test_normalize_per_learner_with_one_learner_normalizes_the_whole():
    e = embeddings()
    got = NORMALIZE(e, jnp.zeros(12, jnp.int32), 4)
    np.testing.assert_allclose(got, e / np.linalg.norm(e, axis=1, keepdims=True), rtol=1e-6)


def test_normalize_per_learner_gives_each_learner_unit_length_without_compiling_anew():
    e = embeddings()
    NORMALIZE(e, jnp.zeros(12, jnp.int32), 4)
    compiled = NORMALIZE._cache_size()
    for count in (2, 3, 4):
        learner_id = learners.contiguous_learners(12, count)[jnp.asarray(np.random.default_rng(1).permutation(12))]
        got = np.asarray(NORMALIZE(e, learner_id, 4))
        for c in range(count):
            np.testing.assert_allclose(np.linalg.norm(got[:, learner_id == c], axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), np.sqrt(count), rtol=1e-6)
    assert NORMALIZE._cache_size() == compiled


def test_normalize_per_learner_keeps_a_part_that_is_zero_with_a_finite_gradient():
    e = embeddings().at[0, :6].set(0)
    learner_id = learners.contiguous_learners(12, 2)
    assert jnp.all(NORMALIZE(e, learner_id, 4)[0, :6] == 0)
    gradient = jax.grad(lambda e: jnp.sum(NORMALIZE(e, learner_id, 4)[:, 3]))(e)
    assert jnp.all(jnp.isfinite(gradient))


def test_neuron_scores_are_those_of_the_authors_code(pieces, x64):
    state = learners.ScoreState(jnp.zeros(32), jnp.zeros((), jnp.int32))
    for part in (slice(7), slice(7, None)):  # two batches
        state = learners.score_update(
            state, jnp.asarray(pieces["split_activations"][part]), jnp.asarray(pieces["split_gradients"][part])
        )
    mask = np.isin(np.arange(32), pieces["split_candidate_neurons"])
    scores = np.asarray(learners.neuron_scores(state, jnp.asarray(mask)))
    np.testing.assert_allclose(scores, pieces["split_scores"], atol=1e-10)
    kept = np.flatnonzero(scores > 0.5)
    np.testing.assert_array_equal(kept[np.argsort(-scores[kept])], pieces["split_kept"])


def test_neuron_scores_that_are_all_equal_are_zero():
    state = learners.ScoreState(jnp.ones(8), jnp.int32(2))
    assert jnp.all(learners.neuron_scores(state, jnp.arange(8) < 6) == 0)
    assert jnp.all(learners.neuron_scores(learners.init_scores(8), jnp.ones(8, bool)) == 0)


SPLIT = jax.jit(learners.split_learner, static_argnums=4)


def layer(neurons=32, fan_in=3):
    rng = np.random.default_rng(0)
    kernel, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((fan_in, neurons), (neurons,)))
    return {"kernel": kernel, "bias": bias}


def test_split_learner_moves_useful_neurons_to_the_first_positions_and_draws_the_others_anew(pieces):
    params, kept = layer(), pieces["split_kept"]
    before = np.where(np.arange(32) < 8, 0, 1).astype(np.int32)
    scores = pieces["split_scores"].astype(np.float32)
    new, learner_id, did_split = jax.device_get(SPLIT(jax.random.key(0), params, before, scores, 4))
    assert did_split
    np.testing.assert_array_equal(learner_id, np.repeat([0, 1, 2], [8, 5, 19]))
    source = np.concatenate([np.arange(8), kept])  # position 11, a source, is rewritten too
    np.testing.assert_array_equal(new["kernel"][:, :13], params["kernel"][:, source])
    np.testing.assert_array_equal(new["bias"][:13], params["bias"][source])
    assert not np.any(np.isin(new["kernel"][:, 13:], params["kernel"]))
    assert np.abs(new["bias"][13:]).max() <= 1 / np.sqrt(3)


@pytest.mark.parametrize(
    ("useful", "members", "max_learners"), [(4, 24, 4), (6, 10, 4), (6, 24, 2)], ids=["few", "small", "most"]
)
def test_split_learner_changes_no_bit_where_the_rule_does_not_hold(useful, members, max_learners):
    params = layer()
    before = np.where(np.arange(32) < 32 - members, 0, 1).astype(np.int32)
    scores = np.zeros(32, np.float32)
    scores[32 - members : 32 - members + useful] = np.linspace(0.6, 1, useful)
    new, learner_id, did_split = jax.device_get(SPLIT(jax.random.key(0), params, before, scores, max_learners))
    assert not did_split
    chex.assert_trees_all_equal((new, learner_id), (params, before))


def test_fresh_learners_draw_each_learner_as_a_layer_of_its_own():
    learner_id = jnp.asarray(np.repeat([0, 1], [20, 180]), jnp.int32)
    drawn = learners.fresh_learners(jax.random.key(0), 400, learner_id, 4)
    for size, part in ((20, slice(20)), (180, slice(20, None))):
        # Of 8000 draws or more the standard deviation is known to 1 %.
        np.testing.assert_allclose(jnp.std(drawn["kernel"][:, part]), np.sqrt(2 / (400 + size)), rtol=0.03)
    assert 0.045 < jnp.max(jnp.abs(drawn["bias"])) <= 0.05


def test_reset_moments_zeroes_the_moments_of_rewritten_neurons_alone():
    params = {"backbone": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}, "embedding": layer(6)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    state = jax.tree.map(jnp.ones_like, tx.init(params))
    rewritten = jnp.asarray([False, True, False, True, True, False])
    new = learners.reset_moments(state, "embedding", rewritten)
    for old_moment, moment in zip(state[1][0][1:], new[1][0][1:], strict=True):
        chex.assert_trees_all_equal(moment["backbone"], old_moment["backbone"])
        for name in ("kernel", "bias"):
            wanted = np.where(rewritten, 0, old_moment["embedding"][name])
            np.testing.assert_array_equal(moment["embedding"][name], wanted)
    assert new[1][0].count == 1


def test_plateau_update_waits_for_patience_and_explores_again_after_the_next_best():
    state, reached = learners.init_plateau(), []
    for epoch, nmi in enumerate([0.0, 0.5, 0.4, 0.5, 0.3, 0.6, 0.1]):
        state = learners.plateau_update(state, nmi, epoch)
        reached.append(bool(learners.plateau_reached(state, epoch, 2)))
        if reached[-1]:
            state = state._replace(explore=jnp.zeros((), bool))
    assert reached == [False, False, False, True, False, False, False]
    assert (float(state.best), int(state.best_epoch), bool(state.explore)) == (pytest.approx(0.6), 5, True)
    assert not learners.plateau_reached(learners.plateau_update(learners.init_plateau(), 0.5, 0), 0, 0)


@pytest.mark.slow
def test_recluster_finds_clusters_of_directions_and_keeps_their_names():
    rng = np.random.default_rng(0)
    true = rng.integers(3, size=60).astype(np.int32)
    lengths = rng.uniform(0.1, 10, (60, 1))
    features = (lengths * (np.eye(3, 4)[true] + 0.05 * rng.standard_normal((60, 4)))).astype(np.float32)
    previous = np.where(rng.random(60) < 0.2, 0, true).astype(np.int32)
    np.testing.assert_array_equal(learners.recluster(jax.random.key(0), features, 3, previous), true)


@pytest.mark.slow
def test_recall_at_k_is_that_of_the_oracle(pieces, x64):
    got = metrics.recall_at_k(jnp.asarray(pieces["recall_X"]), jnp.asarray(pieces["recall_y"]), (1, 2, 4, 8))
    np.testing.assert_allclose(got, pieces["recall_at_1_2_4_8"], rtol=1e-12)


EXAMPLES = {"x": np.arange(40, dtype=np.float32), "labels": np.arange(40, dtype=np.int32) % 5}


def taken(assignment, count, start=0, **options):
    batches = learners.class_balanced_batches(
        EXAMPLES, assignment, **{"batch_size": 12, "per_class": 3, "seed": 0, **options}
    )
    batches.set_state({"next_index": start})
    return [next(batches) for _ in range(count)]


def test_class_balanced_batches_hold_one_cluster_and_as_many_examples_of_each_class():
    assignment = np.where(np.arange(40) < 30, 0, 1)
    assignment[:2] = -1
    for number, batch in enumerate(taken(assignment, 6)):
        assert set(batch["cluster"]) == {number % 2}
        np.testing.assert_array_equal(assignment[batch["x"].astype(int)], batch["cluster"])
        _, counts = np.unique(batch["labels"], return_counts=True)
        np.testing.assert_array_equal(counts, 3)
        if number % 2 == 0:  # the other cluster has two examples of each class
            assert len(np.unique(batch["x"])) == 12


def test_class_balanced_batches_leave_out_an_example_alone_of_its_class_and_repeat_classes_that_are_too_few():
    assignment = np.where(EXAMPLES["labels"] < 2, 0, 1)
    assignment[2] = 0  # class 2, alone in cluster 0
    for batch in taken(assignment, 8):
        if batch["cluster"][0] == 0:
            labels, counts = np.unique(batch["labels"], return_counts=True)
            np.testing.assert_array_equal((labels, counts), [[0, 1], [6, 6]])
        assert 2 not in batch["x"]


def test_class_balanced_batches_are_a_function_of_their_number_and_join_over_processes():
    assignment = np.zeros(40, np.int32)
    whole = taken(assignment, 4)
    chex.assert_trees_all_equal(taken(assignment, 2, start=2), whole[2:])
    parts = [taken(assignment, 4, process=(i, 2)) for i in range(2)]
    for batch, *own in zip(whole, *parts, strict=True):
        chex.assert_trees_all_equal(jax.tree.map(lambda *x: np.concatenate(x), *own), batch)
    assert not np.array_equal(taken(assignment, 1, seed=1)[0]["x"], whole[0]["x"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": {"x": np.zeros(4)}}, r"labels: expected integers beside \['x'\], got none"),
        ({"examples": {"labels": np.asarray([0, 0, 1, 1, 2])}}, r"labels: expected at least 2 .*got {2: 1}"),
        ({"examples": {"labels": np.zeros(40, np.int32)}}, "labels: expected at least 2 classes"),
        ({"per_class": 1}, "per_class: expected at least 2"),
        ({"batch_size": 13}, "batch_size: expected a multiple of per_class = 3"),
        ({"batch_size": 3}, "batch_size: expected a multiple of per_class = 3, of at least 2 classes"),
        ({"process": (0, 5)}, "batch_size: expected a multiple of 5 processes"),
        ({"assignment": np.zeros(3)}, "assignment: expected a cluster for each of 40 examples"),
        ({"assignment": np.full(40, -1)}, "assignment: expected a cluster with two examples of a class, got none"),
    ],
)
def test_class_balanced_batches_refuse_what_cannot_be_balanced(change, message):
    given = {"examples": EXAMPLES, "assignment": np.zeros(40), "batch_size": 12, "per_class": 3, "seed": 0}
    with pytest.raises(ValueError, match=message):
        learners.class_balanced_batches(**{**given, **change})


def test_shape_texture_has_the_textures_that_it_names():
    made = learners.shape_texture(0, 400)
    assert made["inputs"].shape == (400, 16, 16, 1)
    np.testing.assert_array_equal(made["labels"], 4 * made["shape"] + made["texture"])
    assert len(np.unique(made["labels"])) == 16
    chex.assert_trees_all_equal(learners.shape_texture(0, 400), made)
    down, across = (np.mean(np.abs(np.diff(made["inputs"], axis=axis)), axis=(1, 2, 3)) for axis in (1, 2))
    rows, columns, checks, plain = (made["texture"] == t for t in range(4))
    assert np.mean(down[rows] > across[rows]) > 0.95
    assert np.mean(across[columns] > down[columns]) > 0.95
    assert np.median((down + across)[checks]) > 1.1 * np.median((down + across)[plain])


def test_spatial_attention_is_that_of_the_authors_code(pieces, x64):
    attention = learners.SpatialAttention(32, rngs=nnx.Rngs(0))
    for i, (kernel, bias) in enumerate(zip(attention.kernels, attention.biases, strict=True), start=1):
        wanted = pieces[f"att_w{i}_oihw"].transpose(2, 3, 1, 0)
        assert kernel.get_value().shape == wanted.shape
        kernel.set_value(jnp.asarray(wanted))
        bias.set_value(jnp.asarray(pieces[f"att_b{i}"]))
    got = attention(jnp.asarray(pieces["att_x_nchw"].transpose(0, 2, 3, 1)))
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), pieces["att_out"], atol=1e-10)


def test_make_learners_with_resnet50_ends_with_the_third_stage():
    config = learners.NetworkConfig(backbone="resnet50")
    model = nnx.eval_shape(lambda key: learners.make_learners(key, (224, 224, 3), config), jax.random.key(0))
    graph, arrays = nnx.split(model)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    found = jax.eval_shape(lambda arrays, x: nnx.merge(graph, arrays)(x), arrays, images)
    assert (found.embedding.shape, found.features.shape) == ((2, 128), (2, 1024))
    assert found.attention.shape == (2, 14, 14, 1)
    assert "stage3" not in model.backbone.net.weights


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"backbone": "mpl"}, (4,), r"model\.backbone: expected one of .*did you mean 'mlp'"),
        ({"dtype": "int8"}, (4,), r"model\.dtype: expected one of"),
        ({"dropout": 1.0}, (4,), r"model\.dropout: expected a number in \[0, 1\)"),
        ({"features": ()}, (4,), r"model\.features: expected widths of at least 1"),
        ({"backbone": "convnet"}, (4,), r"model\.backbone: 'convnet' expects images"),
        ({"embedding": 5}, (4,), "features: expected an embedding of at least 6 neurons, got 5"),
        ({"learners": 9}, (4,), "learners, max_learners: expected 1 <= learners <= max_learners"),
    ],
)
def test_make_learners_refuses_invalid_sizes(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        learners.make_learners(jax.random.key(0), shape, learners.NetworkConfig(**fields))


def test_split_learner_and_normalize_per_learner_refuse_shapes_that_do_not_fit():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="params: expected an embedding of at least 6 neurons, got 5"):
        learners.split_learner(key, layer(5), jnp.zeros(5, jnp.int32), jnp.zeros(5), 4)
    with pytest.raises(ValueError, match="params, learner_id, scores: expected as many neurons"):
        learners.split_learner(key, layer(8), jnp.zeros(7, jnp.int32), jnp.zeros(8), 4)
    with pytest.raises(ValueError, match=r"e, learner_id: expected \[batch, neurons\]"):
        learners.normalize_per_learner(embeddings(), jnp.zeros(5, jnp.int32), 4)
    with pytest.raises(ValueError, match="max_learners: expected at least 1"):
        learners.normalize_per_learner(embeddings(), jnp.zeros(12, jnp.int32), 0)


def image_task():
    config = learning.default_config()
    config.data.name = "shape_texture"
    config.data.per_class = 4
    config.model.update({"backbone": "convnet", "features": (8,), "embedding": 12})
    return learning.outline(config).phases[0].task


@pytest.mark.slow
def test_attention_maps_reach_from_0_to_1_and_are_drawn(tmp_path):
    task = image_task()
    params, variables = jax.jit(task.init)(jax.random.key(0))
    images = learners.shape_texture(1, 3)["inputs"]
    maps = np.asarray(jax.jit(functools.partial(learners.attention_maps, task))(params, variables, images))
    assert maps.shape == (3, 16, 16)
    np.testing.assert_allclose((maps.min(axis=(1, 2)), maps.max(axis=(1, 2))), [[0] * 3, [1] * 3], rtol=1e-6)
    learners.plot_attention(images, maps, tmp_path / "maps.png", columns=2)
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_dropout_acts_with_a_key_alone():
    model = learners.make_learners(
        jax.random.key(0), (6,), learners.NetworkConfig(features=(8,), embedding=12, dropout=0.5)
    )
    x = embeddings(neurons=6)
    plain, first, second = (model(x, key).embedding for key in (None, *jax.random.split(jax.random.key(1))))
    assert not any(jnp.allclose(a, b) for a, b in itertools.combinations((plain, first, second), 2))
    np.testing.assert_array_equal(model(x).embedding, plain)


@pytest.mark.slow
def test_a_step_leaves_the_statistics_of_a_resnets_batch_norms_as_they_are():
    config = learners.NetworkConfig(backbone="resnet18", embedding=12)
    model = learners.make_learners(jax.random.key(0), (32, 32, 3), config)
    before = jax.device_get(model.backbone.net.batch_stats)
    model.train()
    model(jnp.ones((2, 32, 32, 3)), jax.random.key(1))
    chex.assert_trees_all_equal(jax.device_get(model.backbone.net.batch_stats), before)
    assert isinstance(model.backbone.net, nn.Model)
