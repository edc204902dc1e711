"""Compressed models: packed coefficients, their folder, the command that writes it, and those that read it."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from subspace_jax import interop, language, nn, train
from subspace_jax.adapters.structured import as_dense, is_structured
from subspace_jax.cli.main import main
from subspace_jax.compress import cospadi
from subspace_jax.compress.cospadi import folder as folders

CONFIG = nn.CausalLMConfig.tiny(
    260,
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=32,  # kernels of few shapes, for few programs
    max_length=64,
    bos_token=256,
    eos_tokens=(257,),
    pad_token=258,
)
LEARNING = cospadi.Learning(n_iter=1, solver="mod", init="svd")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nn.init_params(jax.random.key(0), CONFIG))
    interop.save_causal_lm(folder, CONFIG, params)
    return folder


@pytest.fixture(scope="module")
def rows():
    tokens = np.random.default_rng(0).integers(0, 256, (4, 16)).astype(np.int32)
    ones = np.ones_like(tokens)
    return {
        "inputs": tokens,
        "labels": tokens,
        "segment_ids": ones,
        "positions": np.arange(16, dtype=np.int32) * ones,
        "weights": ones.astype(np.float32),
    }


def settings(**changes):
    return cospadi.CompressSettings(**{"ratio": 0.2, "learning": LEARNING, "batch_size": 4, **changes})


@pytest.fixture(scope="module")
def small(model, rows, tmp_path_factory):
    """The model compressed by CoSpaDi, pairs of layers with one dictionary."""
    out = tmp_path_factory.mktemp("out") / "small"
    return out, cospadi.compress_folder(model, out, rows, settings(share=2), progress=False)


def kernels_of(params):
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_structured)
    return {jax.tree_util.keystr(path): x for path, x in found if is_structured(x)}


@pytest.mark.parametrize(("k", "s"), [(14, 7), (15, 7), (9, 7), (1, 1)])
def test_pack_coefficients_keeps_values_and_atoms_in_16_bits_each(k, s):
    rng = np.random.default_rng(0)
    values = np.array(nn.truncate_bf16(jnp.asarray(rng.standard_normal((s, 11)), jnp.float32)))
    values[0, 0] = 0
    indices = np.stack([np.sort(rng.permutation(k)[:s]) for _ in range(11)], axis=1)
    words = interop.pack_coefficients(values, indices, k)
    assert words.nbytes * 8 == cospadi.storage_bits(0, 11, 2 * s, s)
    found_values, found = interop.unpack_coefficients(words, k)
    np.testing.assert_array_equal(found, indices)
    np.testing.assert_array_equal(found_values.view(np.uint16), values.view(np.uint16))


def test_pack_coefficients_refuses_masks_that_do_not_fit():
    values, indices = np.zeros((2, 3), ml_dtypes.bfloat16), np.array([[0] * 3, [1] * 3])
    with pytest.raises(ValueError, match="k: the mask of 6 atoms"):
        interop.pack_coefficients(values, indices, 6)
    with pytest.raises(ValueError, match="indices: expected ascending"):
        interop.pack_coefficients(values, indices[::-1], 4)
    with pytest.raises(ValueError, match="values: expected the two lowest bits cleared"):
        interop.pack_coefficients(np.full((2, 3), 1.0078125, ml_dtypes.bfloat16), indices, 4)
    with pytest.raises(ValueError, match="coefficients: expected masks of 2 atoms"):
        interop.unpack_coefficients(np.zeros((2, 3), np.int16), 4)


def test_compress_folder_writes_what_the_model_reads_with_the_bytes_that_it_says(small, model):
    out, report = small
    assert not (out / "unfinished").exists()
    config, params = interop.load_causal_lm(out)
    assert config == CONFIG.replace(tied=config.tied) == interop.read_config(out)
    kernels = kernels_of(params)
    assert len(kernels) == 7
    assert all(isinstance(kernel, nn.SparseFactor) for kernel in kernels.values())
    query = params["layers"]["attn"]["q"]["kernel"]
    np.testing.assert_array_equal(query.dictionary[0], query.dictionary[1])  # that of both layers
    out_kernel = params["layers"]["attn"]["out"]["kernel"]
    assert not np.array_equal(out_kernel.dictionary[0], out_kernel.dictionary[1])
    _, before = interop.load_causal_lm(model)
    for got, was in zip(jax.tree.leaves(params["norm"]), jax.tree.leaves(before["norm"]), strict=True):
        np.testing.assert_array_equal(got, was)
    stored, _ = interop.read_header(out / "compressed.safetensors")
    assert report.total_bytes == sum(tensor.nbytes for tensor in stored.values())
    names = ("dictionary", "coefficients")
    assert report.kernel_bytes == sum(t.nbytes for name, t in stored.items() if name.endswith(names))
    assert report.kernel_bytes <= 0.8 * report.dense_bytes
    assert set(report.errors) == set(cospadi.kernel_inputs(CONFIG))
    assert all(0 < error < 1 for errors in report.errors.values() for error in errors)
    shapes, axes = interop.param_shapes_and_axes(out)
    assert jax.tree.structure(shapes) == jax.tree.structure(params) == jax.tree.structure(axes)
    jax.tree.map(
        lambda shape, x: np.testing.assert_equal((shape.shape, shape.dtype), (x.shape, x.dtype)), shapes, params
    )


@pytest.mark.slow
def test_a_compressed_model_computes_what_its_dense_kernels_do(small):
    _, params = interop.load_causal_lm(small[0], dtype=jnp.float32)
    dense = jax.tree.map(as_dense, params, is_leaf=is_structured)
    apply = jax.jit(functools.partial(nn.causal_lm_apply, CONFIG))
    one, other = (apply(p, jnp.arange(12)[None]).logits for p in (params, dense))
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_compress_folder_resumes_at_the_kernel_where_it_was_stopped(model, rows, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run = functools.partial(cospadi.compress_folder, model, rows=rows, progress=False)
    report = run(out=whole, settings=settings(method="svd-llm"))
    real, calls = folders.compress_kernels, []

    def once(*args):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(folders, "compress_kernels", once)
    monkeypatch.setattr(folders.os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        run(out=stopped, settings=settings(method="svd-llm"))
    assert len(list((stopped / "unfinished").glob("layer*.npz"))) == 5
    assert not (stopped / "config.json").exists()
    with pytest.raises(ValueError, match="an unfinished run of other settings"):
        run(out=stopped, settings=settings(method="svd"))
    calls.clear()
    monkeypatch.setattr(folders, "compress_kernels", lambda *args: calls.append(args) or real(*args))
    assert run(out=stopped, settings=settings(method="svd-llm")) == report
    assert len(calls) == 14 - 5
    for name in ("compressed.safetensors", "config.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_ratios_by_rule_pad_layers_that_differ_and_keep_kernels(model, rows, tmp_path):
    rules = {"mlp/": 0.0, "layers/1/attn/q": 0.6}
    cospadi.compress_folder(model, tmp_path / "out", rows, settings(rules=rules), progress=False)
    config, params = interop.load_causal_lm(tmp_path / "out")
    assert {name.split("']")[2].removeprefix("['") for name in kernels_of(params)} == {"q", "k", "v", "out"}
    kernel = params["layers"]["attn"]["q"]["kernel"]
    k, s = cospadi.allocate(32, 32, 0.6)
    assert not np.asarray(kernel.dictionary[1, :, k:]).any()
    assert not np.asarray(kernel.values[1, s:]).any()
    np.testing.assert_array_equal(np.diff(np.sort(kernel.indices, axis=1), axis=1) > 0, True)
    assert np.isfinite(nn.causal_lm_apply(config, params, jnp.arange(3)[None]).logits).all()


@pytest.mark.slow
def test_an_adapter_trains_on_a_compressed_model_and_all_parameters_do_not(small):
    config = language.default_config().unlock()
    config.model.folder, config.model.tokenizer, config.data.length = str(small[0]), "bytes", 16
    with pytest.raises(ValueError, match=r"adapter.method: expected adapters, as .* is compressed"):
        language.finetune.outline(config)
    config.adapter.method, config.adapter.rank, config.adapter.alpha = "lora", 2, 4.0
    task = language.finetune.outline(config).phases[0].task
    mesh = train.make_mesh(data=1, fsdp=1)
    variables = {"base": interop.load_causal_lm(small[0], dtype=jnp.float32)[1], "start": {}}
    trainable = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), task.shapes)
    tokens = jnp.arange(32).reshape(2, 16)
    batch = {"inputs": tokens, "labels": tokens, "segment_ids": jnp.ones_like(tokens), "positions": tokens % 16}
    batch["weights"] = jnp.ones(tokens.shape)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    trainable, variables = jax.device_put((trainable, variables), whole)
    gradients = train.jit_on_mesh(
        lambda params, variables, batch: jax.grad(
            lambda params: task.loss(params, variables, batch, key=jax.random.key(0), step=0)[0]
        )(params),
        mesh,
        whole,
    )(trainable, variables, batch)
    assert all(np.asarray(g).any() for g in jax.tree.leaves(gradients))
    assert not kernels_of(task.merged(trainable, variables))  # dense, for a Hugging Face folder


@pytest.mark.slow
def test_compress_command_writes_a_dense_folder_that_equals_the_compressed_one(model, tmp_path, capsys):
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "a line of text " * 5}) for _ in range(40)))
    options = ["--calibration", str(tmp_path / "text.jsonl"), "--rows", "8", "--length", "32", "--quiet"]
    command = ["compress", "--model", str(model), "--method", "asvd", *options]
    assert main([*command, "--out", str(tmp_path / "dense"), "--dense"]) == 0
    assert main([*command, "--out", str(tmp_path / "small")]) == 0
    said = capsys.readouterr().out
    assert "bytes instead of" in said
    assert f"Wrote the compressed model to {tmp_path / 'small'}" in said
    result = json.loads((tmp_path / "small" / "result.json").read_text())
    assert 0 < result["mean_error"] < 1
    assert (tmp_path / "small" / "errors.png").stat().st_size > 1000
    small, dense = (interop.load_causal_lm(tmp_path / name)[1] for name in ("small", "dense"))
    assert len(kernels_of(small)) == 7
    assert not kernels_of(dense)
    for path, kernel in kernels_of(small).items():
        own = dense
        for key in path.strip("[']").split("']['"):
            own = own[key]
        np.testing.assert_allclose(np.asarray(own, np.float32), np.asarray(kernel.dense(), np.float32), atol=1e-3)
    perplexity = ["--data", str(tmp_path / "text.jsonl"), "--length", "32", "--batch-size", "2"]
    told = []
    for name in ("small", "dense"):
        assert main(["perplexity", "--model", str(tmp_path / name), *perplexity]) == 0
        told.append(float(capsys.readouterr().out.split()[1]))
    assert told[0] == pytest.approx(told[1], rel=2e-2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--ratio", "1.5"], "ratio: expected a share removed"),
        (["--ratio", "0.99"], "leaves 0 atoms and 0 coefficients of a kernel 32 x 32"),
        (["--ratio-of", "mlp"], "--ratio-of: expected REGEX=RATIO, got mlp"),
        (["--ratio-of", "conv=0.1"], "no kernel such as layers/0/attn/out matches"),
        (["--ratio-of", "layers/0/mlp/up=0"], "expected mlp/up kept in all layers or in none"),
        (["--ratio-of", "mlp/up=1.5"], "rules: expected a share removed in"),
        (["--ratio-of", "=0"], "rules: keep all kernels"),
        (["--share", "2", "--method", "svd"], "share: expected 1 layer"),
        (["--share", "2", "--ratio-of", "layers/0/attn/q=.5"], "share attn/q; expected one ratio"),
        (["--rows", "0"], "--rows: expected at least 1"),
        (["--batch-size", "64"], "expected a batch of calibration text, 64 rows"),
    ],
)
def test_compress_command_refuses_what_does_not_fit_and_writes_nothing(model, tmp_path, capsys, options, match):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a line of text " * 9}))
    command = ["compress", "--model", str(model), "--calibration", str(tmp_path / "text.jsonl")]
    assert main([*command, "--out", str(tmp_path / "out"), "--length", "32", *options]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_compress_folder_refuses_a_compressed_model_and_readers_a_damaged_one(model, small, rows, tmp_path):
    out = small[0]
    with pytest.raises(ValueError, match="is compressed already"):
        cospadi.compress_folder(out, tmp_path / "again", rows, settings())
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        cospadi.compress_folder(model, out, rows, settings())
    (tmp_path / "compressed.safetensors").write_bytes((out / "compressed.safetensors").read_bytes())
    for change, match in (
        (lambda c: c.pop("compression"), "compression: expected kernels with their kinds"),
        (lambda c: c["compression"]["kernels"].popitem(), "of one kind in all layers"),
        (lambda c: c["compression"]["kernels"].update(x={"kind": "sparse"}), "is no module of the model"),
        (
            lambda c: c["compression"]["kernels"].update({"model.layers.0.mlp.up_proj": {"kind": "low_rank"}}),
            "of one kind in all layers",
        ),
    ):
        fields = json.loads((out / "config.json").read_text())
        change(fields)
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match=match):
            interop.load_causal_lm(tmp_path)


@pytest.mark.eight_devices
def test_gram_sums_of_a_sharded_model_equal_those_of_one_device(model, rows):
    found = []
    names = [(0, "attn/q"), (1, "mlp/down"), (1, "attn/out")]
    eight = {name: np.concatenate([x, x]) for name, x in rows.items()}
    for count in (8, 1):
        mesh = train.make_mesh(data=count // 2 or 1, fsdp=2 if count > 1 else 1, devices=jax.devices()[:count])
        place = functools.partial(train.param_shardings, mesh=mesh)
        config, params = interop.load_causal_lm(model, shardings=place, dtype=jnp.float32)
        batch = {**eight, "mask": np.ones(8, np.float32)}
        found.append(cospadi.grams_of_model(config, params, names, [batch], mesh, progress=False))
    for name in names:
        for one, other in zip(found[0][name], found[1][name], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
