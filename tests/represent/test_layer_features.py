"""Features of every layer of a model, and `subspace-jax compare` of two models."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from subspace_jax import interop, nn, represent
from subspace_jax.cli.main import main
from tests.interop.vision_goldens import GOLDEN

from .test_text_features import WORDS, bert, static, write_tokenizer  # noqa: F401

TEXTS = [f"The {a} is {b} ." for a in ("grass", "manifold", "flat grass") for b in ("flat", "not flat", "grass")]


def test_layer_features_of_texts_are_means_of_hidden_states_of_bert(bert):  # noqa: F811
    found = represent.layer_features_of_texts(bert, TEXTS, batch_size=4)
    assert list(found) == ["0", "1"]
    model = represent.open_text_model(bert)
    config, params = interop.load_bert(bert)
    tokens = jnp.asarray(model.prepare(TEXTS[4]))[None]
    hidden = nn.bert_apply(config, params, tokens, capture="all").hidden
    for name, state in zip(found, hidden, strict=True):
        np.testing.assert_allclose(found[name][4], state[0].mean(0), atol=1e-5)


@pytest.mark.slow
def test_layer_features_of_texts_take_a_causal_language_model(tmp_path):
    config = nn.CausalLMConfig.tiny(num_layers=2, vocab_size=len(WORDS))
    interop.save_causal_lm(tmp_path / "lm", config, nn.init_params(jax.random.key(0), config))
    write_tokenizer(tmp_path / "lm", processor=False)
    found = represent.layer_features_of_texts(tmp_path / "lm", TEXTS)
    assert list(found) == ["0", "1", "2"]
    assert {x.shape for x in found.values()} == {(9, found["0"].shape[1])}
    assert not np.allclose(found["1"], found["2"])


def test_layer_features_of_texts_refuse_embeddings_without_layers(static):  # noqa: F811
    with pytest.raises(ValueError, match="got embeddings without layers"):
        represent.layer_features_of_texts(static, TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_layer_features_of_images_are_means_of_hidden_states(tmp_path, name):
    (tmp_path / "model").mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name / file, tmp_path / "model" / file)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "all").mkdir(parents=True)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "photos" / "all" / f"{i}.png")
    images = represent.open_labelled_images(tmp_path / "photos", "")
    found = represent.layer_features_of_images(tmp_path / "model", images, batch_size=4)
    model = represent.open_feature_model(tmp_path / "model")
    config, params = interop.load_vision(tmp_path / "model")
    pixels = jnp.asarray(model.prepare(images[2]["inputs"]))[None]
    hidden = jax.jit(lambda p, x: nn.vision_apply(config, p, x, capture="all").hidden)(params, pixels)
    assert list(found) == [str(i) for i in range(len(hidden))]
    for x, state in zip(found.values(), hidden, strict=True):
        mean = np.asarray(state[0]).reshape(-1, state.shape[-1]).mean(0)
        np.testing.assert_allclose(x[2], mean, atol=1e-4)


def test_compare_command_takes_two_models_and_texts(bert, tmp_path, capsys):  # noqa: F811
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    command = ["compare", bert, bert, "--text", tmp_path / "texts.txt", "--out", tmp_path / "out", "--permutations", 9]
    assert main([*map(str, command), "--measures", "debiased_cka", "--layers", "0,1", "--quiet"]) == 0
    pairs = json.loads((tmp_path / "out" / "compare.json").read_text())["pairs"]
    assert len(pairs) == 4
    np.testing.assert_allclose([pairs[i]["scores"]["debiased_cka"]["value"] for i in (0, 3)], 1, atol=1e-4)
    assert main([*map(str, command), "--layers", "7", "--quiet"]) == 2
    assert "--layers: expected some of 0, 1" in capsys.readouterr().err
