"""The mesh and the sharding rules under which a step is traced; tasks read them here and are given none."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax.train import sharding

if TYPE_CHECKING:
    from subspace_jax.train.task import Task

PyTree = Any

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class _Context(NamedTuple):
    mesh: Mesh | AbstractMesh | None = None
    rules: tuple[tuple[str, Any], ...] = ()
    remat: str = "none"


# In the key of every jit cache: a function is traced anew under another mesh.
_context = jax.make_user_context(_Context())


@contextlib.contextmanager
def use_mesh(
    mesh: Mesh | AbstractMesh | None, rules: sharding.Rules = sharding.DEFAULT_RULES, *, remat: str = "none"
) -> Iterator[None]:
    """Traces what is called inside for a mesh; the functions of this module do nothing without one.

    Args:
      mesh: The mesh.
      rules: Logical name to mesh axis or axes.
      remat: What :func:`gathered` keeps for the backward pass, see :func:`subspace_jax.train.make_train_step`.
    """
    fixed = tuple((name, tuple(axes) if isinstance(axes, list) else axes) for name, axes in sorted(rules.items()))
    with _context(_Context(None if mesh is None else sharding.auto_mesh(mesh), fixed, remat)):
        yield


@contextlib.contextmanager
def use_remat(remat: str) -> Iterator[None]:
    """Changes the rematerialization of :func:`gathered` alone."""
    with _context(_context.value._replace(remat=remat)):
        yield


def current_mesh() -> Mesh | AbstractMesh | None:
    """Returns the mesh of the context with axes of type Auto, or None."""
    return _context.value.mesh


def current_rules() -> sharding.Rules:
    """Returns the rules of the context."""
    return dict(_context.value.rules)


def mesh_axes(name: str) -> tuple[str, ...]:
    """Returns the mesh axes over which a logical axis is sharded, none where there is no mesh.

    Args:
      name: The logical name; the mesh has the axis "sequence" only where positions are sharded.
    """
    mesh = current_mesh()
    return () if mesh is None else sharding.axes_of_name(name, mesh, current_rules())


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Constrains the sharding of an activation; works under ``jax.jit`` only.

    Args:
      x: The array.
      names: Logical name of each dimension.  Dimensions with None, and those beyond the names, are left to the
        compiler, as is a dimension that the mesh axes do not divide.

    Returns:
      The array; as it is without a mesh, and on a mesh of one device.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return x
    spec = sharding.to_partition_spec(P(*names), x.shape, mesh, current_rules())
    free = (P.UNCONSTRAINED,) * (x.ndim - len(names))
    entries = tuple(P.UNCONSTRAINED if name is None else axes for name, axes in zip(names, spec, strict=True))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*entries, *free)))


def all_gather_params(tree: PyTree, axes: PyTree) -> PyTree:
    """Gathers parameters over the mesh axes that shard examples or positions; works under ``jax.jit`` only.

    A parameter is stored in shards, and replicated but for ``tensor`` where it meets examples.  Left to itself, the
    compiler may shard a matmul over its contracted dimension by the axis that already shards its examples; on a mesh
    of 2 x 2 x 2 the gradient is then wrong (JAX 0.10.2).

    Stacks with a logical axis ``"layers"`` stay sharded: all layers would be gathered at once.  A scan over them
    gathers each layer, by the names of its axes without ``"layers"``.

    Args:
      tree: Tree of arrays.
      axes: Their logical axes, as :meth:`subspace_jax.train.Task.axes` gives them.

    Returns:
      The same arrays.
    """
    mesh, rules = current_mesh(), current_rules()
    if mesh is None:
        return tree
    return jax.tree.map(lambda x, names: x if "layers" in names else _gather(x, names, mesh, rules), tree, axes)


def _gather(x: jax.Array, names: P, mesh: Mesh | AbstractMesh, rules: sharding.Rules) -> jax.Array:
    used = {a for name in ("batch", "sequence") for a in sharding.axes_of_name(name, mesh, rules)}
    groups = [sharding.axes_of(entry) for entry in sharding.to_partition_spec(names, x.shape, mesh, rules)]
    if not any(mesh.shape[axis] > 1 for group in groups for axis in group if axis in used):
        return x  # a constraint is another array, which a scan keeps for its backward pass
    spec = P(*(tuple(axis for axis in group if axis not in used) or None for group in groups))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def gathered(task: "Task", f: Callable) -> Callable:
    """Returns ``f`` with its parameters and variables gathered first, in the form that is to be differentiated.

    The backward pass then reduces and scatters each gradient, and keeps what the step's ``remat`` says.

    Args:
      task: The task whose axes and ``ungathered`` entries count.
      f: ``f(params, variables, ...)``.

    Returns:
      A function of the same arguments.
    """

    def of_shards(params, variables, *args, **kwargs):
        param_axes, variable_axes = task.axes()
        params = _gather_entries(params, param_axes, task.ungathered)
        variables = _gather_entries(variables, variable_axes, task.ungathered)
        return f(params, variables, *args, **kwargs)

    remat = _context.value.remat
    return of_shards if remat == "none" else jax.checkpoint(of_shards, policy=REMAT_POLICIES[remat])


def _gather_entries(tree: PyTree, axes: PyTree, ungathered: tuple[str, ...]) -> PyTree:
    if not ungathered or not isinstance(tree, dict):
        return all_gather_params(tree, axes)
    return {name: x if name in ungathered else all_gather_params(x, axes[name]) for name, x in tree.items()}


def jit_on_mesh(
    function: Callable,
    mesh: Mesh,
    out_shardings: PyTree,
    *,
    rules: sharding.Rules = sharding.DEFAULT_RULES,
    in_shardings: PyTree = None,
    donate_argnums: int | tuple = (),
) -> Callable:
    """Compiles a function of sharded arrays, traced under the mesh, whatever the type of the mesh's axes.

    On Explicit axes its body runs with Auto ones: the same program, and results typed by ``out_shardings``.

    Args:
      function: Takes and returns pytrees of arrays.
      mesh: The mesh on which they live.
      out_shardings: Shardings of the results, or one for all.
      rules: Logical name to mesh axis or axes.
      in_shardings: Of the arguments; by default as they come.
      donate_argnums: As for ``jax.jit``.
    """

    def placed(*args):
        with use_mesh(mesh, rules):
            return function(*args)

    placed.__name__ = getattr(function, "__name__", placed.__name__)  # by which profiles show the program
    if AxisType.Explicit in mesh.axis_types:
        placed = jax.sharding.auto_axes(placed, out_sharding=out_shardings)
    given = {} if in_shardings is None else {"in_shardings": in_shardings}
    return jax.jit(placed, out_shardings=out_shardings, donate_argnums=donate_argnums, **given)
