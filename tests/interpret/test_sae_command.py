"""``subspace-jax sae``: on vectors and on a small language model, its report, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import data, interop, nn
from subspace_jax.cli.main import main
from subspace_jax.data import text
from subspace_jax.interpret import polysae
from subspace_jax.interpret.polysae import export, study
from subspace_jax.interpret.polysae.activations import ResidualStream
from subspace_jax.interpret.polysae.evaluate import encode

D, M = 16, 32
SMALL = {"hidden_size": D, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_size": 24}


def sae(workdir, *arguments):
    small = ["--features", M, "--k", 4, "--steps", 2, "--quiet", "--workdir", workdir]
    sizes = ["batch_size=8", "eval_batch_size=8"]
    every = [f"--config.train.{name}_every=2" for name in ("eval", "checkpoint", "log")]
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        return main(["sae", *map(str, [*small, *arguments]), *every, *(f"--config.data.{size}" for size in sizes)])


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """A run on vectors, and its folder."""
    folder = tmp_path_factory.mktemp("vectors")
    drawn = polysae.planted_pairs(0, 400, D, M)
    np.save(folder / "x.npy", drawn.inputs)
    np.savez(folder / "probe.npz", features=drawn.inputs, labels=(drawn.codes[:, 0] > 0).astype(int))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("subspace_jax.train.loop.plot_curves", lambda *arguments: None)
        probe = ["--probe", folder / "probe.npz", "--config.data.holdout=0.25"]
        assert sae(folder / "run", "--data", folder / "x.npy", *probe) == 0
    return folder


def test_sae_writes_a_page_figures_and_a_folder_for_sae_lens(vectors):
    found = json.loads((vectors / "run" / "result.json").read_text())
    assert found["l0"] == pytest.approx(4, abs=1)
    assert {"explained_variance", "mse", "dead", "probe_f1_1", "probe_f1_5", "wasserstein1"} <= found.keys()
    page = (vectors / "run" / "report.html").read_text()
    assert "<mark>item " in page
    assert "http" not in page
    assert "by their number from 0 in" in page
    assert "texts" not in page
    features = json.loads((vectors / "run" / "features.json").read_text())["features"]
    assert all(f["share"] <= 0.1 and f["contexts"] for f in features)
    assert all(np.all(np.diff([c["value"] for c in f["contexts"]]) <= 0) for f in features)


def test_sae_names_vectors_by_their_row_in_the_file(vectors):
    config, params = export.import_sae_lens(vectors / "run" / "sae_lens")
    features = json.loads((vectors / "run" / "features.json").read_text())["features"]
    named = [(f["number"], int(c["token"].split()[1]), c["value"]) for f in features for c in f["contexts"]]
    numbers, items, values = map(np.array, zip(*named, strict=True))
    x = np.load(vectors / "x.npy")
    z, _ = jax.jit(encode, static_argnums=0)(config, params, x, jnp.zeros(()), jnp.ones(()), jnp.zeros(D))
    z = np.asarray(z)[items, numbers]
    assert items.min() >= 300
    np.testing.assert_allclose(z / z.max(), values / values.max(), rtol=1e-3)  # activations are scaled in the run


def test_the_exported_autoencoder_explains_vectors_as_they_are(vectors):
    config, params = export.import_sae_lens(vectors / "run" / "sae_lens")
    assert (config.k, config.decoder) == (4, "linear")
    held = np.load(vectors / "x.npy")[300:]
    z, recon = jax.jit(encode, static_argnums=0)(config, params, held, jnp.zeros(()), jnp.ones(()), jnp.zeros(D))
    found = json.loads((vectors / "run" / "result.json").read_text())
    explained = 1 - np.sum((held - recon) ** 2) / np.sum((held - held.mean(axis=0)) ** 2)
    assert explained == pytest.approx(found["explained_variance"], abs=1e-4)
    assert np.mean(np.sum(z > 0, axis=1)) == pytest.approx(found["l0"], abs=1e-4)


@pytest.mark.parametrize("sparsifier", ["batchtopk", "jumprelu"])
def test_codes_by_thresholds_are_exported_as_jumprelu_with_scale_and_norms_folded(sparsifier, tmp_path):
    config = polysae.PolySAEConfig(D, M, 4, decoder="linear", sparsifier=sparsifier, rescale=True)
    params = jax.jit(polysae.init_params, static_argnums=1)(jax.random.key(0), config)
    x = polysae.planted_pairs(1, 20, D, M).inputs
    center = jnp.linspace(-1, 1, D)
    trained = study.Trained(config, params, jnp.asarray(0.05), jnp.asarray(2.0), center)
    export.export_sae_lens(tmp_path / "out", trained)
    read, found = export.import_sae_lens(tmp_path / "out")
    run = jax.jit(encode, static_argnums=0)
    before = trained.encode(x)
    after = run(read, found, x, jnp.zeros(()), jnp.ones(()), jnp.zeros(D))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after[1], before[1], rtol=1e-4, atol=1e-5)


def test_a_polynomial_decoder_is_not_exported(tmp_path):
    config = polysae.PolySAEConfig(D, M, 4, (8, 4, 4))
    with pytest.raises(ValueError, match="decoder: the format of SAELens holds linear ones, got 'shared'"):
        export.export_sae_lens(tmp_path / "out", study.Trained(config, {}, *[jnp.zeros(())] * 3))


def test_loss_recovered_is_one_with_perfect_reconstructions_and_occurrences_are_those_of_the_codes():
    model = nn.CausalLMConfig.tiny(**SMALL, num_layers=2, vocab_size=text.ByteTokenizer().vocab_size)
    params = nn.init_params(jax.random.key(0), model)
    stream = ResidualStream(model, 1, skip=0)
    # A code of d features and their negatives reconstructs anything.
    eye = np.eye(D, dtype=np.float32)
    own = {"W_enc": np.c_[eye, -eye], "b_enc": np.zeros(M), "W_dec": np.r_[eye, -eye], "b_dec": np.zeros(D)}
    own = {name: jnp.asarray(x, jnp.float32) for name, x in own.items()}
    config = polysae.PolySAEConfig(D, M, M, decoder="linear")
    trained = study.Trained(config, own, jnp.zeros(()), jnp.asarray(2.0), jnp.zeros(D))
    texts = [text.Completion("", word * 9) for word in ("ab", "cde", "f")]
    rows = text.pack_rows(texts, text.ByteTokenizer(), 16)
    kept = nn.first_layer_params(params, 1)
    seen = study.find_occurrences(trained, stream, kept, data.eval_batches(rows, batch_size=2))
    counted = np.asarray(stream.counted(rows)) > 0
    assert seen.positions == counted.sum()
    x = np.zeros((*counted.shape, D), np.float32)
    np.add.at(x, (seen.rows, seen.columns), seen.values[:, None] * np.asarray(own["W_dec"])[seen.features] / 2)
    np.testing.assert_allclose(x[counted].mean(axis=0), seen.mean, atol=1e-5)
    found = study.loss_recovered(trained, stream, params, data.eval_batches(rows, batch_size=2), seen.mean)
    assert found.spliced == pytest.approx(found.clean, rel=1e-5)
    assert found.recovered == pytest.approx(1, abs=1e-3)
    assert found.zero != pytest.approx(found.clean, rel=1e-4)


def test_interactions_correlate_strengths_with_what_is_active_together():
    params = jax.jit(polysae.init_params, static_argnums=1)(
        jax.random.key(0), polysae.PolySAEConfig(4, 6, 2, (4, 2, 2))
    )
    rows, columns = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 0, 0])
    seen = study.Occurrences(rows, columns, np.array([1, 2, 1, 3, 1, 2]), np.ones(6), 4, np.zeros(4))
    pairs, strength, counts, correlation = study.interactions(params, seen, np.array([1, 2, 3]))
    assert dict(zip(map(tuple, pairs.tolist()), counts.tolist(), strict=True)) == {(1, 2): 2, (1, 3): 1, (2, 3): 0}
    np.testing.assert_allclose(strength, polysae.interaction_strength(params, jnp.asarray(pairs)))
    assert correlation == pytest.approx(np.corrcoef(strength, counts)[0, 1])
    assert study.top_places(seen, 1, 5) == [(0, 0, 1.0), (1, 0, 1.0)]


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["linear", "shared"])
def test_sae_of_a_language_model_reports_loss_recovered_and_contexts(decoder, tmp_path):
    model = nn.CausalLMConfig.tiny(**SMALL, num_layers=3, vocab_size=text.ByteTokenizer().vocab_size)
    interop.save_causal_lm(tmp_path / "model", model, nn.init_params(jax.random.key(0), model))
    lines = (json.dumps({"text": f"the number {i} is {i % 7}"}) for i in range(400))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    given = ["--model", tmp_path / "model", "--layer", 2, "--data", tmp_path / "a.jsonl", "--decoder", decoder]
    given += ["--config.model.ranks=8,4,4", "--config.data.length=32", "--config.data.holdout=0.3"]
    assert sae(tmp_path / "run", *given) == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"loss_recovered", "loss_clean", "loss_spliced", "loss_zero", "loss_mean"} <= found.keys()
    assert ("correlation" in found) == (decoder == "shared")
    assert (tmp_path / "run" / "sae_lens").is_dir() == (decoder == "linear")


def test_sae_refuses_what_it_can_not_serve(tmp_path, capsys):
    np.save(tmp_path / "bad.npy", np.zeros((4, 3), np.int32))
    np.save(tmp_path / "one.npy", np.ones((1, D), np.float32))
    np.save(tmp_path / "good.npy", polysae.planted_pairs(0, 40, D, M).inputs)
    for arguments, message in (
        ([], "--model: expected a language model for the texts of --data docstrings"),
        (["--data", tmp_path / "bad.npy"], "bad.npy: expected floating-point vectors"),
        (["--data", tmp_path / "none.npy"], "data.source: no file"),
        (["--data", tmp_path / "good.npy", "--k", "99"], "model.k: expected a number above 0 and at most the 32"),
        (["--data", tmp_path / "good.npy", "--sparsifier", "top"], "model.sparsifier: expected one of"),
        (["--data", tmp_path / "good.npy", "--config.data.holdout=0.0"], "data.holdout: expected a share"),
        (["--data", tmp_path / "good.npy", "--config.model.d_in=7"], "model.d_in: expected 16"),
        (["--data", tmp_path / "good.npy", "--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--data", tmp_path / "good.npy", "--layer", "3"], "--layer 3: expected --model"),
        (["--data", tmp_path / "good.npy", "--probe", tmp_path / "good.npy"], "--probe: labels: "),
        (["--data", tmp_path / "one.npy"], "one.npy: expected vectors besides those held out, got 1 in all"),
        (["--model", tmp_path / "none"], "--model: there is no"),
        (["--config", "gcr/digits:k8"], "model.d_sae"),
    ):
        assert sae(tmp_path / "run", *arguments) == 2, arguments
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_vector_shards_are_read_by_index_over_files_and_refuse_nan(tmp_path):
    x = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float16)
    np.save(tmp_path / "a.npy", x[:4])
    np.save(tmp_path / "b.npy", x[4:])
    shards = data.VectorShards(tmp_path, start=2)
    assert (len(shards), shards.width) == (8, 3)
    found = np.stack([example["inputs"] for example in shards.__getitems__([0, 1, 2, 7])])
    np.testing.assert_array_equal(found, x[[2, 3, 4, 9]].astype(np.float32))
    x[7] = np.nan
    np.save(tmp_path / "b.npy", x[4:])
    with pytest.raises(ValueError, match=r"data: .*b.npy: row 3 holds NaN or infinity"):
        data.VectorShards(tmp_path)[7]
    np.save(tmp_path / "c.npy", np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"c.npy: expected vectors of width 3, got 4"):
        data.VectorShards(tmp_path)
    (tmp_path / "d.npy").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"d.npy: no .npy file of numbers"):
        data.VectorShards(tmp_path / "d.npy")
