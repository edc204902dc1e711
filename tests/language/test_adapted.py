"""Adapters of a checkpoint as a task: the golden run, meshes, quantized weights."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import adapters, interop, language, nn, optim, train
from subspace_jax.adapters.rules import adapters_of

from .conftest import LLAMA

LINEAR = {"re:layers/(attn|mlp)/.*": adapters.LoRA(4, 8.0)}


def task(settings, **options):
    return language.AdaptedLMTask(interop.read_config(LLAMA), settings, folder=LLAMA, **options)


@jax.numpy_dtype_promotion("standard")  # Optax raises float32 to int32 powers
@pytest.mark.slow
def test_lora_of_the_golden_llama_learns_in_50_steps_and_is_the_same_when_read_again(batch, tmp_path):
    mesh = train.make_mesh(devices=jax.devices()[:1])
    own, tx = task(LINEAR), optax.adamw(1e-2, weight_decay=0.0)
    # In two parts, of one row each, that share the frozen weights; the mean is that of the whole batch.
    state, step = train.init_state(own, tx, mesh), train.jit_train_step(own, tx, mesh, accumulate=2)
    placed = train.to_device(batch, train.batch_sharding(mesh))
    losses = []
    for _ in range(50):
        state, metrics = step(state, placed)
        losses.append(float(metrics["loss"]))
    # The first is that of the base, which PEFT has too; PEFT then reaches 0.17 with its own random start.
    assert abs(losses[0] - 6.01) < 0.01
    assert losses[-1] < 0.6
    chex.assert_trees_all_equal(state.variables["base"], interop.load_causal_lm(LLAMA)[1])

    interop.save_peft_adapter(tmp_path, own.config, state.params, own.settings)
    read = interop.load_peft_adapter(tmp_path, own.config)
    apply = jax.jit(lambda params: nn.causal_lm_apply(own.config, params, jnp.asarray(batch["inputs"])).logits)
    base = state.variables["base"]
    got, wanted = (
        apply(adapters.bind(base, *pair)) for pair in ((read.trainable, read.settings), (state.params, own.settings))
    )
    np.testing.assert_array_equal(got, wanted)
    # Sums in another order.
    np.testing.assert_allclose(apply(own.merged(state.params, state.variables)), wanted, rtol=0, atol=1e-4)


@pytest.mark.eight_devices
@pytest.mark.slow
def test_a_step_of_adapted_lm_task_on_a_mesh_is_that_of_one_device(batch):
    # Plain SGD: the update is the gradient.  Rows are repeated, so that they split.
    many = {name: np.tile(x, (4, 1)) for name, x in batch.items()}
    settings = {
        "attn/q": adapters.DoRA(2, 4.0, init="gaussian"),
        "embed/embedding": adapters.LoRA(2, 4.0),
        "mlp/up": adapters.SVFit(3),
        "norm/scale": adapters.Full(),
    }
    results = []
    for mesh in (train.make_mesh(devices=jax.devices()[:1]), train.make_mesh(2, 2, 2)):
        own, tx = task(settings), optax.sgd(0.5)
        state = train.init_state(own, tx, mesh)
        state, metrics = train.jit_train_step(own, tx, mesh)(state, train.to_device(many, train.batch_sharding(mesh)))
        results.append((jax.device_get(state.params), float(metrics["loss"])))
    (one, loss), (split, loss_split) = results
    assert abs(loss - loss_split) < 1e-4
    chex.assert_trees_all_close(split, one, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.parametrize(
    "settings",
    [LINEAR, {"attn/q": adapters.LoRA(2, 4.0, init="pissa"), "mlp/up": adapters.DoRA(2, 4.0)}],
)
def test_one_step_delivers_the_energies_of_gradients_on_any_mesh(batch, settings):
    many = {name: np.tile(x, (4, 1)) for name, x in batch.items()}
    results = []
    for mesh in (train.make_mesh(devices=jax.devices()[:1]), train.make_mesh(2, 2, 2)):
        own, tx = task(settings, probes=True), optim.adaprelora(1e-2, scale=2.0)
        state, step = train.init_state(own, tx, mesh), train.jit_train_step(own, tx, mesh)
        start = jax.device_get(adapters.drop_gradient_probes(state.params))
        for _ in range(2):
            state, _ = step(state, train.to_device(many, train.batch_sharding(mesh)))
        results.append(jax.device_get((state.params, state.opt_state)))
    chex.assert_trees_all_close(*results, rtol=2e-3, atol=2e-5)
    params, energy = results[0][0], results[0][1][0].energy
    for path, arrays in adapters_of(params).items():
        at = functools.reduce(lambda tree, part: tree[part], path.split("/"), energy)
        # Both sides are means of the same squares.
        np.testing.assert_allclose(at["a"].mean(-1), at["b"].mean(-1), rtol=1e-4)
        assert np.all(at["a"].mean(-1) > 0)
        np.testing.assert_array_equal(arrays["row_energy"], 0)
    whole = own.merged(params, state.variables)
    assert jax.tree.structure(whole) == jax.tree.structure(nn.param_shapes(own.config))
    assert jax.tree.structure(start) == jax.tree.structure(adapters.drop_gradient_probes(params))


def test_a_random_base_of_adapted_lm_task_is_in_the_checkpoints_and_one_from_a_folder_is_not():
    assert task(LINEAR).frozen == ("base",)
    assert language.AdaptedLMTask(interop.read_config(LLAMA), LINEAR).frozen == ()


@jax.numpy_dtype_promotion("standard")  # Optax raises float32 to int32 powers
@pytest.mark.slow
def test_a_base_in_eight_bits_trains_the_adapters_and_is_merged_whole(batch):
    mesh = train.make_mesh(devices=jax.devices()[:1])
    settings = {
        "attn/q": adapters.FLoRA((4, 4), dropout=0.1),
        "mlp/up": adapters.DoRA(2, 4.0),
        "mlp/down": adapters.Full(),
    }
    own, tx = task(settings, base_dtype="int8"), optax.adamw(1e-2, weight_decay=0.0)
    state, step = train.init_state(own, tx, mesh), train.jit_train_step(own, tx, mesh)
    base, plain = state.variables["base"]["layers"], interop.load_causal_lm(LLAMA)[1]["layers"]
    assert isinstance(base["attn"]["k"]["kernel"], adapters.Int8Weight)
    np.testing.assert_array_equal(base["mlp"]["down"]["kernel"], plain["mlp"]["down"]["kernel"])
    kept = jax.device_get(base)
    placed = train.to_device(batch, train.batch_sharding(mesh))
    losses = []
    for _ in range(20):
        state, metrics = step(state, placed)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    chex.assert_trees_all_equal(state.variables["base"]["layers"], kept)
    merged = own.merged(state.params, state.variables)
    bound = adapters.bind(state.variables["base"], state.params, settings)
    apply = jax.jit(lambda params: nn.causal_lm_apply(own.config, params, jnp.asarray(batch["inputs"])).logits)
    # Sums in another order: the integers are multiplied first and scaled at the end.
    np.testing.assert_allclose(apply(merged), apply(bound), rtol=0, atol=1e-3)
    assert merged["layers"]["attn"]["k"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "folder", "message"),
    [
        (LINEAR, None, "base_dtype: int8 weights are of a folder"),
        ({"attn/q": adapters.SVFit(2)}, LLAMA, "base_dtype: int8 does not serve SVFit.*layers/attn/q/kernel"),
    ],
)
def test_what_eight_bits_cannot_serve_is_named(settings, folder, message):
    with pytest.raises(ValueError, match=message):
        language.AdaptedLMTask(interop.read_config(LLAMA), settings, folder=folder, base_dtype="int8")
