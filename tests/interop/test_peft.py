"""PEFT's adapter folders, against what PEFT computes with them."""

import dataclasses
import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, interop, nn

from .conftest import GOLDEN

PEFT = pathlib.Path(__file__).parents[1] / "golden" / "peft"
ADAPTERS = sorted("/".join(p.parent.parts[-2:]) for p in PEFT.glob("*/*/adapter_config.json"))

# One of each kind and family in the quick tests, as each takes seconds to compile.
QUICK = ("gpt2/rslora", "llama/dora", "llama/lora_embed")
every_adapter = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ADAPTERS]
)


@pytest.fixture
def copied_adapter(tmp_path):
    """Copies an adapter, with some fields or tensors changed (None removes one)."""

    def copy(name, fields=(), tensors=()):
        folder = tmp_path / "adapter"
        folder.mkdir()
        config = {**json.loads((PEFT / name / "adapter_config.json").read_text()), **dict(fields)}
        (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        got = {**read(PEFT / name), **dict(tensors)}
        got = {k: v for k, v in got.items() if v is not None}
        shapes = {k: (v.shape, v.dtype) for k, v in got.items()}
        interop.write_safetensors(folder / "adapter_model.safetensors", shapes, got.values())
        return folder

    return copy


def read(folder):
    return {k: np.array(t.read()) for k, t in interop.read_header(folder / "adapter_model.safetensors")[0].items()}


def kept(tensors):
    return {k: v for k, v in tensors.items() if not k.endswith(".base_layer.weight")}


@functools.cache
def model(config):
    """Logits, and the loss that PEFT's gradients are of; compiled once for merged weights of all adapters."""

    @jax.jit
    def run(params, tokens):
        with jax.default_matmul_precision("highest"):
            logits = nn.causal_lm_apply(config, params, tokens).logits
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)), logits

    return run


@functools.cache
def loaded(name):
    """Config, base weights and adapter, and what PEFT computes with them."""
    config, params = interop.load_causal_lm(GOLDEN / name.split("/")[0], dtype=jnp.float32)
    with np.load(PEFT / name / "io.npz") as io:
        return config, params, interop.load_peft_adapter(PEFT / name, config), dict(io)


@functools.cache
def bound(name):
    """Loss and logits of a bound adapter, and the gradients of the loss where PEFT gives them; one program."""
    config, params, adapter, io = loaded(name)
    tokens = jnp.asarray(io["input_ids"], jnp.int32)

    def run(trainable):
        return model(config)(adapters.bind(params, trainable, adapter.settings), tokens)

    if any(key.startswith("grad:") for key in io):
        return jax.jit(jax.value_and_grad(run, has_aux=True))(adapter.trainable)
    return run(adapter.trainable), None


@every_adapter
def test_logits_of_bound_and_merged_adapters_are_those_of_peft(name, tmp_path):
    config, params, adapter, io = loaded(name)
    (loss, logits), _ = bound(name)
    np.testing.assert_allclose(logits, io["logits"], atol=1e-4)
    if "loss" in io:
        np.testing.assert_allclose(loss, io["loss"], rtol=1e-4)
    merged = adapters.merge(params, adapter.trainable, adapter.settings)
    merged_logits = model(config)(merged, jnp.asarray(io["input_ids"], jnp.int32))[1]
    np.testing.assert_allclose(merged_logits, io["logits"], atol=1e-4)
    for key in (key for key in io if key.startswith("merged:")):
        interop.save_causal_lm(tmp_path / "merged", config, merged)
        stored = interop.open_folder(tmp_path / "merged")[key.removeprefix("merged:")]
        np.testing.assert_allclose(stored.read(), io[key], rtol=1e-5, atol=1e-6)


def with_gradients():
    """Adapters whose gradients PEFT gives."""
    for name in ADAPTERS:
        with np.load(PEFT / name / "io.npz") as io:
            if any(key.startswith("grad:") for key in io):
                yield pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("name", with_gradients())
def test_gradients_of_bound_adapters_are_those_of_peft(name, tmp_path):
    config, _, adapter, io = loaded(name)
    _, grads = bound(name)
    # Written as adapters, gradients get the names and the layout of PEFT's parameters.
    interop.save_peft_adapter(tmp_path / "grads", config, grads, adapter.settings, fields=adapter.fields)
    got = read(tmp_path / "grads")
    expected = {key.removeprefix("grad:"): value for key, value in io.items() if key.startswith("grad:")}
    for key, value in expected.items():
        own = got[key.replace("magnitude_vector.weight", "magnitude_vector")]
        np.testing.assert_allclose(own, value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("again", [True, False], ids=["fields kept", "fields made"])
def test_save_peft_adapter_writes_the_tensors_that_were_read(name, again, checkpoint, tmp_path):
    config = interop.read_config(checkpoint(name.split("/")[0]))
    adapter = interop.load_peft_adapter(PEFT / name, config)
    fields = adapter.fields if again else None
    interop.save_peft_adapter(tmp_path / "out", config, adapter.trainable, adapter.settings, fields=fields)
    got, expected = read(tmp_path / "out"), kept(read(PEFT / name))
    assert got.keys() == expected.keys()
    for key, value in got.items():
        np.testing.assert_array_equal(value, expected[key].astype(np.float32))
        assert value.shape == expected[key].shape
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    if again:
        assert written == adapter.fields
    else:
        assert all(adapter.fields.get(key) == written[key] for key in ("use_dora", "use_rslora", "fan_in_fan_out"))
    back = interop.load_peft_adapter(tmp_path / "out", config)
    chex.assert_trees_all_equal(back.trainable, adapter.trainable)
    assert {path: (type(s), getattr(s, "scale", None)) for path, s in back.settings.items()} == {
        path: (type(s), getattr(s, "scale", None)) for path, s in adapter.settings.items()
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": None}, "target_modules: missing"),
        ({"target_modules": ["query"]}, "matches none"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": None}, "lacks"),
        ({"r": 5}, r"expected \(5, 32\), got \(4, 32\)"),
        ({"bias": "some"}, "bias: expected"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"target_modules": ["q_proj", "v_proj"]}, "tensors that no target has"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"modules_to_save": ["q_proj"]}, "modules_to_save"),
    ],
)
def test_load_peft_adapter_refuses_fields_that_are_not_supported(fields, message, copied_adapter, checkpoint):
    config = interop.read_config(checkpoint("llama"))
    folder = copied_adapter("llama/lora", fields)
    with pytest.raises(ValueError, match=message):
        interop.load_peft_adapter(folder, config)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": None}, "is missing"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": np.zeros((4, 32), np.float32)}, "lacks the prefix"),
        ({"base_model.model.other.lora_A.weight": np.zeros((4, 32), np.float32)}, "no target has"),
    ],
)
def test_load_peft_adapter_refuses_missing_and_unexpected_tensors(tensors, message, copied_adapter, checkpoint):
    config = interop.read_config(checkpoint("llama"))
    with pytest.raises(ValueError, match=message):
        interop.load_peft_adapter(copied_adapter("llama/lora", tensors=tensors), config)


def test_save_peft_adapter_writes_dropout(checkpoint, tmp_path):
    config = interop.read_config(checkpoint("llama"))
    adapter = interop.load_peft_adapter(PEFT / "llama/lora", config)
    settings = {path: dataclasses.replace(s, dropout=0.125) for path, s in adapter.settings.items()}
    interop.save_peft_adapter(tmp_path / "out", config, adapter.trainable, settings)
    back = interop.load_peft_adapter(tmp_path / "out", config)
    assert {s.dropout for s in back.settings.values()} == {0.125}
    with pytest.raises(ValueError, match="dropout"):
        interop.save_peft_adapter(
            tmp_path / "mixed", config, adapter.trainable, {**settings, next(iter(settings)): adapters.LoRA(4, 8.0)}
        )


def test_save_peft_adapter_leaves_an_older_adapter_where_writing_fails(checkpoint, tmp_path, monkeypatch):
    config, folder = interop.read_config(checkpoint("llama")), tmp_path / "out"
    adapter = interop.load_peft_adapter(PEFT / "llama/lora", config)
    interop.save_peft_adapter(folder, config, adapter.trainable, adapter.settings)
    (folder / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(file, *_):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("subspace_jax.interop.peft.adapter.write_safetensors", full)
        with pytest.raises(OSError, match="no space"):
            interop.save_peft_adapter(folder, config, adapter.trainable, adapter.settings)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    doubled = jax.tree.map(lambda x: 2 * x, adapter.trainable)
    interop.save_peft_adapter(folder, config, doubled, adapter.settings)
    back = interop.load_peft_adapter(folder, config)
    chex.assert_trees_all_equal(back.trainable, doubled)
    assert (folder / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_save_peft_adapter_refuses_what_peft_has_not(checkpoint, tmp_path):
    config = interop.read_config(checkpoint("llama"))
    shapes = nn.param_shapes(config)
    for rules in (
        {"q": adapters.SVFit(2)},
        {"q": adapters.LoRA(2, 2.0, init="pissa")},
        {"q": adapters.LoRA(2, 2.0), "v": adapters.DoRA(2, 2.0)},
        {"q": adapters.LoRA(2, 2.0), "v": adapters.LoRA(2, 2.0, rslora=True)},
    ):
        _, trainable = jax.eval_shape(functools.partial(adapters.prepare, settings=rules), jax.random.key(0), shapes)
        with pytest.raises(ValueError, match="settings: "):
            interop.save_peft_adapter(tmp_path / "out", config, trainable, rules)
