"""Tied checkpoints with a head beside the table, as the installed transformers reads them, by ``make test-peers``."""

import importlib.util
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the peers come with the extra bench"),
]

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "interop"
TOKENS = np.array([[1, 5, 9, 33]])


def given_head(folder, name, kind):
    """Copies a golden model, says that it is tied, and puts a head into its files."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    fields = json.loads((GOLDEN / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    tensors = load_file(GOLDEN / name / "model.safetensors")
    table = "transformer.wte.weight" if name == "gpt2" else "model.embed_tokens.weight"
    noise = np.random.default_rng(0).standard_normal(tensors[table].shape, np.float32)
    tensors["lm_head.weight"] = tensors[table] + (noise if kind in ("own", "sharded", "bare") else 0)
    if kind == "alone":
        del tensors[table]
    if kind == "bare" and name == "gpt2":
        tensors = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    names, weight_map = sorted(tensors), {}
    for part in (names[::2], names[1::2]) if kind == "sharded" else (names,):
        file = f"model-{len(weight_map)}.safetensors" if kind == "sharded" else "model.safetensors"
        save_file({key: tensors[key] for key in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if kind == "sharded":
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["own", "sharded", "bare", "same", "alone"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen2"])
def test_load_causal_lm_reads_a_head_beside_a_tied_table_as_transformers_does(name, kind, tmp_path):
    import torch
    import transformers

    given_head(tmp_path / "model", name, kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor(TOKENS)).logits.numpy()
    config, params = interop.load_causal_lm(tmp_path / "model")
    assert config.tied == (kind in ("same", "alone"))
    # Logits of up to 20 in float32, summed in another order.
    logits = nn.causal_lm_apply(config, params, jnp.asarray(TOKENS)).logits
    np.testing.assert_allclose(np.asarray(logits), wanted, atol=1e-4)
    interop.save_causal_lm(tmp_path / "again", config, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    with torch.no_grad():
        np.testing.assert_array_equal(theirs(torch.tensor(TOKENS)).logits.numpy(), wanted)
