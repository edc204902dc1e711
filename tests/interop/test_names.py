import jax
import pytest

from subspace_jax import interop, nn
from subspace_jax.interop import Place


def test_modules_and_places_are_one_to_one(model, checkpoint):
    config = interop.read_config(checkpoint(model))
    places, names = interop.module_places(config), interop.module_names(config)
    assert len(places) == len(names)
    assert all(names[place] == name for name, place in places.items())
    stored = {name.rsplit(".", 1)[0] for name in interop.open_folder(checkpoint(model))}
    assert stored == set(places)


def test_tensors_are_those_of_the_file_and_cover_every_parameter_once(model, checkpoint):
    config = interop.read_config(checkpoint(model))
    tensors = interop.tensor_names(config)
    assert {t.name for t in tensors} == interop.open_folder(checkpoint(model)).keys()
    flat = jax.tree_util.tree_leaves_with_path(nn.param_shapes(config))
    wanted = {
        (tuple(k.key for k in path), layer)
        for path, leaf in flat
        for layer in (range(leaf.shape[0]) if path[0].key == "layers" else [None])
    }
    got = [(t.place.path, t.place.layer) for t in tensors]
    assert len(got) == len(set(got))
    assert set(got) == wanted


def test_names_of_some_modules():
    llama = interop.module_places(nn.CausalLMConfig.llama3("8b"))
    assert llama["model.layers.3.self_attn.q_proj"] == Place(("layers", "attn", "q"), 3)
    assert llama["model.layers.31.mlp.down_proj"] == Place(("layers", "mlp", "down"), 31)
    assert llama["lm_head"] == Place(("head",))
    assert next(iter(llama)) == "model.embed_tokens"
    assert list(llama)[-2:] == ["model.norm", "lm_head"]
    gpt2 = interop.module_places(nn.CausalLMConfig.gpt2())
    assert gpt2["transformer.h.11.attn.c_attn"] == Place(("layers", "attn", "qkv"), 11)
    assert "lm_head" not in gpt2
    transposed = {t.name: t.transposed for t in interop.tensor_names(nn.CausalLMConfig.gpt2(tied=False))}
    assert not transposed["transformer.h.0.mlp.c_fc.weight"]
    assert transposed["lm_head.weight"]


def test_parameters_that_a_family_has_no_name_for_are_refused():
    with pytest.raises(ValueError, match=r"family 'gpt2' has no module for .*layers/mlp/gate/kernel"):
        interop.tensor_names(nn.CausalLMConfig.gpt2(gated_mlp=True))
