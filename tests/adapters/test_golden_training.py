"""Training of small models, step by step as in PEFT and in the code of Effort's authors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import adapters, nn


def train(tx, loss, trained, steps):
    """Values, the first gradient, and what is trained after each step."""

    @jax.jit
    def step(trained, state):
        value, grads = jax.value_and_grad(loss, has_aux=True)(trained)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value, grads

    state, values, gradients, path = tx.init(trained), [], [], []
    for _ in range(steps):
        trained, state, value, grads = step(trained, state)
        values.append(value)
        gradients.append(grads)
        path.append(trained)
    return values, gradients[0], path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_dora", "train_lora", "train_rslora", "train_dora_sgd"])
def test_low_rank_training_is_that_of_peft(name, golden, x64):
    g = {k: jnp.asarray(v) for k, v in golden(f"dora/{name}").items()}
    rank, alpha, steps, rate, decay = map(float, g["hyper"])
    method = adapters.DoRA if "dora" in name else adapters.LoRA
    rules = {"l?": method(int(rank), alpha, rslora=bool(g["scaling"] != alpha / rank))}
    base = {layer: {"kernel": g[f"base_{layer}.weight"].T} for layer in ("l1", "l2")}

    def at(moment):
        names = {"a": "A", "b": "B", "magnitude": "m"}
        return {
            layer: {
                "kernel": {k: g[f"{moment}_{layer}.{n}"].T for k, n in names.items() if f"{moment}_{layer}.{n}" in g}
            }
            for layer in ("l1", "l2")
        }

    def loss(trainable):
        bound = adapters.bind(base, trainable, rules)
        hidden = jnp.tanh(nn.linear(g["X"], bound["l1"]["kernel"], g.get("base_l1.bias")))
        y = nn.linear(hidden, bound["l2"]["kernel"], g.get("base_l2.bias"))
        return 0.5 * jnp.mean(jnp.sum(jnp.square(y - g["Y"]), -1)), y

    tx = optax.sgd(rate, momentum=0.9) if "sgd" in name else optax.adamw(rate, weight_decay=decay)
    values, first, path = train(tx, loss, at("p0"), int(steps) + 1)
    np.testing.assert_allclose([float(value) for value, _ in values[:-1]], g["losses"], rtol=1e-9)
    np.testing.assert_allclose(values[-1][1], g["yT"], rtol=1e-9)
    for got, expected in ((first, at("g0")), (path[0], at("p1")), (path[5], at("p6"))):
        chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-12)
    merged = adapters.merge(base, path[5], rules)
    for layer in base:
        np.testing.assert_allclose(merged[layer]["kernel"], g[f"merged_{layer}.weight"].T, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_ce", "train_reg"])
def test_effort_training_is_that_of_the_authors(name, golden, x64):
    g = {k: jnp.asarray(v) for k, v in golden(f"effort/{name}").items()}
    paths = [f"layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in ("q", "k", "v", "out")]
    triplets = {"u": "V_residual", "s": "S_residual", "vt": "U_residual"}
    rules = {"*": adapters.Effort(g[f"p0_{paths[0]}.S_residual"].shape[0], bases=True)}

    def base_of(path):
        # Theirs are [out, in]: their V is on the side of the inputs.
        energy = jnp.square(g[f"fnorig_{path}"]) - jnp.sum(jnp.square(g[f"main_{path}"]))
        bases = adapters.PrincipalBases(g[f"Vmain_{path}"].T, g[f"Umain_{path}"].T, energy)
        return adapters.EffortBase(g[f"main_{path}"].T, bases)

    def at(moment):
        return {path: {k: g[f"{moment}_{path}.{n}"].T for k, n in triplets.items()} for path in paths}

    base = {path: base_of(path) for path in paths}

    def loss(trained):
        bound, x = adapters.bind(base, trained["factors"], rules), g["X"]
        for i in (0, 1):
            own = f"layers.{i}.self_attn."
            q, k, v = (nn.linear(x, bound[f"{own}{p}_proj"], g[f"base_{own}{p}_proj.bias"]) for p in "qkv")
            mixed = jax.nn.softmax(q @ k.mT / x.shape[-1] ** 0.5) @ v
            x = x + nn.linear(mixed, bound[f"{own}out_proj"], g[f"base_{own}out_proj.bias"])
            x = x + jnp.tanh(nn.linear(x, g[f"base_layers.{i}.mlp.weight"].T, g[f"base_layers.{i}.mlp.bias"]))
        logits = nn.linear(jnp.mean(x, axis=1), trained["head"], trained["bias"])
        ce = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, g["y"]))
        penalty = adapters.effort_penalty(base, trained["factors"], rules)
        return ce + g["lam"] * penalty, (ce, penalty, logits)

    start = {"factors": at("p0"), "head": g["head_W0"].T, "bias": g["head_b0"]}
    # Decay is added to the gradient.
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.adam(2e-3))
    values, first, path = train(tx, loss, start, 6)
    for i, (value, (ce, penalty, _)) in enumerate(values[:-1]):
        np.testing.assert_allclose([value, ce], [g["loss"][i], g["ce"][i]], rtol=1e-7)
        np.testing.assert_allclose(penalty, g["reg"][i], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(values[0][1][2], g["logits0"], rtol=1e-7)
    np.testing.assert_allclose(values[-1][1][2], g["logitsT"], rtol=1e-7)
    expected = {"factors": at("pT"), "head": g["head_WT"].T, "bias": g["head_bT"]}
    for got, wanted in ((first["factors"], at("g0")), (path[4], expected)):
        chex.assert_trees_all_close(got, wanted, rtol=1e-7, atol=1e-10)
