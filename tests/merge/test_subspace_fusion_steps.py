"""Steps on masks and coefficients: golden loops, and the same on several devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax.merge import subspace_fusion as fusion
from subspace_jax.merge.subspace_fusion.concrete import inner_step, mask_step, merge_masked

from .trees import NAMES, network, tree

STEPS = 5


@pytest.fixture(autouse=True)
def promotion():
    """Optax's Adam takes floats to int32 powers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def problem(golden, x64):
    """The golden arrays, what is merged, and the functions of the tasks."""
    g = golden("subspace-fusion/meta_train")
    found = fusion.Fusion(tree(g, "base"), tuple(tree(g, f"tv{i}") for i in range(3)))
    return g, found, [network(jnp.asarray(g[f"head{i}"])) for i in range(3)]


def layered(lam):
    return {name: jnp.asarray(lam[:, i]) for i, name in enumerate(NAMES)}


def test_concrete_task_arithmetic_is_golden(problem):
    g, models, apply_fns = problem
    txs = fusion.Optimizers(mask=optax.adam(float(g["lr_mask"])))
    settings = fusion.ConcreteSettings(float(g["lambda0"]), float(g["temperature"]))
    state = fusion.concrete_init(models.taus, txs, settings=settings)

    @jax.jit
    def step(state, batches, u):
        return mask_step(state, batches, lambda _: u, models, apply_fns, txs, settings)

    merged = jax.jit(lambda logits, u: merge_masked(models, state.lam, logits, lambda _: u, settings))
    chex.assert_trees_all_close(merged(state.logits, tree(g, "ta/u0")), tree(g, "ta/merged0"), atol=1e-10)
    for t in range(STEPS):
        state, metrics = step(state, list(jnp.asarray(g["X"][t])), tree(g, f"ta/u{t}"))
        chex.assert_trees_all_close(metrics["loss"], g["ta/loss"][t], atol=1e-6)
        chex.assert_trees_all_close(state.logits, tree(g, f"ta/logits{t + 1}"), atol=1e-6)
    assert state.step == STEPS


def test_layerwise_concrete_adamerging_is_golden(problem):
    g, models, apply_fns = problem
    txs = fusion.Optimizers(optax.adam(float(g["lr_mask"])), optax.adam(float(g["lw/base_lr"])))
    settings = fusion.ConcreteSettings(float(g["lambda0"]), float(g["temperature"]))
    state = fusion.concrete_init(models.taus, txs, settings=settings)

    @jax.jit
    def step(state, inner, outer, u_in, u_out):
        state, found = inner_step(state, inner, lambda _: u_in, models, apply_fns, txs, settings)
        state, metrics = mask_step(state, outer, lambda _: u_out, models, apply_fns, txs, settings)
        return state, metrics | {"inner_loss": found["loss"]}

    for t in range(STEPS):
        batches = [list(jnp.asarray(x)) for x in g["X"][2 * t : 2 * t + 2]]
        state, metrics = step(state, *batches, tree(g, f"lw/u_in{t}"), tree(g, f"lw/u_out{t}"))
        chex.assert_trees_all_close(metrics["inner_loss"], g["lw/loss_in"][t], atol=1e-6)
        chex.assert_trees_all_close(metrics["loss"], g["lw/loss_out"][t], atol=1e-6)
        chex.assert_trees_all_close(state.lam, layered(g["lw/lam_after_inner"][t]), atol=1e-6)
        chex.assert_trees_all_close(state.logits, tree(g, f"lw/logits{t + 1}"), atol=1e-6)


def test_layerwise_adamerging_with_clipped_coefficients_is_golden(problem):
    g, models, apply_fns = problem
    txs = fusion.Optimizers(lam=optax.adam(float(g["am/lr"])))
    settings = fusion.ConcreteSettings(float(g["lambda0"]), clamp=True)
    state = fusion.concrete_init(models.taus, txs, settings=settings)
    options = {"fusion": models, "apply_fns": apply_fns, "txs": txs, "settings": settings}
    step = jax.jit(functools.partial(fusion.adamerging_step, **options))
    for t in range(STEPS):
        state, metrics = step(state, list(jnp.asarray(g["X"][t])), jax.random.key(0))
        chex.assert_trees_all_close(metrics["loss"], g["am/loss"][t], atol=1e-6)
        chex.assert_trees_all_close(state.lam, layered(g["am/lam"][t]), atol=1e-6)


def small(seed=0, width=16):
    """Two tasks of a linear layer, whose kernel can be sharded."""
    keys = jax.random.split(jax.random.key(seed), 4)
    base = {"kernel": jax.random.normal(keys[0], (8, width)), "bias": jnp.zeros(width)}
    finetuned = [jax.tree.map(lambda x, k=k: x + jax.random.normal(k, x.shape), base) for k in keys[1:3]]
    batches = list(jax.random.normal(keys[3], (2, 16, 8)))

    def apply(params, x):
        return jnp.tanh(jnp.matmul(x, params["kernel"]) + params["bias"][None])[:, :5]

    return fusion.Fusion(base, fusion.task_vectors(base, finetuned)), batches, [apply, apply]


BOTH = fusion.Optimizers(optax.adam(0.05), optax.adam(0.1))


def runs(models, batches, apply_fns, state=None, layerwise=True):
    """Two steps of Concrete AdaMerging."""
    state = state or fusion.concrete_init(models.taus, BOTH, layerwise=layerwise)
    step = jax.jit(functools.partial(fusion.concrete_adamerging_step, apply_fns=apply_fns, txs=BOTH))
    for i in range(2):
        state, metrics = step(state, (batches, batches), jax.random.key(i), fusion=models)
    return state, metrics


def test_concrete_adamerging_draws_masks_by_its_key_and_starts_coefficients_anew():
    models, batches, apply_fns = small()
    (one, first), (two, _) = runs(models, batches, apply_fns), runs(models, batches, apply_fns)
    chex.assert_trees_all_equal(one, two)
    assert first["entropies"].shape == (2,)
    # One step of Adam from the start moves a coefficient by the learning rate at most, whatever came before.
    for x in jax.tree.leaves(one.lam):
        assert x.shape == (2,)
        assert np.all(np.abs(np.asarray(x) - 0.3) < 0.11)


@pytest.mark.slow
def test_taskwise_coefficients_are_of_a_number_for_each_task():
    models, batches, apply_fns = small()
    state, _ = runs(models, batches, apply_fns, layerwise=False)
    assert state.lam.shape == (2,)


@pytest.mark.slow
def test_adaptation_with_a_drawn_mask_is_adamerging_of_masked_task_vectors():
    models, batches, apply_fns = small()
    txs = fusion.Optimizers(lam=optax.adam(0.1))
    mask = fusion.concrete_mask(jax.tree.map(jnp.ones_like, models.taus[0]), jax.random.key(3))
    step = jax.jit(functools.partial(fusion.adamerging_step, apply_fns=apply_fns, txs=txs))
    state = fusion.concrete_init(models.taus, txs)
    fixed, _ = step(state, batches, jax.random.key(0), fusion=models._replace(mask=mask))
    copies = fusion.Fusion(models.base, fusion.mask_task_vectors(models.taus, mask))
    apart, _ = step(state, batches, jax.random.key(0), fusion=copies)
    chex.assert_trees_all_close(fixed.lam, apart.lam, atol=1e-5)


@pytest.mark.slow
def test_a_step_on_a_mask_keeps_no_mask_for_its_gradient():
    models, batches, apply_fns = small()
    state = fusion.concrete_init(models.taus, BOTH)

    def loss(logits):
        from subspace_jax.merge.subspace_fusion.concrete import draw_noise, merge_masked

        noise, settings = draw_noise(jax.random.key(0)), fusion.ConcreteSettings()
        params = merge_masked(models, state.lam, logits, noise, settings)
        return fusion.entropy_objective(apply_fns, params, batches)

    _, back = jax.vjp(loss, state.logits)
    kept = [x.shape for x in jax.tree.leaves(back) if hasattr(x, "shape")]
    # The logits and the task vectors, which are there anyway, and the merged kernel: neither noise nor mask.
    kernels = kept.count((8, 16))
    assert kernels <= 1 + len(models.taus) + 2, kept


@pytest.mark.eight_devices
def test_sharded_steps_and_ties_equal_those_of_one_device():
    models, batches, apply_fns = small()
    want, wanted = runs(models, batches, apply_fns)
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(tree):
        return jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, P(*(None,) * (x.ndim - 1), "fsdp"))) if x.ndim else x, tree
        )

    sharded = fusion.Fusion(*place(models[:2]))
    state = fusion.concrete_init(sharded.taus, BOTH)
    spread = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batches]
    found, metrics = runs(sharded, spread, apply_fns, state)
    chex.assert_trees_all_close(found.logits, want.logits, atol=1e-5)
    chex.assert_trees_all_close(found.lam, want.lam, atol=1e-5)
    chex.assert_trees_all_close(metrics["loss"], wanted["loss"], atol=1e-5)
    merged = jax.jit(fusion.ties_merge)(sharded.taus)
    chex.assert_trees_all_close(merged, fusion.ties_merge(models.taus), atol=1e-6)
