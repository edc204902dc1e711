"""RegMean over folders: golden numbers, what language models are measured by, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn, train
from subspace_jax.cli.main import main
from subspace_jax.merge import subspace_fusion as fusion
from subspace_jax.merge.subspace_fusion import folders, language_grams, language_text
from subspace_jax.merge.subspace_fusion.settings import MergeSettings

from .trees import NAMES


def write(folder, tensors):
    folder.mkdir(parents=True)
    shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    interop.write_safetensors(folder / "model.safetensors", shapes, tensors.values())
    (folder / "config.json").write_text(json.dumps({"folder": folder.name}))
    return folder


def read(folder):
    return {name: np.array(x.read()) for name, x in interop.open_folder(folder).items()}


def test_merge_folders_by_regmean_is_golden(golden, x64, tmp_path):
    g = golden("subspace-fusion/merging")
    models, grams = [], []
    for i in range(3):
        tensors = {name: g[f"ft{i}/{name}"] for name in NAMES}
        models.append(write(tmp_path / f"model{i}", tensors))
        x = g[f"fisher/x{i}"]
        hidden = np.maximum(x @ tensors["l1.weight"].T + tensors["l1.bias"], 0)
        own = {"l1.weight": x.T @ x / len(x), "l2.weight": hidden.T @ hidden / len(x)}
        grams.append(write(tmp_path / f"grams{i}", own))
    for alpha in (1.0, 0.9):
        settings = MergeSettings("regmean", alpha=float(np.float32(alpha)))
        out = tmp_path / f"alpha{alpha}"
        folders.merge_folders(models, out, settings, grams=folders.KernelGrams(tuple(grams)))
        for name, found in read(out).items():
            np.testing.assert_allclose(found, g[f"regmean/{alpha}/{name}"], atol=1e-10, err_msg=name)


@pytest.fixture
def made(tmp_path):
    """Two models of one kernel with inputs of very different sizes, whose statistics are known."""
    rng = np.random.default_rng(0)
    sizes = np.array([1, 1e4, 1e-2, 1], np.float32)
    models, grams = [], []
    for i in range(2):
        kernel = rng.standard_normal((3, 4)).astype(np.float32) / sizes
        models.append(write(tmp_path / f"model{i}", {"up.weight": kernel, "norm.weight": np.ones(4, np.float32)}))
        x = rng.standard_normal((9, 4)).astype(np.float32) * sizes
        grams.append({"up.weight": x.T @ x / 9})
    return models, grams


def merge(made, tmp_path, grams, **settings):
    models, _ = made
    written = [write(tmp_path / f"grams{i}", own) for i, own in enumerate(grams)]
    settings = MergeSettings("regmean", **settings)
    return folders.merge_folders(models, tmp_path / "out", settings, grams=folders.KernelGrams(tuple(written)))


def test_regmean_in_float32_holds_inputs_of_very_different_sizes(made, tmp_path):
    merge(made, tmp_path, made[1])
    exact = [gram["up.weight"].astype(np.float64) for gram in made[1]]
    exact = [np.where(np.eye(4, dtype=bool), x, 0.95 * x) for x in exact]
    kernels = [read(folder)["up.weight"].T.astype(np.float64) for folder in made[0]]
    want = np.linalg.solve(sum(exact), sum(x @ w for x, w in zip(exact, kernels, strict=True)))
    np.testing.assert_allclose(read(tmp_path / "out")["up.weight"].T / want, 1, atol=1e-4)


@pytest.mark.parametrize(
    ("error", "change"),
    [
        ("grams1: up.weight: expected .in, in. of a kernel, got .3, 3.", {"up.weight": np.eye(3, dtype=np.float32)}),
        ("grams1: norm.weight: expected .in, in. of a kernel", {"norm.weight": np.eye(4, dtype=np.float32)}),
        ("grams1: other: expected .in, in. of a kernel, got .4, 4. for ..", {"other": np.eye(4, dtype=np.float32)}),
        ("grams1: expected the tensors of .*grams0; missing: .'up.weight'.", {}),
        ("grams1: up.weight: expected finite", {"up.weight": np.full((4, 4), np.nan, np.float32)}),
    ],
)
def test_merge_folders_refuses_gram_matrices_that_do_not_fit(made, tmp_path, error, change):
    with pytest.raises(ValueError, match=error):
        merge(made, tmp_path, [made[1][0], change])
    assert not (tmp_path / "out").exists()


def test_merge_folders_refuses_singular_sums_and_merges_them_with_damping(made, tmp_path):
    # An input that is always 0.
    grams = [{"up.weight": gram["up.weight"] * np.outer([1, 1, 1, 0], [1, 1, 1, 0])} for gram in made[1]]
    grams = [{"up.weight": gram["up.weight"].astype(np.float32)} for gram in grams]
    with pytest.raises(ValueError, match=r"up.weight: the sum of the Gram matrices is singular"):
        merge(made, tmp_path / "first", grams)
    assert not (tmp_path / "first" / "out").exists()
    merge(made, tmp_path / "second", grams, damping=1e-6)
    found, models = read(tmp_path / "second" / "out")["up.weight"], [read(folder)["up.weight"] for folder in made[0]]
    # Nothing is known of that input but the damping.
    sizes = [np.trace(gram["up.weight"]) for gram in grams]
    np.testing.assert_allclose(found[:, 3], np.average(models, axis=0, weights=sizes)[:, 3], rtol=1e-5)


CONFIGS = {
    "llama": nn.CausalLMConfig.llama3(
        vocab_size=260, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=12, max_length=16
    ),
    "gpt2": nn.CausalLMConfig.gpt2(260, 8, 2, 2, max_length=16),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merge_models_by_regmean_measures_the_inputs_of_each_model(family, tmp_path, capsys):
    config, models, texts = CONFIGS[family], [], []
    for i in range(2):
        params = nn.init_params(jax.random.key(i), config)
        models.append(tmp_path / f"model{i}")
        interop.save_causal_lm(models[-1], config, params)
        texts.append(tmp_path / f"text{i}.txt")
        texts[-1].write_text("\n\n".join(f"A text with the number {i + j}, in a few words." for j in range(20)))
    arguments = ["merge-models", "--quiet", "--method", "regmean", "--models", *map(str, models), "--alpha", "0.9"]
    more = ["--data", *map(str, texts), "--length", "8", "--batches", "2", "--batch-size", "2"]
    assert main([*arguments, *more, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    # The inputs of the first layer, without the library's observation of them.
    text = language_text.MergeText(tuple(map(str, texts)), 2, 2, 8)
    kernels, grams, biases = [], [], []
    for rows, folder in zip(language_text.rows_of_models(models, text, train.make_mesh()), models, strict=True):
        params = interop.load_causal_lm(folder, dtype=jnp.float32)[1]
        x = np.asarray(params["embed"]["embedding"], np.float64)[rows["inputs"]]
        layer = jax.tree.map(lambda x: np.asarray(x, np.float64)[0], params["layers"])
        if family == "gpt2":
            x = x + np.asarray(params["position"]["embedding"], np.float64)[rows["positions"]]
            x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps) * layer["attn_norm"]["scale"]
        x = (x + layer["attn_norm"].get("bias", 0))[rows["segment_ids"] > 0]
        gram = x.T @ x / len(x)
        grams.append(np.where(np.eye(8, dtype=bool), gram, 0.9 * gram))
        own = layer["attn"]["qkv" if family == "gpt2" else "q"]
        kernels.append(own["kernel"])
        biases.append(own.get("bias", np.zeros(1)))
    want = np.linalg.solve(sum(grams), sum(x @ w for x, w in zip(grams, kernels, strict=True)))
    merged = interop.load_causal_lm(tmp_path / "out", dtype=jnp.float32)[1]
    found = jax.tree.map(lambda x: np.asarray(x)[0], merged["layers"]["attn"]["qkv" if family == "gpt2" else "q"])
    np.testing.assert_allclose(found["kernel"], want, atol=1e-4 * np.abs(want).max())
    assert np.abs(want - np.mean(kernels, axis=0)).max() > 0.01 * np.abs(want).max()
    np.testing.assert_allclose(found.get("bias", np.zeros(1)), np.mean(biases, axis=0), atol=1e-6)
    both = [interop.load_causal_lm(folder)[1] for folder in models]
    mean = fusion.average(both)["embed"]
    np.testing.assert_allclose(merged["embed"]["embedding"], mean["embedding"], atol=1e-6)


@pytest.mark.slow
def test_write_grams_stores_one_matrix_for_each_kernel_of_the_layers(tmp_path):
    config = CONFIGS["llama"]
    interop.save_causal_lm(tmp_path / "model", config, nn.init_params(jax.random.key(0), config))
    (tmp_path / "text.txt").write_text("\n\n".join(f"Words and words, {i} of them." for i in range(20)))
    text = language_text.MergeText((str(tmp_path / "text.txt"),), 2, 2, 8)
    grams = language_grams.write_grams([tmp_path / "model"], tmp_path / "grams", text)
    found = read(grams.folders[0])
    assert len(found) == 7 * config.num_layers
    mlp = "model.layers.1.mlp"
    np.testing.assert_array_equal(found[f"{mlp}.up_proj.weight"], found[f"{mlp}.gate_proj.weight"])
    for name, gram in found.items():
        assert np.linalg.eigvalsh(gram.astype(np.float64)).min() > -1e-6 * np.trace(gram), name
