"""FLoRA against what the authors' code returns, and its own invariants."""

import string

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import adapters, linalg, nn

# How each golden layer is called.
LAYERS = {
    "linear": {},
    "conv2d": {"padding": 1},
    "conv2d_strided": {"strides": 2, "padding": (2, 1), "dilation": (1, 2)},
    "conv3d": {"padding": (1, 1, 0)},
}


def ours(w):
    """A weight or activation of torch, channels last; kernels with their two axes of channels last."""
    return jnp.moveaxis(w, 1, -1)


def kernel(w):
    return w.T if w.ndim == 2 else jnp.moveaxis(w, (1, 0), (-2, -1))


def arrays_of(g, at):
    names = [k for k in g if k.startswith(f"{at}_param_")]
    return {"core" if k.endswith("G") else f"p{k[-1]}": jnp.asarray(g[k]) for k in names}


def apply(name, x, weight, bias=None):
    y = nn.linear(x, weight) if name == "linear" else nn.conv(x, weight, **LAYERS[name])
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "conv2d_strided" else pytest.mark.slow) for n in LAYERS]
)
def test_layers_gradients_and_training_are_those_of_the_authors(name, golden, x64):
    g = {k: jnp.asarray(v) for k, v in golden(f"flora/{name}").items()}
    base, start = {"w": kernel(g["base_W"])}, {"w": arrays_of(g, "p0")}
    rules = {"w": adapters.FLoRA(start["w"]["core"].shape, float(g["scale"]))}
    x, target = ours(g["x"]), ours(g["target"])
    update = adapters.materialize(base, start, rules)["w"] - base["w"]
    np.testing.assert_allclose(update, kernel(g["delta0"]), rtol=1e-9, atol=1e-13)

    @jax.jit
    def step(trainable, state):
        def loss(trainable, x):
            y = apply(name, x, adapters.bind(base, trainable, rules)["w"], g.get("base_b"))
            return 0.5 * jnp.mean(jnp.square(y - target)), y

        (value, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(trainable, x)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads[0], state, trainable)
        return optax.apply_updates(trainable, updates), state, value, y, grads

    tx = optax.adamw(1e-2, weight_decay=0.0)
    trainable, state, losses = start, tx.init(start), []
    for i in range(5):
        trainable, state, value, y, (grads, dx) = step(trainable, state)
        losses.append(float(value))
        if i == 0:
            np.testing.assert_allclose(y, ours(g["y0"]), rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(dx, ours(g["dx0"]), rtol=1e-9, atol=1e-13)
            for key, expected in arrays_of(g, "g0").items():
                np.testing.assert_allclose(grads["w"][key], expected, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(losses, g["losses"], rtol=1e-9)
    for key, expected in arrays_of(g, "pT").items():
        np.testing.assert_allclose(trainable["w"][key], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(step(trainable, state)[3], ours(g["yT"]), rtol=1e-9, atol=1e-12)


def drawn(shape, ranks, scale=1.0):
    """A weight, its rules, and an adapter away from its start."""
    rules, draw = {"w": adapters.FLoRA(ranks, scale)}, np.random.default_rng(0).normal
    params = {"w": jnp.asarray(draw(size=shape), jnp.result_type(float))}
    trainable = start_of(params, rules)
    core = jnp.asarray(draw(size=ranks), trainable["w"]["core"].dtype)
    return params, {"w": {**trainable["w"], "core": core}}, rules


def start_of(params, rules):
    """One program, and not one for each draw."""
    return jax.jit(lambda p: adapters.init(jax.random.key(1), p, rules))(params)


@pytest.mark.slow
def test_a_convolution_without_the_update_equals_one_with_it(x64):
    groups = 2
    params, trainable, rules = drawn((3, 2, 4, 6), (3, 4, 2, 2), 2.0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 6, 4 * groups)))
    how = {"strides": 2, "padding": (2, (0, 1)), "dilation": (1, 2), "groups": groups}
    merged = adapters.merge(params, trainable, rules)["w"]

    @jax.jit
    def run(trainable, merged):
        return [nn.conv(x, w, **how) for w in (adapters.bind(params, trainable, rules)["w"], merged)]

    np.testing.assert_allclose(*run(trainable, merged), rtol=1e-12, atol=1e-12)
    back = adapters.unmerge({"w": merged}, trainable, rules, {})
    np.testing.assert_allclose(back["w"], params["w"], atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "ranks"), [((3, 2, 4, 5), (2, 3, 2, 1)), ((4, 5), (2, 3)), ((5,), (3,))])
def test_the_update_is_the_sum_it_is_defined_by_and_has_its_ranks(shape, ranks, x64):
    params, trainable, rules = drawn(shape, ranks, 0.5)
    own, order = trainable["w"], len(ranks)
    update = adapters.materialize(params, trainable, rules)["w"] - params["w"]
    # Axes of the weight in the order of the core's: inputs, outputs, window.
    ordered = update if order < 3 else jnp.moveaxis(update, (-2, -1), (0, 1))
    small, large = string.ascii_lowercase[:order], string.ascii_uppercase[:order]
    sides = ",".join(f"{b}{a}" for a, b in zip(small, large, strict=True))
    expected = 0.5 * np.einsum(f"{small},{sides}->{large}", own["core"], *(own[f"p{i}"] for i in range(order)))
    np.testing.assert_allclose(ordered, expected, atol=1e-13)
    for axis, rank in enumerate(ranks):
        unfolded = np.moveaxis(ordered, axis, 0).reshape(ordered.shape[axis], -1)
        assert np.linalg.matrix_rank(unfolded, tol=1e-10) <= rank


@pytest.mark.slow
def test_flora_with_an_identity_core_is_lora_and_its_factors_may_be_rotated(x64):
    params, trainable, rules = drawn((6, 5), (3, 3), 2.0)
    own = {**trainable["w"], "core": jnp.eye(3)}
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6)))
    got = nn.linear(x, adapters.bind(params, {"w": own}, rules)["w"])
    lora = {"w": {"a": own["p0"], "b": own["p1"].T}}
    expected = nn.linear(x, adapters.bind(params, lora, {"w": adapters.LoRA(3, 6.0)})["w"])
    np.testing.assert_allclose(got, expected, rtol=1e-13)
    change = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3)))
    rotated = {"w": {**own, "p0": own["p0"] @ change, "core": jnp.linalg.inv(change)}}
    np.testing.assert_allclose(nn.linear(x, adapters.bind(params, rotated, rules)["w"]), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("shape", "ranks"), [((6, 5), (4, 3)), pytest.param((3, 4, 5), (2, 2, 2), marks=pytest.mark.slow)]
)
def test_the_first_step_changes_the_core_only(shape, ranks):
    params, _, rules = drawn(shape, ranks)
    start = start_of(params, rules)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, *(() if len(shape) == 2 else (7,)), shape[-2])), "float32")

    def loss(trainable):
        weight = adapters.bind(params, trainable, rules)["w"]
        return jnp.sum(jnp.sin(nn.linear(x, weight) if len(shape) == 2 else nn.conv(x, weight)))

    np.testing.assert_array_equal(adapters.materialize(params, start, rules)["w"], params["w"])
    grads = jax.jit(jax.grad(loss))(start)["w"]
    assert np.any(grads.pop("core"))
    assert not any(np.any(g) for g in grads.values())


@pytest.mark.slow
def test_full_ranks_hold_any_update_and_less_hold_what_has_them(x64):
    draw = np.random.default_rng(0).normal
    update = jnp.asarray(draw(size=(4, 4, 4)))
    np.testing.assert_allclose(linalg.tucker_product(*linalg.hosvd(update, (4, 4, 4))), update, atol=1e-12)
    low = linalg.tucker_product(jnp.asarray(draw(size=(2, 2, 2))), [jnp.asarray(draw(size=(4, 2))) for _ in range(3)])
    np.testing.assert_allclose(linalg.tucker_product(*linalg.hosvd(low, (2, 2, 2))), low, atol=1e-12)
    assert linalg.hosvd(update[:, :1, :1], (4, 1, 1))[1][0].shape == (4, 4)


def test_describe_count_label_fn_and_logical_axes_take_flora():
    params, trainable, rules = drawn((3, 3, 8, 8), (4, 4, 2, 2))
    assert adapters.count(trainable) == 4 * 4 * 2 * 2 + 2 * 8 * 4 + 2 * 3 * 2
    text = adapters.describe(params, trainable, rules)
    assert "FLoRA" in text
    assert "4/4/2/2" in text
    labels = adapters.label_fn(trainable)["w"]
    assert labels == {"core": "core", "p0": "factor", "p1": "factor", "p2": "factor", "p3": "factor"}
    bound = jax.tree.leaves(adapters.label_fn(adapters.bind(params, trainable, rules)))
    assert sorted(bound) == ["core", *["factor"] * 4, "frozen"]
    names = jax.sharding.PartitionSpec(None, None, "embed", "mlp")
    frozen, own = adapters.logical_axes({"w": names}, trainable, rules)
    assert frozen["w"] == names
    assert own["w"]["p0"] == jax.sharding.PartitionSpec("embed", None)
    assert own["w"]["p1"] == jax.sharding.PartitionSpec("mlp", None)


@pytest.mark.parametrize("arguments", [((),), ((0, 1),), ((2, 2.0),), (3,), ((2, 2), 0.0), ((2, 2), 1.0, "zero")])
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=r"(ranks|scale|init): expected"):
        adapters.FLoRA(*arguments)


def test_ranks_that_do_not_fit_a_weight_are_refused():
    w = {"w": jnp.ones((3, 3, 4, 8))}
    with pytest.raises(ValueError, match="1 to 4 for axis -2 of a weight"):
        adapters.init(jax.random.key(0), w, {"w": adapters.FLoRA((5, 2, 2, 2))})
    with pytest.raises(ValueError, match="5 of them"):
        adapters.init(jax.random.key(0), w, {"w": adapters.FLoRA((1, 1, 1, 1, 1))})
    params, trainable, rules = drawn((3, 4, 5), (2, 2, 2))
    with pytest.raises(ValueError, match="linear: expected a FLoRA weight of order 2, got 3"):
        nn.linear(jnp.ones((1, 4)), adapters.bind(params, trainable, rules)["w"])
    with pytest.raises(ValueError, match=r"ranks: expected 1 to 2 for axis 1, got 3"):
        linalg.hosvd(jnp.ones((4, 2)), (1, 3))
    with pytest.raises(ValueError, match=r"factors\[0\]: expected"):
        linalg.tucker_product(jnp.ones((2, 2)), [jnp.ones((4, 3)), jnp.ones((4, 2))])
