"""The contract that every public Optax transform keeps; see ``registry.py`` for who takes part.

Compiling and tracing are what costs here.  The quick run has one jitted step for each method, which most tests share;
what traces or compiles anew, such as wrappers and placements, runs for one method of each kind, and in the slow run for
all entries.
"""

import functools
import inspect
import itertools
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import optim

from ..variants import rest_slow
from .registry import ENTRIES, KINDS, METHODS, orthonormal

NUM_STEPS = 3

# Steps of wrappers and placements run a few times: to optimise their machine code takes as long as all else of them.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _entries(entries, quick):
    cases = [pytest.param(e, marks=[] if e in quick else pytest.mark.slow, id=e.id) for e in entries]
    return pytest.mark.parametrize("entry", cases)


# Tests that share a method's jitted step.
every_method = _entries(ENTRIES, METHODS)
# Tests that trace.
every_kind = _entries(ENTRIES, KINDS)
# Of these, tests of what depends little on the kind.
one_kind = _entries(ENTRIES, [e for e in KINDS if e.id == "adaprelora"])
# Tests that compile anew.
every_code = _entries([e for e in ENTRIES if not e.same_code], KINDS)
# Tests of a wrapper, which compile anew.
wrapped = _entries([e for e in ENTRIES if not e.same_code], [e for e in METHODS if e.id == "lora-plus"])

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


def stepper(entry, tx):
    """``step(grads, state, params) -> (params, state)``, not jitted."""

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params, **entry.extra_args())
        assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def compiled(entry):
    """The transform and its jitted step, shared by the tests."""
    tx = entry.make()
    return tx, jax.jit(stepper(entry, tx))


def run(entry, step, state, params):
    """Parameters and state before the first and after each step."""
    path = [(params, state)]
    for i in range(NUM_STEPS):
        params, state = path[-1]
        path.append(step(entry.gradients(params, i), state, params))
    return path


@functools.cache
def plain_run(entry):
    tx, step = compiled(entry)
    params = entry.params()
    return run(entry, step, tx.init(params), params)


def with_a_stranger(entry):
    """Parameters and gradients of the first step, beside a parameter that is none of the transform's business."""
    params = entry.params()
    return {"ours": params, "other": jnp.ones(2)}, {"ours": entry.gradients(params, 0), "other": jnp.full(2, 3.0)}


def avals(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), jax.typeof(x).weak_type), tree)


def dtypes(tree):
    return {x.dtype for x in jax.tree.leaves(tree)}


def test_the_registry_holds_every_public_transform():
    functions = {name: made for name in optim.__all__ if inspect.isfunction(made := getattr(optim, name))}
    returned = {name: typing.get_type_hints(function)["return"] for name, function in functions.items()}
    transforms = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)
    assert {name for name, kind in returned.items() if kind in transforms} == {entry.public for entry in ENTRIES}


@every_method
def test_steps_move_every_parameter_and_keep_the_invariant(entry):
    for i, (params, _) in enumerate(plain_run(entry)[1:]):
        # Adding a difference in float32 rounds each entry anew, so errors add up until drift is removed.
        entry.check(params, 1e-6 if i == 0 else 2e-6)
    moved = jax.tree.map(lambda new, old: not np.allclose(new, old), params, entry.params())
    assert all(jax.tree.leaves(moved))


@pytest.mark.slow
@wrapped
def test_eager_equals_jit(entry):
    params, state = plain_run(entry)[1]
    step = stepper(entry, compiled(entry)[0])
    close(step(entry.gradients(params, 1), state, params), plain_run(entry)[2])


@every_code
def test_init_needs_no_values(entry):
    params, state = plain_run(entry)[0]
    init = compiled(entry)[0].init
    shapes = jax.eval_shape(lambda: params)
    for made in (jax.eval_shape(init, shapes), jax.eval_shape(init, params), jax.eval_shape(lambda: init(params))):
        assert avals(made) == avals(state)
    chex.assert_trees_all_equal(jax.jit(init)(params), state)


@every_method
def test_types_are_stable_from_step_0_and_nothing_is_retraced(entry):
    start, *rest = plain_run(entry)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(start))
    assert all(avals(after) == avals(start) for after in rest)
    assert compiled(entry)[1]._cache_size() <= 1  # 0 where conftest.py has dropped compiled functions since


@wrapped
def test_bfloat16_params_have_a_float32_state(entry):
    tx, _ = compiled(entry)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), entry.params())
    start, *rest = run(entry, quick_jit(stepper(entry, tx)), tx.init(params), params)
    assert avals(start[1]) == avals(plain_run(entry)[0][1])
    assert all(avals(after) == avals(start) for after in rest)
    chex.assert_tree_all_finite(rest[-1])
    entry.check(rest[-1][0], 0.03)


@every_kind
def test_float64_params_have_a_float64_state(entry, x64):
    tx = entry.make()
    params = jax.tree.map(lambda x: x.astype(jnp.float64), entry.params())
    start = params, jax.eval_shape(tx.init, params)
    assert jnp.float32 not in dtypes(start)
    after = jax.eval_shape(stepper(entry, tx), params, start[1], params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), start)


@one_kind
def test_can_be_vmapped(entry):
    tx, _ = compiled(entry)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), entry.params())
    states = jax.eval_shape(jax.vmap(tx.init), stacked)
    after = jax.eval_shape(jax.vmap(stepper(entry, tx)), stacked, states, stacked)
    assert avals(after) == avals((stacked, states))


@wrapped
def test_masked(entry):
    params, grads = with_a_stranger(entry)
    tx = optax.masked(entry.make(), {"ours": True, "other": False})
    params, _ = stepper(entry, tx)(grads, tx.init(params), params)
    close(params, {"ours": plain_run(entry)[1][0], "other": jnp.full(2, 4.0)})


@every_method
def test_masked_away_altogether(entry):
    params = {"other": jnp.ones(2)}
    tx = optax.masked(entry.make(), {"other": False})
    state = tx.init(params)
    updates, after = tx.update(params, state, params, **entry.extra_args())
    chex.assert_trees_all_equal(updates, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@wrapped
def test_partition(entry):
    params, grads = with_a_stranger(entry)
    tx = optax.partition({"a": entry.make(), "b": optax.sgd(0.5)}, {"ours": "a", "other": "b"})
    params, _ = stepper(entry, tx)(grads, tx.init(params), params)
    close(params, {"ours": plain_run(entry)[1][0], "other": jnp.full(2, -0.5)})


@wrapped
def test_chain_with_clipping_in_front(entry):
    params, state = plain_run(entry)[1]
    clip, tx = optax.clip_by_global_norm(0.5), compiled(entry)[0]
    chained, grads = optax.chain(clip, tx), entry.gradients(params, 1)
    clipped, _ = clip.update(grads, clip.init(params))
    got, _ = stepper(entry, chained)(grads, (clip.init(params), state), params)
    expected, _ = compiled(entry)[1](clipped, state, params)
    close(got, expected)


@wrapped
def test_inject_hyperparams_changes_the_rate_without_recompiling(entry):
    tx = optax.inject_hyperparams(entry.factory, static_args=entry.static)(**{entry.rate: 0.1}, **entry.kwargs)
    step = jax.jit(stepper(entry, tx))
    params = entry.params()
    path = run(entry, step, tx.init(params), params)
    close([(params, state.inner_state) for params, state in path], plain_run(entry))

    params, state = path[-1]
    grads = entry.gradients(params, NUM_STEPS)
    expected, _ = stepper(entry, entry.make(0.02))(grads, state.inner_state, params)
    state.hyperparams[entry.rate] = jnp.asarray(0.02, jnp.float32)
    got, _ = step(grads, state, params)
    close(got, expected)
    assert step._cache_size() == 1


@wrapped
def test_a_schedule_is_followed(entry):
    rates = jnp.asarray([0.1, 0.03, 0.2])
    scheduled = entry.make(lambda count: rates[count])
    by_hand = optax.inject_hyperparams(entry.factory, static_args=entry.static)(**{entry.rate: 0.1}, **entry.kwargs)
    params = entry.params()
    expected, state, step = params, by_hand.init(params), quick_jit(stepper(entry, by_hand))
    for i, (got, _) in enumerate(run(entry, quick_jit(stepper(entry, scheduled)), scheduled.init(params), params)[1:]):
        state.hyperparams[entry.rate] = rates[i]
        expected, state = step(entry.gradients(params, i), state, expected)
        close(got, expected)


@wrapped
def test_multi_steps_averages_gradients(entry):
    tx = optax.MultiSteps(compiled(entry)[0], every_k_schedule=2)
    step, params = quick_jit(stepper(entry, tx)), entry.params()
    state, grads = tx.init(params), entry.gradients(params, 0)
    with jax.numpy_dtype_promotion("standard"):  # Optax divides float32 by int32
        halfway, after = step(jax.tree.map(lambda g: 0.5 * g, grads), state, params)
        got, after = step(jax.tree.map(lambda g: 1.5 * g, grads), after, halfway)
    chex.assert_trees_all_equal(halfway, params)
    assert avals(after) == avals(state)
    close((got, after.inner_opt_state), plain_run(entry)[1])


class Holder(nnx.Module):
    """A tree of dicts and tuples of arrays as parameters of Flax."""

    def __init__(self, tree):
        self.tree = self._held(tree)

    def _held(self, tree):
        if isinstance(tree, dict):
            return nnx.Dict({name: self._held(x) for name, x in tree.items()})
        return nnx.List([self._held(x) for x in tree]) if isinstance(tree, tuple) else nnx.Param(tree)


def held(model):
    """The parameters of a :class:`Holder` in the order of the tree."""
    return jax.tree.leaves(nnx.pure(nnx.state(model, nnx.Param)))


def fill(model, leaves):
    state = nnx.state(model, nnx.Param)
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def inner_state(optimizer):
    """What is in the wrapper's state; Flax leaves out a state without arrays."""
    return nnx.pure(nnx.state(optimizer.opt_state)).get("inner_state", {})


@wrapped
def test_flax_steps_it_and_apply_if_finite_skips_what_is_not(entry):
    """In one program: ``flax.nnx.Optimizer`` asks for states whose trees are like its own."""
    tx, params = optax.apply_if_finite(compiled(entry)[0], max_consecutive_errors=3), entry.params()
    model = Holder(params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(avals, nnx.pure(nnx.state(optimizer)))

    @nnx.jit
    def step(model, optimizer, grads):
        optimizer.update(model, grads, **entry.extra_args())

    for i, (expected, _) in enumerate(plain_run(entry)):
        close(held(model), jax.tree.leaves(expected))
        if i == NUM_STEPS:
            break
        grads = jax.tree.leaves(entry.gradients(expected, i))
        if i == 1:
            skipped = inner_state(optimizer)
            step(model, optimizer, fill(model, [g.at[(0,) * g.ndim].set(jnp.nan) for g in grads]))
            close(held(model), jax.tree.leaves(expected))
            chex.assert_trees_all_equal(inner_state(optimizer), skipped)
        step(model, optimizer, fill(model, grads))
    assert jax.tree.map(avals, nnx.pure(nnx.state(optimizer))) == before


@every_kind
def test_flax_finds_the_state_it_began_with(entry):
    tx, params = compiled(entry)[0], entry.params()

    def twice():
        model = Holder(params)
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        start = avals(nnx.pure(nnx.state(optimizer)))
        for _ in range(2):
            optimizer.update(model, nnx.state(model, nnx.Param), **entry.extra_args())
            assert avals(nnx.pure(nnx.state(optimizer))) == start
        return nnx.state(model)

    assert [x.shape for x in jax.tree.leaves(nnx.eval_shape(twice))] == [x.shape for x in jax.tree.leaves(params)]


@every_kind
def test_tree_map_params_finds_what_belongs_to_parameters(entry):
    tx, params = compiled(entry)[0], entry.params()
    state = jax.eval_shape(tx.init, params)
    names = jax.tree_util.tree_map_with_path(lambda path, x: jax.tree_util.keystr(path), params)
    assert avals(optax.tree.map_params(tx, lambda x: x, state)) == avals(state)
    # Optax's own way around what optax.masked and optax.partition hide.
    hidden = {"is_leaf": lambda x: isinstance(x, optax.MaskedNode)}
    named = optax.tree.map_params(tx, lambda x, name: name, state, names, transform_non_params=lambda x: None, **hidden)
    found = jax.tree.leaves(named)
    assert set(found) <= set(jax.tree.leaves(names))
    # What is mapped is all but counters.
    arrays = sum(x.ndim > 0 for x in jax.tree.leaves(state))
    assert len(found) >= arrays


@every_kind
def test_arguments_go_by_the_names_of_optax(entry):
    params = entry.params()
    tx = entry.factory(**{entry.rate: 0.1}, **entry.kwargs)  # as it comes, without optax.with_extra_args_support

    def step(grads, state, params):
        named = tx.update(updates=grads, state=state, params=params, **entry.extra_args())
        assert avals(named) == avals(tx.update(grads, state, params, **entry.extra_args(), nobody_asks_for=1))
        return named

    state = jax.eval_shape(tx.init, params)
    assert avals(jax.eval_shape(step, params, state, params)[1]) == avals(state)


@one_kind
def test_other_dtypes_keep_theirs(entry, x64):
    """Updates have the dtype of the parameters, in trees of several too, and states theirs from the first step on."""
    tx = entry.make()
    for dtypes in ([jnp.float16], [jnp.bfloat16], [jnp.float64, jnp.float32], [jnp.bfloat16, jnp.float64]):
        kinds = itertools.cycle(dtypes)
        params = jax.tree.map(lambda x, kinds=kinds: jax.ShapeDtypeStruct(x.shape, next(kinds)), entry.params())
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(lambda g, s, p: tx.update(g, s, p, **entry.extra_args()), params, state, params)
        assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
        assert avals(after) == avals(state)


@one_kind
def test_gradients_may_be_coarser_than_parameters(entry, x64):
    """As where a loss is computed in another type than its parameters have; a state keeps its dtypes."""
    tx = entry.make()
    for wide, coarse in ((jnp.float32, jnp.bfloat16), (jnp.float32, jnp.float16), (jnp.float64, jnp.float32)):
        params, grads = (
            jax.tree.map(lambda x, dtype=dtype: jax.ShapeDtypeStruct(x.shape, dtype), entry.params())
            for dtype in (wide, coarse)
        )
        state = jax.eval_shape(tx.init, params)
        with jax.numpy_dtype_promotion("standard"):  # on which Optax relies there
            _, after = jax.eval_shape(lambda g, s, p: tx.update(g, s, p, **entry.extra_args()), grads, state, params)
        assert avals(after) == avals(state)


@every_kind
def test_odd_leaves_go_along(entry):
    """Leaves without entries, of one entry, of one axis or four, None, and what optax.masked hides."""
    tx, ours = compiled(entry)[0], entry.params()
    odd = {"none": None, "hidden": optax.MaskedNode()}
    if entry.check is not orthonormal:
        shapes = {"wide": (0, 4), "tall": (4, 0), "flat": (0,), "number": (), "vector": (3,)}
        if entry.public != "coso":  # has no sketch of so small sides
            shapes |= {"one": (1, 1), "stacked": (2, 1, 3, 2)}
        odd |= {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    else:
        odd |= {"empty": jax.ShapeDtypeStruct((0, 4, 2), jnp.float32), "one": jax.ShapeDtypeStruct((1, 1), jnp.float32)}
    if entry.public == "with_geometry":
        odd["bases"] = jax.ShapeDtypeStruct((0, 4, 2), jnp.float32)
    for tree in ({"ours": ours, **odd}, {}, {"none": None}, (ours, [None])):
        state = jax.eval_shape(tx.init, tree)
        updates, after = jax.eval_shape(lambda g, s: tx.update(g, s, g, **entry.extra_args()), tree, state)
        assert avals(updates) == avals(tree)
        assert avals(after) == avals(state)


@every_method
def test_what_is_not_finite_is_seen_in_the_step(entry):
    """Else it stays in the state, and no wrapper can tell."""
    step = compiled(entry)[1]
    for params, state in plain_run(entry)[:2]:
        leaves, structure = jax.tree.flatten(entry.gradients(params, 1))
        for bad, i in itertools.product((jnp.nan, jnp.inf), range(len(leaves))):
            spoilt = [g.at[(0,) * g.ndim].set(bad) if i == j else g for j, g in enumerate(leaves)]
            after, _ = step(structure.unflatten(spoilt), state, params)
            assert not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(after)), (bad, i)


@every_method
def test_gradients_of_any_size_give_steps_that_are_finite(entry):
    step, (start, fresh) = compiled(entry)[1], plain_run(entry)[0]
    # What is squared by the caller, or is turned by 1e19 radians, is no number any more.
    largest = 1e8 if entry.public == "adaprelora" or entry.check is orthonormal or "head" in start else 1e20
    for size in (0.0, 1e-20, largest):
        params, state = start, fresh
        for i in range(NUM_STEPS):
            grads = jax.tree.map(lambda g, size=size: size * g, entry.gradients(params, i))
            params, state = step(grads, state, params)
            chex.assert_tree_all_finite((params, state))
            # The next gradient is taken at the start: parameters of 1e19 are another matter.
            params = start


@every_method
def test_steps_from_zero_are_finite(entry):
    params, state = plain_run(entry)[0]
    if entry.check is orthonormal or "head" in params:
        pytest.skip("bases are not zero")
    params = jax.tree.map(jnp.zeros_like, params)
    for i in range(NUM_STEPS):
        params, state = compiled(entry)[1](entry.gradients(params, i), state, params)
        chex.assert_tree_all_finite((params, state))


@pytest.mark.eight_devices
@every_code
@pytest.mark.parametrize("axis_type", rest_slow([AxisType.Explicit, AxisType.Auto]), ids=["explicit", "auto"])
def test_a_mesh_of_8_devices_changes_nothing(entry, axis_type):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type, axis_type))
    # A basis turns by rounding errors over the gap between singular values, and plain momenta with it; in float64 that
    # is little enough to see what else differs.
    wide = entry.public == "low_rank_projection"
    params, tx = entry.params(), entry.make()
    # Under Explicit axes a wrapper's branches must agree on shardings, too.
    explicit = axis_type == AxisType.Explicit
    wrapped = optax.apply_if_finite(tx, 3) if explicit else tx
    whole = isinstance(entry.layout, P)
    layout = jax.tree.map(lambda _: entry.layout, params) if whole else entry.layout
    # JAX takes a spec with its trailing Nones for another one than that without, and would compile twice.  Under Auto
    # axes a tree of specs has them where results have them.
    if whole or explicit:
        layout = jax.tree.map(lambda p, spec: P(*spec, *[None] * (p.ndim - len(spec))), params, layout)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout)
    by_shape = {p.shape: s for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)}

    with jax.enable_x64(wide):
        if wide:
            params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
        expected = run(entry, quick_jit(stepper(entry, tx)), tx.init(params), params) if wide else plain_run(entry)
        with jax.set_mesh(mesh):
            params = jax.device_put(params, shardings)
            step = quick_jit(stepper(entry, wrapped), donate_argnums=(1, 2))
            after = params, wrapped.init(params)
            for i, before in enumerate(expected):
                for x in jax.tree.leaves(after):
                    assert x.shape not in by_shape or x.sharding.is_equivalent_to(by_shape[x.shape], x.ndim)
                params, state = after
                seen = params, state.inner_state if explicit else state
                tolerance = 1e-10 if wide else 1e-5
                chex.assert_trees_all_close(seen, before, rtol=tolerance, atol=tolerance)
                grads = jax.device_put(entry.gradients(params, i), shardings)
                after = step(grads, state, params)
    assert step._cache_size() == 1


@every_kind
def test_a_checkpoint_continues_bit_for_bit(entry, tmp_path):
    saved, end = plain_run(entry)[1], plain_run(entry)[-1]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        params, state = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: saved))
    chex.assert_trees_all_equal((params, state), saved)
    # Off the sharding that Orbax pins them to, which would only make the same step compile again.
    params, state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (params, state))
    for i in range(1, NUM_STEPS):
        params, state = compiled(entry)[1](entry.gradients(params, i), state, params)
    chex.assert_trees_all_equal((params, state), end)


@every_method
def test_params_are_asked_for_where_they_are_needed(entry):
    if not entry.needs_params:
        pytest.skip("runs without parameters")
    params, state = plain_run(entry)[0]
    with pytest.raises(ValueError, match="params"):
        compiled(entry)[0].update(params, state, **entry.extra_args())


@every_method
def test_gradients_of_another_structure_are_refused(entry):
    params, state = plain_run(entry)[0]
    with pytest.raises((TypeError, ValueError)):
        compiled(entry)[0].update({"elsewhere": params}, state, params, **entry.extra_args())
