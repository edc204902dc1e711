import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import optim, train

from .common import assert_close, classification, make_tx, take_steps

pytestmark = pytest.mark.eight_devices

MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 1, "tensor": 4},
    "tensor and data": {"data": 2, "tensor": 4},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def whole():
    """States and losses on one device, by optimizer and number of classes."""
    made = {}

    def get(grassmann, num_classes):
        if (grassmann, num_classes) not in made:
            task, data = classification(num_classes)
            made[grassmann, num_classes] = take_steps(task, data, make_tx(grassmann=grassmann), train.make_mesh(1))
        return made[grassmann, num_classes]

    return get


@pytest.mark.parametrize(
    ("name", "grassmann"),
    [
        pytest.param(
            name,
            grassmann,
            marks=[] if (name, grassmann) == ("all", "riemannian_adam") else pytest.mark.slow,
        )
        for name, grassmann in [*((name, "riemannian_sgd") for name in MESHES), ("all", "riemannian_adam")]
    ],
)
def test_sharded_steps_equal_those_of_one_device(name, grassmann, whole):
    task, data = classification()
    state, metrics = take_steps(task, data, make_tx(grassmann=grassmann), train.make_mesh(**MESHES[name]))
    expected, expected_metrics = whole(grassmann, 8)
    assert_close(state, expected, atol=1e-5)
    assert_close(metrics, expected_metrics, atol=1e-5)


def test_class_subspaces_and_their_optimizer_state_are_sharded(whole):
    task, data = classification()
    mesh = train.make_mesh(data=1, fsdp=2, tensor=4)
    state, _ = take_steps(task, data, make_tx(grassmann="riemannian_adam"), mesh)
    assert_close(state, whole("riemannian_adam", 8)[0], atol=1e-5)
    bases = state.params["head"]["bases"]
    inner = state.opt_state.inner_states["grassmann"].inner_state
    momentum, nu = inner.momentum["head"]["bases"], inner.nu["head"]["bases"]
    assert bases.sharding.spec == momentum.sharding.spec == P("tensor", "fsdp", None)
    assert nu.sharding.spec == P("tensor")
    assert {shard.data.shape for shard in bases.addressable_shards} == {(2, 8, 2)}
    assert {shard.data.shape for shard in momentum.addressable_shards} == {(2, 8, 2)}
    assert {shard.data.shape for shard in nu.addressable_shards} == {(2,)}
    kernel = state.params["backbone"]["layers"][0]["kernel"]
    trace = state.opt_state.inner_states["euclidean"].inner_state[1][0].trace["backbone"]["layers"][0]["kernel"]
    assert kernel.sharding.spec == trace.sharding.spec == P("fsdp", "tensor")
    assert inner.count.sharding.is_fully_replicated


def test_class_subspaces_are_sharded_over_fsdp_and_tensor_at_once():
    task, data = classification(num_classes=16)
    mesh = train.make_mesh(data=2, fsdp=2, tensor=2)
    state = train.init_state(task, make_tx(), mesh)
    bases = state.params["head"]["bases"]
    assert {shard.data.shape for shard in bases.addressable_shards} == {(8, 8, 2)}
    assert len({shard.device for shard in bases.addressable_shards}) == 8
    rows = train.to_device(next(data.train(0)), train.batch_sharding(mesh))["inputs"]
    assert {shard.data.shape for shard in rows.addressable_shards} == {(8, 16)}


@pytest.mark.slow
def test_ten_classes_are_replicated_on_four_devices_and_give_the_same_steps(whole):
    task, data = classification(num_classes=10)
    state, metrics = take_steps(task, data, make_tx(), train.make_mesh(data=2, tensor=4))
    assert state.params["head"]["bases"].sharding.spec == P(None, "fsdp", None)
    expected, expected_metrics = whole("riemannian_sgd", 10)
    assert_close(state, expected, atol=1e-5)
    assert_close(metrics, expected_metrics, atol=1e-5)


@pytest.mark.slow
def test_accumulation_on_a_mesh_equals_the_batch_on_one_device(whole):
    task, data = classification()
    mesh = train.make_mesh(data=2, fsdp=2, tensor=2)
    state, metrics = take_steps(task, data, make_tx(grassmann="riemannian_sgd"), mesh, accumulate=2)
    expected, expected_metrics = whole("riemannian_sgd", 8)
    assert_close(state, expected, atol=1e-5)
    assert_close(metrics, expected_metrics, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_initial_state_does_not_depend_on_the_mesh(sizes):
    task, _ = classification()
    states = [
        train.init_state(task, make_tx(), mesh, seed=3) for mesh in (train.make_mesh(1), train.make_mesh(**sizes))
    ]
    np.testing.assert_array_equal(states[0].key, states[1].key)
    assert_close(states[1].params, states[0].params, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (P("class", "embed", None), (8, 16, 2), P("tensor", "fsdp", None)),
        (P("class"), (8, 16), P("tensor")),
        (P(), (8, 16), P()),
        (P("class", "embed"), (6, 16), P(None, "fsdp")),  # 6 classes don't divide among 4
        (P("class", "embed"), (8, 3), P("tensor", None)),
        (P("class", "vocab"), (8, 8), P("tensor", None)),  # an axis serves one dimension only
        (P("class", "vocab"), (6, 8), P(None, "tensor")),  # and is free again where it was of no use
        (P("batch"), (4,), P(("data", "fsdp"))),
        (P("batch", "embed"), (4, 4), P(("data", "fsdp"), None)),
        (P("class"), (1,), P(None)),
        (P("layers", "embed"), (3, 4), P(None, "fsdp")),
    ],
)
def test_to_partition_spec_maps_names_to_mesh_axes(names, shape, expected):
    assert train.to_partition_spec(names, shape, train.make_mesh(data=1, fsdp=2, tensor=4)) == expected


def test_to_partition_spec_takes_rules_of_the_users_own():
    mesh = train.make_mesh(data=2, fsdp=2, tensor=2)
    rules = {**train.DEFAULT_RULES, "class": ("fsdp", "tensor"), "embed": None}
    assert train.to_partition_spec(P("class", "embed"), (8, 16), mesh, rules) == P(("fsdp", "tensor"), None)
    assert train.to_partition_spec(P("class", "embed"), (2, 16), mesh, rules) == P("fsdp", None)


def test_to_partition_spec_refuses_what_it_does_not_know():
    mesh = train.make_mesh(data=1, fsdp=2, tensor=4)
    with pytest.raises(ValueError, match="no sharding rule for the logical axis 'klass'"):
        train.to_partition_spec(P("klass"), (8,), mesh)
    with pytest.raises(ValueError, match="name 2 dimensions"):
        train.to_partition_spec(P("class", "embed"), (8,), mesh)
    plain = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match=r"rule for 'class' names mesh axes \['tensor'\]; the mesh has \['data'\]"):
        train.to_partition_spec(P("class"), (8,), plain)


def follow(init, params, specs, mesh, update=None):
    """The specs of what ``init`` makes of parameters."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    found = train.opt_state_shardings(optax.GradientTransformation(init, update), params, shardings)
    return jax.tree.map(lambda sharding: sharding.spec, found)


def test_optimizer_state_follows_its_parameter_factored_statistics_included():
    mesh = train.make_mesh(data=1, fsdp=2, tensor=4)
    params = {"head": {"bases": jnp.zeros((8, 16, 2))}, "bases": jnp.zeros((4, 6))}
    specs = {"head": {"bases": P("tensor", "fsdp", None)}, "bases": P("tensor")}

    def init(params):
        (k, n, p), (m, q) = params["head"]["bases"].shape, params["bases"].shape
        return {
            "same": params,
            "per_subspace": {"head": {"bases": jnp.zeros(k)}},
            "row": {"head": {"bases": jnp.zeros((k, n))}, "bases": jnp.zeros(m)},
            "column": {"head": {"bases": jnp.zeros((k, p))}, "bases": jnp.zeros(q)},
            "transposed": {"head": {"bases": jnp.zeros((n, k))}},
            "coincidence": {"bases": jnp.zeros((m, 4))},  # a rank of 4, which shards over what is left, 2 devices
            "placeholder": {"head": {"bases": jnp.zeros(1)}},
            "count": jnp.zeros((), jnp.int32),
        }

    got = follow(init, params, specs, mesh)
    assert got["same"] == {"head": {"bases": P("tensor", "fsdp", None)}, "bases": P("tensor", None)}
    assert got["per_subspace"]["head"]["bases"] == P("tensor")
    assert got["row"] == {"head": {"bases": P("tensor", "fsdp")}, "bases": P("tensor")}
    assert got["column"] == {"head": {"bases": P("tensor", None)}, "bases": P(None)}
    assert got["transposed"]["head"]["bases"] == P("fsdp", "tensor")
    assert got["coincidence"]["bases"] == P("tensor", "fsdp")
    assert got["placeholder"]["head"]["bases"] == P(None)
    assert got["count"] == P()


def test_state_in_a_subspace_is_sharded_along_the_side_that_it_keeps_and_else_along_its_rank():
    mesh = train.make_mesh(data=1, fsdp=2, tensor=4)
    params = {"layers": {"kernel": jnp.zeros((3, 16, 32))}, "factor": jnp.zeros((16, 4))}
    specs = {"layers": {"kernel": P(None, "fsdp", "tensor")}, "factor": P("fsdp", None)}
    tx = optim.low_rank_projection(optax.trace(0.9), rank=lambda path, shape: 4 if path == "layers/kernel" else None)
    got = {}
    for x, spec in zip(
        jax.tree.leaves(tx.init(params)), jax.tree.leaves(follow(tx.init, params, specs, mesh)), strict=True
    ):
        got.setdefault(x.shape, set()).add(spec)
    assert got[3, 4, 32] == {P(None, "fsdp", "tensor")}
    assert got[3, 16, 4] == {P(None, "fsdp", None)}

    def init(params):
        layers, _, k = params["layers"]["kernel"].shape
        rank = params["factor"].shape[1]
        return {
            "odd": {"layers": {"kernel": jnp.zeros((layers, 5, k))}},
            "both": {"layers": {"kernel": jnp.zeros((layers, 4, 4))}},
            "gram": {"factor": jnp.zeros((rank, rank))},
        }

    got = follow(init, params, specs, mesh)
    assert got["odd"]["layers"]["kernel"] == P(None, None, "tensor")
    assert got["both"]["layers"]["kernel"] == P(None, "fsdp", None)
    assert got["gram"]["factor"] == P(None, None)


def test_optimizer_state_that_depends_on_the_size_of_a_parameter_follows_it_where_it_has_its_shape():
    mesh = train.make_mesh(data=1, fsdp=2, tensor=4)

    def init(params):  # factored from 65 on, and so where the sizes are evaluated a second time
        m, k = params["kernel"].shape
        return {"kernel": {"row": jnp.zeros(m)} if m > 64 else jnp.zeros((m, k))}

    got = follow(init, {"kernel": jnp.zeros((64, 8))}, {"kernel": P("fsdp", "tensor")}, mesh)
    assert got["kernel"] == P("fsdp", "tensor")


def test_optimizer_state_follows_where_an_optimizer_checks_sizes_that_parameters_share():
    mesh = train.make_mesh(data=1, fsdp=2, tensor=4)

    def init(params):
        if params["energy"].shape != params["factor"].shape[:2]:
            raise ValueError("energy")
        return {"sum": params}

    params = {"factor": jnp.zeros((4, 16, 4)), "energy": jnp.zeros((4, 16))}  # the rank is the number of layers
    specs = {"factor": P(None, "fsdp", None), "energy": P(None, "fsdp")}
    assert follow(init, params, specs, mesh)["sum"] == specs


@pytest.mark.slow
def test_training_in_subspaces_on_a_mesh_equals_one_device():
    task, data = classification(num_classes=8, features=(32,), head="softmax")
    with jax.numpy_dtype_promotion("standard"):
        one, split = (
            take_steps(task, data, optim.galore(1e-2, 4, refresh_every=2), train.make_mesh(**axes))[0]
            for axes in ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2})
        )
    assert_close(split.params, one.params, atol=1e-5)
    assert all(not x.sharding.is_fully_replicated for x in jax.tree.leaves(split.opt_state) if x.ndim == 2)


@pytest.mark.parametrize("make", [optax.adam, optax.adafactor, optax.lamb])
def test_state_of_any_optax_optimizer_can_be_placed(make):
    mesh = train.make_mesh(data=1, fsdp=2, tensor=4)
    params = {"kernel": jnp.zeros((128, 256)), "bias": jnp.zeros(256)}
    specs = {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    state = make(1e-3).init(params)
    placed = jax.device_put(state, train.opt_state_shardings(make(1e-3), params, shardings))
    found = {str(x.sharding.spec) for x in jax.tree.leaves(placed) if x.shape == (128, 256)}
    assert found <= {str(P("fsdp", "tensor"))}
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))


def test_optimizer_state_follows_a_parameter_that_is_the_tree_itself():
    mesh = train.make_mesh(data=1, fsdp=2, tensor=4)
    got = follow(optax.adam(1e-3).init, jnp.zeros((8, 4)), P("tensor"), mesh)
    assert got[0].mu == got[0].nu == P("tensor", None)
    assert got[0].count == P()


def test_open_mesh_axis_takes_the_devices_that_are_left():
    assert dict(train.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(train.make_mesh(data=2, tensor=-1).shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert train.make_mesh(data=2).size == 2


@pytest.mark.parametrize("sizes", [None, {"data": 1}, {"data": 4, "tensor": 2}])
def test_all_gather_params_hands_arrays_on_as_they_are_where_no_axis_of_the_examples_shards_them(sizes):
    # Anything else is a value that a scan over layers copies for its backward pass.
    layer, axes = {"kernel": jnp.ones((4, 8))}, {"kernel": P("embed", "mlp")}

    def same(layer):
        assert train.all_gather_params(layer, axes)["kernel"] is layer["kernel"]
        return layer

    with train.use_mesh(train.make_mesh(**sizes)) if sizes else contextlib.nullcontext():
        jax.eval_shape(same, layer)


def test_constrain_hands_arrays_on_as_they_are_on_one_device_and_without_a_mesh():
    def same(x):
        assert train.constrain(x, ("batch", None)) is x
        return x

    jax.eval_shape(same, jnp.ones((4, 8)))
    with train.use_mesh(train.make_mesh(1)):
        jax.eval_shape(same, jnp.ones((4, 8)))


def test_all_gather_params_leaves_stacks_of_layers_and_ungathered_entries_sharded():
    mesh = train.make_mesh(1, 4, 2)
    axes = {"stack": P("layers", "embed"), "kernel": P("embed", "mlp"), "table": P("embed", None)}
    arrays = {"stack": jnp.ones((2, 8)), "kernel": jnp.ones((8, 4)), "table": jnp.ones((8, 4))}

    class Holder(train.Task):
        ungathered = ("table",)

        def axes(self):
            return axes, {}

    placed = jax.device_put(arrays, train.param_shardings(arrays, axes, mesh))
    with train.use_mesh(mesh):
        gathered = jax.jit(train.gathered(Holder(), lambda params, variables: params))(placed, {})
    for name in ("stack", "table"):
        assert gathered[name].sharding.is_equivalent_to(placed[name].sharding, 2)
    assert gathered["kernel"].sharding.spec == P(None, "tensor")


def test_constrain_shards_by_logical_names_and_mesh_axes_names_them():
    mesh = train.make_mesh(2, 2, sequence=2)
    with train.use_mesh(mesh):
        assert train.mesh_axes("sequence") == ("sequence",)
        assert train.current_mesh() == mesh
        x = jax.jit(lambda x: train.constrain(2 * x, ("batch", "sequence")))(jnp.ones((4, 8, 3)))
    assert x.sharding.spec == P(("data", "fsdp"), "sequence")
    assert train.mesh_axes("sequence") == ()
    assert train.current_mesh() is None


def test_one_jitted_function_is_traced_anew_under_another_mesh():
    meshes, specs = [train.make_mesh(8), train.make_mesh(4, 2)], []
    f = jax.jit(chex.assert_max_traces(lambda x: train.constrain(2 * x, (None, "embed")), n=2))
    chex.clear_trace_counter()
    for mesh in (*meshes, *meshes):
        with train.use_mesh(mesh):
            specs.append(f(jnp.ones((4, 8))).sharding.shard_shape((4, 8)))
    assert specs == [(4, 8), (4, 4)] * 2
