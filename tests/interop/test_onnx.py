"""ONNX files: initializers, and the backbone of DINOv2.

``tests/golden/interop_onnx/dinov2.onnx`` is a ``Dinov2Model`` of transformers 5.24.0 with two layers 16 wide under
the name ``backbone``, with normal noise of 0.1 added to all parameters, and a convolution; exported by
``torch.onnx.export`` of torch 2.13.0 with ``dynamo=False``, opset 14 and dynamic axes.  ``dinov2.npz`` holds images of
the size of its positions, larger ones, and the ``last_hidden_state`` of both.
"""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import interop, nn

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "interop_onnx"
FILE = GOLDEN / "dinov2.onnx"


def field(number, value):
    """A field of a message: a number, or bytes with their length."""
    if isinstance(value, int):
        return bytes([number << 3]) + varint(value)
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def varint(value):
    low, value = value & 127, value >> 7
    return bytes([low | 128]) + varint(value) if value else bytes([low])


def model(*tensors):
    """A model whose graph has initializers of these fields."""
    return field(7, b"".join(field(5, tensor) for tensor in tensors))


def tensor(values, name=b"x", kind=1):
    dims = b"".join(field(1, size) for size in values.shape)
    return dims + field(2, kind) + field(8, name) + field(9, values.tobytes())


@pytest.mark.parametrize("key", ["large", pytest.param("pixels", marks=pytest.mark.slow)])
def test_load_onnx_dinov2_gives_the_tokens_of_transformers(key):
    config, params = interop.load_onnx_dinov2(FILE, num_heads=2)
    with np.load(GOLDEN / "dinov2.npz") as golden:
        pixels = jnp.asarray(golden[key].transpose(0, 2, 3, 1))
        wanted = golden["tokens" if key == "pixels" else "large_tokens"]
    apply = jax.jit(lambda p, x: nn.vision_transformer_apply(config, p, x, resample=True).tokens)
    with jax.default_matmul_precision("highest"):
        tokens = apply(params, pixels)
    chex.assert_trees_all_close(tokens, wanted, atol=5e-5)


def test_load_onnx_dinov2_gives_what_save_vision_writes_and_load_vision_reads(tmp_path):
    config, params = interop.load_onnx_dinov2(FILE, num_heads=2)
    interop.save_vision(tmp_path / "out", config, params)
    again, same = interop.load_vision(tmp_path / "out")
    assert again == config
    chex.assert_trees_all_equal(same, params)


def test_read_onnx_reads_shapes_and_values(tmp_path):
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    packed = field(1, varint(300)) + field(2, 7) + field(8, b"packed") + field(9, np.arange(300).tobytes())
    floats = field(1, 3) + field(2, 1) + field(8, b"floats") + field(4, values[1].tobytes())
    text = field(1, 1) + field(2, 8) + field(8, b"text") + field(6, b"abc")
    (tmp_path / "m.onnx").write_bytes(field(1, 7) + model(tensor(values), packed, floats, text))
    found = interop.read_onnx(tmp_path / "m.onnx").initializers
    assert list(found) == ["x", "packed", "floats"]
    chex.assert_trees_all_equal(np.array(found["x"].read()), values)
    chex.assert_trees_all_equal(np.array(found["packed"].read()), np.arange(300))
    chex.assert_trees_all_equal(np.array(found["floats"].read()), values[1])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is empty"),
        (b"GGUF" + bytes(40), "not an ONNX file"),
        (field(1, 7), "expected one graph, found 0"),
        (field(7, 3), "expected one graph"),
        (b"\xff" * 12, "the number at byte 0 has no end"),
        (bytes([7 << 3 | 2]) + varint(2**60) + b"1234", "field 7 at byte 10 has 1152921504606846976 bytes"),
        (model(tensor(np.ones(4, "<f4"))[:-4]), "field 9 at byte"),
        (model(field(1, 5) + tensor(np.ones(4, "<f4"))), "needs 80 bytes, has 16"),
        (model(field(1, 2**40) + tensor(np.ones(4, "<f4"))), "has the shape"),
        (model(field(1, 2**63) * 2 + tensor(np.ones(4, "<f4"))), "has the shape"),
        (model(tensor(np.ones(4, "<f4"), name=b"\xff\xfe")), "a name is not UTF-8"),
        (field(7, field(1, field(3, 5))), "expected a text, found a number"),
        (field(7, b"\x2b\x00"), "has the unknown kind 3"),
    ],
)
def test_read_onnx_names_what_is_damaged(data, message, tmp_path):
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(ValueError, match=f"m.onnx: not an ONNX file, or truncated: .*{message}|m.onnx: {message}"):
        interop.read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("size", [100, 20_000, 75_000])
def test_read_onnx_refuses_a_truncated_file(size, tmp_path):
    (tmp_path / "m.onnx").write_bytes(FILE.read_bytes()[:size])
    with pytest.raises(ValueError, match="not an ONNX file, or truncated"):
        interop.read_onnx(tmp_path / "m.onnx")


def test_load_onnx_dinov2_refuses_a_file_without_the_backbone(tmp_path):
    (tmp_path / "m.onnx").write_bytes(model(tensor(np.ones(4, "<f4"))))
    with pytest.raises(ValueError, match=r"m.onnx: expected a DINOv2 backbone"):
        interop.load_onnx_dinov2(tmp_path / "m.onnx")
    data = FILE.read_bytes()
    changes = {b"/embeddings/Reshape_1": "expected positions", b"layernorm.weight": "missing: .'layernorm.weight'"}
    for old, message in changes.items():
        (tmp_path / "m.onnx").write_bytes(data.replace(old, old.swapcase()))
        with pytest.raises(ValueError, match=message):
            interop.load_onnx_dinov2(tmp_path / "m.onnx", num_heads=2)
