"""Adapters of tied models: PEFT changes the embedding or the head, one without the other."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, interop, language, nn

from ..variants import rest_slow

SIZES = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "max_length": 16}
LLAMA = {**SIZES, "num_kv_heads": 1, "head_dim": 4, "mlp_size": 12}
CONFIGS = {
    "gpt2": nn.CausalLMConfig.gpt2(20, **SIZES),
    "llama": nn.CausalLMConfig.tiny(20, **LLAMA, tied=True),
    "mistral": nn.CausalLMConfig.tiny(20, **LLAMA, tied=True).replace(family="mistral"),
    "qwen2": nn.CausalLMConfig.tiny(20, **LLAMA, tied=True).replace(family="qwen2", qkv_bias=True),
}
TABLE = {family: "transformer.wte" if family == "gpt2" else "model.embed_tokens" for family in CONFIGS}
Q = {family: ("c_attn", 24) if family == "gpt2" else ("q_proj", 8) for family in CONFIGS}

# Llama and Mistral have the names of Qwen2.
_LIKE_OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "mistral")]
every_family = pytest.mark.parametrize("family", ["gpt2", "qwen2", *_LIKE_OTHERS])


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def write(folder, family, fields, tensors):
    """An adapter of the first layer's query, and of what else the tensors and the fields say."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [Q[family][0]], **fields}
    config["layers_to_transform"] = [0]
    parent = "transformer.h.0.attn" if family == "gpt2" else "model.layers.0.self_attn"
    tensors = {
        f"{parent}.{Q[family][0]}.lora_A.weight": drawn(1, 2, 8),
        f"{parent}.{Q[family][0]}.lora_B.weight": drawn(2, Q[family][1], 2),
        **tensors,
    }
    tensors = {f"base_model.model.{name}": value for name, value in tensors.items()}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    interop.write_safetensors(folder / "adapter_model.safetensors", shapes, tensors.values())
    return folder


def model(family, folder):
    params = nn.init_params(jax.random.key(0), CONFIGS[family])
    interop.save_causal_lm(folder, CONFIGS[family], params)
    return np.asarray(params["embed"]["embedding"])


def one_of_two(family):
    """Fields and tensors of adapters of one table, or of both, each by itself; and what table and head become."""
    table, name = TABLE[family], TABLE[family].split(".")[-1]
    new, other = drawn(3, 20, 8), drawn(4, 20, 8)
    a, b = drawn(5, 2, 8), drawn(6, 20, 2)
    changed = 2.0 * b @ a
    save = lambda *names: {"modules_to_save": list(names)}  # noqa: E731
    target = lambda *names: {"target_modules": [Q[family][0], *names]}  # noqa: E731
    yield save(name), {f"{table}.weight": new}, lambda w: (new, w)
    yield save(table), {f"{table}.weight": new}, lambda w: (new, w)
    yield save("lm_head"), {"lm_head.weight": new}, lambda w: (w, new)
    yield save("head"), {"lm_head.weight": new}, lambda w: (w, new)
    yield save(name, "lm_head"), {f"{table}.weight": new, "lm_head.weight": other}, lambda w: (new, other)
    yield save(name), {f"{table}.weight": new, "lm_head.weight": other}, lambda w: (new, other)
    embedding = {f"{table}.lora_embedding_A": b.T.copy(), f"{table}.lora_embedding_B": a.T.copy()}
    head = {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}
    # Whole names: they are adapted although they have no layer.
    yield target(table), embedding, lambda w: (w + changed, w)
    yield target("lm_head"), head, lambda w: (w, w + changed)
    yield target(table, "lm_head"), embedding | head, lambda w: (w + changed, w + changed)
    if family != "gpt2":
        # PEFT writes down the one and adds the other.
        fields = {**target(table), "ensure_weight_tying": True}
        yield fields, embedding | head, lambda w: (w + changed, w + changed)
        magnitudes = {f"{table}.lora_magnitude_vector": drawn(7, 8), "lm_head.lora_magnitude_vector": drawn(8, 20)}
        rows = lambda w: (w + changed) / np.linalg.norm(w + changed, axis=1, keepdims=True)  # noqa: E731
        columns = lambda w: (w + changed) / np.linalg.norm(w + changed, axis=0)  # noqa: E731
        yield (
            {**fields, "use_dora": True},
            {
                **embedding,
                **head,
                **magnitudes,
                "model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.ones(8, np.float32),
            },
            lambda w: (columns(w) * drawn(7, 8), rows(w) * drawn(8, 20)[:, None]),
        )


@pytest.mark.parametrize("family", rest_slow(CONFIGS))
def test_load_adapted_unties_a_model_whose_tables_an_adapter_changes_apart(family, tmp_path):
    table = model(family, tmp_path / "model")
    for i, (fields, tensors, change) in enumerate(one_of_two(family)):
        folder = write(tmp_path / f"adapter {i}", family, fields, tensors)
        with pytest.raises(ValueError, match=r"adapter_(config|model).*untie the model by nn\.untie_causal_lm"):
            interop.load_peft_adapter(folder, CONFIGS[family])
        config, params = language.load_adapted(tmp_path / "model", folder)
        assert not config.tied
        for got, wanted in zip((params["embed"]["embedding"], params["head"]["kernel"].T), change(table), strict=True):
            # Norms and products are in other orders than NumPy's.
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
        # The very adapter, for somebody who has untied the model.
        again = interop.load_peft_adapter(folder, CONFIGS[family].replace(tied=False))
        assert again.settings == interop.load_peft_adapter(folder, CONFIGS[family], untie=True).settings


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_load_adapted_refuses_a_stored_base_that_is_not_the_model_s(name, tmp_path):
    table, a, b = model("qwen2", tmp_path / "model"), drawn(5, 2, 8), drawn(6, 20, 2)
    if name == "lm_head":
        factors = {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}
    else:
        factors = {f"{name}.lora_embedding_A": b.T.copy(), f"{name}.lora_embedding_B": a.T.copy()}
    fields = {"target_modules": ["q_proj", name]}
    for i, stored in enumerate((table, table.astype(np.float16))):
        folder = write(tmp_path / f"{i}", "qwen2", fields, factors | {f"{name}.base_layer.weight": stored})
        language.load_adapted(tmp_path / "model", folder)
    other = np.where(np.arange(20)[:, None] == 19, table + 1, table)
    folder = write(tmp_path / "other", "qwen2", fields, factors | {f"{name}.base_layer.weight": other})
    with pytest.raises(ValueError, match=rf"{name}\.base_layer\.weight: differs from the model's"):
        language.load_adapted(tmp_path / "model", folder)


def test_load_adapted_reads_a_saved_head_that_comes_with_its_wrapper(tmp_path):
    table, new = model("qwen2", tmp_path / "model"), drawn(3, 20, 8)
    # What PEFT writes with save_embedding_layers=True; it reads nothing of the second.
    tensors = {"lm_head.weight": new, "lm_head.modules_to_save.weight": new + 1, "model.embed_tokens.weight": table}
    good, other = (
        write(
            tmp_path / name, "qwen2", {"modules_to_save": ["lm_head"]}, tensors | {"lm_head.original_module.weight": w}
        )
        for name, w in (("good", table), ("other", table + 1))
    )
    config, params = language.load_adapted(tmp_path / "model", good)
    assert not config.tied
    np.testing.assert_array_equal(params["embed"]["embedding"], table)
    np.testing.assert_array_equal(params["head"]["kernel"], new.T)
    with pytest.raises(ValueError, match=r"lm_head\.original_module\.weight: differs from the model's"):
        language.load_adapted(tmp_path / "model", other)


def test_all_biases_of_a_model_without_one_are_none(tmp_path):
    folder = write(tmp_path / "adapter", "llama", {"bias": "all"}, {})
    assert interop.load_peft_adapter(folder, CONFIGS["llama"]).settings.keys() == {"layers/attn/q/kernel"}


def test_merge_adapter_writes_an_untied_model(tmp_path):
    table, new = model("qwen2", tmp_path / "model"), drawn(3, 20, 8)
    folder = write(tmp_path / "adapter", "qwen2", {"modules_to_save": ["lm_head"]}, {"lm_head.weight": new})
    language.merge_adapter(tmp_path / "model", folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    config, params = interop.load_causal_lm(tmp_path / "out")
    assert not config.tied
    np.testing.assert_array_equal(params["embed"]["embedding"], table)
    np.testing.assert_array_equal(params["head"]["kernel"], new.T)


@pytest.mark.slow
def test_load_adapted_keeps_the_type_of_a_table_that_an_adapter_holds_in_another(tmp_path):
    params = nn.init_params(jax.random.key(0), CONFIGS["llama"], jnp.bfloat16)
    interop.save_causal_lm(tmp_path / "model", CONFIGS["llama"], params)
    tensors = {"model.embed_tokens.weight": drawn(3, 20, 8)}
    folder = write(tmp_path / "adapter", "llama", {"modules_to_save": ["embed_tokens"]}, tensors)
    _, got = language.load_adapted(tmp_path / "model", folder)
    assert {str(x.dtype) for x in jax.tree.leaves(got)} == {"bfloat16"}


@every_family
@pytest.mark.parametrize("how", ["named", "ensured", "loose"])
def test_load_peft_adapter_reads_equal_tables_as_one(family, how, tmp_path):
    table, new = TABLE[family], drawn(3, 20, 8)
    fields = {
        "named": {"modules_to_save": [table, "lm_head"]},
        # As PEFT writes it; of GPT-2, whose table it does not know, too.
        "ensured": {"modules_to_save": [table], "ensure_weight_tying": True},
        # With save_embedding_layers.
        "loose": {},
    }[how]
    tensors = {f"{table}.weight": new, "lm_head.weight": new}
    read = interop.load_peft_adapter(write(tmp_path / "in", family, fields, tensors), CONFIGS[family], untie=True)
    assert read.config == CONFIGS[family]
    assert read.settings["embed/embedding"] == adapters.Full()
    assert "head/kernel" not in read.settings
    np.testing.assert_array_equal(read.trainable["embed"]["embedding"]["full"], new)
    interop.save_peft_adapter(tmp_path / "out", read.config, read.trainable, read.settings, fields=read.fields)
    again = interop.load_peft_adapter(tmp_path / "out", CONFIGS[family])
    chex.assert_trees_all_equal(again.trainable, read.trainable)


def test_load_peft_adapter_refuses_one_loose_table_of_a_tied_model(tmp_path):
    folder = write(tmp_path / "in", "llama", {}, {"lm_head.weight": drawn(3, 20, 8)})
    with pytest.raises(ValueError, match=r"no target has: \['base_model.model.lm_head.weight'\]"):
        interop.load_peft_adapter(folder, CONFIGS["llama"], untie=True)
    untied = interop.load_peft_adapter(folder, CONFIGS["llama"].replace(tied=False))
    np.testing.assert_array_equal(untied.trainable["head"]["kernel"]["full"], drawn(3, 20, 8).T)


@every_family
def test_save_peft_adapter_writes_a_trained_table_that_is_tied_in_both_places(family, tmp_path):
    config = CONFIGS[family]
    q = "attn/qkv" if family == "gpt2" else "attn/q"
    settings = {q: adapters.LoRA(2, 4.0), "embed/embedding": adapters.Full()}
    trainable = adapters.init(jax.random.key(1), nn.init_params(jax.random.key(0), config), settings)
    interop.save_peft_adapter(tmp_path / "out", config, trainable, settings)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["modules_to_save"] == [TABLE[family], "lm_head"]
    assert fields["ensure_weight_tying"] is True
    stored = interop.read_header(tmp_path / "out" / "adapter_model.safetensors")[0]
    for name in (TABLE[family], "lm_head"):
        got = stored[f"base_model.model.{name}.weight"].read()
        np.testing.assert_array_equal(got, trainable["embed"]["embedding"]["full"])
    back = interop.load_peft_adapter(tmp_path / "out", config)
    chex.assert_trees_all_equal(back.trainable, trainable)
    # Of a model with a head of its own, the table is the table.
    interop.save_peft_adapter(tmp_path / "untied", config.replace(tied=False), trainable, settings)
    fields = json.loads((tmp_path / "untied" / "adapter_config.json").read_text())
    assert fields["modules_to_save"] == [TABLE[family]]
    assert not fields.get("ensure_weight_tying")


@pytest.mark.parametrize("method", [adapters.LoRA, adapters.DoRA])
def test_save_peft_adapter_refuses_low_rank_updates_of_a_tied_table(method, tmp_path):
    settings = {"attn/q": method(2, 4.0), "embed": method(2, 4.0)}
    trainable = adapters.init(jax.random.key(1), nn.init_params(jax.random.key(0), CONFIGS["llama"]), settings)
    with pytest.raises(ValueError, match="settings: the embedding is tied to the head"):
        interop.save_peft_adapter(tmp_path / "out", CONFIGS["llama"], trainable, settings)


@pytest.mark.slow
def test_untie_causal_lm_changes_no_logits():
    config, tokens = CONFIGS["gpt2"], jnp.array([[1, 5, 9]])
    params = nn.init_params(jax.random.key(0), config)
    untied, own = nn.untie_causal_lm(config, params)
    assert untied == config.replace(tied=False)
    assert nn.untie_causal_lm(untied, own) == (untied, own)
    wanted, got = (nn.causal_lm_apply(c, p, tokens).logits for c, p in ((config, params), (untied, own)))
    np.testing.assert_allclose(got, wanted, atol=1e-6)
