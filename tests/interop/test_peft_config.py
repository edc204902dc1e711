"""``adapter_config.json`` of others: what is meant by it, and what is refused by name."""

import json
import logging

import jax
import numpy as np
import pytest

from subspace_jax import adapters, interop, nn
from subspace_jax.interop.peft import rules as peft_rules

CONFIG = nn.CausalLMConfig.gpt2(20, 8, 3, 2, max_length=16)
PREFIX = "base_model.model.transformer.h"
MODULES = [
    f"model.layers.{i}.{name}"
    for i in range(12)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.1.up_proj")
]


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def factors(layers=(0, 1, 2), rank=2):
    names = [(i, f"{PREFIX}.{i}.attn.c_attn") for i in layers]
    a = {f"{name}.lora_A.weight": drawn(i, rank, 8) for i, name in names}
    return a | {f"{name}.lora_B.weight": drawn(10 + i, 24, rank) for i, name in names}


def write(folder, fields=(), tensors=None, *, text=None):
    folder.mkdir(exist_ok=True)
    made = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], **dict(fields)}
    (folder / "adapter_config.json").write_text(json.dumps(made) if text is None else text)
    tensors = factors() if tensors is None else tensors
    shapes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    interop.write_safetensors(folder / "adapter_model.safetensors", shapes, tensors.values())
    return folder


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "null", '"text"', "[" * 100_000, '{"r": ' + "[" * 50_000, '{"r": ' + "9" * 5000 + "}", "\x00"],
    ids=range(9),
)
def test_load_peft_adapter_names_a_config_that_is_no_object(text, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json: "):
        interop.load_peft_adapter(write(tmp_path / "a", text=text), CONFIG)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "r": [0, -1, 2.0, 1e9, True, "2", [2], {}],
        "lora_alpha": [True, "4", float("nan"), float("inf"), 10**400, [4]],
        "lora_dropout": [-0.1, 1.0, 2, "0.1", True],
        "target_modules": [[1], [["c_attn"]], 3, {"c_attn": 1}, True],
        "exclude_modules": [[1], 3],
        "modules_to_save": ["lm_head", [1], 3, {"lm_head": 1}],
        "layers_to_transform": [["0"], "0", 1.0, [1.5], True],
        "layers_pattern": [[1], 3],
        "rank_pattern": [{"c_attn": 0}, {"c_attn": 2.5}, {"c_attn": "2"}, [["c_attn", 2]], "c_attn"],
        "alpha_pattern": [{"c_attn": "2"}, {"c_attn": None}, ["c_attn"]],
        "bias": ["some", True, ["none"], 1],
        "use_dora": ["yes", 1, [True]],
        "use_rslora": ["no", 0],
        "init_lora_weights": [1, ["gaussian"], "what"],
        "ensure_weight_tying": ["yes"],
    }.items(),
)
def test_load_peft_adapter_names_the_field_of_the_wrong_type(name, values, tmp_path):
    for value in values:
        with pytest.raises(ValueError, match=rf"adapter_config\.json: {name}: expected .*, got "):
            interop.load_peft_adapter(write(tmp_path / "a", {name: value}), CONFIG)


def test_load_peft_adapter_makes_no_array_of_a_rank_that_no_tensor_has(tmp_path):
    # 3 x 8 x 1e9 float32 would be 96 GB.
    for fields in ({"r": 10**9}, {"rank_pattern": {r"h\.2\.attn\.c_attn": 10**9}}):
        with pytest.raises(ValueError, match=r"expected \(1000000000, 8\), got \(2, 8\)"):
            interop.load_peft_adapter(write(tmp_path / "a", fields), CONFIG)


SLOW = "((.|.)+)+[!?]"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"rank_pattern": {SLOW: 2}},
        {"alpha_pattern": {SLOW: 2}},
        {"layers_pattern": SLOW, "layers_to_transform": [0]},
        {"modules_to_save": [SLOW]},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize(
    "pattern",
    [SLOW, "(", "a{2,1}", "x" * 30_000, "(" * 9000 + ")" * 9000, "(?<n>a)(?P=m)", "(a{60000}){60000}", "(?:(?R))*"],
    ids=range(8),
)
def test_load_peft_adapter_bounds_regular_expressions(fields, pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_rules, "_SECONDS", 0.05)
    fields = json.loads(json.dumps(fields).replace(json.dumps(SLOW), json.dumps(pattern)))
    name = next(iter(fields))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {name}: (?s:.{{1,400}})$"):
        interop.load_peft_adapter(write(tmp_path / "a", fields), CONFIG)


def test_ensure_weight_tying_bounds_its_regular_expression(tmp_path, monkeypatch):
    monkeypatch.setattr(peft_rules, "_SECONDS", 0.05)
    fields = {"ensure_weight_tying": True, "target_modules": SLOW}
    with pytest.raises(ValueError, match=r"adapter_config\.json: target_modules: matching"):
        interop.load_peft_adapter(write(tmp_path / "a", fields), CONFIG)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "Gaussian", "orthogonal", "eva", "mica"])
def test_load_peft_adapter_reads_starts_that_leave_the_base(start, tmp_path):
    read = interop.load_peft_adapter(write(tmp_path / "a", {"init_lora_weights": start}), CONFIG)
    a = read.trainable["layers"]["attn"]["qkv"]["kernel"]["a"]
    np.testing.assert_array_equal(a[1], factors()[f"{PREFIX}.1.attn.c_attn.lora_A.weight"].T)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_load_peft_adapter_says_what_to_do_about_starts_that_change_the_base(start, tmp_path):
    with pytest.raises(ValueError, match=r"init_lora_weights: .*path_initial_model_for_weight_conversion"):
        interop.load_peft_adapter(write(tmp_path / "a", {"init_lora_weights": start}), CONFIG)


@pytest.mark.parametrize("name", ["kasa_config", "monteclora_config", "velora_config", "use_bdlora", "arrow_config"])
def test_load_peft_adapter_refuses_layers_of_another_kind(name, tmp_path):
    with pytest.raises(ValueError, match=name):
        interop.load_peft_adapter(write(tmp_path / "a", {name: {"beta": 1}}), CONFIG)


def test_load_peft_adapter_logs_unknown_fields_that_are_set(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        interop.load_peft_adapter(write(tmp_path / "a", {"new_trick": {"x": 1}, "old": None, "off": False}), CONFIG)
    assert "adapter_config.json" in caplog.text
    assert "['new_trick']" in caplog.text
    caplog.clear()
    known = {
        "task_type": "CAUSAL_LM",
        "peft_version": "0.21.2",
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
    }
    interop.load_peft_adapter(write(tmp_path / "a", known), CONFIG)
    assert not caplog.text


def test_load_peft_adapter_refuses_tensors_of_integers(tmp_path):
    name = f"{PREFIX}.1.attn.c_attn.lora_B.weight"
    for dtype in (np.int8, np.int64, np.uint8, np.bool_):
        folder = write(tmp_path / "a", tensors=factors() | {name: np.ones((24, 2), dtype)})
        with pytest.raises(ValueError, match=rf"safetensors: {name}: expected floating point, got {np.dtype(dtype)}"):
            interop.load_peft_adapter(folder, CONFIG)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("attn.c_attn.lora_A.weight", "attn.c_attn.lora_A.default.weight"),
        ("attn.c_attn.lora_magnitude_vector", "attn.c_attn.lora_magnitude_vector.weight"),
        ("attn.c_attn.lora_magnitude_vector.default", "attn.c_attn.lora_magnitude_vector.default.weight"),
    ],
)
def test_load_peft_adapter_refuses_two_tensors_of_one_name(first, second, tmp_path):
    first, second = f"{PREFIX}.0.{first}", f"{PREFIX}.0.{second}"
    folder = write(tmp_path / "a", tensors=factors() | {first: drawn(0, 2, 8), second: drawn(1, 2, 8)})
    with pytest.raises(ValueError, match=f"{first}.*{second}|{second}.*{first}"):
        interop.load_peft_adapter(folder, CONFIG)


def test_load_peft_adapter_reads_the_name_of_the_adapter_away_and_no_part_of_a_module(tmp_path):
    tensors = {name.replace(".weight", ".default.weight"): value for name, value in factors().items()}
    read = interop.load_peft_adapter(write(tmp_path / "a", tensors=tensors), CONFIG)
    assert read.trainable["layers"]["attn"]["qkv"]["kernel"]["b"].shape == (3, 2, 24)
    strange = {name.replace(".c_attn.", ".default_c_attn."): value for name, value in factors().items()}
    with pytest.raises(ValueError, match="is missing"):
        interop.load_peft_adapter(write(tmp_path / "a", tensors=strange), CONFIG)


def test_load_peft_adapter_says_where_the_adapter_of_a_run_is(tmp_path):
    write(tmp_path / "adapter")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"this is a run; its adapter is .*/adapter$"):
        interop.load_peft_adapter(tmp_path, CONFIG)
    with pytest.raises(FileNotFoundError, match="expected the folder of a PEFT adapter"):
        interop.load_peft_adapter(tmp_path / "checkpoints", CONFIG)


def biases(names):
    return {
        f"base_model.model.transformer.{name}.bias": drawn(i, 24 if "attn" in name else 8)
        for i, name in enumerate(names)
    }


def test_load_peft_adapter_reads_the_biases_of_adapted_modules_and_writes_them_again(tmp_path):
    own = biases([f"h.{i}.attn.c_attn.base_layer" for i in range(3)])
    folder = write(tmp_path / "a", {"bias": "lora_only"}, factors() | own)
    read = interop.load_peft_adapter(folder, CONFIG)
    np.testing.assert_array_equal(read.trainable["layers"]["attn"]["qkv"]["bias"]["full"], np.stack(list(own.values())))
    for fields in (None, read.fields):
        interop.save_peft_adapter(tmp_path / "b", CONFIG, read.trainable, read.settings, fields=fields)
        assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["bias"] == "lora_only"
        stored = interop.read_header(tmp_path / "b" / "adapter_model.safetensors")[0]
        assert stored.keys() == (factors() | own).keys()
    with pytest.raises(ValueError, match=r"c_attn\.base_layer\.bias is missing"):
        interop.load_peft_adapter(write(tmp_path / "c", {"bias": "lora_only"}), CONFIG)


def test_load_peft_adapter_refuses_biases_of_some_layers(tmp_path):
    own = biases(["h.1.attn.c_attn.base_layer"])
    folder = write(tmp_path / "a", {"bias": "lora_only", "layers_to_transform": [1]}, factors([1]) | own)
    with pytest.raises(ValueError, match="bias: 'lora_only' of 1 among 3 layers"):
        interop.load_peft_adapter(folder, CONFIG)


def test_load_peft_adapter_reads_dora_of_some_layers(tmp_path):
    names = {f"{PREFIX}.1.attn.c_attn.lora_magnitude_vector": drawn(5, 24)}
    folder = write(tmp_path / "a", {"use_dora": True, "layers_to_transform": 1}, factors([1]) | names)
    read = interop.load_peft_adapter(folder, CONFIG)
    assert read.settings["layers/attn/qkv/kernel"].rank == (0, 2, 0)
    interop.save_peft_adapter(tmp_path / "b", CONFIG, read.trainable, read.settings)
    assert interop.read_header(tmp_path / "b" / "adapter_model.safetensors")[0].keys() == (factors([1]) | names).keys()


def test_match_modules_passes_over_the_layers_of_modules_that_are_named_in_full():
    fields = {"target_modules": ["q_proj", "model.layers.3.self_attn.v_proj"], "layers_to_transform": [0]}
    expected = ["model.layers.0.self_attn.q_proj", "model.layers.3.self_attn.v_proj"]
    assert interop.match_modules(fields, MODULES) == expected


def test_match_modules_takes_the_first_number_for_the_layer():
    fields = {"target_modules": ["up_proj"], "layers_to_transform": [1]}
    assert interop.match_modules(fields, MODULES) == ["model.layers.1.mlp.experts.1.up_proj"]
    assert len(interop.match_modules({**fields, "layers_to_transform": []}, MODULES)) == 12
    # The pattern has a group of its own.
    fields["layers_pattern"] = ["nothing", "(layers|h)"]
    assert interop.match_modules(fields, MODULES) == ["model.layers.1.mlp.experts.1.up_proj"]
    # PEFT wants a part before the one that is numbered.
    with pytest.raises(ValueError, match="matches none"):
        interop.match_modules({"target_modules": ["conv"], "layers_to_transform": [0]}, ["layers.0.conv"])


def test_match_modules_refuses_fields_that_peft_refuses():
    for fields in ({"layers_pattern": "layers"}, {"layers_pattern": "h", "target_modules": ".*q_proj"}):
        with pytest.raises(ValueError, match="layers_pattern"):
            interop.match_modules({"target_modules": ["q_proj"], **fields}, MODULES)


def test_modules_that_are_saved_are_named_by_any_end_of_their_path():
    names = ["classifier.1", "fc", "model.lm_head"]
    assert peft_rules.saved_modules({"modules_to_save": ["head"]}, names) == ["model.lm_head"]
    assert peft_rules.saved_modules({"modules_to_save": ["classifier", "score"]}, names) == ["classifier.1"]
    assert peft_rules.saved_modules({}, names) == []


GPT2_MODULES = [f"transformer.h.{i}.{name}" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (lambda name: "c_attn" in name, ["c_attn"]),
        (lambda name: "c_proj" in name, ["c_proj"]),
        (lambda name: "mlp" in name, ["mlp.c_proj"]),
        (lambda name: "attn" in name, ["c_attn", "attn.c_proj"]),
        (lambda name: ".1.attn.c_attn" in name, ["transformer.h.1.attn.c_attn"]),
        (lambda name: "lm_head" in name, ["lm_head"]),
    ],
)
def test_shortest_names_mean_the_chosen_modules_and_no_other(chosen, expected):
    modules = [*GPT2_MODULES, "lm_head"]
    found = peft_rules.shortest_names(filter(chosen, modules), modules)
    assert found == expected
    assert interop.match_modules({"target_modules": found}, modules) == list(filter(chosen, modules))


@pytest.mark.parametrize(
    ("settings", "fields"),
    [
        ({"attn/qkv": adapters.LoRA(2, 4.0)}, {"target_modules": ["c_attn"], "rank_pattern": {}}),
        (
            {"mlp/down": adapters.LoRA(4, 4.0), "**": adapters.LoRA(2, 4.0)},
            {
                "target_modules": ["wte", "wpe", "c_attn", "c_proj", "c_fc", "lm_head"],
                "rank_pattern": {r"mlp\.c_proj": 4},
                "alpha_pattern": {},
            },
        ),
        (
            {"attn/qkv": adapters.LoRA((2, 0, 2), 4.0), "attn/out": adapters.LoRA((2, 2, 1), 4.0)},
            {
                "target_modules": ["transformer.h.0.attn.c_attn", "attn.c_proj", "transformer.h.2.attn.c_attn"],
                "rank_pattern": {r"transformer\.h\.2\.attn\.c_proj": 1},
            },
        ),
    ],
)
def test_fields_name_the_modules_of_a_language_model_by_their_ends(settings, fields):
    config = CONFIG.replace(tied=False)
    shapes = jax.eval_shape(lambda params: adapters.init(jax.random.key(0), params, settings), nn.param_shapes(config))
    made = interop.peft_fields(config, shapes, settings)
    assert {name: made[name] for name in fields} == fields


@pytest.mark.parametrize("target", ["c_attn", "c_proj", "attn.c_proj", "all-linear", r".*\.(c_attn|c_fc)", "wpe"])
def test_target_rules_mean_what_peft_adapts(target):
    settings = dict.fromkeys(interop.target_rules(CONFIG, target), adapters.LoRA(2, 4.0))
    shapes = jax.eval_shape(lambda params: adapters.init(jax.random.key(0), params, settings), nn.param_shapes(CONFIG))
    modules = [name for name in interop.module_places(CONFIG) if "ln_" not in name]
    linear = [name for name in modules if name not in ("transformer.wte", "transformer.wpe")]
    targets = target if target == "all-linear" or "(" in target else [target]
    expected = interop.match_modules({"target_modules": targets}, modules, linear=linear)
    assert interop.match_modules(interop.peft_fields(CONFIG, shapes, settings), modules) == expected


def test_target_rules_have_no_weights_for_other_texts():
    for target in ("attn/qkv", "re:layers/.*", "**", "lm_head", "query", "ln_1"):
        assert interop.target_rules(CONFIG, target) == []
