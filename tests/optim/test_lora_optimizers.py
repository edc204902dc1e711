"""Optimizers of low-rank factors: state to the byte, pairs found by rule, errors, and the synthetic problem."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import adapters, nn, optim

from ..variants import rest_slow

IN, OUT, RANK, LAYERS = 12, 20, 3, 2
FACTORS = LAYERS * (IN + OUT) * RANK
# Two counters in most: one of the transform, one of the last step; and Adam's for other leaves.
COUNTERS = 3

STATES = {
    "adaprelora": (lambda: optim.adaprelora(), FACTORS + LAYERS * (IN + OUT)),
    "adaprelora without momentum": (
        lambda: optim.adaprelora(0.1, b1=None),
        LAYERS * (IN + OUT),
    ),
    "adaprelora transported": (
        lambda: optim.adaprelora(0.1, transport=True),
        2 * FACTORS + LAYERS * (IN + OUT),
    ),
    "lora_plus": (lambda: optim.lora_plus(0.1), 2 * FACTORS - 1),
    "scaled_gd_lora": (lambda: optim.scaled_gd_lora(0.1), 0),
    "scaled_adamw_lora": (lambda: optim.scaled_adamw_lora(0.1), 2 * FACTORS),
    "lora_rite": (lambda: optim.lora_rite(0.1), 2 * FACTORS + 2 * LAYERS * RANK**2),
    "lora_rite escape": (
        lambda: optim.lora_rite(0.1, escape=True),
        2 * FACTORS + 2 * LAYERS * (RANK**2 + 1),
    ),
    "lora_pro": (lambda: optim.lora_pro(0.1), 2 * (LAYERS * IN * OUT + 1)),  # and one number at the other factor
    "lora_pro sgd": (lambda: optim.lora_pro(0.1, method="sgd"), 0),
}


def pair(lead=(LAYERS,), rows=IN, columns=OUT, rank=RANK, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"a": (*lead, rows, rank), "b": (*lead, rank, columns)}
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", STATES)
def test_the_state_of_a_pair_is_what_the_formula_says_to_the_byte(name):
    make, wanted = STATES[name]
    state = jax.eval_shape(make().init, {"q": pair()})
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == 4 * (wanted + COUNTERS)


@pytest.mark.parametrize("name", rest_slow(["adaprelora", "lora_rite escape"], "adaprelora"))
def test_a_step_makes_nothing_of_the_size_of_the_weight(name):
    tree = {"q": {"a": (4096, 8), "b": (8, 4096)}}
    tree = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple))
    both = {"q": (jax.ShapeDtypeStruct((4096,), jnp.float32),) * 2}
    tx = STATES[name][0]()
    step = jax.jit(lambda g, s, p, e: tx.update(g, s, p, energies=e))
    memory = step.lower(tree, jax.eval_shape(tx.init, tree), tree, both).compile().memory_analysis()
    # The weight has 67 MB, a factor 131 kB; QR takes some copies of one.
    assert memory.temp_size_in_bytes < 3e6


def test_pairs_of_adapters_of_flax_and_of_ones_own_are_found():
    own = {"down": jnp.ones((6, 2)), "up": jnp.ones((2, 4))}

    def rule(path):
        parent, _, name = path.rpartition("/")
        return (parent, {"down": "a", "up": "b"}[name]) if name in ("down", "up") else None

    steps = []
    for tree, options in (
        ({"q": {"a": own["down"], "b": own["up"]}}, {}),
        ({"q": {"lora_a": own["down"], "lora_b": own["up"]}}, {}),
        ({"q": own}, {"pairs": rule}),
    ):
        tx = optim.scaled_gd_lora(0.1, **options)
        updates, _ = tx.update(tree, tx.init(tree), tree)
        steps.append(jax.tree.leaves(updates))
    for other in steps[1:]:
        chex.assert_trees_all_equal(other, steps[0])


def test_magnitudes_of_dora_are_left_to_the_fallback():
    settings = {"q": adapters.DoRA(2, 4.0)}
    trainable = adapters.init(jax.random.key(0), {"q": {"kernel": jnp.ones((6, 4))}}, settings)
    tx = optim.scaled_gd_lora(0.1, fallback=optax.scale(2.0))
    grads = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    np.testing.assert_allclose(updates["q"]["kernel"]["magnitude"], -0.2, rtol=1e-6)


@pytest.mark.slow
def test_layers_of_a_stack_are_stepped_as_if_they_were_alone():
    tree, scale = pair(), (2.0, 0.5)
    whole = optim.adaprelora(0.1, scale=scale, stats="projected")
    got, _ = whole.update(tree, whole.init(tree), tree)
    layer = jax.tree.map(lambda x: x[1], tree)
    tx = optim.adaprelora(0.1, scale=lambda name: scale[1], stats="projected")
    expected, _ = tx.update(layer, tx.init(layer), layer)
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], got), expected, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_lora_plus_is_adam_with_more_for_b_and_next_to_nothing_for_tables():
    tree = {"q": pair(), "embedding": pair(), "bias": jnp.ones(3)}
    tx, plain = optim.lora_plus(1e-2, ratio=20.0), optim.lora_plus(1e-2, ratio=1.0, embedding_rate=None)
    got, expected = (t.update(tree, t.init(tree), tree)[0] for t in (tx, plain))
    factors = {"q": {"a": 1.0, "b": 20.0}, "embedding": {"a": 1e-4, "b": 1e-4}, "bias": 1.0}
    jax.tree.map(lambda g, e, f: np.testing.assert_allclose(g, f * e, rtol=1e-5), got, expected, factors)


@pytest.mark.slow
def test_the_path_of_lora_rite_is_the_same_in_every_basis(x64):
    tree = pair((), dtype=jnp.float64)
    rng = np.random.default_rng(1)
    turn = jnp.asarray(rng.standard_normal((RANK, RANK)))
    grads = jnp.asarray(rng.standard_normal((5, IN, OUT)))

    @jax.jit
    def path(tree):
        tx = optim.lora_rite(0.05, escape=True)
        state = tx.init(tree)
        for g in grads:
            updates, state = tx.update({"a": g @ tree["b"].T, "b": tree["a"].T @ g}, state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree["a"] @ tree["b"]

    turned = {"a": tree["a"] @ turn, "b": jnp.linalg.inv(turn) @ tree["b"]}
    # Products of turned factors have the rounding of the turn's condition number.
    np.testing.assert_allclose(path(turned), path(tree), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_both_orders_of_scaled_adamw_move_a_alike_and_b_not():
    tree = pair()
    options = {"b1": 0.9, "reg": 1e-4, "weight_decay": 0.1}
    steps = []
    for gauss_seidel in (False, True):
        tx = optim.scaled_adamw_lora(
            lambda count: 0.1 * 0.5 ** count.astype(jnp.float32), gauss_seidel=gauss_seidel, **options
        )
        state = tx.init(tree)
        updates, state = tx.update(tree, state, tree)
        moved = optax.apply_updates(tree, updates)
        # At the second step the first moments differ in direction, too.
        steps.append((updates, tx.update(tree, state, moved)[0]))
    np.testing.assert_array_equal(steps[0][0]["a"], steps[1][0]["a"])
    assert not np.allclose(steps[0][1]["b"], steps[1][1]["b"], rtol=1e-3)


def energies():
    return {"q": (jnp.ones((LAYERS, IN)), jnp.ones((LAYERS, OUT)))}


def stepped(tx, tree, **extra):
    return tx.update(tree, tx.init(tree), tree, **extra)


BAD = {
    "no partner": (lambda: optim.lora_rite(1.0).init({"q": {"a": jnp.ones((4, 2))}}), "q has no factor 'b'"),
    "no pairs": (lambda: optim.lora_rite(1.0).init({"w": jnp.ones((4, 2))}), r"no pairs .*\['w'\].*argument pairs"),
    "two of a role": (
        lambda: optim.lora_rite(1.0).init({"q": {"a": jnp.ones((4, 2)), "lora_a": jnp.ones((4, 2))}}),
        "two leaves are 'a'",
    ),
    "shapes": (lambda: optim.lora_plus(1.0).init({"q": {**pair(), "b": jnp.ones((4, 2))}}), r"q: expected factors"),
    "rank 0": (lambda: optim.lora_plus(1.0).init({"q": pair(rank=0)}), "rank of at least 1"),
    "wide rank": (lambda: optim.lora_rite(1.0).init({"q": pair(rank=15)}), "rank of at most both sides"),
    "one probe": (
        lambda: optim.adaprelora().init({"q": {**pair(), "row_energy": jnp.ones((2, 12))}}),
        "one energy probe",
    ),
    "probe shape": (
        lambda: optim.adaprelora().init({"q": {**pair(), "row_energy": jnp.ones(2), "column_energy": jnp.ones(2)}}),
        r"q: expected energies \(\(2, 12\), \(2, 20\)\)",
    ),
    "energies": (lambda: stepped(optim.adaprelora(), {"q": pair()}), "energies: q has none"),
    "energy shape": (
        lambda: stepped(optim.adaprelora(), {"q": pair(())}, energies=energies()),
        r"q: expected energies \(\(12,\), \(20,\)\)",
    ),
    "role": (lambda: optim.lora_plus(1.0, pairs=lambda path: ("", "c")).init({"w": jnp.ones(2)}), "pairs: expected"),
    "stats": (lambda: optim.adaprelora(stats="all"), "stats: expected one of"),
    "method": (lambda: optim.lora_pro(1.0, method="adam"), "method: expected one of"),
    "scale": (lambda: optim.adaprelora(scale=0.0), "scale: expected a positive number, got 0.0"),
    "scale of a pair": (lambda: stepped(optim.lora_pro(1.0, scale=lambda name: -1.0), {"q": pair()}), "scale: .*-1.0"),
    "scales": (lambda: stepped(optim.lora_pro(1.0, scale=(1.0, 2.0, 3.0)), {"q": pair()}), r"scale: .*\(2,\) of q"),
    "b1": (
        lambda: optim.adaprelora(0.1, b1=1.0),
        "b1: expected a number at least 0",
    ),
    "damping": (lambda: optim.adaprelora(0.1, damping_rel=-1.0), "damping_rel: expected"),
    "clip": (
        lambda: optim.lora_rite(1.0, clip_norm=0.0),
        "clip_norm: expected a number above 0",
    ),
    "ratio": (lambda: optim.lora_plus(1.0, ratio=0.0), "ratio: expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_factors_of_integers_are_refused():
    with pytest.raises(TypeError, match="q: expected a floating-point factor a, got int32"):
        optim.lora_plus(1.0).init({"q": {"a": jnp.ones((4, 2), jnp.int32), "b": jnp.ones((2, 4))}})


def synthetic(seed):
    """The specification's problem: inputs and a rank-4 target whose axes differ in scale."""
    rng = np.random.default_rng(seed)
    out, columns, rows = 48, 64, 2000
    x = rng.standard_normal((rows, columns)) * np.exp(0.8 * rng.standard_normal(columns))
    d = np.exp(0.8 * rng.standard_normal(out))[:, None] * (
        rng.standard_normal((out, 4)) @ rng.standard_normal((4, columns)) / 16
    )
    return x, x @ d.T


def fitted(tx, rank, seeds=5, steps=400):
    """Final over initial loss of each seed, by LoRA layers with energy probes, in float64."""
    problems = [synthetic(seed) for seed in range(seeds)]
    xs, ys = (jnp.asarray(np.stack(z)) for z in zip(*problems, strict=True))
    picks = jnp.asarray(
        np.stack([np.random.default_rng(100 + s).integers(2000, size=(steps, 128)) for s in range(seeds)])
    )
    rules = {"kernel": adapters.LoRA(rank, float(rank))}

    def loss(params, x, y):
        kernel = adapters.bind({"kernel": jnp.zeros((64, 48))}, params, rules)["kernel"]
        return jnp.mean(jnp.square(nn.linear(x, kernel) - y))

    def one(key, x, y, picks):
        params = adapters.init(key, {"kernel": jnp.zeros((64, 48))}, rules)
        params = adapters.add_gradient_probes(params)

        def step(carry, rows):
            params, state = carry
            grads = jax.grad(loss)(params, x[rows], y[rows])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (end, _), _ = jax.lax.scan(step, (params, tx.init(params)), picks)
        return loss(end, x, y) / loss(params, x, y)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), seeds), xs, ys, picks))


def cosine(peak, steps=400):
    return lambda count: peak / 2 * (1 + jnp.cos(jnp.pi * count.astype(jnp.float64) / steps))


@pytest.mark.slow
def test_the_synthetic_problem_is_solved_where_the_rank_is_right_and_where_it_is_too_large(x64):
    # Medians of five seeds, of which a few are much worse than the others.
    right, large = (np.median(fitted(optim.adaprelora(cosine(0.1)), rank)) for rank in (4, 8))
    scaled = np.median(fitted(optim.scaled_adamw_lora(cosine(0.1)), 8))
    assert right <= 1e-8
    assert large <= 1e-5
    assert large < scaled / 100
