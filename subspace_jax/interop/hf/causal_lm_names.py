"""Names of modules and tensors of causal language models in Hugging Face checkpoints."""

from subspace_jax.interop.tensors import Path, Place, PyTree, TensorName, at
from subspace_jax.nn import CausalLMConfig, causal_lm_specs

_GPT2 = {
    "transformer.wte": "embed",
    "transformer.wpe": "position",
    "transformer.h.{}.ln_1": "layers/attn_norm",
    "transformer.h.{}.attn.c_attn": "layers/attn/qkv",
    "transformer.h.{}.attn.c_proj": "layers/attn/out",
    "transformer.h.{}.ln_2": "layers/mlp_norm",
    "transformer.h.{}.mlp.c_fc": "layers/mlp/up",
    "transformer.h.{}.mlp.c_proj": "layers/mlp/down",
    "transformer.ln_f": "norm",
    "lm_head": "head",
}
_ATTENTION = {
    "model.embed_tokens": "embed",
    "model.layers.{}.input_layernorm": "layers/attn_norm",
    "model.layers.{}.self_attn.q_proj": "layers/attn/q",
    "model.layers.{}.self_attn.k_proj": "layers/attn/k",
    "model.layers.{}.self_attn.v_proj": "layers/attn/v",
    "model.layers.{}.self_attn.q_norm": "layers/attn/q_norm",
    "model.layers.{}.self_attn.k_norm": "layers/attn/k_norm",
    "model.layers.{}.self_attn.o_proj": "layers/attn/out",
}
_MLP = {
    "model.layers.{}.mlp.gate_proj": "layers/mlp/gate",
    "model.layers.{}.mlp.up_proj": "layers/mlp/up",
    "model.layers.{}.mlp.down_proj": "layers/mlp/down",
}
_END = {"model.norm": "norm", "lm_head": "head"}
_LLAMA = {**_ATTENTION, "model.layers.{}.post_attention_layernorm": "layers/mlp_norm", **_MLP, **_END}
_GEMMA = {
    **_ATTENTION,
    # The name that others give to the norm before the perceptron.
    "model.layers.{}.post_attention_layernorm": "layers/attn_post_norm",
    "model.layers.{}.pre_feedforward_layernorm": "layers/mlp_norm",
    **_MLP,
    "model.layers.{}.post_feedforward_layernorm": "layers/mlp_post_norm",
    **_END,
}
_MODULES = {
    "gpt2": _GPT2,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
}


def module_places(config: CausalLMConfig) -> dict[str, Place]:
    """Maps the path of every module in a checkpoint to its place in the parameters; one to one.

    ``"model.layers.3.self_attn.q_proj"`` maps to ``Place(("layers", "attn", "q"), 3)``.  The dict has the order of the
    forward pass.

    Args:
      config: The model.
    """
    specs, places = causal_lm_specs(config), {}
    templates = [(name, tuple(path.split("/"))) for name, path in _MODULES[config.family].items()]
    templates = [(name, path) for name, path in templates if _has(specs, path)]
    stacked = [(name, path) for name, path in templates if "{}" in name]
    first = templates.index(stacked[0])
    last = templates.index(stacked[-1])
    for name, path in templates[:first]:
        places[name] = Place(path)
    for layer in range(config.num_layers):
        for name, path in stacked:
            places[name.format(layer)] = Place(path, layer)
    for name, path in templates[last + 1 :]:
        places[name] = Place(path)
    return places


def module_names(config: CausalLMConfig) -> dict[Place, str]:
    """The inverse of :func:`module_places`."""
    return {place: name for name, place in module_places(config).items()}


def tensor_names(config: CausalLMConfig) -> list[TensorName]:
    """Returns the tensors of a checkpoint, with their places in the parameters.

    Args:
      config: The model.

    Raises:
      ValueError: The family has no module for one of the parameters (a GPT-2 with rotary positions, say).
    """
    specs, tensors, covered = causal_lm_specs(config), [], set()
    for module, place in module_places(config).items():
        for parameter in at(specs, place.path):
            suffix = "bias" if parameter == "bias" else "weight"
            # The layers of GPT-2 are stored as [in, out].
            transposed = parameter == "kernel" and (config.family != "gpt2" or module == "lm_head")
            path = (*place.path, parameter)
            tensors.append(TensorName(f"{module}.{suffix}", Place(path, place.layer), transposed))
            covered.add(path)
    if left := [path for path in _leaf_paths(specs) if path not in covered]:
        raise ValueError(f"family {config.family!r} has no module for {['/'.join(path) for path in left]}")
    return tensors


def is_buffer(name: str) -> bool:
    """Whether a tensor is a buffer of old files, which is ignored: rotary frequencies and causal masks."""
    return name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias"))


def _has(tree: PyTree, path: Path) -> bool:
    for key in path:
        if key not in tree:
            return False
        tree = tree[key]
    return True


def _leaf_paths(tree: PyTree, path: Path = ()) -> list[Path]:
    if not isinstance(tree, dict):
        return [path]
    return [leaf for key, part in tree.items() for leaf in _leaf_paths(part, (*path, key))]
