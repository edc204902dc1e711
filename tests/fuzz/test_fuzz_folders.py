"""Two hundred damaged model and adapter folders: each is refused in one line, or read as the file says."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from subspace_jax import interop

from .mutations import bounded, copy_folder, damage_bytes, damage_text, mutate_fields, refusal, write_json

pytestmark = pytest.mark.slow

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LANGUAGE = ("gpt2", "llama", "llama31", "llama_sharded", "mistral", "qwen2")
VISION = ("vit", "vit_timm", "deit_distilled", "swin", "swin_timm", "resnet", "resnet_timm", "clip_vision_timm")
DUAL = ("clip", "siglip")
ADAPTERS = tuple(str(p.parent.relative_to(GOLDEN / "peft")) for p in (GOLDEN / "peft").rglob("adapter_config.json"))
# Fields that say nothing of what the model computes here.
WITHOUT_EFFECT = {
    "add_cross_attention", "architectures", "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop",
    "custom_load", "dtype", "drop_path_rate", "embd_pdrop", "encoder_stride", "first_conv", "fixed_input_size",
    "hidden_dropout_prob", "id2label", "initializer_factor", "initializer_range", "label2id", "license",
    "logit_scale_init_value", "max_window_layers", "model_type", "num_features", "out_features", "out_indices",
    "pretrained_cfg", "pretraining_tp", "reorder_and_upcast_attn", "resid_pdrop", "stage_names", "summary_activation",
    "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "tag", "torch_dtype",
    "transformers_version", "use_cache", "use_sliding_window", "rope_scaling",
}  # fmt: skip


def opened(family, folder):
    """Reads a folder; returns its config."""
    read = {"language": interop.load_causal_lm, "vision": interop.load_vision, "dual": interop.load_dual}[family]
    return read(folder)[0]


def case(rng):
    """Draws a golden folder; returns its kind and path."""
    family = ("language", "vision", "dual")[rng.choice(3, p=[0.5, 0.35, 0.15])]
    names = {"language": LANGUAGE, "vision": VISION, "dual": DUAL}[family]
    parent = GOLDEN / ("interop" if family == "language" else "interop_vision")
    return family, parent / names[rng.integers(len(names))]


def check(number, what, read, wrong):
    """Reads a damaged folder; returns what was read, or None where it was refused as it should be."""
    try:
        with bounded():
            return read()
    except AssertionError as error:
        wrong.append(f"{number} ({what}): {error}")
    except Exception as error:
        if fault := refusal(error):
            wrong.append(f"{number} ({what}): {fault}")
    return None


def test_models_with_100_mutated_configs_are_refused_in_one_line_or_read_as_the_field_says(tmp_path):
    rng, wrong = np.random.default_rng(0), []
    for number in range(100):
        family, source = case(rng)
        folder = copy_folder(source, tmp_path / str(number))
        file = folder / "config.json"
        if rng.random() < 0.15:
            file.write_bytes(damage_text(rng, file.read_text()))
            what, fields = "config.json damaged", None
        else:
            fields, what = mutate_fields(rng, json.loads(file.read_text()))
            write_json(file, fields)
        what = f"{source.name}: {what}"
        config = check(number, what, lambda: opened(family, folder), wrong)  # noqa: B023
        original = opened(family, source)
        field = what.split(" = ")[0].split()[-1].split(".")
        nothing = what.endswith("(NoneType)") or "removed" in what  # None and absent mean the default
        effect = not nothing and WITHOUT_EFFECT.isdisjoint(field)
        unchanged = fields == json.loads((source / "config.json").read_text())
        if config is not None and config == original and effect and not unchanged:
            wrong.append(f"{number} ({what}): passed over in silence")
    assert not wrong, "\n".join(wrong)


def test_models_with_60_damaged_tensor_files_are_refused_or_read_as_the_reference_reads_them(tmp_path):
    rng, wrong = np.random.default_rng(1), []
    for number in range(60):
        family, source = case(rng)
        folder = copy_folder(source, tmp_path / str(number))
        files = sorted(folder.glob("*.safetensors*"))
        file = files[rng.integers(len(files))]
        raw = file.read_bytes()
        if file.suffix == ".json":
            file.write_bytes(damage_text(rng, raw.decode()))
        else:  # mostly in the header, where the structure is
            size = 8 + int.from_bytes(raw[:8], "little") if rng.random() < 0.8 else len(raw)
            file.write_bytes(damage_bytes(rng, raw[:size]) + raw[size:])
        what = f"{source.name}: {file.name} damaged"
        config = check(number, what, lambda: opened(family, folder), wrong)  # noqa: B023
        if config is None:
            continue
        try:
            expected = {}
            for part in sorted(folder.glob("*.safetensors")):
                expected |= load_file(part)
            found = {name: np.asarray(tensor.read()) for name, tensor in interop.open_folder(folder).items()}
            assert found.keys() <= expected.keys()
            assert all(found[name].tobytes() == expected[name].tobytes() for name in found)
        except Exception as error:
            wrong.append(f"{number} ({what}): read, but the reference says {type(error).__name__} {str(error)[:100]}")
    assert not wrong, "\n".join(wrong)


def test_60_mutated_adapters_are_refused_in_one_line_or_read_with_the_fields_they_have(tmp_path):
    rng, wrong = np.random.default_rng(2), []
    for number in range(60):
        name = ADAPTERS[rng.integers(len(ADAPTERS))]
        source = GOLDEN / "peft" / name
        folder = copy_folder(source, tmp_path / str(number))
        config = interop.read_config(GOLDEN / "interop" / name.split("/")[0])
        file = folder / "adapter_config.json"
        fields, what, draw = json.loads(file.read_text()), "", rng.random()
        if draw < 0.7:
            fields, what = mutate_fields(rng, fields)
            write_json(file, fields)
        elif draw < 0.85:
            file.write_bytes(damage_text(rng, file.read_text()))
            what = "adapter_config.json damaged"
        else:
            tensors = folder / "adapter_model.safetensors"
            raw = tensors.read_bytes()
            size = 8 + int.from_bytes(raw[:8], "little")
            tensors.write_bytes(damage_bytes(rng, raw[:size]) + raw[size:])
            what = "the header of its tensors damaged"
        what = f"{name}: {what}"
        read = check(number, what, lambda: interop.load_peft_adapter(folder, config), wrong)  # noqa: B023
        if read is None:
            continue
        before = interop.load_peft_adapter(source, config)
        for field in ("r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern"):
            changed = fields.get(field) != before.fields.get(field) and fields.get(field)
            if changed and read.settings == before.settings:
                wrong.append(f"{number} ({what}): passed over in silence")
    assert not wrong, "\n".join(wrong)
