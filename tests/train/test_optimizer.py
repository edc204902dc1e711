"""Schedules and optimizers from the fields ``optim`` of a config."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from subspace_jax import train
from subspace_jax.manifolds import grassmann
from subspace_jax.optim import registry
from subspace_jax.train import optimizer

EUCLIDEAN = ("sgd", "adam", "adamw", "lamb")
LOW_RANK = ("galore", "fira", "apollo", "apollo_mini", "online_subspace_descent", "coso")
LORA = ("lora_plus", "scaled_gd_lora", "scaled_adamw_lora", "lora_rite", "lora_pro", "adaprelora")


def slow_but(names, *quick):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


ROLES = {"head/bases": "grassmann", "layer/magnitude": "no_decay"}


def make_tx(num_steps=20, roles=ROLES, **settings):
    config = optimizer.default_config()
    config.update(settings)
    return train.make_optimizer(config, num_steps, roles)


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


@pytest.fixture(scope="module")
def params():
    bases = grassmann.random_point(jax.random.key(0), n=6, k=2, batch_shape=(3,))
    return {"head": {"bases": bases}, "kernel": jax.random.normal(jax.random.key(1), (4, 5))}


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("name", slow_but(EUCLIDEAN, "adamw"))
def test_decay_of_kernels_leaves_norms_tables_and_biases_alone(name, params):
    others = {"bias": jnp.ones(3), "scale": jnp.ones((2, 3)), "table": jnp.ones((4, 2)), "magnitude": jnp.ones(2)}
    params = {**params, "layer": others}
    tx = make_tx(name=name, learning_rate=0.1, kwargs={"weight_decay": 0.5}, decay="kernels", schedule="constant")
    updates, _ = jax.jit(tx.update)(optax.tree.zeros_like(params), tx.init(params), params)
    chex.assert_trees_all_equal(updates["layer"], optax.tree.zeros_like(others))
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


@pytest.mark.slow
@pytest.mark.usefixtures("third_party")
def test_decay_coupled_with_adam_moves_weights_without_gradient_by_one_step():
    tx = make_tx(name="adam", learning_rate=0.1, kwargs={"weight_decay": 0.5}, schedule="constant")
    params = {"kernel": jnp.array([[3.0, -0.2]])}
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [[-0.1, 0.1]], rtol=1e-5)


@pytest.mark.usefixtures("third_party")
def test_parameters_of_the_role_no_decay_do_not_decay():
    """Such as the lengths that DoRA trains."""
    roles = {"kernel/magnitude": "no_decay"}
    tx = make_tx(name="adamw", roles=roles, learning_rate=0.1, kwargs={"weight_decay": 0.5}, schedule="constant")
    params = {"kernel": {"a": jnp.ones((2, 3)), "magnitude": jnp.ones(3)}}
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    np.testing.assert_array_equal(updates["kernel"]["magnitude"], 0)
    np.testing.assert_allclose(updates["kernel"]["a"], -0.05, rtol=1e-5)


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("manifold", slow_but(registry.MANIFOLD_OPTIMIZERS, "riemannian_sgd"))
@pytest.mark.parametrize("name", slow_but(("sgd", "adamw", "lamb"), "sgd"))  # Adam's coupled decay is of constant size
def test_weight_decay_shrinks_kernels_and_never_touches_bases(name, manifold, params):
    tx = make_tx(name=name, manifold={"name": manifold}, kwargs={"weight_decay": 0.5}, schedule="constant")
    # Without a gradient nothing but weight decay moves anything.
    updates, _ = tx.update(optax.tree.zeros_like(params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(moved["head"]["bases"], params["head"]["bases"], atol=1e-6)
    ratio = np.asarray(moved["kernel"] / params["kernel"])
    np.testing.assert_allclose(ratio, np.full_like(ratio, ratio[0, 0]), rtol=1e-5)
    assert ratio[0, 0] < 0.99


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("manifold", slow_but(registry.MANIFOLD_OPTIMIZERS, "riemannian_adam"))
@pytest.mark.parametrize("name", slow_but(EUCLIDEAN, "adamw"))
def test_bases_stay_on_the_manifold_and_everything_moves(name, manifold, params):
    tx = make_tx(name=name, manifold={"name": manifold})
    grads = jax.tree.map(jnp.ones_like, params)
    state, moved, update = tx.init(params), params, jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(grads, state, moved)
        moved = optax.apply_updates(moved, updates)
    bases = np.asarray(moved["head"]["bases"])
    np.testing.assert_allclose(bases.swapaxes(-1, -2) @ bases, np.broadcast_to(np.eye(2), (3, 2, 2)), atol=1e-5)
    assert all(np.abs(x - y).max() > 1e-3 for x, y in zip(*map(jax.tree.leaves, (moved, params)), strict=True))


def test_roles_say_which_parameters_are_subspaces(params):
    """By path or by the path of a group; names mean nothing then."""
    params = {"probe": {"points": params["head"]["bases"]}, "bases": params["kernel"]}
    tx = make_tx(schedule="constant", roles={"probe": "grassmann"})
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    points = params["probe"]["points"] + updates["probe"]["points"]
    np.testing.assert_allclose(points.mT @ points, np.broadcast_to(np.eye(2), (3, 2, 2)), atol=1e-5)
    np.testing.assert_allclose(updates["bases"], -0.1, rtol=1e-6)
    with pytest.raises(ValueError, match=r"optim.manifold.name: 'riemannian_sgd' moves subspaces, but q is 'stiefel'"):
        make_tx(roles={"q": "stiefel"})


@pytest.mark.slow
def test_clipping_scales_the_whole_gradient_to_the_norm(params):
    grads = jax.tree.map(lambda x: 10 * jnp.ones_like(x), params)
    small = jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)

    def step(gradient, **settings):
        tx = make_tx(schedule="constant", **settings)
        return tx.update(gradient, tx.init(params), params)[0]

    plain = step(small)
    chex.assert_trees_all_close(step(grads, clip_norm=1.0), plain, atol=1e-6)
    chex.assert_trees_all_equal(step(small, clip_norm=2.0), plain)


@pytest.mark.slow
def test_clipping_leaves_out_probes():
    tx = make_tx(name="sgd", schedule="constant", clip_norm=1.0, roles={"probe": "probe"}, kwargs={"momentum": 0.0})
    params = {"w": jnp.zeros(1), "probe": jnp.zeros(1)}
    updates, _ = tx.update({"w": jnp.ones(1), "probe": jnp.full(1, 100.0)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)


def test_the_subspaces_have_a_learning_rate_factor_of_their_own(params):
    grads = jax.tree.map(jnp.ones_like, params)

    def step(factor, rate):
        tx = make_tx(10, schedule="constant", learning_rate=rate, manifold={"kwargs": {"lr_factor": factor}})
        return tx.update(grads, tx.init(params), params)[0]

    chex.assert_trees_all_close(step(3.0, 0.1)["head"], step(1.0, 0.3)["head"], atol=1e-6)
    chex.assert_trees_all_equal(step(3.0, 0.1)["kernel"], step(1.0, 0.1)["kernel"])


def kernels():
    """A stack of kernels with a bias each, an embedding table, and factors of a LoRA."""
    rng = np.random.default_rng(0)
    shapes = {"layers": {"q": {"kernel": (2, 16, 12), "bias": (2, 12)}}, "embed": {"embedding": (20, 16)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def first_step(params, name, learning_rate=1e-2, **kwargs):
    kwargs = {"weight_decay": 0.1, **({"sketch_rank": 4} if name == "coso" else {}), **kwargs}
    tx = make_tx(10, name=name, schedule="constant", learning_rate=learning_rate, kwargs=kwargs)
    grads = jax.tree.map(lambda x: jnp.sin(3 * x), params)
    updates, state = jax.jit(lambda p: tx.update(grads, tx.init(p), p))(params)
    return updates, state


@pytest.mark.parametrize("name", slow_but(LOW_RANK, "galore"))
def test_low_rank_optimizers_of_a_config_project_kernels_alone(name):
    params = kernels()
    updates, state = first_step(params, name)
    chex.assert_tree_all_finite(updates)
    assert all(jnp.any(u != 0) for u in jax.tree.leaves(updates))
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
@pytest.mark.parametrize("name", slow_but(LORA, "adaprelora"))
def test_optimizers_of_factors_of_a_config_move_both(name):
    rng = np.random.default_rng(0)
    factors = {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in (("a", (12, 2)), ("b", (2, 8)))}
    updates, _ = first_step({"q": {"kernel": factors}}, name)
    chex.assert_tree_all_finite(updates)
    assert all(jnp.any(u != 0) for u in jax.tree.leaves(updates))


@pytest.mark.slow
@pytest.mark.usefixtures("third_party")
def test_muon_of_a_config_orthogonalizes_each_kernel_of_a_stack_and_leaves_the_rest_to_adam():
    params = kernels()
    rate, beta = 1e-2, 0.95
    tx = make_tx(name="muon", learning_rate=rate, schedule="constant", kwargs={"beta": beta})
    grads = jax.tree.map(lambda x: jnp.sin(3 * x), params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    with jax.numpy_rank_promotion("allow"):
        alone = optax.contrib.muon(rate, beta=beta, consistent_rms=0.2)
        for i in range(2):
            kernel, grad = params["layers"]["q"]["kernel"][i], grads["layers"]["q"]["kernel"][i]
            expected, _ = alone.update(grad, alone.init(kernel), kernel)
            np.testing.assert_allclose(updates["layers"]["q"]["kernel"][i], expected, rtol=1e-4, atol=1e-6)
    rest = [tree["layers"]["q"]["bias"] for tree in (grads, params)]
    adam = optax.adamw(rate, weight_decay=0.0, nesterov=True)
    expected, _ = adam.update(rest[0], adam.init(rest[1]), rest[1])
    np.testing.assert_allclose(updates["layers"]["q"]["bias"], expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"optim.kwargs.ns_steps: expected"):
        make_tx(name="muon", kwargs={"ns_steps": 0})


@pytest.mark.parametrize("name", registry.OPTIMIZERS)
def test_every_default_of_a_registered_optimizer_may_be_given(name):
    """And what is neither a number nor a name may not."""
    arguments = registry.OPTIMIZERS[name].arguments()
    make_tx(name=name, kwargs=arguments)
    assert not {"learning_rate", "mask", "pairs", "fallback", "inner"} & set(arguments)


@pytest.mark.parametrize("name", registry.OPTIMIZERS)
def test_make_refuses_a_text_for_a_number_and_a_long_text_for_a_name(name):
    optimizer = registry.OPTIMIZERS[name]
    for argument, default in optimizer.arguments().items():
        if isinstance(default, (int, float, str)):
            with pytest.raises(ValueError, match=rf"^{argument}: expected .{{0,250}}$"):
                registry.make(optimizer, 0.1, {argument: "ß" * 5000})


def test_a_rank_is_a_number_or_a_share_of_the_shorter_side():
    rule = registry.kernel_rank(0.25)
    assert rule("q/kernel", (3, 40, 24)) == 6
    assert rule("q/kernel", (2, 3)) == 1
    assert rule("q/bias", (3, 24)) is None
    assert registry.kernel_rank(7)("kernel", (3, 5)) == 7


def test_what_is_wrong_with_an_optimizer_names_its_field():
    with pytest.raises(ValueError, match=r"optim.kwargs.rank: expected an integer of at least 1.* got -1"):
        make_tx(name="galore", kwargs={"rank": -1})
    with pytest.raises(ValueError, match=r"optim.kwargs.side: expected one of"):
        make_tx(name="galore", kwargs={"side": "input"})
    with pytest.raises(ValueError, match=r"optim.kwargs.method: expected one of"):
        make_tx(name="fira", kwargs={"method": "qr"})
    with pytest.raises(ValueError, match=r"optim.state_dtype: expected one of .*'int4'"):
        make_tx(name="fira", state_dtype="int4")
    with pytest.raises(ValueError, match=r"optim.state_dtype: 'int8' rounds the bases of coso"):
        make_tx(name="coso", state_dtype="int8")
    with pytest.raises(ValueError, match=r"optim.kwargs.stats: expected one of"):
        make_tx(name="adaprelora", kwargs={"stats": "some"})
    with pytest.raises(ValueError, match=r"optim.name: expected one of .*'galore'.*'lora_rite'.*, got 'rmsprop'"):
        make_tx(name="rmsprop")


def test_a_quantized_state_is_asked_for_by_name():
    tx = make_tx(name="galore", state_dtype="int8")
    state = jax.eval_shape(tx.init, {"q": {"kernel": jnp.zeros((40, 80))}})
    assert any(x.dtype == jnp.int8 for x in jax.tree.leaves(state))


def test_configs_of_optimizers_can_be_read(configs):
    for file in ("tiny_gpt", "low_rank_regression"):
        default = train.load_config(f"{configs}/optim/{file}.py")
        assert default.optim.name in (*LOW_RANK, *LORA)
    assert train.load_config(f"{configs}/optim/tiny_gpt.py:coso").optim.kwargs.max_history == 1
    assert train.load_config(f"{configs}/optim/tiny_gpt.py:galore").optim.kwargs.side == "left"
    with pytest.raises(ValueError, match="variant: expected one of"):
        train.load_config(f"{configs}/optim/tiny_gpt.py:sgd")


@pytest.mark.slow
def test_energies_of_the_true_gradient_come_through_a_train_step(configs, tmp_path):
    config = train.load_config(f"{configs}/optim/low_rank_regression.py")
    config = train.override(config, ["model.rank=4", "train.steps=200", "train.log_every=200"])
    metrics = train.run(config, tmp_path, progress=False).metrics
    # The figure is 1e-8 as a median after twice as many steps.
    assert metrics["relative"] <= 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("learning_rate=-0.1", "learning_rate: expected a finite number at least 0, got -0.1"),
        ("learning_rate=1e300", r"learning_rate: expected a finite number at least 0, got 1e\+300"),
        ("final_scale=1e400", "final_scale: expected a finite number at least 0, got inf"),
        ("clip_norm=-1", "clip_norm: expected a finite number at least 0, got -1.0"),
        ("warmup_steps=-1", "warmup_steps: expected at least 0, got -1"),
        ("kwargs.momentum=1", "kwargs.momentum: expected a number at least 0 and below 1, got 1"),
        ("kwargs.weight_decay=-1", "kwargs.weight_decay: expected a number at least.* 0.*, got -1"),
        ("kwargs.weight_decay=much", "kwargs.weight_decay: expected a number, got 'much'"),
        ("kwargs.momentm=0.9", "kwargs.momentm: unknown argument, .*; did you mean 'momentum'?"),
        ("name=adamw kwargs.b1=-0.5", "kwargs.b1: expected a number at least 0 and below 1, got -0.5"),
        ("name=lamb kwargs.b2=1e400", "kwargs.b2: expected a number at least 0 and below 1, got inf"),
        ("name=galore kwargs.refresh_every=0", "kwargs.refresh_every: expected an integer of at least 1, got 0"),
        ("name=fira kwargs.scale=1e300", r"kwargs.scale: expected .*, got 1e\+300"),
        ("name=coso kwargs.sketch_rank=0", "kwargs.sketch_rank: expected an integer of at least 1, got 0"),
        ("name=lora_plus kwargs.ratio=0", "kwargs.ratio: expected a number above.* 0.*, got 0"),
        ("name=lora_pro kwargs.scale=-1", "kwargs.scale: expected a positive number, got -1"),
        ("name=lora_rite kwargs.eps=-1", "kwargs.eps: expected a number at least.* 0.*, got -1"),
        ("manifold.kwargs.momentum=1e39", r"manifold.kwargs.momentum: expected .*, got 1e\+39"),
        ("manifold.kwargs.lr_factor=-1", "manifold.kwargs.lr_factor: expected a number at least.* 0.*, got -1"),
        ("manifold.kwargs.reorth_every=0", "manifold.kwargs.reorth_every: expected a whole number of at least 1"),
        ("name=adamm", "name: expected one of .*got 'adamm'; did you mean 'adam'?"),
        ("schedule=cosin", "schedule: expected one of .*got 'cosin'; did you mean 'cosine'?"),
        ("manifold.name=riemann_sgd", "manifold.name: expected one of .*; did you mean 'riemannian_sgd'?"),
    ],
)
def test_make_optimizer_names_the_field_that_is_out_of_range(settings, message):
    config = ConfigDict({"optim": optimizer.default_config()})
    config = train.override(config, [f"optim.{setting}" for setting in settings.split()])
    with pytest.raises(ValueError, match=rf"^optim\.{message}"):
        train.make_optimizer(config.optim, 10)


def test_override_takes_new_fields_only_in_groups_of_arguments():
    config = ConfigDict({"optim": optimizer.default_config()})
    changed = train.override(
        config, ["optim.name=galore", "optim.kwargs.rank=16", "optim.manifold.kwargs.momentum=0.5"]
    )
    assert changed.optim.kwargs.to_dict() == {"rank": 16}
    assert changed.optim.manifold.kwargs.momentum == 0.5
    for setting in ("optim.rank=16", "optim.kwargs.rank.left=3", "optim.kwargs=3"):
        with pytest.raises(ValueError, match=rf"--config.{setting.partition('=')[0]}: unknown field"):
            train.override(config, [setting])


@pytest.mark.usefixtures("third_party")
def test_online_subspace_descent_rests_at_a_learning_rate_of_zero():
    updates, _ = first_step({"q": {"kernel": jnp.ones((8, 4))}}, "online_subspace_descent", learning_rate=0.0)
    np.testing.assert_array_equal(updates["q"]["kernel"], 0)
