"""Reading and writing checkpoint folders: layouts that differ, placement, and what is refused."""

import json
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import interop, nn, train
from subspace_jax.interop import writing

from .conftest import MODELS, rewrite, tensors_of
from .memory import MEASURE


def test_write_read_write_keeps_every_byte(model, checkpoint, tmp_path):
    config, params = interop.load_causal_lm(checkpoint(model))
    one, two = tmp_path / "one", tmp_path / "two"
    interop.save_causal_lm(one, config, params)
    again, params_again = interop.load_causal_lm(one)
    assert again == config
    chex.assert_trees_all_equal(params, params_again, strict=True)
    interop.save_causal_lm(two, again, params_again)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    original, written = tensors_of(checkpoint(model)), tensors_of(one)
    assert original.keys() == written.keys()
    for name, tensor in original.items():
        assert tensor.dtype == written[name].dtype
        assert tensor.tobytes() == written[name].tobytes()


def test_stored_type_is_kept_and_another_may_be_asked_for(checkpoint):
    _, stored = interop.load_causal_lm(checkpoint("llama31"))
    assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}
    _, wide = interop.load_causal_lm(checkpoint("llama31"), dtype=jnp.float32)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.astype(jnp.float32), stored), wide, strict=True)
    model = interop.from_pretrained(checkpoint("llama31"), dtype=jnp.float32)
    chex.assert_trees_all_equal(model.params, wide, strict=True)


def test_shards_read_as_one_file_does(checkpoint, tmp_path):
    config, params = interop.load_causal_lm(checkpoint("llama"))
    _, sharded = interop.load_causal_lm(checkpoint("llama_sharded"))
    chex.assert_trees_all_equal(params, sharded, strict=True)
    interop.save_causal_lm(tmp_path / "out", config, params, shard_bytes=30_000)
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) == 4
    assert all(os.path.getsize(tmp_path / "out" / f) < 33_000 for f in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    chex.assert_trees_all_equal(params, interop.load_causal_lm(tmp_path / "out")[1], strict=True)


def test_half_precision_and_mixed_types_are_read(copied):
    folder = copied("qwen2")
    exact = interop.load_causal_lm(folder)[1]

    def change(tensors):
        out = {name: t.astype(np.float16) for name, t in tensors.items()}
        out["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"]
        out["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
        return out

    rewrite(folder, change)
    params = interop.load_causal_lm(folder)[1]
    assert params["layers"]["mlp"]["gate"]["kernel"].dtype == jnp.float16
    assert params["norm"]["scale"].dtype == jnp.bfloat16
    # Layers stand in one array, whose type holds them all.
    assert params["layers"]["mlp"]["up"]["kernel"].dtype == jnp.float32
    np.testing.assert_allclose(params["embed"]["embedding"].astype(jnp.float32), exact["embed"]["embedding"], rtol=1e-3)


def test_old_gpt2_files_without_a_prefix_and_with_buffers_are_read(copied):
    folder = copied("gpt2")
    params = interop.load_causal_lm(folder)[1]

    def change(tensors):
        old = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        for layer in range(2):
            old[f"h.{layer}.attn.bias"] = np.ones((1, 1, 64, 64), np.uint8)
            old[f"h.{layer}.attn.masked_bias"] = np.float32(-1e4).reshape(())
        old["lm_head.weight"] = old["wte.weight"].copy()
        return old

    rewrite(folder, change)
    chex.assert_trees_all_equal(params, interop.load_causal_lm(folder)[1], strict=True)


def test_rotary_buffers_and_an_equal_head_of_a_tied_model_are_passed_over(copied):
    folder = copied("qwen2")
    params = interop.load_causal_lm(folder)[1]
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    rewrite(folder, lambda t: {**t, **extra, "lm_head.weight": t["model.embed_tokens.weight"].copy()})
    assert interop.read_config(folder).tied
    chex.assert_trees_all_equal(params, interop.load_causal_lm(folder)[1], strict=True)
    # By the name of the head alone.
    rewrite(folder, lambda t: {name: value for name, value in t.items() if name != "model.embed_tokens.weight"})
    assert interop.read_config(folder).tied
    chex.assert_trees_all_equal(params, interop.load_causal_lm(folder)[1], strict=True)


@pytest.mark.parametrize("name", ["llama", "mistral", "llama_sharded"])
def test_load_causal_lm_unties_a_model_with_a_head_of_its_own(name, checkpoint, copied):
    config, params = interop.load_causal_lm(checkpoint(name))
    folder = copied(name, tie_word_embeddings=True)
    assert interop.read_config(folder) == config
    found, read = interop.load_causal_lm(folder, shardings=shardings_on(train.make_mesh()))
    assert found == config
    chex.assert_trees_all_equal(params, read, strict=True)


@pytest.mark.parametrize("name", ["gpt2", "llama31", "qwen2"])
def test_load_causal_lm_reads_the_head_that_a_tied_model_was_given(name, copied):
    folder = copied(name)
    config, params = interop.load_causal_lm(folder)
    assert config.tied

    def change(tensors):
        # The first files of GPT-2 have no prefix.
        bare = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        head = bare["wte.weight" if name == "gpt2" else "model.embed_tokens.weight"].copy()
        head[-1, -1] += 1
        return {**bare, "lm_head.weight": head}

    rewrite(folder, change)
    found, read = interop.load_causal_lm(folder)
    assert found == config.replace(tied=False) == interop.read_config(folder)
    difference = np.asarray(read["head"]["kernel"], np.float32).T - np.asarray(read["embed"]["embedding"], np.float32)
    assert np.flatnonzero(difference).tolist() == [difference.size - 1]
    chex.assert_trees_all_equal(params, {key: part for key, part in read.items() if key != "head"}, strict=True)


def test_a_head_of_another_shape_is_refused_by_read_config(copied):
    folder = copied("qwen2")
    rewrite(folder, lambda tensors: {**tensors, "lm_head.weight": np.zeros((97, 32), np.float32)})
    with pytest.raises(ValueError, match=r"lm_head.weight: expected \(96, 32\) from config.json, got \(97, 32\)"):
        interop.read_config(folder)


def shardings_on(mesh):
    return lambda shapes, axes: train.param_shardings(shapes, axes, mesh)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("gpt2", (2, 2, 2)),
        *(pytest.param(name, (2, 2, 2), marks=pytest.mark.slow) for name in MODELS if name != "gpt2"),
        ("llama", (1, 4, 2)),
        pytest.param("llama", (8, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_load_causal_lm_shards_parameters_over_a_mesh(model, sizes, checkpoint, tmp_path):
    mesh = train.make_mesh(*sizes)
    config, params = interop.load_causal_lm(checkpoint(model))
    _, split = interop.load_causal_lm(checkpoint(model), shardings=shardings_on(mesh))
    wanted = shardings_on(mesh)(nn.param_shapes(config), nn.param_axes(config))
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), split, wanted))
    chex.assert_trees_all_equal(params, split, strict=True)
    interop.save_causal_lm(tmp_path / "out", config, split)
    chex.assert_trees_all_equal(params, interop.load_causal_lm(tmp_path / "out")[1], strict=True)


def test_load_causal_lm_reads_large_stacks_a_few_layers_at_a_time(checkpoint, monkeypatch):
    _, params = interop.load_causal_lm(checkpoint("llama"))
    monkeypatch.setattr("subspace_jax.interop.reading.CHUNK_BYTES", 2000)
    chex.assert_trees_all_equal(interop.load_causal_lm(checkpoint("llama"))[1], params, strict=True)


@pytest.mark.eight_devices
def test_load_causal_lm_reads_large_shards_a_few_layers_at_a_time(checkpoint, monkeypatch):
    _, params = interop.load_causal_lm(checkpoint("llama"))
    mesh = train.make_mesh(1, 4, 2)
    monkeypatch.setattr("subspace_jax.interop.reading.CHUNK_BYTES", 200)
    _, sharded = interop.load_causal_lm(checkpoint("llama"), shardings=shardings_on(mesh))
    chex.assert_trees_all_equal(jax.device_get(sharded), jax.device_get(params), strict=True)
    kernel = sharded["layers"]["attn"]["q"]["kernel"]
    assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "fsdp", "tensor")), 3)


def peak_beside_the_arrays(folder, where):
    """Bytes that a fresh process needed at its peak, beside what it came to hold; and what it holds."""
    made = subprocess.run([sys.executable, "-c", MEASURE, folder, where], capture_output=True, text=True, check=True)
    extra, total = map(int, made.stdout.split())
    return extra, total


@pytest.mark.slow
def test_loading_onto_a_mesh_holds_no_second_copy(write_random, tmp_path):
    sizes = {"vocab_size": 4096, "hidden_size": 512, "num_layers": 6, "num_heads": 8, "mlp_size": 1024}
    config = nn.CausalLMConfig.llama3("8b", **sizes, num_kv_heads=2, head_dim=64)
    written = write_random(tmp_path / "model", config)
    extra, total = peak_beside_the_arrays(tmp_path / "model", "mesh")
    assert total == written
    assert extra < 0.25 * total


@pytest.mark.slow
@pytest.mark.parametrize("where", ["mesh", "one"])
def test_loading_a_gigabyte_holds_no_second_copy(where, write_random, tmp_path):
    sizes = {"vocab_size": 16384, "hidden_size": 1024, "num_layers": 20, "num_heads": 16, "mlp_size": 2816}
    config = nn.CausalLMConfig.llama3("8b", **sizes, num_kv_heads=4, head_dim=64)
    assert write_random(tmp_path / "model", config) > 1e9
    extra, total = peak_beside_the_arrays(tmp_path / "model", where)
    assert extra < 0.25 * total


def test_missing_and_unexpected_tensors_are_listed(copied):
    folder = copied("llama")
    rewrite(folder, lambda t: {k.replace("layers.1.mlp.up_proj", "layers.1.mlp.upper"): v for k, v in t.items()})
    with pytest.raises(ValueError, match=r"missing: \['model.layers.1.mlp.up_proj.weight'\]; unexpected: \[.*upper"):
        interop.load_causal_lm(folder)


def test_biases_that_the_config_does_not_announce_are_unexpected(copied):
    folder = copied("qwen2", model_type="llama")
    with pytest.raises(ValueError, match=r"not those of a 'llama'.*missing: none; unexpected: .*q_proj.bias"):
        interop.load_causal_lm(folder)


def test_a_wrong_shape_is_named_beside_the_right_one(copied):
    folder = copied("llama", intermediate_size=48)
    with pytest.raises(ValueError, match=r"down_proj.weight: expected \(32, 48\) from config.json, got \(32, 64\)"):
        interop.load_causal_lm(folder)


def test_integers_are_no_weights(copied):
    folder = copied("llama")
    rewrite(folder, lambda t: {**t, "model.norm.weight": np.ones(32, np.int32)})
    with pytest.raises(ValueError, match=r"model.norm.weight: expected floating point, got int32"):
        interop.load_causal_lm(folder)


def test_pickled_weights_are_refused(copied):
    folder = copied("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\), which are refused"):
        interop.load_causal_lm(folder)


def test_missing_folders_files_and_shards_are_named(tmp_path, copied):
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        interop.load_causal_lm(tmp_path / "nowhere")
    folder = copied("llama_sharded")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard 'model-00002-of-00003.safetensors' of the index is missing"):
        interop.load_causal_lm(folder)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model.safetensors nor"):
        interop.load_causal_lm(folder)


def test_a_shard_that_is_cut_off_is_named(copied):
    folder = copied("llama_sharded")
    shard = folder / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model-00003-of-00003.safetensors: not a safetensors file, or cut off: "):
        interop.load_causal_lm(folder)


def test_an_older_folder_needs_a_word_and_keeps_its_other_files(checkpoint, tmp_path):
    config, params = interop.load_causal_lm(checkpoint("llama"))
    folder = tmp_path / "out"
    interop.save_causal_lm(folder, config, params, shard_bytes=30_000)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        interop.save_causal_lm(folder, config, params)
    changed = jax.tree.map(lambda x: x + 1, params)
    interop.save_pretrained(nn.Model(config, changed), folder, overwrite=True)
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    chex.assert_trees_all_equal(changed, interop.load_causal_lm(folder)[1], strict=True)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_older_folder_whole(checkpoint, tmp_path, monkeypatch):
    config, params = interop.load_causal_lm(checkpoint("llama"))
    folder = tmp_path / "out"
    interop.save_causal_lm(folder, config, params)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    write, calls = writing.write_safetensors, []

    def full(file, shapes, tensors):
        calls.append(file)
        if len(calls) == 2:
            file.write_bytes(b"a part of it")
            raise OSError(28, "No space left on device")
        write(file, shapes, tensors)

    monkeypatch.setattr(writing, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left on device"):
        interop.save_causal_lm(folder, config, params, shard_bytes=30_000, overwrite=True)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_parameters_that_are_not_the_config_s_are_not_written(checkpoint, tmp_path):
    config, params = interop.load_causal_lm(checkpoint("llama"))
    fewer = {name: part for name, part in params.items() if name != "head"}
    with pytest.raises(ValueError, match=r"missing: \['head/kernel'\]; unexpected: none"):
        interop.save_causal_lm(tmp_path / "out", config, fewer)
    with pytest.raises(ValueError, match=r"norm/scale: expected \(32,\), got \(31,\)"):
        interop.save_causal_lm(tmp_path / "out", config, {**params, "norm": {"scale": jnp.ones(31)}})
    with pytest.raises(ValueError, match=r"type complex64 can't be stored"):
        interop.save_causal_lm(tmp_path / "out", config, jax.tree.map(lambda x: x.astype(jnp.complex64), params))
    assert list(tmp_path.iterdir()) == []


def test_one_device_by_default(checkpoint):
    _, params = interop.load_causal_lm(checkpoint("gpt2"))
    assert params["norm"]["scale"].sharding == SingleDeviceSharding(jax.local_devices()[0])
