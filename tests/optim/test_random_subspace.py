import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import adapters, linalg, optim
from subspace_jax.optim.random_subspace import _projections as projections

from ..variants import rest_slow

KINDS = {
    "dense": {"method": "dense"},
    "stored": {"method": "dense", "stored": True},
    "sparse": {"method": "sparse"},
    "fastfood": {"method": "fastfood"},
    "did": {"method": "fastfood", "scope": "leaf"},
    "said": {"method": "said"},
}
every_kind = pytest.mark.parametrize("kind", rest_slow(KINDS, "fastfood"))


def tree(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 2)
    return {
        "layer": {"kernel": jax.random.normal(keys[0], (16, 8), dtype), "bias": jnp.zeros(8, dtype)},
        "head": jax.random.normal(keys[1], (8, 4), dtype),
    }


def draw(kind, params, dim=9, **options):
    make = functools.partial(optim.random_subspace, dim=dim, key=jax.random.key(0), **KINDS[kind], **options)
    return jax.jit(make)(params)


def moved(theta, kind):
    """Some point, at which the gains of "said" are still 1."""
    return theta + jnp.linspace(-1, 1, 9) * np.float32(np.arange(9) < (6 if kind == "said" else 9))


def there_and_back(theta, subspace):
    params, pull = jax.vjp(subspace.expand, theta)
    return params, pull(params)[0]


@functools.cache
def facts(kind):
    """All that the tests look at, in one program: compiling is what costs here."""

    @jax.jit
    def compute(params):
        theta, subspace = draw(kind, params)
        matrix = optim.projection_matrix(subspace)
        return theta, subspace, matrix, subspace.expand(theta), there_and_back(moved(theta, kind), subspace)

    return compute(tree())


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def leaves_of(data, count):
    return [tuple(data[f"leaf{i}_shape"]) for i in range(count)]


@pytest.mark.parametrize("quick", rest_slow([True, False], True))
def test_fastfood_is_that_of_the_reference(x64, golden, quick):
    data = golden("intrinsic-dimension/fastfood")
    for t in range(1) if quick else range(1, int(data["n_cases"])):
        case = {k.removeprefix(f"c{t}_"): jnp.asarray(v) for k, v in data.items() if k.startswith(f"c{t}_")}
        made = projections.FastfoodProjection((case["B"],), (case["Pi"],), (case["G"],))
        shapes = [(int(case["D"]),)]
        (offset,), pull = jax.vjp(lambda theta, m=made, s=shapes: projections.apply(m, theta, s), case["theta"])
        np.testing.assert_allclose(offset, case["offset"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(pull([case["cotangent"]])[0], case["vjp"], rtol=1e-9, atol=1e-12)
        # The transform is cut into leaves, one after the other, where there are several.
        several = projections.apply(made, case["theta"], [(2, 3), (int(case["D"]) - 6,)])
        np.testing.assert_allclose(jnp.concatenate([x.ravel() for x in several]), offset, rtol=1e-12)


@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.slow
def test_columns_are_normalised_over_all_leaves_as_in_the_reference(x64, golden, name):
    data = golden(f"intrinsic-dimension/{name}")
    shapes, theta = leaves_of(data, int(data["n_leaves"])), jnp.asarray(data["theta"])
    raw = [data[f"leaf{i}_raw"] for i in range(len(shapes))]
    if name == "dense":
        columns = [(r / data["row_norm"][:, None]).reshape(-1, *s) for r, s in zip(raw, shapes, strict=True)]
        made = projections.StoredProjection(tuple(map(jnp.asarray, columns)))
    else:
        # As many slots as a leaf has parameters: any of them may be empty.
        places = tuple(jnp.broadcast_to(jnp.arange(r.shape[1], dtype=jnp.int32), r.shape) for r in raw)
        signs = tuple(jnp.asarray(np.sign(r), jnp.int8) for r in raw)
        norms = projections._sparse_norms(shapes, signs, len(theta), theta.dtype)
        np.testing.assert_allclose(norms, data["row_norm"], rtol=1e-12)
        made = projections.SparseProjection(places, signs, norms)
    for i, offset in enumerate(projections.apply(made, theta, shapes)):
        np.testing.assert_allclose(offset, data[f"leaf{i}_offset"], rtol=1e-9, atol=1e-12)


def test_structure_aware_offsets_and_true_gradients_are_those_of_the_reference(x64, golden):
    data = golden("intrinsic-dimension/said")
    count = int(data["n_leaves"])
    shapes = leaves_of(data, count)
    theta = jnp.concatenate([jnp.asarray(data["theta"]), jnp.asarray(data["lam"])])
    assert theta.size == data["total_trainable"]
    start = [jnp.zeros(shape) for shape in shapes]
    make = functools.partial(optim.random_subspace, dim=theta.size, method="said", key=jax.random.key(0))
    _, subspace = jax.eval_shape(make, start)
    parts = (tuple(jnp.asarray(data[f"leaf{i}_{part}"]) for i in range(count)) for part in ("B", "Pi", "G"))
    made = projections.FastfoodProjection(*parts)
    # Lengths are those of the reference wherever it does not crop the vector.
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, subspace.projection)
    offsets, pull = jax.vjp(
        jax.jit(dataclasses.replace(subspace, start=start, projection=made, key=made.order[0]).expand), theta
    )
    for i, offset in enumerate(offsets):
        np.testing.assert_allclose(offset, data[f"leaf{i}_offset"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(offset, data[f"leaf{i}_reference_offset_f32"], atol=1e-4)
    (grads,) = pull([jnp.asarray(data[f"leaf{i}_cotangent"]) for i in range(count)])
    np.testing.assert_allclose(grads, np.concatenate([data["grad_theta"], data["grad_lam"]]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", rest_slow(["sgd", "adam"], "adam"))
def test_training_takes_the_path_of_the_reference(x64, golden, name):
    data = golden("intrinsic-dimension/toy_training")
    start = jnp.asarray(data["theta0"])
    theta, subspace = optim.random_subspace(start, 8, "dense", key=jax.random.key(0), stored=True)
    subspace = dataclasses.replace(subspace, projection=projections.StoredProjection((jnp.asarray(data["P"]),)))
    if name == "sgd":
        tx = optax.sgd(float(data["sgd_lr"]), momentum=float(data["momentum"]))
    else:
        tx = optax.adam(float(data["adam_lr"]), *map(float, data["adam_betas"]), eps=1e-8)

    def loss(theta):
        sums = subspace.expand(theta).reshape(len(data["targets"]), -1).sum(axis=1)
        return jnp.sum(jnp.square(sums - data["targets"]))

    def step(carry, _):
        theta, state = carry
        value, grads = jax.value_and_grad(loss)(theta)
        updates, state = tx.update(grads, state, theta)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), (theta, value)

    with jax.numpy_dtype_promotion("standard"):
        _, (path, values) = jax.jit(lambda c: jax.lax.scan(step, c, length=int(data["steps"])))((theta, tx.init(theta)))
    np.testing.assert_allclose(path, data[f"{name}_theta"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(values, data[f"{name}_loss"], rtol=1e-9)


@every_kind
def test_the_start_is_that_of_the_parameters_bit_for_bit(kind):
    theta, subspace, _, start, _ = facts(kind)
    assert (theta.shape, theta.dtype) == ((9,), jnp.float32)
    assert jax.tree.map(jnp.result_type, start) == jax.tree.map(jnp.result_type, subspace.start)
    chex.assert_trees_all_equal(start, subspace.start)


def test_parameters_keep_their_types():
    params = {"half": jnp.ones((4, 4), jnp.bfloat16), "count": jnp.arange(3)}
    theta, subspace = draw("fastfood", params)
    chex.assert_trees_all_equal(jax.jit(subspace.expand)(theta), params)
    assert jax.eval_shape(subspace.expand, theta)["half"].dtype == jnp.bfloat16
    assert jax.eval_shape(subspace.project, params).dtype == jnp.float32


@pytest.mark.slow
@every_kind
def test_expansion_is_affine_and_its_gradient_the_transpose(kind):
    theta, subspace, matrix, start, (params, grads) = facts(kind)
    at = np.asarray(moved(theta, kind)) * (np.arange(9) < (6 if kind == "said" else 9))
    np.testing.assert_allclose(flat(params), flat(start) + matrix @ at, atol=2e-6)
    # Single precision: sums of 168 products of size 0.1.  The gains are where nothing has moved in the matrix.
    theirs = np.arange(9) < (6 if kind == "said" else 9)
    np.testing.assert_allclose(grads[theirs], (matrix.T @ flat(params))[theirs], rtol=1e-5, atol=1e-5)
    if kind == "fastfood":
        np.testing.assert_allclose(subspace.project(params), grads, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["stored", "sparse"])
def test_columns_have_length_one_over_all_parameters(x64, kind):
    lengths = jax.jit(lambda p: jnp.linalg.norm(optim.projection_matrix(draw(kind, p)[1]), axis=0))
    np.testing.assert_allclose(lengths(tree(jnp.float64)), 1, atol=1e-12)


@pytest.mark.slow
def test_fastfood_columns_have_length_one_on_average_and_exactly_where_nothing_is_cut(x64):
    # Leaf by leaf each has such columns, so that together they are longer by the root of their number.
    for kind, leaves in (("fastfood", 1), ("did", 2)):
        lengths = jax.jit(lambda p, k=kind: jnp.linalg.norm(optim.projection_matrix(draw(k, p, dim=5)[1]), axis=0))
        np.testing.assert_allclose(lengths([jnp.zeros((8, 16))] * leaves), leaves**0.5, atol=1e-12)


@pytest.mark.slow
def test_fastfood_columns_of_any_size_have_length_one_on_average():
    @jax.jit
    @jax.vmap
    def norms(key):
        _, subspace = optim.random_subspace(jnp.zeros(37), 9, key=key)
        return jnp.linalg.norm(optim.projection_matrix(subspace), axis=0)

    lengths = norms(jax.random.split(jax.random.key(0), 20))
    np.testing.assert_allclose(jnp.mean(lengths), 1, atol=0.05)


@pytest.mark.slow
def test_drawn_anew_or_kept_the_dense_columns_are_the_same():
    np.testing.assert_allclose(facts("dense")[2], facts("stored")[2], atol=1e-6)


@pytest.mark.slow
def test_sparse_columns_have_a_root_of_the_parameters_entries():
    make = functools.partial(optim.random_subspace, dim=40, method="sparse", key=jax.random.key(5))
    _, subspace = jax.jit(make)([jnp.zeros(10_000), jnp.zeros(())])
    entries = jnp.sum(jnp.abs(subspace.projection.signs[0]), axis=1)
    # Binomial with mean 100 and deviation 10, averaged over 40 columns: five deviations of the mean.
    np.testing.assert_allclose(np.mean(entries), 100, atol=8)
    places = np.asarray(subspace.projection.positions[0])
    assert all(len(set(row[sign != 0])) == count for row, sign, count in zip(
        places, np.asarray(subspace.projection.signs[0]), np.asarray(entries), strict=True
    ))  # fmt: skip
    assert np.all(subspace.projection.signs[1])  # a single parameter is in every column


def test_memory_is_what_the_methods_promise():
    params, dim = {"w": jax.ShapeDtypeStruct((512, 600), jnp.float32)}, 1000
    length, slots = 2**19, math.ceil(307200**0.5 + 6 * 307200**0.25) + 8
    expected = {
        "dense": 8 + 4 * dim,
        "sparse": dim * slots * 5 + 4 * dim,
        "fastfood": 9 * length,
        "said": 9 * length,
    }
    for method, size in expected.items():
        make = functools.partial(optim.random_subspace, dim=dim, method=method, key=jax.random.key(0))
        _, subspace = jax.eval_shape(make, params)
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(subspace.projection)) == size, method


@pytest.mark.parametrize("method", rest_slow(["dense", "fastfood"], "fastfood"))
def test_neither_pass_holds_the_matrix(method):
    # The matrix would have 256 MB; a block of random numbers has 4.
    make = functools.partial(optim.random_subspace, dim=256, method=method, key=jax.random.key(0))
    theta, subspace = jax.eval_shape(make, {"w": jax.ShapeDtypeStruct((512, 512), jnp.float32)})

    def loss(theta, subspace):
        return jnp.sum(jnp.square(subspace.expand(theta)["w"]))

    memory = jax.jit(jax.grad(loss)).lower(theta, subspace).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**25


@pytest.mark.slow
def test_one_vector_solves_the_toy_problem_exactly_from_its_dimension_on(x64):
    # Ten groups of parameters whose sums are to be 1 to 10: ten numbers are enough, and nine are not.
    sums = np.kron(np.eye(10), np.ones(20))
    for dim, solved in ((9, False), (10, True), (12, True)):
        _, subspace = draw("fastfood", jnp.zeros(200), dim)
        map_ = sums @ np.asarray(jax.jit(optim.projection_matrix)(subspace))
        theta = np.linalg.lstsq(map_, np.arange(1.0, 11))[0]
        loss = np.sum(np.square(map_ @ theta - np.arange(1.0, 11)))
        assert loss < 1e-20 if solved else loss > 0.1


@pytest.mark.parametrize(
    ("kind", "axes"),
    rest_slow(
        [*((kind, AxisType.Auto) for kind in ("dense", "sparse", "fastfood", "said")), ("said", AxisType.Explicit)],
        ("said", AxisType.Explicit),
        ("fastfood", AxisType.Auto),
    ),
)
@pytest.mark.eight_devices
def test_sharded_equals_unsharded(kind, axes):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(axes,) * 2)
    theta, subspace, _, _, expected = facts(kind)
    spec = {"layer": {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}, "head": P("tensor")}
    split = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), subspace.start, spec)
    whole = NamedSharding(mesh, P())
    at, rest = jax.device_put((moved(theta, kind), subspace), whole)
    with jax.set_mesh(mesh):
        got = jax.jit(there_and_back)(at, dataclasses.replace(rest, start=split))
    assert got[0]["layer"]["kernel"].sharding.spec == P("fsdp", "tensor")
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_adapters_train_in_a_subspace_of_theirs():
    params = {"q": {"kernel": jnp.ones((8, 8))}, "o": {"kernel": jnp.ones((8, 8))}}
    rules = {"*": adapters.LoRA(2, 4.0)}

    @jax.jit
    def start_and_slopes(params):
        frozen, trainable = adapters.prepare(jax.random.key(0), params, rules)
        theta, subspace = optim.random_subspace(trainable, 3, key=jax.random.key(0))
        weights = functools.partial(_effective, frozen, subspace, rules)
        return weights(theta), jax.jacobian(weights)(theta)

    start, slopes = start_and_slopes(params)
    chex.assert_trees_all_equal(start, params)
    assert all(jnp.all(jnp.any(s != 0, axis=(0, 1))) for s in jax.tree.leaves(slopes))


def _effective(frozen, subspace, rules, theta):
    return adapters.materialize(frozen, subspace.expand(theta), rules)


@pytest.mark.parametrize("kind", rest_slow(["fastfood", "sparse", "said"], "fastfood"))
def test_a_solution_is_its_key_and_its_numbers(kind):
    theta, subspace = facts(kind)[:2]
    at = theta + 0.1
    kept = optim.compress(subspace, at)
    assert sum(x.nbytes for x in kept.values() if isinstance(x, jax.Array)) == 4 * 9 + 8
    names = {name: kept.pop(name) for name in ("method", "scope", "stored")}
    made = jax.jit(lambda kept, start: optim.decompress(kept | names, start))(kept, subspace.start)
    chex.assert_trees_all_close(made, jax.jit(subspace.expand)(at), rtol=1e-7, atol=1e-6)


@pytest.mark.slow
def test_only_what_is_selected_moves():
    theta, subspace = draw("fastfood", tree(), select=lambda path, _: path.endswith("kernel"))
    there = subspace.expand(theta + 1)
    np.testing.assert_array_equal(there["head"], subspace.start["head"])
    assert subspace.num_params == 128
    assert jnp.all(there["layer"]["kernel"] != subspace.start["layer"]["kernel"])


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (r"dim: expected an integer from 1 to 168 for 168 parameters, got 0", {"dim": 0}),
        (r"dim: expected an integer from 1 to 168", {"dim": 169}),
        (r"dim: expected an integer from 4 to 171 for 168 parameters in 3 leaves, got 3", {"dim": 3, "method": "said"}),
        (r"dim: .* got 2.0", {"dim": 2.0}),
        (r"method: expected one of .*, got 'gauss'", {"method": "gauss"}),
        (r"scope: expected one of", {"scope": "layer"}),
        (r"scope: 'leaf' is for 'fastfood', got method 'dense'", {"scope": "leaf", "method": "dense"}),
        (r"stored: is for 'dense', got method 'sparse'", {"stored": True, "method": "sparse"}),
        (r"select: expected some of the 3 leaves, got none", {"select": lambda path, leaf: False}),
    ],
)
def test_what_can_not_serve_is_refused(error, options):
    with pytest.raises(ValueError, match=error):
        optim.random_subspace(tree(), **{"dim": 4, "key": jax.random.key(0), **options})


def test_a_model_too_large_for_one_transform_is_sent_to_one_for_each_leaf():
    shapes = [jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)] * 2
    make = functools.partial(optim.random_subspace, dim=100, key=jax.random.key(0))
    with pytest.raises(ValueError, match="params: expected at most 2147483648 parameters under one transform"):
        jax.eval_shape(make, shapes)
    _, subspace = jax.eval_shape(functools.partial(make, scope="leaf"), shapes)
    assert subspace.num_params == 2**32


def test_integer_leaves_are_passed_over_and_refused_where_they_are_selected():
    params = {"w": jnp.ones(4), "n": jnp.arange(4)}
    assert draw("fastfood", params, dim=2)[1].num_params == 4
    with pytest.raises(TypeError, match="select: n is of int32"):
        draw("fastfood", params, dim=2, select=lambda path, leaf: True)
    with pytest.raises(TypeError, match="key: expected one of"):
        optim.random_subspace(params, 2, key=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"theta: expected shape \(2,\), got \(3,\)"):
        draw("fastfood", params, dim=2)[1].expand(jnp.zeros(3))


@pytest.mark.slow
def test_the_transform_is_the_one_of_linalg():
    theta, subspace = draw("fastfood", jnp.zeros(16), dim=16)
    (signs,), (order,), (gains,) = subspace.projection
    h = linalg.hadamard_matrix(16)
    expected = (h @ (gains * (h @ signs.astype(jnp.float32))[order])) / jnp.sqrt(16 * jnp.sum(gains**2))
    np.testing.assert_allclose(subspace.expand(theta + 1), expected, rtol=1e-5, atol=1e-5)
