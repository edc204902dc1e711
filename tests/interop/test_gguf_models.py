"""Language models in GGUF files.

``tests/golden/gguf`` has two models of random numbers, written by package gguf 0.19.0: ``tiny_llama.gguf`` with a
tokenizer of sentencepiece 0.2, and ``tiny_qwen2.gguf`` with one of tokenizers 0.23; their matrices have a type each in
turn.  ``logits.npz`` is what ``AutoModelForCausalLM.from_pretrained(..., gguf_file=...)`` of transformers 5.24.0 gives
for them.  Other files are written from the golden folders of ``tests/golden/interop``.
"""

import json
import math
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn, train
from subspace_jax.interop import gguf
from subspace_jax.interop.tensors import stored_shape

from . import gguf_files
from .conftest import tensors_of
from .memory import MEASURE

TINY = {name: gguf_files.GOLDEN / f"tiny_{name}.gguf" for name in ("llama", "qwen2")}


def logits_of(config, params, tokens):
    with jax.default_matmul_precision("highest"):
        return nn.causal_lm_apply(config, params, jnp.asarray(tokens)).logits


def converted(folder, path, change=None, **fields):
    """The GGUF file of a golden folder."""
    config = interop.read_config(folder)
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors_of(folder).items()}
    if config.tied:
        tensors.pop("lm_head.weight", None)
    metadata, made = gguf_files.model_of(config, tensors)
    arch = metadata["general.architecture"]
    metadata |= {f"{arch}.{name.replace('__', '.')}": item for name, item in fields.items()}
    if change is not None:
        change(metadata, made)
    return gguf_files.write(path, {name: item for name, item in metadata.items() if item is not None}, made)


@pytest.mark.parametrize("name", TINY)
def test_load_causal_lm_gives_the_logits_of_transformers_for_a_gguf_file(name):
    with np.load(gguf_files.GOLDEN / "logits.npz") as archive:
        tokens, wanted = archive[f"{name}_input_ids"], archive[f"{name}_logits"]
    config, params = interop.load_causal_lm(TINY[name])
    assert config.family == name
    np.testing.assert_allclose(logits_of(config, params, tokens), wanted, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["llama", "llama31", pytest.param("mistral", marks=pytest.mark.slow), "qwen2", "qwen3"]
)
def test_load_causal_lm_reads_from_gguf_what_the_folder_holds(name, checkpoint, tmp_path):
    def scaled(metadata, tensors):
        if name == "llama31":
            config = interop.read_config(checkpoint(name))
            plain = nn.rope_frequencies(nn.Rope(theta=config.rope.theta), config.head_dim)
            tensors["rope_freqs.weight"] = plain / nn.rope_frequencies(config.rope, config.head_dim)
            metadata["llama.rope.scaling.original_context_length"] = config.rope.original_length

    path = converted(checkpoint(name), tmp_path / "a.gguf", scaled)
    config, params = interop.load_causal_lm(path)
    wanted, their_params = interop.load_causal_lm(checkpoint(name), dtype=jnp.float32)
    family = "llama" if name == "mistral" else wanted.family
    expected = wanted.replace(family=family, windows=None, eos_tokens=wanted.eos_tokens[:1])
    assert config == expected
    chex.assert_trees_all_equal(params, their_params, strict=True)
    assert interop.read_config(path) == config


@pytest.mark.slow
def test_load_causal_lm_reads_the_biases_of_a_llama(tmp_path):
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "mlp_size": 24}
    config = nn.CausalLMConfig.tiny(40, **sizes, qkv_bias=True, out_bias=True, mlp_bias=True)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape, np.float32)), nn.param_shapes(config))
    interop.save_causal_lm(tmp_path / "model", config, params)
    chex.assert_trees_all_equal(interop.load_causal_lm(converted(tmp_path / "model", tmp_path / "a.gguf"))[1], params)


def test_load_causal_lm_casts_a_gguf_file(tmp_path):
    _, params = interop.load_causal_lm(TINY["llama"], dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    _, single = interop.load_causal_lm(TINY["llama"], dtype=jnp.float32)
    chex.assert_trees_all_equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), single))


def test_load_causal_lm_decodes_a_few_rows_at_a_time(monkeypatch):
    _, params = interop.load_causal_lm(TINY["llama"])
    monkeypatch.setattr("subspace_jax.interop.reading.DECODED_BYTES", 700)
    chex.assert_trees_all_equal(interop.load_causal_lm(TINY["llama"])[1], params, strict=True)


@pytest.mark.eight_devices
@pytest.mark.parametrize("name", TINY)
def test_load_causal_lm_shards_a_gguf_file_over_a_mesh(name):
    mesh = train.make_mesh(1, 4, 2)
    config, params = interop.load_causal_lm(TINY[name])
    place = lambda shapes, axes: train.param_shardings(shapes, axes, mesh)  # noqa: E731
    _, sharded = interop.load_causal_lm(TINY[name], shardings=place)
    wanted = place(nn.param_shapes(config), nn.param_axes(config))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), sharded, wanted))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(sharded))
    chex.assert_trees_all_equal(jax.device_get(sharded), jax.device_get(params), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["mesh", "one"])
def test_loading_a_quantized_gigabyte_holds_no_second_copy(where, tmp_path):
    sizes = {"vocab_size": 32768, "hidden_size": 1024, "num_layers": 17, "num_heads": 16, "mlp_size": 2816}
    config = nn.CausalLMConfig.llama3("8b", **sizes, num_kv_heads=4, head_dim=64)
    rng, types = np.random.default_rng(0), {12: (256, 144), 14: (256, 210), 8: (32, 34)}
    metadata, tensors = gguf_files.model_of(config, {})[0], {}
    for number, tensor in enumerate(interop.tensor_names(config)):
        shape = stored_shape(nn.causal_lm_specs(config), tensor)
        kind = 0 if len(shape) == 1 else (12, 14, 8)[number % 3]
        size, nbytes = types.get(kind, (1, 4))
        data = rng.integers(0, 100, math.prod(shape) // size * nbytes, np.uint8).tobytes()
        tensors[gguf_files.name_of(tensor.name)] = (shape, kind, data)
    path = gguf_files.write(tmp_path / "a.gguf", metadata, tensors)
    made = subprocess.run([sys.executable, "-c", MEASURE, path, where], capture_output=True, text=True, check=True)
    extra, total = map(int, made.stdout.split())
    assert total > 1e9
    assert extra < 0.25 * total


def without(name):
    return lambda metadata, tensors: tensors.pop(name)


def put(name, item):
    return lambda metadata, tensors: metadata.update({name: item})


def added(name, tensor):
    return lambda metadata, tensors: tensors.update({name: tensor})


ONES = np.ones((4, 4), np.float32)
WRONG = {
    "no architecture": (put("general.architecture", None), "general.architecture: None is not supported"),
    "another architecture": (put("general.architecture", "falcon"), "'falcon' is not supported; expected one of"),
    "experts": (put("llama.expert_count", 8), "llama.expert_count: not supported, got 8"),
    "logit scale": (put("llama.logit_scale", 0.5), "llama.logit_scale: not supported"),
    "no layers": (put("llama.block_count", None), "block_count: expected a positive integer, got None"),
    "too many layers": (put("llama.block_count", 9000), "9000 layers, the file has"),
    "endless layers": (put("llama.block_count", 2**31), "block_count: expected at most"),
    "layers a text": (put("llama.block_count", "2"), "block_count: expected a positive integer"),
    "heads a list": (put("llama.attention.head_count_kv", [1, 2]), "attention.head_count_kv: expected a positive"),
    "heads": (put("llama.attention.head_count_kv", 3), "num_key_value_heads: expected a divisor"),
    "rotary part": (put("llama.rope.dimension_count", 2), "rope.dimension_count: expected 8, the width of a head"),
    "values": (put("llama.attention.value_length", 4), "attention.value_length: expected 8"),
    "epsilon": (put("llama.attention.layer_norm_rms_epsilon", None), "rms_epsilon: expected a number"),
    "rope type": (put("llama.rope.scaling.type", "longrope"), "rope.scaling.type: 'longrope' is not supported"),
    "no table": (without("token_embd.weight"), "token_embd.weight: expected this tensor"),
    "no kernel": (without("blk.1.ffn_up.weight"), r"missing: \['model.layers.1.mlp.up_proj.weight'\]"),
    "a tensor more": (added("blk.0.attn_sinks.weight", ONES), r"unexpected: \['blk.0.attn_sinks.weight'\]"),
    "a layer more": (added("blk.7.ffn_up.weight", ONES), r"unexpected: \['model.layers.7.mlp.up_proj.weight'\]"),
    "shape": (
        added("blk.0.ffn_up.weight", ONES),
        r"up_proj.weight: expected \(64, 32\) from the metadata, got",
    ),
    "queries": (added("blk.0.attn_q.weight", ONES), r"q_proj.weight: expected \(32, 32\) from the metadata"),
    "factors": (added("rope_freqs.weight", np.array([1, 2, 3, 8], np.float32)), "rope_freqs.weight: expected the 4"),
    "number of factors": (added("rope_freqs.weight", np.ones(3, np.float32)), "rope_freqs.weight: expected the 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_load_causal_lm_refuses_a_gguf_file(name, checkpoint, tmp_path):
    change, match = WRONG[name]
    path = converted(checkpoint("llama"), tmp_path / "a.gguf", change)
    with pytest.raises(ValueError, match=match) as error:
        interop.load_causal_lm(path)
    assert str(error.value).startswith(str(path))


def test_read_config_reads_the_rotary_factors_of_llama_32(checkpoint, tmp_path):
    known = nn.Rope(5e5, "llama3", 32.0)
    factors = nn.rope_frequencies(nn.Rope(5e5), 8) / nn.rope_frequencies(known, 8)
    change = added("rope_freqs.weight", factors)
    path = converted(checkpoint("llama"), tmp_path / "a.gguf", change, rope__freq_base=5e5)
    assert interop.read_config(path).rope == known


def test_read_config_reads_scaled_rotary_frequencies(checkpoint, tmp_path):
    fields = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    rope = interop.read_config(converted(checkpoint("llama"), tmp_path / "a.gguf", **fields)).rope
    assert (rope.kind, rope.factor) == ("linear", 4.0)
    rope = interop.read_config(converted(checkpoint("llama"), tmp_path / "b.gguf", rope__scale_linear=2.0)).rope
    assert (rope.kind, rope.factor) == ("linear", 2.0)
    fields = {"rope__scaling__type": "yarn", "rope__scaling__original_context_length": 64}
    path = converted(checkpoint("llama"), tmp_path / "c.gguf", **fields, rope__scaling__factor=4.0)
    rope = interop.read_config(path).rope
    assert (rope.kind, rope.factor, rope.original_length) == ("yarn", 4.0, 64)


def test_read_config_ends_texts_at_the_end_of_a_turn_too(checkpoint, tmp_path):
    path = converted(checkpoint("llama"), tmp_path / "a.gguf", put("tokenizer.ggml.eot_token_id", 7))
    ends = interop.read_config(checkpoint("llama")).eos_tokens
    assert interop.read_config(path).eos_tokens == (ends[0], 7)


@pytest.mark.parametrize("name", TINY)
def test_to_folder_writes_the_model_of_a_gguf_file(name, tmp_path):
    gguf.to_folder(TINY[name], tmp_path / "out")
    config, params = interop.load_causal_lm(TINY[name], dtype=jnp.float32)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    read, again = interop.load_causal_lm(tmp_path / "out")
    assert read == config
    chex.assert_trees_all_equal(again, params, strict=True)
    with pytest.raises(FileExistsError):
        gguf.to_folder(TINY[name], tmp_path / "out")


def test_to_folder_leaves_nothing_behind_where_a_file_is_refused(checkpoint, tmp_path):
    path = converted(checkpoint("llama"), tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=r"tokenizer.ggml.model: None is not supported"):
        gguf.to_folder(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]
