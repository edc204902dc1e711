"""SVFit against an independent oracle of its equations, and its own invariants."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import adapters, nn

LAYERS = ("layer_tall", "layer_wide", "layer_full")


def one(w, setting, delta=None):
    """A bound weight, from one kernel; the frozen tree and the trainable one."""
    rules = {"w": setting}
    base, trainable = adapters.prepare(jax.random.key(0), {"w": w}, rules)
    if delta is not None:
        trainable = {"w": {"delta": delta}}
    return base, trainable, adapters.bind(base, trainable, rules)["w"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "layer_tall" else pytest.mark.slow) for name in LAYERS]
)
def test_svfit_layers_and_gradients_are_those_of_the_oracle(name, golden, x64):
    g = {k: jnp.asarray(v) for k, v in golden(f"svfit/{name}").items()}
    rank = int(g["r"])
    # The oracle's weights are [out, in].
    base, _, _ = one(g["W"].T, adapters.SVFit(rank))
    bases = base["w"].bases
    np.testing.assert_allclose(bases.sigma, g["S_full"][:rank], rtol=1e-12)
    np.testing.assert_allclose((bases.u * bases.sigma[None]) @ bases.vt, g["W_top"].T, rtol=1e-9, atol=1e-12)

    def apply(x, sigma):
        weight = one(g["W"].T, adapters.SVFit(rank), sigma - bases.sigma)[2]
        return nn.linear(x, weight)

    y, back = jax.vjp(apply, g["x"], g["s"])
    dx, ds = back(g["dout"])
    for got, expected in ((y, g["y"]), (dx, g["dx"]), (ds, g["ds_abs"])):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
    merged = adapters.merge(base, {"w": {"delta": g["s"] - bases.sigma}}, {"w": adapters.SVFit(rank)})["w"]
    np.testing.assert_allclose(merged, g["W_new"].T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_energy_rank_gives_the_ranks_of_the_oracle(name, golden, x64):
    g = golden(f"svfit/{name}")
    for tau, square, plain in zip(g["taus"], g["rank_sq"], g["rank_sum"], strict=True):
        assert adapters.energy_rank(g["S_full"], float(tau)) == square
        assert adapters.energy_rank(g["S_full"], float(tau), kind="sum") == plain


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "train_wd"])
def test_svfit_training_is_that_of_the_oracle(name, golden, x64):
    g = {k: jnp.asarray(v) for k, v in golden(f"svfit/{name}").items()}
    rules = {"kernel": adapters.SVFit(int(g["r"]))}
    params = {f"l{i}": {"kernel": g[f"W{i}"].T} for i in (1, 2)}
    base, start = adapters.prepare(jax.random.key(0), params, rules)
    sigma0 = [base[layer]["kernel"].bases.sigma for layer in ("l1", "l2")]

    def forward(sigma, x):
        delta = {
            f"l{i + 1}": {"kernel": {"delta": s - s0}} for i, (s, s0) in enumerate(zip(sigma, sigma0, strict=True))
        }
        bound = adapters.bind(base, delta, rules)
        hidden = jnp.tanh(nn.linear(x, bound["l1"]["kernel"], g["b1"]))
        return nn.linear(hidden, bound["l2"]["kernel"], g["b2"])

    def loss(sigma):
        return 0.5 * jnp.mean(jnp.sum(jnp.square(forward(sigma, g["X"]) - g["Y"]), axis=-1))

    del start
    # The oracle decays sigma, not its change.
    tx = optax.adamw(float(g["lr"]), weight_decay=float(g["wd"]))
    sigma, losses = sigma0, []

    @jax.jit
    def step(sigma, state):
        value, grads = jax.value_and_grad(loss)(sigma)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, sigma)
        return value, grads, optax.apply_updates(sigma, updates), state

    state = tx.init(sigma)
    for i in range(int(g["steps"])):
        value, grads, sigma, state = step(sigma, state)
        losses.append(float(value))
        if i == 0:
            chex.assert_trees_all_close(grads, [g["g1_0"], g["g2_0"]], rtol=1e-8, atol=0)
    np.testing.assert_allclose(losses, g["losses"], rtol=1e-8)
    chex.assert_trees_all_close(sigma, [g["s1_T"], g["s2_T"]], rtol=1e-8, atol=0)
    np.testing.assert_allclose(forward(sigma, g["X"]), g["yT"], rtol=1e-8)


def test_singular_values_are_those_trained_and_those_left(x64):
    w = jax.random.normal(jax.random.key(0), (3, 9, 6), jnp.float64)
    delta = jax.random.normal(jax.random.key(1), (3, 4), jnp.float64)
    base, _, weight = one(w, adapters.SVFit(4), delta)
    rest = jnp.linalg.svd(w, compute_uv=False)[:, 4:]
    expected = np.sort(np.concatenate([np.abs(weight.sigma), rest], -1))[:, ::-1]
    np.testing.assert_allclose(jnp.linalg.svd(weight.dense(), compute_uv=False), expected, atol=1e-10)
    del base


@pytest.mark.slow
def test_svfit_of_all_singular_values_learns_a_spectrum(x64):
    """The loss is quadratic in the values, and its minimum is the teacher's spectrum."""
    w = jax.random.normal(jax.random.key(0), (6, 5), jnp.float64)
    x = jax.random.normal(jax.random.key(1), (40, 6), jnp.float64)
    base, start, weight = one(w, adapters.SVFit())
    target = jnp.arange(1.0, 6.0)
    y = x @ ((weight.base.bases.u * target[None]) @ weight.base.bases.vt)

    def loss(trainable):
        return 0.5 * jnp.mean(
            jnp.square(nn.linear(x, adapters.bind(base, trainable, {"w": adapters.SVFit()})["w"]) - y)
        )

    step = jax.jit(lambda t: jax.tree.map(lambda p, g: p - 2.0 * g, t, jax.grad(loss)(t)))
    for _ in range(300):
        start = step(start)
    sigma = adapters.bind(base, start, {"w": adapters.SVFit()})["w"].sigma
    np.testing.assert_allclose(sigma, target, atol=1e-6)


@pytest.mark.slow
def test_changes_are_kept_in_bfloat16():
    """A shift of 0.01 beside a singular value of 50 would be lost if the weight were formed in bfloat16."""
    w = (50 * jnp.eye(4)).astype(jnp.bfloat16)
    _, _, weight = one(w, adapters.SVFit(), jnp.full((4,), 0.01))
    assert weight.delta.dtype == jnp.float32
    x = jnp.ones((1, 4), jnp.float32)
    np.testing.assert_allclose(nn.linear(x, weight), 50.01, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": "most"}, "rank"),
        ({"rank": True}, "rank"),
        ({"param": "exp"}, "param"),
        ({"tau": 0.0}, "tau"),
        ({"tau": 1.1}, "tau"),
        ({"tau": float("nan")}, "tau"),
    ],
)
def test_svfit_refuses_fields_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=f"{message}: expected"):
        adapters.SVFit(**arguments)


def test_svfit_refuses_weights_that_are_not_finite_and_reduces_large_ranks():
    with pytest.raises(ValueError, match="not finite"):
        one(jnp.full((3, 3), jnp.nan), adapters.SVFit())
    with pytest.warns(UserWarning, match="rank 9 exceeds the 3"):
        base, trainable, _ = one(jnp.eye(3), adapters.SVFit(9))
    assert trainable["w"]["delta"].shape == (3,)
    assert base["w"].bases.u.shape == (3, 3)
