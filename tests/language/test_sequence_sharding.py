"""Sequences whose positions are sharded: results of one device, collectives and memory."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import adapters, data, language, nn, planning, train
from subspace_jax.data import text

pytestmark = pytest.mark.eight_devices

LENGTH = 32
MODELS = {
    "gpt2": nn.CausalLMConfig.gpt2(259, 32, 2, 4, max_length=64),
    "llama": nn.CausalLMConfig.tiny(vocab_size=272),
    "window": nn.CausalLMConfig.tiny(vocab_size=272, windows=(5,) * 4),
}


@pytest.fixture(scope="module")
def rows():
    texts = [text.Completion("p", "the quick brown fox " * (1 + i % 4)) for i in range(40)]
    packed = text.pack_rows(texts, text.ByteTokenizer(), LENGTH)
    return next(data.eval_batches(packed, batch_size=4))


def gradient(config, mesh, rows, settings=None, **options):
    """The loss of a batch and its gradient, on the host."""
    adapted = (language.AdaptedLMTask, settings) if settings else (language.CausalLMTask,)
    task = adapted[0](config, *adapted[1:], **options)
    state = train.init_state(task, optax.identity(), mesh)

    def loss_and_gradient(params, variables, batch):
        options = {"key": jax.random.key(0), "step": 0}
        (loss, _), gradient = task.gradients(params, variables, batch, **options)
        return loss, gradient

    batch = train.to_device(rows, train.batch_sharding(mesh))
    with train.use_mesh(mesh):
        return jax.device_get(jax.jit(loss_and_gradient)(state.params, state.variables, batch))


@pytest.mark.parametrize(
    ("name", "sizes", "settings", "options"),
    [
        pytest.param("gpt2", {"data": 1, "sequence": 8}, None, {}, marks=pytest.mark.slow),
        ("llama", {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}, None, {"loss_chunk": 8, "remat": "full"}),
        pytest.param(
            "llama",
            {"data": 2, "sequence": 4},
            {"re:layers/(attn|mlp)/.*": adapters.DoRA(4, 8.0)},
            {"remat": "dots"},
            marks=pytest.mark.slow,
        ),
        pytest.param("window", {"data": 1, "fsdp": 2, "sequence": 4}, None, {"loss_chunk": 16}, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_one_device(rows, name, sizes, settings, options):
    config = MODELS[name]
    one, split = (
        gradient(config, mesh, rows, settings, **options)
        for mesh in (train.make_mesh(1, devices=jax.devices()[:1]), train.make_mesh(**sizes))
    )
    chex.assert_trees_all_close(split, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_without_a_mask_sees_what_came_before_on_other_devices_too(window):
    mesh = train.make_mesh(1, sequence=8)
    query, key, value = (
        jax.random.normal(k, (2, 16, heads, 8))
        for k, heads in zip(jax.random.split(jax.random.key(0), 3), (4, 2, 2), strict=True)
    )
    attend = nn.sequence_attention(mesh, ("sequence",))
    wanted = nn.attention(query, key, value, window=window)
    got = jax.jit(lambda *x: attend(*x, window=window))(query, key, value)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_a_length_that_devices_do_not_divide_is_refused():
    attend = nn.sequence_attention(train.make_mesh(1, sequence=8), ("sequence",))
    x = jnp.zeros((1, 12, 2, 8))
    with pytest.raises(ValueError, match=r"multiples of 8 devices \(sequence\), got 12 and 12"):
        attend(x, x, x)
    config = train.override(language.finetune.default_config(), ["mesh.sequence=8", "data.length=60"])
    with pytest.raises(ValueError, match=r"data.length: 60 positions don't divide among mesh.sequence=8"):
        language.finetune.outline(config)


def compiled(sequence, length=512, width=64):
    """A compiled step of a small model on rows of some length."""
    sizes = {"hidden_size": width, "mlp_size": 4 * width, "num_layers": 2, "num_heads": 4, "num_kv_heads": 1}
    config = nn.CausalLMConfig.tiny(vocab_size=320, **sizes, head_dim=width // 4, max_length=length)
    mesh = train.make_mesh(1, sequence=sequence, devices=jax.devices()[:sequence])
    task, tx = language.CausalLMTask(config, remat="full"), optax.sgd(0.1)
    abstract, _ = train.state_shardings(task, tx, mesh)
    names = ("inputs", "labels", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct((2, length), jnp.int32) for name in names}
    batch["weights"] = jax.ShapeDtypeStruct((2, length), jnp.float32)
    return train.jit_train_step(task, tx, mesh).lower(abstract, batch).compile()


@pytest.mark.slow
def test_memory_falls_with_the_shards_of_a_sequence_and_only_keys_and_values_are_gathered():
    length, width, head = 512, 64, 16
    found = {ways: compiled(ways, length, width) for ways in (1, 2, 8)}
    temporaries = {ways: step.memory_analysis().temp_size_in_bytes for ways, step in found.items()}
    assert temporaries[2] < 0.6 * temporaries[1]
    assert temporaries[8] < 0.25 * temporaries[1]
    cost = planning.module_cost(found[8].as_text(), {"data": 1, "fsdp": 1, "sequence": 8, "tensor": 1})
    assert {c.axis for c in cost.collectives} == {"sequence"}
    shapes = [
        tuple(int(n) for n in sizes.split(","))
        for sizes in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", found[8].as_text())
    ]
    # Of activations, keys and values of one head; the rest are weights.
    long = {shape for shape in shapes if length in shape}
    assert {int(np.prod(shape)) for shape in long} <= {2 * length * head}
