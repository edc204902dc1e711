"""GGUF files as the installed transformers and gguf read them, by ``make test-peers``."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from subspace_jax.interop import gguf
from subspace_jax.interop.gguf.blocks import BLOCK_TYPES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the peers come with the extra bench"),
]
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "gguf"


@pytest.mark.parametrize("number", BLOCK_TYPES)
def test_blocks_of_random_bytes_decode_to_the_numbers_of_the_gguf_package(number):
    import gguf as peer

    block, kind = BLOCK_TYPES[number], peer.GGMLQuantizationType(number)
    assert (kind.name, peer.GGML_QUANT_SIZES[kind]) == (block.name, (block.size, block.nbytes))
    data = np.random.default_rng(1).integers(0, 256, (4096, block.nbytes), np.uint8)
    with np.errstate(all="ignore"):
        wanted = peer.quants.dequantize(data, kind).astype(np.float32)
        decoded = data.view(block.dtype) if block.decode is None else block.decode(data)
    np.testing.assert_array_equal(decoded.astype(np.float32), wanted.reshape(decoded.shape))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2"])
def test_read_header_gives_the_metadata_and_places_of_the_gguf_package(name):
    import gguf as peer

    header, theirs = gguf.read_header(GOLDEN / f"{name}.gguf"), peer.GGUFReader(GOLDEN / f"{name}.gguf")
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata.keys() == fields.keys()
    for key, value in header.metadata.items():
        kind = np.float32 if np.asarray(value).dtype.kind == "f" else None
        np.testing.assert_array_equal(np.asarray(value, kind), np.asarray(fields[key], kind), err_msg=key)
    places = {t.name: (tuple(t.shape.tolist())[::-1], t.tensor_type.name, t.data_offset) for t in theirs.tensors}
    assert {key: (t.shape, t.block.name, t.offset) for key, t in header.tensors.items()} == places


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers_reads_what_to_folder_writes(name, tmp_path):
    import torch
    import transformers

    gguf.to_folder(GOLDEN / f"tiny_{name}.gguf", tmp_path / "out")
    with np.load(GOLDEN / "logits.npz") as archive:
        tokens, wanted = archive[f"{name}_input_ids"], archive[f"{name}_logits"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.from_numpy(tokens).long()).logits.numpy(), wanted, atol=2e-5)


@pytest.mark.parametrize(("name", "kind"), [("llama", "sentencepiece"), ("qwen2", "bpe")])
def test_transformers_reads_the_tokenizer_that_to_folder_writes(name, kind, tmp_path):
    import transformers

    gguf.to_folder(GOLDEN / f"tiny_{name}.gguf", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    read = json.loads((GOLDEN / "tokens.json").read_text())
    start = [1] if name == "llama" else []
    assert [theirs(text).input_ids for text in read["samples"]] == [start + tokens for tokens in read[kind]]
