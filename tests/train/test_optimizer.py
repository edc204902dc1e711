import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from subspace_jax import train
from subspace_jax.manifolds import grassmann
from subspace_jax.train import optimizer

from .common import assert_close, make_tx


@pytest.fixture
def third_party():
    """Lets Optax mix integer counts and floats, as its Adam does."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def rates(num_steps, steps, **settings):
    config = optimizer.default_config()
    config.update({"learning_rate": 0.5, **settings})
    schedule = jax.jit(train.make_schedule(config, num_steps))
    return [float(schedule(jnp.asarray(step, jnp.int32))) for step in steps]


def test_constant_schedule_is_constant():
    assert rates(10, range(10), schedule="constant") == [0.5] * 10


def test_cosine_schedule_falls_from_the_peak_to_its_last_value():
    got = rates(100, [0, 25, 50, 100, 120], schedule="cosine", final_scale=0.1)
    expected = [0.5 * (0.1 + 0.9 * (1 + np.cos(np.pi * t)) / 2) for t in (0, 0.25, 0.5, 1, 1)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_step_schedule_drops_after_30_60_and_90_percent():
    got = rates(10, range(11), schedule="step")
    np.testing.assert_allclose(got, [0.5] * 3 + [0.05] * 3 + [0.005] * 3 + [0.0005] * 2, rtol=1e-6)
    # In a run so short that two drops fall on one step, both count.
    np.testing.assert_allclose(rates(2, [0, 1], schedule="step"), [0.05, 0.0005], rtol=1e-6)


def test_linear_schedule_falls_from_the_peak_to_its_last_value():
    got = rates(100, [10, 55, 100, 120], schedule="linear", warmup_steps=10, final_scale=0.1)
    np.testing.assert_allclose(got, [0.5, 0.275, 0.05, 0.05], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_warmup_rises_linearly_from_zero_to_the_peak(schedule):
    got = rates(100, [0, 5, 9, 10], schedule=schedule, warmup_steps=10)
    np.testing.assert_allclose(got, [0, 0.25, 0.45, 0.5], rtol=1e-6)


def test_step_schedule_drops_at_the_same_steps_with_warmup():
    got = rates(100, [10, 29, 30, 59, 60, 89, 90, 99], schedule="step", warmup_steps=10)
    np.testing.assert_allclose(got, np.repeat([0.5, 0.05, 0.005, 0.0005], 2), rtol=1e-5)
    # A warm-up over the first drop starts below the peak.
    got = rates(100, [39, 40, 60], schedule="step", warmup_steps=40)
    np.testing.assert_allclose(got, [0.5 * 39 / 40, 0.05, 0.005], rtol=1e-5)


def test_cosine_after_warmup_ends_with_the_run():
    np.testing.assert_allclose(rates(100, [100], schedule="cosine", warmup_steps=20), [0], atol=1e-8)


@pytest.fixture
def params():
    bases = grassmann.random_point(jax.random.key(0), n=6, k=2, batch_shape=(3,))
    return {"head": {"bases": bases}, "kernel": jax.random.normal(jax.random.key(1), (4, 5))}


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb"])
def test_decay_of_kernels_leaves_norms_tables_and_biases_alone(name, params):
    others = {"bias": jnp.ones(3), "scale": jnp.ones((2, 3)), "table": jnp.ones((4, 2)), "magnitude": jnp.ones(2)}
    params = {**params, "layer": others}
    tx = make_tx(name=name, learning_rate=0.1, weight_decay=0.5, decay="kernels", schedule="constant")
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    assert all(np.all(x == 0) for x in jax.tree.leaves(updates["layer"]))
    assert np.all(updates["kernel"] * params["kernel"] < 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "some"}, "optim.decay: expected one of .*got 'some'"),
        ({"decay": "kernels", "name": "galore"}, "optim.decay: 'galore' decays all"),
    ],
)
def test_a_decay_that_an_optimizer_does_not_have_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_tx(**settings)


@pytest.mark.usefixtures("third_party")
def test_decay_coupled_with_adam_moves_weights_without_gradient_by_one_step():
    tx = make_tx(name="adam", learning_rate=0.1, weight_decay=0.5, schedule="constant")
    params = {"kernel": jnp.array([[3.0, -0.2]])}
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[-0.1, 0.1]], rtol=1e-5)


@pytest.mark.usefixtures("third_party")
def test_decay_of_adamw_leaves_the_lengths_of_dora_alone():
    tx = make_tx(name="adamw", learning_rate=0.1, weight_decay=0.5, schedule="constant")
    params = {"kernel": {"a": jnp.ones((2, 3)), "magnitude": jnp.ones(3)}}
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    np.testing.assert_array_equal(updates["kernel"]["magnitude"], 0)
    np.testing.assert_allclose(updates["kernel"]["a"], -0.05, rtol=1e-5)


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("manifold", optimizer.GRASSMANN)
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])  # coupled with Adam, decay is a step of constant size
def test_weight_decay_shrinks_kernels_and_never_touches_bases(name, manifold, params):
    tx = make_tx(name=name, grassmann=manifold, weight_decay=0.5, schedule="constant")
    # Without a gradient nothing but weight decay moves anything.
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(moved["head"]["bases"], params["head"]["bases"], atol=1e-6)
    ratio = np.asarray(moved["kernel"] / params["kernel"])
    np.testing.assert_allclose(ratio, np.full_like(ratio, ratio[0, 0]), rtol=1e-5)
    assert ratio[0, 0] < 0.99


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("manifold", optimizer.GRASSMANN)
@pytest.mark.parametrize("name", optimizer.EUCLIDEAN)
def test_bases_stay_on_the_manifold_and_everything_moves(name, manifold, params):
    tx = make_tx(name=name, grassmann=manifold)
    grads = jax.tree.map(jnp.ones_like, params)
    state, moved = tx.init(params), params
    for _ in range(3):
        updates, state = tx.update(grads, state, moved)
        moved = optax.apply_updates(moved, updates)
    bases = np.asarray(moved["head"]["bases"])
    np.testing.assert_allclose(bases.swapaxes(-1, -2) @ bases, np.broadcast_to(np.eye(2), (3, 2, 2)), atol=1e-5)
    assert all(np.abs(x - y).max() > 1e-3 for x, y in zip(*map(jax.tree.leaves, (moved, params)), strict=True))


def test_clipping_scales_the_whole_gradient_to_the_norm(params):
    grads = jax.tree.map(lambda x: 10 * jnp.ones_like(x), params)
    small = jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)

    def step(gradient, **settings):
        tx = make_tx(schedule="constant", **settings)
        return tx.update(gradient, tx.init(params), params)[0]

    assert_close(step(grads, clip_norm=1.0), step(small), atol=1e-6)
    assert_close(step(small, clip_norm=2.0), step(small), atol=0)


def test_the_subspaces_have_a_learning_rate_factor_of_their_own(params):
    grads = jax.tree.map(jnp.ones_like, params)

    def step(factor, rate):
        config = optimizer.default_config()
        config.update({"schedule": "constant", "learning_rate": rate})
        config.grassmann.lr_factor = factor
        tx = train.make_optimizer(config, 10)
        return tx.update(grads, tx.init(params), params)[0]

    assert_close(step(3.0, 0.1)["head"], step(1.0, 0.3)["head"], atol=1e-6)
    assert_close(step(3.0, 0.1)["kernel"], step(1.0, 0.1)["kernel"], atol=0)


def kernels():
    """A stack of kernels with a bias each, a table, and factors of a LoRA."""
    rng = np.random.default_rng(0)
    shapes = {"layers": {"q": {"kernel": (2, 16, 12), "bias": (2, 12)}}, "embed": {"embedding": (20, 16)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def first_step(params, name, **settings):
    config = optimizer.default_config()
    config.update({"name": name, "schedule": "constant", "learning_rate": 1e-2, "weight_decay": 0.1, **settings})
    config.low_rank.sketch_rank = 4
    tx = train.make_optimizer(config, 10)
    grads = jax.tree.map(lambda x: jnp.sin(3 * x), params)
    updates, state = jax.jit(lambda p: tx.update(grads, tx.init(p), p))(params)
    return updates, state


@pytest.mark.parametrize("name", optimizer.LOW_RANK)
def test_low_rank_optimizers_of_a_config_project_kernels_alone(name):
    params = kernels()
    updates, state = first_step(params, name)
    assert all(jnp.all(jnp.isfinite(u)) and jnp.any(u != 0) for u in jax.tree.leaves(updates))
    shapes = [jnp.shape(x) for x in jax.tree.leaves(state)]
    # A quarter of the shorter side is 3; tables and biases have Adam's moments.
    assert (2, 16, 1 if name == "apollo_mini" else 3) in shapes
    assert (2, 16, 12) not in shapes
    assert shapes.count((20, 16)) == shapes.count((2, 12)) == 2
    bias = params["layers"]["q"]["bias"]
    # Adam steps by the sign of the gradient first, where that is well above eps; the decay comes after it.
    stepped = bias - 1e-2 * jnp.sign(jnp.sin(3 * bias))
    np.testing.assert_allclose(bias + updates["layers"]["q"]["bias"], stepped * (1 - 1e-3), atol=1e-4)


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("name", optimizer.LORA)
def test_optimizers_of_factors_of_a_config_move_both(name):
    rng = np.random.default_rng(0)
    factors = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in (("a", (12, 2)), ("b", (2, 8)))}
    updates, _ = first_step({"q": {"kernel": factors}}, name)
    assert all(jnp.all(jnp.isfinite(u)) and jnp.any(u != 0) for u in jax.tree.leaves(updates))


def test_what_is_wrong_with_an_optimizer_names_its_field():
    with pytest.raises(ValueError, match=r"optim.low_rank.rank: expected at least 0, got -1"):
        make_tx(name="galore", low_rank={"rank": -1})
    with pytest.raises(ValueError, match=r"optim.low_rank: side: expected one of"):
        make_tx(name="galore", low_rank={"side": "input"})
    with pytest.raises(ValueError, match=r"optim.low_rank: method: expected one of"):
        make_tx(name="fira", low_rank={"method": "qr"})
    with pytest.raises(ValueError, match=r"optim.low_rank.state_dtype: expected one of .*'int4'"):
        make_tx(name="fira", low_rank={"state_dtype": "int4"})
    with pytest.raises(ValueError, match=r"optim.low_rank.state_dtype: 'int8' would round the bases of coso"):
        make_tx(name="coso", low_rank={"state_dtype": "int8"})
    with pytest.raises(ValueError, match=r"optim.lora: stats: expected one of"):
        make_tx(name="adaprelora", lora={"stats": "some"})
    with pytest.raises(ValueError, match=r"optim.name: expected one of .*'galore'.*'lora_rite'.*, got 'rmsprop'"):
        make_tx(name="rmsprop")


def test_configs_of_optimizers_can_be_read(configs):
    for file in ("tiny_gpt", "low_rank_regression"):
        default = train.load_config(f"{configs}/optim/{file}.py")
        assert default.optim.name in (*optimizer.LOW_RANK, *optimizer.LORA)
    assert train.load_config(f"{configs}/optim/tiny_gpt.py:coso").optim.name == "coso"
    assert train.load_config(f"{configs}/optim/tiny_gpt.py:galore").optim.low_rank.side == "left"
    with pytest.raises(ValueError, match="variant: expected one of"):
        train.load_config(f"{configs}/optim/tiny_gpt.py:sgd")


def test_energies_of_the_true_gradient_come_through_a_train_step(configs, tmp_path):
    config = train.load_config(f"{configs}/optim/low_rank_regression.py")
    config = train.override(config, ["model.rank=4", "train.steps=200", "train.log_every=200"])
    metrics = train.run(config, tmp_path, progress=False).metrics
    # The figure is 1e-8 as a median after twice as many steps.
    assert metrics["relative"] <= 1e-5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learning_rate=-0.1", "learning_rate: expected a finite number at least 0, got -0.1"),
        ("learning_rate=1e300", r"learning_rate: expected a finite number at least 0, got 1e\+300"),
        ("final_scale=1e400", "final_scale: expected a finite number at least 0, got inf"),
        ("momentum=1", r"momentum: expected a number in \[0, 1\), got 1.0"),
        ("b1=-0.5", r"b1: expected a number in \[0, 1\), got -0.5"),
        ("b2=1e400", r"b2: expected a number in \[0, 1\), got inf"),
        ("weight_decay=-1", "weight_decay: expected a finite number at least 0, got -1.0"),
        ("clip_norm=-1", "clip_norm: expected a finite number at least 0, got -1.0"),
        ("warmup_steps=-1", "warmup_steps: expected at least 0, got -1"),
        ("low_rank.rank=-1", "low_rank.rank: expected at least 0, got -1"),
        ("low_rank.refresh_every=0", "low_rank.refresh_every: expected at least 1, got 0"),
        ("low_rank.scale=1e300", r"low_rank.scale: expected a finite number above 0, got 1e\+300"),
        ("low_rank.sketch_rank=0", "low_rank.sketch_rank: expected at least 1, got 0"),
        ("lora.ratio=0", "lora.ratio: expected a finite number above 0, got 0.0"),
        ("lora.scale=-1", "lora.scale: expected a finite number above 0, got -1.0"),
        ("grassmann.momentum=1e39", r"grassmann.momentum: expected a number in \[0, 1\), got 1e\+39"),
        ("grassmann.lr_factor=-1", "grassmann.lr_factor: expected a finite number at least 0, got -1.0"),
        ("grassmann.reorth_every=0", "grassmann.reorth_every: expected at least 1, got 0"),
        ("name=adamm", "name: expected one of .*got 'adamm'; did you mean 'adam'?"),
        ("schedule=cosin", "schedule: expected one of .*got 'cosin'; did you mean 'cosine'?"),
        ("grassmann.name=rgsd", "grassmann.name: expected one of .*; did you mean 'rsgd'?"),
    ],
)
def test_make_optimizer_names_the_field_that_is_out_of_range(setting, message):
    config = train.override(ConfigDict({"optim": optimizer.default_config()}), [f"optim.{setting}"])
    with pytest.raises(ValueError, match=rf"^optim\.{message}"):
        train.make_optimizer(config.optim, 10)


@pytest.mark.usefixtures("third_party")
def test_online_subspace_descent_rests_at_a_learning_rate_of_zero():
    updates, _ = first_step({"q": {"kernel": jnp.ones((8, 4))}}, "online_subspace_descent", learning_rate=0.0)
    np.testing.assert_array_equal(updates["q"]["kernel"], 0)
