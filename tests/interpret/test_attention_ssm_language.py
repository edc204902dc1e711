"""Attention layers of language models as operators, and the command that measures them."""

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn
from subspace_jax.cli.main import main
from subspace_jax.interpret import attention_ssm as ops
from subspace_jax.interpret.attention_ssm import language_model, report
from subspace_jax.nn.params import map_specs
from tests.nn import lm

SMOLLM2 = pathlib.Path(__file__).parents[2] / "work" / "models" / "smollm2"
# Grouped queries with windows that differ; bounds of scores, norms after blocks; learned positions in one kernel.
NAMES = ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "gemma3", "gpt2", "qwen3"))]


def by_hand(config, params, hidden, index, mask):
    """The attention of a layer, from the library's own parts; the function of its normalized input."""
    layer = jax.tree.map(lambda x: x[index], params["layers"])
    windowed = config.windows is not None and config.windows[index] is not None
    rope = config.local_rope if config.local_rope is not None and windowed else config.rope
    tables = None if rope is None else nn.rope_tables(rope, config.head_dim, jnp.arange(hidden.shape[2])[None])
    scale = None if config.score_dim is None else config.score_dim**-0.5

    def attend(x):
        query, key, value = language_model.attention_heads(config, layer["attn"], x[None], tables)
        mixed = nn.attention(query, key, value, mask=mask[None, None], scale=scale, softcap=config.score_softcap)
        return nn.linear(
            mixed.reshape(1, len(x), -1), layer["attn"]["out"]["kernel"], layer["attn"]["out"].get("bias")
        )[0]

    return attend, language_model.apply_norm(config, layer["attn_norm"], hidden[index])


@pytest.mark.parametrize("name", NAMES)
def test_layer_factors_and_gradients_are_those_of_the_models_attention(name):
    config, params, tokens = lm.CONFIGS[name], lm.params_of(name), lm.tokens_of(name, 2, 9)
    hidden = language_model._hidden(config, params, tokens)
    for index in (1, 0)[: 1 if name == "qwen2" else 2]:
        window = config.windows and config.windows[index]
        positions = jnp.arange(9, dtype=jnp.int32)
        mask = nn.causal_mask(positions, positions[None], positions[None], window=window)[0, 0]
        layer = language_model._inputs_of(config, params, tokens, hidden, index)

        @jax.jit
        def both(layer, index=index, mask=mask):
            attend, x = by_hand(config, params, hidden, index, mask)
            factors = language_model._factors_of(config, layer)
            # Biases of values, whose weights add up to 1, and of the output are the same for all tokens.
            constant = attend(jnp.zeros_like(x[0]))[0]
            found = jnp.einsum("hbij,hpd,bjd->bip", *factors, x) + constant[None, None]
            profile = language_model._last_gradients(config, layer._replace(x=x[0]))
            return found, jax.vmap(attend)(x), profile, ops.gradient_profile(attend, x[0])

        with jax.default_matmul_precision("highest"):
            found, y, profile, expected = both(layer)
        chex.assert_trees_all_close(found, y, atol=2e-5 * float(jnp.max(jnp.abs(y))))
        chex.assert_trees_all_close(profile, expected, rtol=0.01, atol=1e-5 * float(expected[0]))


def test_measure_layers_counts_heads_and_tied_ones_once():
    config, params, tokens = lm.CONFIGS["qwen2"], lm.params_of("qwen2"), lm.tokens_of("qwen2", 2, 9)
    attn = params["layers"]["attn"]
    # The second of two value heads is the first, and so are the output kernels of their two query heads each.
    width = config.head_dim
    value = jax.tree.map(lambda x: x.at[..., width:].set(x[..., :width]), attn["v"])
    out = attn["out"]["kernel"]
    tied = {
        **attn,
        "v": value,
        "out": {**attn["out"], "kernel": out.at[:, width:].set(jnp.tile(out[:, :width], (1, 3, 1)))},
    }
    for own, rank in ((attn, 4), (tied, 1)):
        layers = ops.measure_layers(config, {**params, "layers": {**params["layers"], "attn": own}}, tokens)
        assert [layer.rank for layer in layers] == [rank] * 3
        assert all(1 <= layer.effective_rank <= rank + 1e-3 for layer in layers)
        assert all(len(layer.profile) == 9 and len(layer.singular_values) == 4 for layer in layers)
    assert layers[1].mean_distance < layers[0].mean_distance  # its window has four tokens
    assert np.all(layers[1].profile[4:] == 0)
    with pytest.raises(ValueError, match=r"tokens: expected \[rows, n\] of at least 4"):
        ops.measure_layers(config, params, tokens[:, :3])
    with pytest.raises(ValueError, match="layer: expected 0 to 2, got 3"):
        ops.layer_factors(config, params, tokens, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("operators")
    config = nn.CausalLMConfig.gpt2(259, 16, 2, 2, max_length=64, bos_token=256, eos_tokens=(257,), pad_token=258)
    draw = np.random.default_rng(0).standard_normal
    params = map_specs(
        lambda spec: jnp.asarray(spec.value + 0.2 * draw(spec.shape), jnp.float32), nn.param_specs(config)
    )
    interop.save_causal_lm(folder / "model", config, params)
    (folder / "some.txt").write_text("\n\n".join(f"the sum of {i} and {i} is {2 * i}." for i in range(40)))
    return folder


def test_attention_operators_writes_a_table_and_json(model, tmp_path, capsys, caplog, monkeypatch):
    # Drawing takes longer than measuring.
    monkeypatch.setattr(report, "draw", lambda folder, layers: folder / "operators.png")
    options = ["--model", str(model / "model"), "--data", str(model / "some.txt"), "--length", "16", "--rows", "2"]
    assert main(["attention-operators", *options, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "trained on" not in caplog.text
    assert printed[0].split() == [
        "layer",
        "rank",
        "effective",
        "half",
        "error",
        "mean",
        "distance",
        "first",
        "token",
        "half-distance",
        "log",
        "slope",
    ]
    assert [line.split()[:2] for line in printed[1:3]] == [["0", "2"], ["1", "2"]]
    assert str(tmp_path / "out") in printed[-1]
    record = json.loads((tmp_path / "out" / "operators.json").read_text())
    assert (record["rows"], record["length"], len(record["layers"][0]["profile"])) == (2, 16, 16)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == record["summary"]
    assert record["summary"]["rank_over_heads"] == 1


def test_attention_operators_refuses_bad_input_and_writes_nothing(model, tmp_path, capsys):
    good = {"--model": model / "model", "--data": model / "some.txt", "--out": tmp_path / "out", "--length": 16}
    for change, message in (
        ({"--length": 3}, "--length, --rows: expected at least 4 and 1, got 3 and 4"),
        ({"--rows": 0}, "--length, --rows"),
        ({"--length": 65}, "--length: expected at most 64"),
        ({"--data": model / "none.txt"}, "none.txt"),
        ({"--model": model / "none"}, "none"),
        ({"--out": model / "some.txt"}, f"can't write to the folder {model / 'some.txt'} (File exists)"),
    ):
        words = [str(word) for pair in {**good, **change}.items() for word in pair]
        assert main(["attention-operators", *words]) == 2
        assert message in capsys.readouterr().err
    (model / "short.txt").write_text("so short")
    words = [str(word) for pair in {**good, "--data": model / "short.txt", "--length": 60}.items() for word in pair]
    assert main(["attention-operators", *words]) == 2
    assert "short.txt has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_draw_writes_a_picture_of_layers_of_which_one_has_no_gradient(tmp_path):
    numbers = (2, 1.5, np.asarray([2.0, 1.0]), 0.4, 3.0, 0.1, np.asarray([1.0, 0.5, 0.1, 0.0]), 1, -0.7)
    layers = [ops.LayerMeasure(*numbers), ops.LayerMeasure(*numbers)._replace(profile=np.zeros(4))]
    assert report.draw(tmp_path, layers).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_smollm2_uses_all_its_heads_and_its_layers_differ(tmp_path):
    if not SMOLLM2.is_dir():
        pytest.skip("needs `subspace-jax fetch smollm2`")
    assert main(["attention-operators", "--model", str(SMOLLM2), "--rows", "2", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "operators.json").read_text())
    assert record["summary"]["rank_over_heads"] == 1
    effective = [layer["effective_rank"] for layer in record["layers"]]
    assert len(effective) == 30
    assert 1 < min(effective) < max(effective) <= 9
