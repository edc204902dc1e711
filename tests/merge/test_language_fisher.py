"""Fisher information of language models: the values, the folders, and the merge that they weigh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn, train
from subspace_jax.cli.main import main
from subspace_jax.merge import subspace_fusion as fusion
from subspace_jax.merge.subspace_fusion import language_fisher, language_text

CONFIG = nn.CausalLMConfig.llama3(
    vocab_size=260, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_size=8, max_length=16
)
TEXT = language_text.MergeText(("text.txt",), batches=2, batch_size=2, length=8)


@pytest.mark.slow
def test_fisher_of_drawn_tokens_is_that_of_fisher_diagonal_with_the_same_draw():
    params = nn.init_params(jax.random.key(0), CONFIG)
    tokens = np.random.default_rng(0).integers(1, 250, (2, 8)).astype(np.int32)
    rows = {
        "inputs": tokens,
        "labels": tokens,
        "weights": np.ones((2, 8), np.float32),
        "segment_ids": np.ones((2, 8), np.int32),
        "positions": np.tile(np.arange(8, dtype=np.int32), (2, 1)),
    }
    mesh = train.make_mesh(devices=jax.devices()[:1])
    params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    found = language_fisher._diagonal(
        language_fisher._step(CONFIG, params, mesh), params, rows, TEXT, mesh, progress=False
    )

    def logits(params, tokens):
        return nn.causal_lm_apply(CONFIG, params, tokens, logits_dtype=jnp.float32).logits

    key = jax.random.fold_in(jax.random.key(0), 0)
    want = jax.jit(lambda p, x: fusion.fisher_diagonal(logits, p, x, "sampled", key=key))(params, tokens)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(want), rtol=1e-3, atol=1e-9)


@pytest.fixture
def models(tmp_path):
    made = []
    for i in range(2):
        params = jax.tree.map(lambda x, i=i: x * (1 + 0.1 * i), nn.init_params(jax.random.key(1), CONFIG))
        made.append(tmp_path / f"model{i}")
        interop.save_causal_lm(made[-1], CONFIG, params)
    (tmp_path / "text.txt").write_text("\n\n".join(f"A text with the number {i}, in a few words." for i in range(20)))
    return made


@pytest.mark.slow
def test_merge_models_by_fisher_writes_a_model_between_both(models, tmp_path, capsys):
    arguments = ["merge-models", "--quiet", "--method", "fisher", "--models", *map(str, models)]
    more = ["--data", str(tmp_path / "text.txt"), "--length", "8", "--batches", "2", "--batch-size", "2"]
    assert main([*arguments, *more, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    one, two, found = (interop.load_causal_lm(folder)[1] for folder in (*models, tmp_path / "out"))
    for a, b, x in zip(*map(jax.tree.leaves, (one, two, found)), strict=True):
        assert bool(jnp.all(x >= jnp.minimum(a, b) - 1e-6) & jnp.all(x <= jnp.maximum(a, b) + 1e-6))
    texts = TEXT._replace(files=(str(tmp_path / "text.txt"),))
    folders = language_fisher.write_fishers(models, tmp_path / "fishers", texts)
    fishers = [interop.load_causal_lm(folder)[1] for folder in folders]
    chex.assert_trees_all_close(found, fusion.fisher_merge([one, two], fishers), atol=1e-6)


def test_write_fishers_refuses_texts_that_can_not_serve(models, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("one")
    with pytest.raises(ValueError, match="expected at least a batch of 2 examples, got 1"):
        language_fisher.write_fishers(models, tmp_path / "f", TEXT._replace(files=(str(text),)))
    with pytest.raises(ValueError, match="--data: expected a text for all models, or one for each of 2"):
        language_fisher.write_fishers(models, tmp_path / "f", TEXT._replace(files=("a",) * 3))
