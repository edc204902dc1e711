"""Folders of SAELens: what is written is read back, what a field folds is folded, and what is refused."""

import json

import numpy as np
import pytest

from subspace_jax import interop
from subspace_jax.interop.safetensors_io import read_header

D, M = 4, 6


def autoencoder(**changes):
    rng = np.random.default_rng(0)
    shapes = {"w_enc": (D, M), "b_enc": (M,), "w_dec": (M, D), "b_dec": (D,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return interop.LinearSAE(**(arrays | {"k": 2, "metadata": {"model_name": "m"}} | changes))


def rewrite(folder, **fields):
    file = folder / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def codes(sae, x):
    pre = (x - sae.b_dec) @ sae.w_enc + sae.b_enc
    least = np.sort(pre, axis=1)[:, -sae.k][:, None] if sae.threshold is None else sae.threshold[None]
    kept = pre >= least if sae.threshold is None else pre > least
    return np.maximum(pre, 0) * kept


@pytest.mark.parametrize("changes", [{}, {"k": None, "threshold": np.arange(M, dtype=np.float32)}])
def test_load_sae_reads_what_save_sae_wrote(tmp_path, changes):
    sae = autoencoder(**changes)
    interop.save_sae(tmp_path / "sae", sae)
    found = interop.load_sae(tmp_path / "sae")
    for name, value, expected in zip(sae._fields, found, sae, strict=True):
        np.testing.assert_array_equal(value, expected, err_msg=name)


def test_save_sae_writes_the_names_of_sae_lens(tmp_path):
    interop.save_sae(tmp_path / "topk", autoencoder())
    interop.save_sae(tmp_path / "jump", autoencoder(k=None, threshold=np.zeros(M, np.float32)))
    # As sae-lens 6.54.12 writes and reads them.
    fields = json.loads((tmp_path / "topk" / "cfg.json").read_text())
    assert fields == {
        "architecture": "topk",
        "d_in": D,
        "d_sae": M,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"model_name": "m"},
        "k": 2,
        "rescale_acts_by_decoder_norm": False,
    }
    stored = read_header(tmp_path / "jump" / "sae_weights.safetensors")[0]
    shapes = {"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,), "threshold": (M,)}
    assert {name: tensor.shape for name, tensor in stored.items()} == shapes


def test_load_sae_folds_a_bias_that_is_not_subtracted_and_norms_of_the_decoder(tmp_path):
    sae, x = autoencoder(), np.random.default_rng(1).standard_normal((5, D)).astype(np.float32)
    interop.save_sae(tmp_path / "sae", sae)
    rewrite(tmp_path / "sae", apply_b_dec_to_input=False)
    found = interop.load_sae(tmp_path / "sae")
    np.testing.assert_allclose((x - found.b_dec) @ found.w_enc + found.b_enc, x @ sae.w_enc + sae.b_enc, atol=1e-5)
    rewrite(tmp_path / "sae", apply_b_dec_to_input=True, rescale_acts_by_decoder_norm=True)
    found, norms = interop.load_sae(tmp_path / "sae"), np.linalg.norm(sae.w_dec, axis=1)
    scaled = codes(sae._replace(w_enc=sae.w_enc * norms, b_enc=sae.b_enc * norms), x)
    np.testing.assert_allclose(codes(found, x), scaled, rtol=1e-5)
    np.testing.assert_allclose(codes(found, x) @ found.w_dec, (scaled / norms) @ sae.w_dec, rtol=1e-4, atol=1e-5)


def test_a_plain_relu_is_read_as_thresholds_of_zero(tmp_path):
    interop.save_sae(tmp_path / "sae", autoencoder(k=None, threshold=np.ones(M, np.float32)))
    rewrite(tmp_path / "sae", architecture="standard")
    assert not interop.load_sae(tmp_path / "sae").threshold.any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "gated"}, "cfg.json: architecture: expected one of"),
        ({"normalize_activations": "layer_norm"}, "cfg.json: normalize_activations: expected 'none'"),
        ({"reshape_activations": "hook_z"}, "cfg.json: reshape_activations: expected 'none'"),
        ({"d_sae": 7}, "sae_weights.safetensors: W_enc: expected"),
        ({"k": 0}, "cfg.json: k: expected an integer from 1 to 6"),
        ({"architecture": "jumprelu"}, "sae_weights.safetensors: expected a tensor threshold"),
    ],
)
def test_load_sae_refuses_what_it_does_not_support(tmp_path, fields, message):
    interop.save_sae(tmp_path / "sae", autoencoder())
    rewrite(tmp_path / "sae", **fields)
    with pytest.raises(ValueError, match=message):
        interop.load_sae(tmp_path / "sae")


def test_load_sae_names_the_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cfg.json: no such file"):
        interop.load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"sae_weights.safetensors: no such file"):
        interop.load_sae(tmp_path)


def test_save_sae_refuses_a_folder_that_holds_something_and_what_does_not_fit(tmp_path):
    interop.save_sae(tmp_path, autoencoder())
    with pytest.raises(FileExistsError, match="exists; pass overwrite=True"):
        interop.save_sae(tmp_path, autoencoder())
    interop.save_sae(tmp_path, autoencoder(k=3), overwrite=True)
    assert interop.load_sae(tmp_path).k == 3
    for changes, message in (
        ({"k": None}, "k, threshold: expected one of the two"),
        ({"b_enc": np.zeros(3, np.float32)}, r"b_enc: expected \[6\], got \[3\]"),
        ({"k": None, "threshold": np.zeros(3, np.float32)}, r"threshold: expected \[6\], got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            interop.save_sae(tmp_path / "other", autoencoder(**changes))
    assert not (tmp_path / "other").exists()
