"""Compressed kernels as layers apply them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import adapters, nn

from ..variants import rest_slow

D1, D2, K, S = 6, 8, 5, 2


def sparse():
    rng = np.random.default_rng(0)
    indices = np.stack([np.sort(rng.permutation(K)[:S]) for _ in range(D2)], axis=1)
    draw = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((D1, K), (S, D2)))
    return nn.SparseFactor(*draw, jnp.asarray(indices, jnp.uint16))


def low_rank():
    rng = np.random.default_rng(1)
    return nn.LowRankFactor(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((D1, 3), (3, D2))))


@pytest.mark.parametrize("kernel", [sparse(), low_rank()], ids=["sparse", "low_rank"])
def test_linear_of_a_compressed_kernel_is_that_of_its_dense_one(kernel):
    dense = kernel.dense()
    assert (kernel.shape, kernel.ndim, kernel.dtype) == (dense.shape, 2, dense.dtype)
    for rows in (1, 40):  # coefficients are picked for few rows
        x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, 1, D1)), jnp.float32)
        np.testing.assert_allclose(nn.linear(x, kernel, jnp.ones(D2)), x @ dense + 1, atol=1e-5)
    half = nn.linear(x.astype(jnp.bfloat16), kernel)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), x @ dense, atol=0.2)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), kernel)
    np.testing.assert_allclose(stacked.dense()[1], dense, atol=1e-6)
    with pytest.raises(ValueError, match=r"linear: x of shape \(2, 5\) does not fit a compressed kernel \(6, 8\)"):
        nn.linear(jnp.ones((2, 5)), kernel)


def test_sparse_dict_dense_is_a_module_of_a_compressed_kernel():
    x = jnp.ones((3, D1))
    layer = nn.SparseDictDense(sparse(), jnp.ones(D2))
    np.testing.assert_allclose(layer(x), x @ sparse().dense() + 1, atol=1e-5)
    assert layer.indices.get_value().dtype == jnp.uint16


@pytest.mark.parametrize("config", rest_slow([adapters.DoRA(2, 4.0), adapters.LoRA(2, 4.0)]))
def test_adapters_on_a_compressed_kernel_compute_what_they_do_on_a_dense_one(config):
    trees = [{"up": {"kernel": kernel}} for kernel in (sparse(), sparse().dense())]
    trainable = adapters.init(jax.random.key(0), trees[1], {"up": config})
    trainable["up"]["kernel"]["b"] = jnp.ones_like(trainable["up"]["kernel"]["b"])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, D1)), jnp.float32)
    one, other = (nn.linear(x, adapters.bind(tree, trainable, {"up": config})["up"]["kernel"]) for tree in trees)
    np.testing.assert_allclose(one, other, atol=1e-4)
    own = adapters.init(jax.random.key(0), trees[0], {"up": config})
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, trainable)
