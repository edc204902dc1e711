"""Experts in both towers of CLIP: equal to CLIP at first, measured and trained through its layers, and a whole run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from subspace_jax import nn, train
from subspace_jax.continual import igsp
from subspace_jax.continual.igsp import clip, digits
from subspace_jax.interop.config_fields import read_fields
from subspace_jax.interop.hf.clip import dual_config_from_fields
from tests.conftest import GOLDEN

FOLDER = GOLDEN / "interop_vision" / "clip"
SETTINGS = igsp.ExpertSettings(max_experts=4, rank=2)
TOKENS = np.stack([np.array([[57, 3 + 7 * i + j, 4 + i, 59, 59] for j in range(3)]) for i in range(2)])


@pytest.fixture(scope="module")
def begun():
    """A stream of two tasks with two and three classes, its parameters and variables, and a batch of the first."""
    task = igsp.ClipStream(dual_config_from_fields(read_fields(FOLDER)), TOKENS, [2, 3], SETTINGS)
    rng = np.random.default_rng(0)
    batch = {
        "inputs": jnp.asarray(rng.standard_normal((4, 28, 28, 3)), jnp.float32),
        "labels": jnp.asarray([0, 1, 1, 0], jnp.int32),
        "task": jnp.zeros(4, jnp.int32),
    }

    @jax.jit
    def made(key):
        return task.begun(*task.init(key), key, 0)

    return task, *made(jax.random.key(0)), batch


def test_experts_in_both_towers_change_nothing_at_first_and_are_measured_through_the_layers(begun):
    task, params, variables, batch = begun

    @jax.jit
    def found(params, variables, batch):
        kernels, base = task.kernels(params, variables), variables["base"]
        plain = nn.encode_image(task.config, base["model"], batch["inputs"])
        texts = nn.encode_text(task.config, base["model"], base["tokens"][0])
        own = task.embed(base, kernels, batch["inputs"]), task.class_vectors(base, kernels, jnp.int32(0))

        def loss(params, probe):
            return task.objective(base, task.kernels(params, variables, probe), jnp.int32(0), batch)[0]

        return plain, texts, *own, jax.grad(loss, argnums=(0, 1))(params, task.probe(batch))

    plain, texts, images, vectors, (grads, probs) = found(params, variables, batch)
    np.testing.assert_array_equal(images, plain)
    np.testing.assert_array_equal(vectors, texts)
    for name, rows in (("image", 4), ("text", 3)):
        assert probs[name].shape == (2, rows, 4)
        np.testing.assert_allclose(probs[name], np.broadcast_to([0.5, 0.5, 0, 0], probs[name].shape), rtol=1e-6)
        np.testing.assert_array_equal(grads["a"][name], 0)  # as b is zero
        assert float(jnp.min(jnp.max(jnp.abs(grads["b"][name]), axis=(1, 2, 3)))) > 0


def test_objective_gives_no_probability_to_classes_that_a_task_does_not_have(begun):
    task = begun[0]
    np.testing.assert_array_equal(task._valid(jnp.int32(0)), [True, True, False])
    np.testing.assert_array_equal(task._valid(jnp.asarray([1, 0])), [[True, True, True], [True, True, False]])


class Words:
    """A tokenizer of words by their lengths."""

    bos_id, eos_id = 57, 59

    def encode(self, text):
        return [len(word) for word in text.split()]


def test_prompt_tokens_puts_names_into_the_prompt_and_pads_by_the_end_token():
    found = clip.prompt_tokens(Words(), ["cat", "big_dog"], "a {} here", 6)
    np.testing.assert_array_equal(found, [[57, 1, 3, 4, 59, 59], [57, 1, 3, 3, 4, 59]])
    with pytest.raises(ValueError, match="prompt: expected"):
        clip.prompt_tokens(Words(), ["cat"], "a photo", 6)


def test_clip_stream_refuses_prompts_that_do_not_fit():
    config = dual_config_from_fields(read_fields(FOLDER))
    with pytest.raises(ValueError, match=r"tokens: expected \[2, 2, length\]"):
        igsp.ClipStream(config, TOKENS, [2, 2], SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "data.sets: expected at least one set"),
        (["data.sets=('a',)", "data.train_splits=('train',)", "data.eval_splits=('test',)"], "model.path: expected"),
        (["data.sets=('a','b')", "data.train_splits=('train',)", "data.eval_splits=('test',)"], "data.sets: expected"),
        (["data.statistics=0"], "data.statistics: expected at least 1"),
        (["model.label_smoothing=1.0"], r"model.label_smoothing: expected a number in \[0, 1\)"),
    ],
)
def test_build_refuses_fields_that_cannot_serve(changes, message):
    with pytest.raises(ValueError, match=message):
        clip.build(train.override(clip.default_config(), changes))


def write_sets(folder):
    rng = np.random.default_rng(0)
    for name, classes in (("shades", ("dark", "bright")), ("colors", ("red", "green", "blue"))):
        for split, count in (("train", 8), ("test", 4)):
            for j, label in enumerate(classes):
                (folder / name / split / label).mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(60, size=(28, 28, 3))
                    pixels[..., j if name == "colors" else slice(None)] += 190 * (name == "colors" or j)
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / name / split / label / f"{i}.png")


def write_model(folder):
    import tokenizers

    shutil.copytree(FOLDER, folder)
    words = ["dark", "bright", "red", "green", "blue", "a", "photo", "of", ".", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate(words)} | {"<s>": 57, "</s>": 59}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    settings = '{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}'
    (folder / "tokenizer_config.json").write_text(settings)
    side, third = {"height": 28, "width": 28}, [0.5, 0.5, 0.5]
    fields = {"size": {"shortest_edge": 28}, "resample": 3, "crop_size": side, "image_mean": third, "image_std": third}
    fields |= {name: True for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")}
    fields |= {"image_processor_type": "CLIPImageProcessor", "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_a_stream_of_image_folders_is_learnt_by_clip_and_the_first_set_is_not_forgotten(tmp_path):
    write_sets(tmp_path / "data")
    write_model(tmp_path / "model")
    changes = [
        f"model.path={tmp_path / 'model'}",
        f"data.data_dir={tmp_path / 'data'}",
        "data.sets=('shades','colors')",
        "data.train_splits=('train','train')",
        "data.eval_splits=('test','test')",
        "data.batch_size=8",
        "data.eval_batch_size=8",
        "stream.identify_steps=12",
        "stream.tune_steps=20",
        "optim.warmup_steps=2",
        "optim.learning_rate=0.01",
        "experts.max_experts=4",
        "experts.rank=4",
        "experts.window=4",
    ]
    config = train.override(clip.default_config(), changes)
    result = train.run(config, tmp_path / "run", progress=False)
    assert result.summary["forgetting"] == 0
    assert result.summary["final_accuracy"] > 0.7
    assert result.state.variables["past"].pool["text"].a.shape == (2, 4, 24, 4)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_split_digits_are_learnt_without_forgetting_and_shared_experts_are_found(tmp_path):
    changes = ["data.kind=split", "experts.max_experts=12", "experts.rank=4"]
    config = train.override(digits.default_config(), changes)
    result = train.run(config, tmp_path, progress=False)
    assert result.summary["forgetting"] == 0
    assert result.summary["final_accuracy"] > 0.9
