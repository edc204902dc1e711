"""A small writer of GGUF files for tests, also of wrong ones."""

import pathlib
import struct

import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "gguf"
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
PLAIN = {np.dtype("f4"): 0, np.dtype("f2"): 1}


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(item):
    """The type and the bytes of a metadata value."""
    if isinstance(item, bytes):
        return item  # as they are
    if isinstance(item, bool):
        return struct.pack("<IB", BOOL, item)
    if isinstance(item, int):
        return struct.pack("<II", U32, item)
    if isinstance(item, float):
        return struct.pack("<If", F32, item)
    if isinstance(item, str):
        return struct.pack("<I", STRING) + string(item)
    kind = STRING if isinstance(item[0], str) else F32 if isinstance(item[0], float) else I32
    code = {F32: "f", I32: "i"}.get(kind)
    body = b"".join(string(x) if kind == STRING else struct.pack("<" + code, x) for x in item)
    return struct.pack("<IIQ", ARRAY, kind, len(item)) + body


def place(name, shape, kind, offset):
    """The entry of a tensor in the header; sizes are listed in reverse."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def header(metadata, places, *, magic=b"GGUF", version=3, num_tensors=None, num_entries=None):
    counts = (
        len(places) if num_tensors is None else num_tensors,
        len(metadata) if num_entries is None else num_entries,
    )
    entries = metadata.items() if isinstance(metadata, dict) else metadata
    body = b"".join(string(name) + value(item) for name, item in entries)
    return magic + struct.pack("<IQQ", version, *counts) + body + b"".join(places)


def padded(data, alignment=32):
    return data + bytes(-len(data) % alignment)


def write(path, metadata, tensors):
    """Writes tensors: arrays of float32 or float16, or ``(shape, type, bytes)``."""
    places, body, end = [], [], 0
    for name, tensor in tensors.items():
        shape, kind, data = (
            tensor if isinstance(tensor, tuple) else (tensor.shape, PLAIN[tensor.dtype], tensor.tobytes())
        )
        places.append(place(name, shape, kind, end))
        body.append(padded(data))
        end += len(body[-1])
    path.write_bytes(b"".join([padded(header(metadata, places)), *body]))
    return path


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def name_of(name):
    """The name in a GGUF file of a tensor at Hugging Face."""
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{NAMES[module]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def rotary_order(rows, heads):
    """Rows of queries or keys in the order of llama.cpp, which rotates neighbours instead of halves."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def model_of(config, tensors):
    """Metadata and tensors of a model: a config, and its tensors by their names at Hugging Face."""
    arch = config.family if config.family in ("qwen2", "qwen3") else "llama"
    own = {
        "block_count": config.num_layers,
        "context_length": config.max_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.mlp_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": float(config.rope.theta),
    }
    metadata = {"general.architecture": arch} | {f"{arch}.{name}": item for name, item in own.items()}
    ids = {"bos": config.bos_token, "eos": (*config.eos_tokens, None)[0], "padding": config.pad_token}
    metadata |= {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items() if token is not None}
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if arch == "llama" else {}
    made = {}
    for name, tensor in tensors.items():
        count = next((n for module, n in heads.items() if f".{module}." in name), 0)
        made[name_of(name)] = rotary_order(tensor, count) if count else np.ascontiguousarray(tensor)
    return metadata, made
