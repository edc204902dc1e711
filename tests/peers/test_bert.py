"""BERT and DINOv2 with the installed transformers: folders that are written here are read there."""

import importlib.util
import pathlib

import chex
import numpy as np
import pytest

from subspace_jax import interop

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the peers come with the extra bench"),
]
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("pooler", [True, False])
def test_transformers_reads_what_save_bert_writes(pooler, tmp_path):
    import torch
    import transformers

    config, params = interop.load_bert(GOLDEN / "interop_bert" / "tiny")
    if not pooler:
        config, params = config.replace(pooler=False), {k: v for k, v in params.items() if k != "pooler"}
    interop.save_bert(tmp_path / "out", config, params)
    theirs = transformers.BertModel.from_pretrained(tmp_path / "out", add_pooling_layer=pooler).eval()
    with np.load(GOLDEN / "interop_bert" / "tiny" / "io.npz") as golden, torch.no_grad():
        tokens, mask = (torch.from_numpy(golden[name]) for name in ("input_ids", "attention_mask"))
        out = theirs(tokens, attention_mask=mask)
        valid = golden["attention_mask"].astype(bool)
        chex.assert_trees_all_close(out.last_hidden_state.numpy()[valid], golden["hidden"][-1][valid], atol=1e-5)
        if pooler:
            chex.assert_trees_all_close(out.pooler_output.numpy(), golden["pooled"], atol=1e-5)


def test_transformers_reads_a_backbone_out_of_an_onnx_file(tmp_path):
    import torch
    import transformers

    found = interop.load_onnx_dinov2(GOLDEN / "interop_onnx" / "dinov2.onnx", num_heads=2)
    interop.save_vision(tmp_path / "out", *found)
    theirs = transformers.Dinov2Model.from_pretrained(tmp_path / "out").eval()
    with np.load(GOLDEN / "interop_onnx" / "dinov2.npz") as golden, torch.no_grad():
        states = theirs(torch.from_numpy(golden["pixels"])).last_hidden_state
        chex.assert_trees_all_close(states.numpy(), golden["tokens"], atol=5e-5)
