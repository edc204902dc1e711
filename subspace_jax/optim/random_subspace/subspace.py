"""Training inside a random subspace of the parameters (arXiv 1804.08838), structure-aware too (arXiv 2012.13255)."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.optim import _checks
from subspace_jax.optim._arrays import automatic, spec_of
from subspace_jax.optim.random_subspace import _projections as projections

PyTree = Any
Select = Callable[[str, jax.Array], bool]

METHODS = ("dense", "sparse", "fastfood", "said")
SCOPES = ("global", "leaf")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("start", "projection", "key"),
    meta_fields=("dim", "method", "scope", "chosen"),
)
@dataclass(frozen=True)
class RandomSubspace:
    """An affine subspace of a tree of parameters: ``start + P theta``.  A pytree: hand it to jitted functions.

    Attributes:
      start: The parameters at ``theta`` zero.
      projection: What makes P, none of it as large as P (unless it was to be stored).
      key: Data of the random key that the projection came from, uint32.
      dim: Number of trainable coordinates.
      method: One of "dense", "sparse", "fastfood" and "said".
      scope: "global", or "leaf" for transforms of their own.
      chosen: For each leaf of ``start``, whether it moves.
    """

    start: PyTree
    projection: projections.Projection
    key: jax.Array
    dim: int
    method: str
    scope: str
    chosen: tuple[bool, ...]

    @property
    def num_params(self) -> int:
        """How many parameters move."""
        return sum(x.size for x in self._moving())

    def init(self) -> jax.Array:
        """The vector ``[dim]`` at which :meth:`expand` gives ``start``: zeros, and ones for the gains of "said"."""
        gains = self._num_gains()
        dtype = _working(self._moving())
        return jnp.concatenate([jnp.zeros(self.dim - gains, dtype), jnp.ones(gains, dtype)])

    def expand(self, theta: jax.Array) -> PyTree:
        """Returns the parameters at a point of the subspace.

        Pure; works under ``jax.jit``, ``jax.vmap`` and ``jax.grad``, and its gradient is exactly :meth:`project`.  The
        sum is computed in float32 (float64 for float64 parameters) and then cast to each parameter's dtype.

        Args:
          theta: ``[dim]``, float32 or float64 as :meth:`init` gives it.

        Returns:
          A tree like ``start``; leaves that don't move are those of ``start``.

        Raises:
          ValueError: ``theta`` has another shape.
        """
        offsets = iter(self._offsets(theta))
        leaves, treedef = jax.tree.flatten(self.start)
        moved = [_moved(x, next(offsets)) if moves else x for x, moves in zip(leaves, self.chosen, strict=True)]
        return treedef.unflatten(moved)

    def project(self, grads: PyTree) -> jax.Array:
        """Returns the gradient ``[dim]`` at :meth:`init` for a gradient of the parameters: ``P^T g``.

        For "said" the gains' part of it is zero, since nothing moves there.

        Args:
          grads: A tree like ``start``.
        """
        leaves = jax.tree.structure(self.start).flatten_up_to(grads)
        like = _working(self._moving())
        picked = [g.astype(like) for g, moves in zip(leaves, self.chosen, strict=True) if moves]
        return jax.vjp(self._offsets, self.init())[1](picked)[0]

    def _offsets(self, theta: jax.Array) -> list[jax.Array]:
        if theta.shape != (self.dim,):
            raise ValueError(f"theta: expected shape ({self.dim},), got {theta.shape}")
        moving, gains = self._moving(), self._num_gains()

        def offsets(projection, theta):
            parts = projections.apply(projection, theta[: self.dim - gains], [x.shape for x in moving])
            return [theta[self.dim - gains + i] * x for i, x in enumerate(parts)] if gains else parts

        specs = functools.partial(spec_of, moving)
        return automatic(offsets, (self.projection, theta), specs)

    def _moving(self) -> list[jax.Array]:
        return [x for x, moves in zip(jax.tree.leaves(self.start), self.chosen, strict=True) if moves]

    def _num_gains(self) -> int:
        return sum(self.chosen) if self.method == "said" else 0


def random_subspace(
    params: PyTree,
    dim: int,
    method: str = "fastfood",
    *,
    key: jax.Array,
    select: Select | None = None,
    scope: str = "global",
    stored: bool = False,
) -> tuple[jax.Array, RandomSubspace]:
    """Draws a random subspace through the parameters, to train ``dim`` coordinates instead of all parameters.

    Methods, with D parameters:

    * "dense": Gaussian columns, drawn again at every use, so that memory stays that of the parameters, and
      time grows with ``dim D``.
    * "sparse": about ``sqrt(n)`` entries a column in a leaf of n parameters; memory and time grow with
      ``dim sqrt(D)``.
    * "fastfood": two Hadamard transforms; memory ``9 L`` bytes for the power of two L that D fits into, time
      ``L log L``, whatever ``dim`` is.
    * "said": fastfood with a transform for each leaf and a trainable gain for each (arXiv 2012.13255).  The last of
      the ``dim`` coordinates are the gains, 1 at the start.  Gradients are exact; those of the released code lack
      a factor.

    A column has length 1 over all parameters together (with "fastfood" on average, exactly where D is a power of two),
    so that a step of some size moves the parameters by that size.  Learning rates are ten times and more those of
    usual training.  Put regularisers on ``expand(theta)`` and not on ``theta``.

    For adapters give the trainable tree of :func:`subspace_jax.adapters.prepare`.  On a mesh offsets are sharded like
    the parameters, whether its axes are Auto or Explicit, and values don't depend on it; with
    scope "leaf" no transform crosses from one parameter to another.

    Source: Li, Farkhoor, Liu and Yosinski, arXiv 1804.08838.

    Args:
      params: Any tree of arrays; works on shapes under ``jax.eval_shape``, too.
      dim: Trainable coordinates, 1 to D; for "said" more than the number of leaves.
      method: See above.
      key: Random key.
      select: ``select(path, leaf)``, which leaves move, paths as in ``"layers/attn/q/kernel"``; by default all that are
        of floating point.
      scope: "leaf" gives each leaf its own Hadamard transform, with columns of length 1 in each leaf, so that
        nothing crosses from one to another ("DID" of arXiv 2012.13255).
      stored: Whether "dense" keeps its columns, ``dim D`` entries: faster, for small problems.

    Returns:
      ``theta [dim]``, float32 (float64 with float64 parameters), and the subspace.

    Raises:
      ValueError: ``dim`` is out of range, a name is unknown, nothing is selected, an option is of another method, or
        one Hadamard transform would have more than 2^31 entries.
      TypeError: The key is no random key, or a selected leaf is not of floating point.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}
      >>> theta, subspace = random_subspace(params, 5, key=jax.random.key(0))
      >>> loss = lambda theta: jnp.sum(jnp.square(subspace.expand(theta)["kernel"]))
      >>> jax.grad(loss)(theta).shape
      (5,)
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {SCOPES}, got {scope!r}")
    if scope == "leaf" and method not in ("fastfood", "said"):
        raise ValueError(f"scope: 'leaf' is for 'fastfood', got method {method!r}")
    if stored and method != "dense":
        raise ValueError(f"stored: is for 'dense', got method {method!r}")
    if not jnp.issubdtype(getattr(key, "dtype", type(key)), jax.dtypes.prng_key):
        raise TypeError(f"key: expected one of jax.random.key, got {getattr(key, 'dtype', key)!s}")
    chosen = _choose(params, select)
    moving = [x for x, moves in zip(jax.tree.leaves(params), chosen, strict=True) if moves]
    shapes, total = [x.shape for x in moving], sum(math.prod(x.shape) for x in moving)
    gains = len(moving) if method == "said" else 0
    if isinstance(dim, bool) or not isinstance(dim, int) or not gains < dim <= total + gains:
        raise ValueError(
            f"dim: expected an integer from {gains + 1} to {total + gains} for {total} parameters"
            f"{f' in {gains} leaves' if gains else ''}, got {dim!r}"
        )
    dtype = _working(moving)
    if method == "dense":
        projection = (projections.stored if stored else projections.dense)(key, shapes, dim, dtype)
    elif method == "sparse":
        projection = projections.sparse(key, shapes, dim, dtype)
    else:
        by_leaf = method == "said" or scope == "leaf"
        projection = projections.fastfood(key, shapes, dim - gains, dtype, by_leaf=by_leaf)
    scope = "leaf" if method == "said" else scope
    subspace = RandomSubspace(params, projection, jax.random.key_data(key), dim, method, scope, chosen)
    return subspace.init(), subspace


def compress(subspace: RandomSubspace, theta: jax.Array) -> dict[str, Any]:
    """Returns a solution without its start: the random key's data and ``dim`` coordinates.

    Args:
      subspace: Of :func:`random_subspace`.
      theta: ``[dim]``.

    Returns:
      A dict of arrays and names, for :func:`decompress`.
    """
    stored = isinstance(subspace.projection, projections.StoredProjection)
    names = {"method": subspace.method, "scope": subspace.scope, "stored": stored}
    return {"theta": theta, "key": subspace.key, **names}


def decompress(compressed: Mapping[str, Any], params: PyTree, *, select: Select | None = None) -> PyTree:
    """Returns the parameters of a compressed solution and its start.

    Parameters are reproduced with the same version of JAX; another one may draw other numbers from a key.

    Args:
      compressed: Of :func:`compress`.
      params: The start.
      select: As for :func:`random_subspace`.

    Returns:
      A tree like ``params``.
    """
    fields = dict(compressed)
    theta, key = fields.pop("theta"), jax.random.wrap_key_data(fields.pop("key"))
    scope = "global" if fields["method"] == "said" else fields["scope"]
    fields |= {"scope": scope}
    return random_subspace(params, theta.shape[0], key=key, select=select, **fields)[1].expand(theta)


def projection_matrix(subspace: RandomSubspace) -> jax.Array:
    """The matrix P at the start, ``[D, dim]``, leaves flattened one after the other: for tests of small problems."""
    columns = jax.jacobian(lambda theta: jnp.concatenate([x.ravel() for x in subspace._offsets(theta)]))
    return columns(subspace.init())


def _choose(params: PyTree, select: Select | None) -> tuple[bool, ...]:
    chosen = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = _checks.path_name(path)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        chosen.append(floating if select is None else bool(select(name, leaf)))
        if chosen[-1] and not floating:
            raise TypeError(f"select: {name} is of {leaf.dtype}, expected parameters of floating point")
    if not any(chosen):
        raise ValueError(f"select: expected some of the {len(chosen)} leaves, got none")
    return tuple(chosen)


def _moved(x: jax.Array, offset: jax.Array) -> jax.Array:
    return (x.astype(offset.dtype) + offset).astype(x.dtype)


def _working(leaves: list[jax.Array]) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in leaves) else jnp.float32)
