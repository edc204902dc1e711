"""Gates, pairs and loss of Hydra: golden vectors of the authors' code, the checks of the method, bad input."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import losses
from subspace_jax.represent import hydra

from ..variants import rest_slow

BATCH, KEYS, WIDTH, CLASSES = 8, 12, 6, 5
PUBLIC = (
    "PairGate OpenGate Projector sample_partners gated_logits pair_masks hydra_loss gate_penalty class_pair_gates "
    "effective_rank HydraTask"
)


@pytest.mark.parametrize("name", PUBLIC.split())
def test_hydra_has_the_names_of_the_method(name):
    assert name in hydra.__all__
    assert callable(getattr(hydra, name))


def gate_arrays(vectors, when):
    """Parameters and running statistics of a golden gate."""
    params = {"table": vectors["label_embedding"]}
    for i in (1, 2):
        params[f"norm{i}"] = {part: vectors[f"bn{i}_{part}"] for part in ("scale", "bias")}
        params[f"dense{i}"] = {"kernel": vectors[f"dense{i}_weight"].T, "bias": vectors[f"dense{i}_bias"]}
    statistics = {f"norm{i}": {part: vectors[f"bn{i}_{part}_{when}"] for part in ("mean", "var")} for i in (1, 2)}
    return jax.tree.map(jnp.asarray, (params, statistics))


@pytest.mark.parametrize("kind", ["fused", "product"])
def test_pair_gate_gives_the_golden_gates_statistics_and_gradients(x64, golden, kind):
    vectors = golden(f"hydra/gate_{kind}")
    params, statistics = gate_arrays(vectors, "before")
    pairs = jnp.asarray(vectors["y1"]), jnp.asarray(vectors["y2"])
    fuse = kind == "fused"

    @jax.jit
    def step(params, statistics):
        def f(params):
            gate, new = hydra.pair_gate(params, statistics, *pairs, fuse=fuse, train=True)
            return jnp.sum(gate * vectors["cotangent"]), (gate, new)

        grads, (gate, new) = jax.grad(f, has_aux=True)(params)
        return grads, gate, new, hydra.pair_gate(params, new, *pairs, fuse=fuse)[0]

    grads, gate, new, evaluated = step(params, statistics)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-8, atol=1e-10)
    close(gate, vectors["gate_train"])
    close(new, gate_arrays(vectors, "after")[1])
    close(evaluated, vectors["gate_eval_after_update"])
    close(grads["table"], vectors["grad_label_embedding"])
    for i in (1, 2):
        for part in ("scale", "bias"):
            close(grads[f"norm{i}"][part], vectors[f"grad_bn{i}_{part}"])
        close(grads[f"dense{i}"]["kernel"].T, vectors[f"grad_dense{i}_weight"])
        close(grads[f"dense{i}"]["bias"], vectors[f"grad_dense{i}_bias"])


GOLDEN_LOSSES = {
    "plain": hydra.HydraLoss(),
    "alpha": hydra.HydraLoss(),
    "global": hydra.HydraLoss(reduction="global"),
    "subspace": hydra.HydraLoss(reduction="global", renormalize=True),
}


def test_hydra_loss_gives_the_golden_values_and_gradients(x64, golden):
    vectors = {key: jnp.asarray(x) for key, x in golden("hydra/loss").items()}
    labels = hydra.PairLabels(vectors["y1"], vectors["y2"], vectors["key_labels"])
    log_scale, arrays = -jnp.log(vectors["temperature"]), tuple(vectors[name] for name in ("z", "k", "gate"))

    def found(name, config):
        alpha = vectors["alpha"] if name == "alpha" else 0.0

        def f(log_scale, *arrays):
            return hydra.hydra_loss({"log_scale": log_scale, "alpha": alpha}, *arrays, labels, config)[0]

        logits = hydra.gated_logits(*arrays, log_scale, alpha, config.renormalize)
        return jax.value_and_grad(f, argnums=(0, 1, 2, 3))(log_scale, *arrays), logits

    # In three blocks, of which the last has padding.
    cases = {name: config._replace(block_size=3) for name, config in GOLDEN_LOSSES.items()}
    results = jax.jit(lambda: {name: found(name, config) for name, config in cases.items()})()
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-9, atol=1e-12)
    for name, ((loss, (of_scale, *grads)), logits) in results.items():
        close(loss, vectors[f"{name}_loss"])
        close(tuple(grads), tuple(vectors[f"{name}_grad_{part}"] for part in ("z", "k", "gate")))
        if f"{name}_grad_log_scale" in vectors:
            close(of_scale, vectors[f"{name}_grad_log_scale"][0])
        if f"{name}_logits" in vectors:
            close(logits, vectors[f"{name}_logits"])


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    z, k = rng.standard_normal((BATCH, WIDTH)), rng.standard_normal((KEYS, WIDTH))
    gate = rng.uniform(size=(BATCH, WIDTH))
    labels = [rng.integers(CLASSES, size=n) for n in (BATCH, BATCH, KEYS)]
    return tuple(np.float32(x) for x in (z, k, gate)), hydra.PairLabels(*map(np.int32, labels))


PLAIN = hydra.HydraLoss(block_size=5)


@functools.partial(jax.jit, static_argnames=("config",))
def loss_and_grads(arrays, labels, log_scale=2.0, alpha=0.0, config=PLAIN):
    def f(arrays):
        params = {"log_scale": log_scale, "alpha": alpha}
        return hydra.hydra_loss(params, *arrays, labels, config)[0]

    return jax.value_and_grad(f)(arrays)


effective_rank = jax.jit(hydra.effective_rank)
gated_logits = jax.jit(hydra.gated_logits, static_argnames="renormalize")


@pytest.mark.parametrize(("reduction", "penalty"), [("anchor", 0.0), ("global", 2.0)])
def test_hydra_loss_in_blocks_is_the_infonce_of_all_logits_and_the_penalty(pairs, reduction, penalty):
    arrays, labels = pairs
    masks = hydra.pair_masks(*map(jnp.asarray, labels))
    logits = gated_logits(*arrays, 2.0, 0.3)
    infonce = jax.jit(functools.partial(losses.multi_positive_infonce, reduction=reduction))
    expected = infonce(logits, *masks)
    # A constant for each anchor does not count.
    np.testing.assert_allclose(infonce(logits + np.float32(np.arange(BATCH)[:, None] - 3), *masks), expected, rtol=1e-5)
    expected = expected + penalty * np.mean(arrays[2] * (1 - arrays[2]))
    got, _ = loss_and_grads(arrays, labels, alpha=0.3, config=hydra.HydraLoss(False, reduction, penalty, 5))
    # float32, and 1e-6 beside the number of positives.
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got >= 0


def test_hydra_loss_with_an_open_gate_and_one_positive_is_ntxent(pairs):
    (z, k, _), _ = pairs
    first = np.arange(BATCH, dtype=np.int32)
    own = hydra.PairLabels(first, first, np.arange(KEYS, dtype=np.int32))
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, k)]
    logits = np.exp(2.0) * units[0] @ units[1].T
    expected = np.mean(np.log(np.exp(logits).sum(1)) - np.diag(logits))
    np.testing.assert_allclose(loss_and_grads((z, k, np.ones_like(z)), own)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(("gate", "alpha"), [(1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("renormalize", rest_slow([False, True]))
def test_gated_logits_of_a_repelled_or_closed_gate_are_zero_and_the_loss_counts_negatives(
    pairs, gate, alpha, renormalize
):
    (z, k, _), labels = pairs
    config = PLAIN._replace(renormalize=renormalize)
    gate = np.full_like(z, gate)
    logits = gated_logits(z, k, gate, 2.0, alpha, renormalize=renormalize)
    np.testing.assert_allclose(logits, np.zeros((BATCH, KEYS)), atol=1e-5)  # exp(2) times rounding of a cosine
    positives, negatives = map(np.asarray, hydra.pair_masks(*map(jnp.asarray, labels)))
    expected = np.mean(np.log1p(negatives.sum(1)) * positives.any(1))
    np.testing.assert_allclose(loss_and_grads((z, k, gate), labels, alpha=alpha, config=config)[0], expected, rtol=1e-5)


def test_gated_logits_depend_on_the_size_of_the_gate_unless_they_are_normalized(pairs):
    (z, k, gate), labels = pairs
    other = np.float32(np.random.default_rng(1).uniform(0.1, 3.0, (BATCH, 1))) * gate
    # float32 cosines times exp(2).
    np.testing.assert_allclose(*(gated_logits(z, k, g, 2.0, 0.0, renormalize=True) for g in (gate, other)), atol=1e-5)
    assert abs(loss_and_grads((z, k, gate), labels)[0] - loss_and_grads((z, k, other), labels)[0]) > 1e-2


def test_pair_masks_leave_out_the_class_of_the_anchor():
    positives, negatives = hydra.pair_masks(jnp.asarray([0, 1]), jnp.asarray([2, 1]), jnp.asarray([0, 1, 2, 3, 2]))
    np.testing.assert_array_equal(positives, [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(negatives, [[0, 1, 0, 1, 0], [1, 0, 1, 1, 1]])


@pytest.mark.parametrize("renormalize", rest_slow([False, True]))
def test_hydra_loss_gives_no_gradient_to_anchors_whose_partner_is_absent(pairs, renormalize):
    config = PLAIN._replace(renormalize=renormalize)
    (z, k, gate), (first, second, keys) = pairs
    here = np.isin(second, keys)
    assert here[[2, 7]].all()
    second, gate = second.copy(), gate.copy()
    second[2], gate[3] = CLASSES, 0  # a class without a key, a gate that is closed
    loss, grads = loss_and_grads((z, k, gate), hydra.PairLabels(first, second, keys), config=config)
    assert loss > 0
    chex.assert_tree_all_finite(grads)
    for of_anchors in (grads[0], grads[2]):
        np.testing.assert_array_equal(of_anchors[2], np.zeros(WIDTH))
        assert np.abs(of_anchors[7]).max() > 0
    nobody = hydra.PairLabels(first, np.full_like(second, CLASSES), keys)
    loss, grads = loss_and_grads((z, k, gate), nobody, config=config)
    assert loss == 0
    chex.assert_trees_all_equal(grads, (0 * z, 0 * k, 0 * gate))


def test_hydra_loss_without_negatives_is_zero(pairs):
    arrays, labels = pairs
    loss, grads = loss_and_grads(arrays, jax.tree.map(np.zeros_like, labels))
    assert loss == 0
    chex.assert_trees_all_equal(grads, jax.tree.map(np.zeros_like, arrays))


def test_gated_logits_of_bfloat16_are_float32(pairs):
    arrays, _ = pairs
    got = gated_logits(*(x.astype(jnp.bfloat16) for x in arrays), np.log(100.0))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, gated_logits(*arrays, np.log(100.0)), atol=2.0)  # 8 bits of 100


def test_hydra_loss_holds_no_array_of_all_pairs_and_none_with_their_dimensions():
    batch, keys, block, width = 32, 96, 16, 5
    arrays = [jax.ShapeDtypeStruct((n, width), jnp.float32) for n in (batch, keys, batch)]
    labels = hydra.PairLabels(*(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (batch, batch, keys)))
    for renormalize in (False, True):
        config = hydra.HydraLoss(renormalize, block_size=block)
        text = str(jax.make_jaxpr(functools.partial(loss_and_grads, config=config))(tuple(arrays), labels))
        assert f"f32[{batch},{block}]" in text
        assert f"[{batch},{keys}" not in text
        assert f"[{keys // block},{batch},{block}" not in text  # nor is it kept for the backward pass
        assert f"{block},{width},{width}]" not in text
        assert f"[{batch},{block},{width}]" not in text


def test_sample_partners_permutes_repeats_or_moves_the_classes():
    labels = jnp.asarray(np.random.default_rng(0).integers(CLASSES, size=200), jnp.int32)
    draw = {kind: hydra.sample_partners(jax.random.key(0), labels, kind, CLASSES) for kind in hydra.core.PARTNERS}
    assert all(x.dtype == jnp.int32 for x in draw.values())
    np.testing.assert_array_equal(draw["identical"], labels)
    np.testing.assert_array_equal(np.sort(draw["arbitrary"]), np.sort(labels))
    assert np.mean(draw["arbitrary"] == labels) < 0.5
    steps = np.asarray((draw["distinct"] - labels) % CLASSES)
    assert set(steps) == {1, 2, 3, 4}
    assert set(np.asarray(draw["distinct"])) == set(range(CLASSES))


def test_sample_near_partners_weighs_classes_by_their_distance():
    distances = jnp.asarray([[0.0, 1.0, 3.0], [1.0, 0.0, 1.0], [3.0, 1.0, 0.0]])
    drawn = hydra.sample_near_partners(jax.random.key(0), jnp.zeros(20_000, jnp.int32), distances, 2.0)
    weights = np.asarray([1, 1 / 4, 1 / 16])
    # Three standard deviations of a share over 20,000 draws are 0.011.
    np.testing.assert_allclose(np.bincount(drawn) / 20_000, weights / weights.sum(), atol=0.011)


def test_gate_penalty_is_largest_where_gates_are_half_open():
    assert hydra.gate_penalty(jnp.asarray([[0.0, 1.0]])) == 0
    assert hydra.gate_penalty(jnp.asarray([[0.5, 0.5]])) == 0.25


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_effective_rank_counts_directions_of_equal_variance(rank):
    rows = np.random.default_rng(0).standard_normal((50, 6))
    directions = np.linalg.qr(rows - rows.mean(axis=0))[0]  # orthonormal, and of mean zero
    features = np.float32(directions * (np.arange(6) < rank) + 1)
    np.testing.assert_allclose(effective_rank(features), rank, rtol=1e-4)  # the mean is taken off in float32


def test_effective_rank_of_equal_features_is_one():
    assert effective_rank(np.full((50, 6), 2.0, np.float32)) == 1


@pytest.mark.parametrize("fuse", rest_slow([True, False]))
def test_pair_gate_module_is_symmetric_and_agrees_with_class_pair_gates(fuse):
    def make(key):
        return hydra.PairGate(CLASSES, 4, embed_dim=6, hidden=7, fuse=fuse, rngs=nnx.Rngs(params=key))

    first, second = jnp.asarray([0, 1, 2, 3], jnp.int32), jnp.asarray([4, 1, 0, 2], jnp.int32)

    @jax.jit
    def run(key):
        gate = make(key)
        gate.train()
        trained = gate(first, second), gate(second, first)
        gate.eval()
        found = gate(first, second), gate(second, first), gate(first), gate(first, first)
        return trained, found, hydra.class_pair_gates(gate, CLASSES), nnx.to_pure_dict(nnx.state(gate, nnx.BatchStat))

    trained, (found, swapped, single, same), gates, statistics = run(jax.random.key(0))
    np.testing.assert_array_equal(*trained)
    np.testing.assert_array_equal(found, swapped)
    assert np.abs(found - trained[0]).max() > 1e-3  # by running statistics
    assert all(np.abs(statistics[name]["mean"]).max() > 0 for name in ("norm1", "norm2"))
    assert np.all((found > 0) & (found < 1))
    # Sums over another number of rows.
    np.testing.assert_allclose(gates[first, second], found, rtol=1e-5)
    np.testing.assert_allclose(single, same if fuse else np.sqrt(same), rtol=1e-5)


def test_open_gate_is_one_for_every_pair():
    classes = np.zeros(3, np.int32)
    np.testing.assert_array_equal(hydra.OpenGate(4)(classes, classes), np.ones((3, 4)))


def test_projector_normalizes_each_projection():
    x = np.float32(np.random.default_rng(0).standard_normal((6, 3)))
    out = jax.jit(lambda x: hydra.Projector(3, 5, 4, rngs=nnx.Rngs(0))(x))(x)
    np.testing.assert_allclose(np.mean(out, axis=1), np.zeros(6), atol=1e-6)
    np.testing.assert_allclose(np.std(out, axis=1), np.ones(6), rtol=1e-2)  # 1e-5 beside the variance


@pytest.mark.eight_devices
def test_hydra_loss_of_four_devices_is_that_of_one(pairs):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    sharded = loss_and_grads(*jax.tree.map(place, pairs))
    # Sums over the batch in another order.
    chex.assert_trees_all_close(sharded, loss_and_grads(*pairs), rtol=1e-5, atol=1e-6)


def bad_loss(**changes):
    arrays = {"z": jnp.ones((4, 3)), "k": jnp.ones((5, 3)), "gate": jnp.ones((4, 3))}
    labels = [jnp.zeros(n, jnp.int32) for n in (changes.pop("labels", 4), 4, 5)]
    params = {"log_scale": 1.0, "alpha": changes.pop("alpha", 0.0)}
    arrays |= {name: changes.pop(name) for name in tuple(changes) if name in arrays}
    return hydra.hydra_loss(params, *arrays.values(), hydra.PairLabels(*labels), hydra.HydraLoss(**changes))


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (r"gate: expected the shape \(4, 3\) of z, got \(4, 2\)", {"gate": jnp.ones((4, 2))}),
        (r"z, k: expected \[batch, d\] and \[keys, d\]", {"k": jnp.ones((5, 2))}),
        (r"labels: expected \[batch\], \[batch\] and \[keys\]", {"labels": 3}),
        ("alpha: expected at least 0, got -0.5", {"alpha": -0.5}),
        ("penalty: expected at least 0, got -1", {"penalty": -1.0}),
        (r"reduction: expected one of \('anchor', 'global'\), got 'sum'", {"reduction": "sum"}),
        ("block_size: expected at least 1, got 0", {"block_size": 0}),
    ],
)
def test_hydra_loss_refuses(error, changes):
    with pytest.raises(ValueError, match=error):
        jax.eval_shape(lambda: bad_loss(**changes))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_out_of_range_are_refused(wrong):
    inside, labels = np.asarray([0, 2], np.int32), np.asarray([0, wrong], np.int32)
    table = {"table": np.zeros((3, 4), np.float32)}
    with pytest.raises(ValueError, match=f"second: expected integers in 0 to 2, got {wrong}"):
        hydra.pair_gate(table, {}, inside, labels)
    with pytest.raises(ValueError, match=f"labels: expected integers in 0 to 2, got {wrong}"):
        hydra.sample_partners(jax.random.key(0), labels, "arbitrary", 3)
    with pytest.raises(ValueError, match=f"labels: expected integers in 0 to 2, got {wrong}"):
        hydra.sample_near_partners(jax.random.key(0), labels, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="first: expected integers, got float32"):
        hydra.pair_gate(table, {}, np.ones(2, np.float32))


def test_pair_gate_of_a_traced_label_out_of_range_is_nan(golden):
    params, statistics = jax.tree.map(jnp.float32, gate_arrays(golden("hydra/gate_fused"), "after"))
    gate = jax.jit(lambda first: hydra.pair_gate(params, statistics, first)[0])(np.asarray([0, -1, 5], np.int32))
    np.testing.assert_array_equal(np.isnan(gate).all(axis=1), [False, True, True])


def test_what_pairs_can_not_be_drawn_from_is_refused():
    labels = jnp.zeros(4, jnp.int32)
    with pytest.raises(ValueError, match=r"partners: expected one of \('arbitrary', 'identical', 'distinct'\)"):
        hydra.sample_partners(jax.random.key(0), labels, "other", 3)
    with pytest.raises(ValueError, match="num_classes: expected at least 2 for distinct partners, got 1"):
        hydra.sample_partners(jax.random.key(0), labels, "distinct", 1)
    with pytest.raises(ValueError, match=r"distances: expected \[classes, classes\], got shape \(3, 2\)"):
        hydra.sample_near_partners(jax.random.key(0), labels, jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"features: expected \[examples, n\], got shape \(4,\)"):
        hydra.effective_rank(jnp.ones(4))
