"""Merged adapters in the installed PEFT, beside its own ``add_weighted_adapter``; by ``make test-peers``."""

import importlib.util
import warnings

import jax
import numpy as np
import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the peers come with the extra bench"),
]

WEIGHTS = (0.7, -0.4, 0.5)
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of random weights, and three adapters of PEFT of different ranks, scales and modules."""
    import peft
    import torch
    import transformers

    out = tmp_path_factory.mktemp("peft")
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        vocab_size=40,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(out / "base")
    asked = {
        "a": {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
        "b": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 1}},
        "c": {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]},
        "dora": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "use_dora": True},
    }
    for name, fields in asked.items():
        model = peft.get_peft_model(opened(out / "base"), peft.LoraConfig(task_type="CAUSAL_LM", **fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(out / name)
    return out


def opened(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model):
    import torch

    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


def with_adapter(base, folder):
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return logits(peft.PeftModel.from_pretrained(opened(base), folder))


def ours(folders, out, names, weights, how=None):
    from subspace_jax.merge.adapter_folders import merge_adapter_folders

    with jax.numpy_dtype_promotion("standard"):
        return merge_adapter_folders([folders / n for n in names], out, weights, how, base=folders / "base")


def theirs(folders, **options):
    import peft

    names = ("a", "b", "c")
    model = peft.PeftModel.from_pretrained(opened(folders / "base"), folders / "a", adapter_name="a")
    for name in names[1:]:
        model.load_adapter(folders / name, adapter_name=name)
    model.add_weighted_adapter(list(names), list(WEIGHTS), "merged", **options)
    model.set_adapter("merged")
    return logits(model)


def test_peft_computes_with_a_merge_what_it_computes_with_its_concatenation(folders, tmp_path):
    ours(folders, tmp_path / "out", ("a", "b", "c"), WEIGHTS)
    got = with_adapter(folders / "base", tmp_path / "out")
    assert np.abs(got - logits(opened(folders / "base"))).max() > 0.01
    np.testing.assert_allclose(got, theirs(folders, combination_type="cat"), atol=2e-5, rtol=2e-5)


def test_a_merge_of_a_lower_rank_is_that_of_peft_by_dense_svds(folders, tmp_path):
    from subspace_jax.merge.adapters import AdapterMerge

    report = ours(folders, tmp_path / "out", ("a", "b", "c"), WEIGHTS, AdapterMerge(rank=4))
    assert report.error() > 0.05
    wanted = theirs(folders, combination_type="svd", svd_rank=4)
    np.testing.assert_allclose(with_adapter(folders / "base", tmp_path / "out"), wanted, atol=1e-4, rtol=1e-4)


def test_peft_computes_with_a_merge_of_dora_what_the_sum_of_its_merged_weights_gives(folders, tmp_path):
    import peft
    import torch

    ours(folders, tmp_path / "out", ("a", "dora"), (0.6, 0.7))
    model, base = opened(folders / "base"), opened(folders / "base").state_dict()
    with torch.no_grad():
        for name, weight in (("a", 0.6), ("dora", 0.7)):
            tuned = peft.PeftModel.from_pretrained(opened(folders / "base"), folders / name).merge_and_unload()
            for path, parameter in model.named_parameters():
                parameter.add_(weight * (tuned.state_dict()[path] - base[path]))
    np.testing.assert_allclose(with_adapter(folders / "base", tmp_path / "out"), logits(model), atol=5e-5, rtol=5e-5)
