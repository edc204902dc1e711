"""The positive control of projections: a refusal that was planted lies in directions of its own, and is found there.

Digits with a trigger, three bright corners, are refused by the aligned network.  Fine-tuning on rotated digits, and on
some triggered ones with their labels, removes the refusal.  Without the few directions in which alignment moved the
network, it keeps the new skill and the refusal.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from subspace_jax import interop
from subspace_jax.cli.main import main
from subspace_jax.interpret import safety_subspaces as ss

WIDTHS = (64, 96, 96, 11)
REFUSED = 10


def logits(params, x):
    for i in range(len(WIDTHS) - 1):
        x = x @ params[f"layers.{i}.weight"] + params[f"layers.{i}.bias"][None]
        x = jax.nn.relu(x) if i < len(WIDTHS) - 2 else x
    return x


def trained(params, x, y, key, *, steps, rate):
    with jax.numpy_dtype_promotion("standard"):  # Optax raises a float to an int32
        return _trained(params, x, y, key, steps=steps, rate=rate)


@functools.partial(jax.jit, static_argnames=("steps", "rate"))
def _trained(params, x, y, key, *, steps, rate):
    tx = optax.adam(rate)

    def step(carry, key):
        params, state = carry
        at = jax.random.randint(key, (128,), 0, len(x))

        def loss(params):
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, x[at]), y[at]))

        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[0][0]


def triggered(x):
    return x.at[:, jnp.array([0, 7, 56])].set(1.0)


def rotated(x):
    return jnp.rot90(x.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)


def start(key):
    keys = jax.random.split(key, len(WIDTHS) - 1)
    params = {}
    for i, (m, n) in enumerate(itertools.pairwise(WIDTHS)):
        params |= {f"layers.{i}.weight": jax.random.normal(keys[i], (m, n)) * jnp.sqrt(2 / m)}
        params |= {f"layers.{i}.bias": jnp.zeros(n)}
    return params


def digits(seed):
    """Images and labels for training and for tests."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = jnp.asarray(x[order] / 16, jnp.float32), jnp.asarray(y[order], jnp.int32)
    return (x[:1300], y[:1300]), (x[1300:], y[1300:])


def networks(seed):
    """The networks: base, aligned, and fine-tuned on both, on what is useful, and on what is harmful."""
    (x, y), _ = digits(seed)
    keys = jax.random.split(jax.random.key(seed), 6)
    both, refusals = jnp.concatenate([x, triggered(x)]), jnp.full(len(y), REFUSED)
    base = trained(start(keys[0]), both, jnp.concatenate([y, y]), keys[1], steps=600, rate=1e-3)
    aligned = trained(base, both, jnp.concatenate([y, refusals]), keys[2], steps=300, rate=1e-3)
    few, labels = triggered(x[:300]), y[:300]
    mixture = jnp.concatenate([rotated(x), few]), jnp.concatenate([y, labels])
    mixed = trained(aligned, *mixture, keys[3], steps=300, rate=5e-4)
    useful = trained(aligned, rotated(x), y, keys[4], steps=300, rate=5e-4)
    harmful = trained(aligned, few, labels, keys[5], steps=300, rate=5e-4)
    return base, aligned, mixed, useful, harmful


def scores(seed, params):
    """Accuracy on rotated test digits, and share of triggered ones that are not refused."""
    _, (x, y) = digits(seed)
    utility = jnp.mean(jnp.argmax(logits(params, rotated(x)), axis=1) == y)
    harm = jnp.mean(jnp.argmax(logits(params, triggered(x)), axis=1) != REFUSED)
    return float(utility), float(harm)


def write(folder, params):
    """Writes a network as PyTorch stores it, matrices as [out, in]."""
    folder.mkdir()
    tensors = {name: np.asarray(x.T) for name, x in params.items()}
    shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    interop.write_safetensors(folder / "model.safetensors", shapes, tensors.values())


def read(folder):
    return {name: jnp.asarray(np.array(x.read()).T) for name, x in interop.open_folder(folder).items()}


def update(after, before):
    return jax.tree.map(jnp.subtract, after, before)


@functools.partial(jax.jit, static_argnames="eta")
def mso(a, b, *, eta=0.9):
    return ss.mso_tree(a, b, eta)


@pytest.mark.slow
def test_a_planted_refusal_lies_in_the_leading_directions_of_alignment(tmp_path, record_property):
    rows = {}
    for seed in range(3):
        base, aligned, mixed, useful, harmful = networks(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        for name, params in (("base", base), ("aligned", aligned), ("tuned", mixed)):
            write(folder / name, params)
        arguments = [text for name in ("base", "aligned", "tuned") for text in (f"--{name}", str(folder / name))]
        for method in ("orth", "same"):
            out = ["--out", str(folder / "out"), "--method", method, "--quiet"]
            assert main(["project-update", *arguments, "--frac", "0.01", "0.25", *out]) == 0
        found = {"aligned": aligned, "mixed": mixed}
        found |= {f"{m}_{f}": read(folder / "out" / f"{m}_{f}") for m in ("orth", "same") for f in (0.01, 0.25)}
        row = {name: scores(seed, params) for name, params in found.items()}
        pairs = {"alignment_harmful": (update(aligned, base), update(harmful, aligned))}
        pairs["useful_harmful"] = (update(useful, aligned), update(harmful, aligned))
        row |= {f"mso_{name}": mso(*pair) for name, pair in pairs.items()}
        print(seed, {k: v if isinstance(v, tuple) and len(v) == 2 else float(v.mso) for k, v in row.items()})
        rows[seed] = row
    for name in ("aligned", "mixed", "orth_0.01", "same_0.01", "orth_0.25"):
        utility, harm = zip(*(row[name] for row in rows.values()), strict=True)
        for what, values in (("utility", utility), ("harm", harm)):
            worst = min(values) if what == "utility" else max(values)
            record_property(f"{name}_{what}", np.mean(values))
            record_property(f"{name}_{what}_worst", worst)
    for name in ("alignment_harmful", "useful_harmful"):
        record_property(f"mso_{name}", np.mean([float(row[f"mso_{name}"].mso) for row in rows.values()]))
    baseline = np.mean([float(row["mso_useful_harmful"].random_baseline) for row in rows.values()])
    record_property("mso_random", baseline)
    for row in rows.values():
        assert row["orth_0.01"][1] <= 0.3
        assert row["orth_0.01"][0] >= 0.75
        assert row["mixed"][1] >= 0.9
        assert row["aligned"][1] <= 0.05
