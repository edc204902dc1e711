import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg, losses, nn

from ..variants import rest_slow


def bases_of(rows, dims):
    """Stored rows (sum k, n) to one [1, n, k] basis per class."""
    offsets = np.cumsum([0, *dims])
    return [jnp.asarray(rows[a:b].T[None]) for a, b in itertools.pairwise(offsets)]


def equal_bases(rows, dims):
    k = int(dims[0])
    return jnp.asarray(rows.reshape(len(dims), k, -1).swapaxes(1, 2))


def test_grassmann_logits_and_gradients_match_the_authors_code(x64, golden):
    g = golden("gcr/logits")
    k = int(g["dims"][0])

    def loss(x, bases):
        return jnp.mean(losses.cross_entropy(nn.grassmann_logits(x, bases, float(g["gamma"])), jnp.asarray(g["y"])))

    x, bases = jnp.asarray(g["X"]), equal_bases(g["W"], g["dims"])
    logits = jax.jit(nn.grassmann_logits)(x, bases, float(g["gamma"]))
    np.testing.assert_allclose(logits, g["logits"], rtol=1e-10, atol=1e-12)
    value, (grad_x, grad_bases) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, bases)
    np.testing.assert_allclose(value, g["loss"], rtol=1e-10)
    np.testing.assert_allclose(grad_x, g["grad_X"], rtol=1e-10, atol=1e-12)
    rows = np.asarray(grad_bases).swapaxes(1, 2).reshape(-1, x.shape[1])
    np.testing.assert_allclose(rows, g["grad_W"], rtol=1e-10, atol=1e-12)
    assert bases.shape == (len(g["dims"]), x.shape[1], k)


def test_grassmann_logits_of_mixed_dimensions_match_the_oracle(x64, golden):
    g = golden("gcr/oracle_logits_mixed")
    logits = nn.grassmann_logits(jnp.asarray(g["X"]), bases_of(g["W"], g["dims"]), float(g["gamma"]))
    np.testing.assert_allclose(logits, g["logits"], rtol=1e-10, atol=1e-12)


# One program for each dimension of the subspaces: 5 features, 4 classes in R^6.
logits_of = jax.jit(nn.grassmann_logits)


def drawn(seed, k, n=6, classes=4):
    """Features and orthonormal bases, drawn without a compiler."""
    rng = np.random.default_rng(seed)
    bases = np.linalg.qr(rng.standard_normal((classes, n, k)))[0]
    return jnp.asarray(rng.standard_normal((5, n)), jnp.float32), jnp.asarray(bases, jnp.float32)


def test_grassmann_logits_of_one_dimension_are_absolute_cosines():
    x, bases = drawn(0, 1)
    cosine = np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) @ np.asarray(bases)[:, :, 0].T
    np.testing.assert_allclose(logits_of(x, bases), 25.0 * np.abs(cosine), rtol=1e-5)


def test_grassmann_logits_of_full_dimension_are_gamma():
    np.testing.assert_allclose(logits_of(*drawn(0, 6), 7.0), 7.0, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 6]), st.sampled_from([1e-3, 1.0, 1e4]))
def test_grassmann_logits_are_invariant_to_a_change_of_basis(seed, k, norm):
    x, bases = drawn(seed, k)
    rotation = np.linalg.qr(np.random.default_rng(seed + 1).standard_normal((k, k)))[0].astype(np.float32)
    rotated = jnp.asarray(np.asarray(bases) @ rotation)
    x = norm * x
    # A short projection is a small difference of rounded products, hence the absolute part.
    np.testing.assert_allclose(logits_of(x, bases), logits_of(x, rotated), rtol=2e-5, atol=5e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2.0**-10, 0.5, 2.0, 2.0**20]), st.sampled_from([0.5, 4.0, 64.0]))
def test_grassmann_logits_rank_classes_independently_of_gamma_and_feature_norm(seed, norm, gamma):
    x, bases = drawn(seed, 2)
    logits = np.asarray(logits_of(x, bases, 1.0))
    assert np.all((logits >= 0) & (logits <= 1 + 1e-6))
    # Powers of two scale without rounding, so that ties break in the same way.
    changed = np.asarray(logits_of(norm * x, bases, gamma))
    np.testing.assert_array_equal(changed.argmax(-1), logits.argmax(-1))
    np.testing.assert_allclose(changed, gamma * logits, rtol=1e-6)


def test_grassmann_logits_have_zero_gradients_at_zero():
    bases = jnp.eye(4)[None, :, :2]
    x = jnp.array([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    grads = jax.jit(jax.grad(lambda x, s: jnp.sum(nn.grassmann_logits(x, s)), argnums=(0, 1)))(x, bases)
    chex.assert_tree_all_finite(grads)
    np.testing.assert_array_equal(grads[1], 0.0)


def test_grassmann_logits_of_bfloat16_are_float32_within_rounding():
    x, s = drawn(0, 8, n=64)
    exact, rounded = logits_of(x, s), logits_of(x.astype(jnp.bfloat16), s)
    assert rounded.dtype == jnp.float32
    # Both factors of each product are rounded to 8 bits, 2^-9 each; the errors of 64 terms partly cancel.
    np.testing.assert_allclose(rounded, exact, rtol=2e-2)


@pytest.mark.parametrize("dims", rest_slow([3, [1, 3, 1, 2, 3]]))
def test_grassmann_head_returns_logits_in_class_order(dims):
    head = nn.GrassmannHead(8, 5, dims=dims, gamma=2.0, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (6, 8))
    per_class = [dims] * 5 if isinstance(dims, int) else dims
    groups = {k: (head.bases if isinstance(dims, int) else head.bases[i]) for i, k in enumerate(sorted(set(per_class)))}
    seen, logits = dict.fromkeys(groups, 0), nnx.jit(lambda head, x: head(x))(head, x)
    for c, k in enumerate(per_class):
        basis = groups[k].get_value()[seen[k]]
        seen[k] += 1
        unit = np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True)
        expected = 2.0 * np.linalg.norm(unit @ np.asarray(basis), axis=-1)
        np.testing.assert_allclose(logits[:, c], expected, rtol=1e-5)


def test_grassmann_head_has_orthonormal_bases_with_axes():
    head = nn.GrassmannHead(8, 5, dims=[1, 3, 1, 2, 3], rngs=nnx.Rngs(params=0))
    state = nnx.state(head, nnx.Param)
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.to_pure_dict(state)["bases"])]
    assert shapes == [(2, 8, 1), (1, 8, 2), (2, 8, 3)]
    assert head.bases[0].get_metadata()["axes"] == ("class", "embed", None)
    for leaf in jax.tree.leaves(nnx.to_pure_dict(state)):
        assert jnp.max(linalg.orthonormality_error(leaf)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": 9}, "1 to 8 dimensions, got 9"),
        ({"dims": 0}, "1 to 8 dimensions, got 0"),
        ({"dims": [2, 2]}, "each of the 3 classes, got 2"),
        ({"param_dtype": jnp.bfloat16}, "bfloat16"),
        ({"param_dtype": jnp.int32}, "int32"),
        ({"dims": 2.0}, "1 to 8 dimensions, got 2.0"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
    ],
)
def test_grassmann_head_refuses_invalid_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        nn.GrassmannHead(8, **{"num_classes": 3, **arguments}, rngs=nnx.Rngs(params=0))


def test_grassmann_logits_refuse_other_widths():
    with pytest.raises(ValueError, match="expected x"):
        nn.grassmann_logits(jnp.ones((2, 5)), jnp.ones((3, 4, 2)))


def test_cosine_head_ignores_norms():
    head = nn.CosineHead(6, 4, gamma=3.0, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (5, 6))
    kernel = head.kernel.get_value()
    np.testing.assert_allclose(nn.cosine_logits(10.0 * x, 0.1 * kernel, 3.0), head(x), rtol=1e-5, atol=1e-6)
    assert jnp.max(jnp.abs(head(x))) <= 3.0


def test_softmax_head_is_affine():
    head = nn.SoftmaxHead(6, 4, rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (5, 6))
    np.testing.assert_allclose(head(x), x @ head.linear.kernel.get_value(), rtol=1e-5, atol=1e-6)
    assert head(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_heads_refuse_integer_features():
    x = jnp.ones((2, 4), jnp.int32)
    for logits in (lambda: nn.grassmann_logits(x, jnp.ones((3, 4, 2))), lambda: nn.cosine_logits(x, jnp.ones((4, 3)))):
        with pytest.raises(TypeError, match="x: expected floating point, got int32"):
            logits()


@pytest.mark.slow
def test_grassmann_head_takes_numpy_integers_as_dims():
    assert nn.GrassmannHead(8, 3, dims=np.int64(2), rngs=nnx.Rngs(params=0)).bases.get_value().shape == (3, 8, 2)


@pytest.mark.slow
def test_grassmann_logits_of_bfloat16_have_float32_gradients_within_rounding():
    x, s = jax.random.normal(jax.random.key(0), (32, 16)), linalg.random_orthonormal(jax.random.key(1), 16, 4, (5,))
    labels = jnp.arange(32) % 5

    def gradient(x):
        return jax.grad(lambda s: jnp.mean(losses.cross_entropy(nn.grassmann_logits(x, s), labels)))(s)

    exact, rounded = gradient(x), gradient(x.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.float32
    # Features, bases and the product are each rounded to 8 bits.
    assert jnp.linalg.norm(rounded - exact) < 3 * 2.0**-8 * jnp.linalg.norm(exact)


@pytest.mark.eight_devices
@pytest.mark.parametrize(
    ("dims", "axis_type"),
    rest_slow([(2, AxisType.Explicit), (2, AxisType.Auto), ([1, 2] * 8, AxisType.Auto)]),
)
def test_grassmann_head_with_sharded_classes_returns_the_same_logits(dims, axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(axis_type,) * 2)
    graph, params = nnx.split(nn.GrassmannHead(8, 16, dims=dims, rngs=nnx.Rngs(params=0)))
    x = jax.random.normal(jax.random.key(1), (6, 8))
    expected = nnx.merge(graph, params)(x)
    with jax.set_mesh(mesh):
        split = jax.device_put((params, x), (NamedSharding(mesh, P("tensor")), NamedSharding(mesh, P("data"))))
        logits = jax.jit(lambda params, x: nnx.merge(graph, params)(x))(*split)
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_grassmann_head_traces_ten_million_classes_without_a_loop():
    # Nothing of Python's may grow with the classes: before, this took half an hour.
    def bases(key):
        return nnx.split(nn.GrassmannHead(384, 10_000_000, dims=8, rngs=nnx.Rngs(params=key)))[1]["bases"].get_value()

    assert jax.eval_shape(bases, jax.random.key(0)).shape == (10_000_000, 384, 8)


def test_grassmann_head_is_a_small_graph_whatever_the_classes():
    def nodes(classes):
        dims = [1 + i % 2 for i in range(classes)]
        head = nnx.eval_shape(lambda: nn.GrassmannHead(6, classes, dims=dims, rngs=nnx.Rngs(0)))
        return len(nnx.split(head)[0].attributes)

    assert nodes(4) == nodes(40)
