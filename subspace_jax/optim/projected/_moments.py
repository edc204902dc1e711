"""Moments inside the state of any Optax transform."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax.optim.projected._map import tree_of

PyTree = Any


class Moments:
    """Where a state has moments, that is trees like the projected gradients; all else is counters.

    Attributes:
      low: Tree of arrays or shapes like the projected gradients.
      structure: Structure of the parameters, whose leaves ``low`` has or leaves out.
      names: Paths of the moments in the state.
    """

    def __init__(self, low: PyTree, state: optax.OptState, structure: Any):
        kind, shapes = jax.tree.structure(low), [x.shape for x in jax.tree.leaves(low)]

        def is_moment(x):
            same = bool(shapes) and jax.tree.structure(x) == kind
            return same and [jnp.shape(y) for y in jax.tree.leaves(x)] == shapes

        entries, self._outside = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_moment)
        self._at = [i for i, (_, x) in enumerate(entries) if is_moment(x)]
        self.low, self.structure = low, structure
        self.names = [jax.tree_util.keystr(entries[i][0]) for i in self._at]

    def take(self, state: optax.OptState) -> list[PyTree]:
        """The moments of a state."""
        values = self._outside.flatten_up_to(state)
        return [values[i] for i in self._at]

    def put(self, state: optax.OptState, moments: list[PyTree]) -> optax.OptState:
        """The state with other moments, which may be of other leaves."""
        values = self._outside.flatten_up_to(state)
        for i, tree in zip(self._at, moments, strict=True):
            values[i] = tree
        return self._outside.unflatten(values)

    def of(self, state: optax.OptState) -> list[list[jax.Array]]:
        """For each moment of a state the list of its leaves."""
        return [self.structure.flatten_up_to(tree) for tree in self.take(state)]

    def put_leaves(self, state: optax.OptState, leaves: list[list[jax.Array] | None]) -> optax.OptState:
        """The state with other moments: for each leaf a list of them, None for leaves that are not projected."""
        return self.put(
            state, [tree_of([own and own[i] for own in leaves], self.structure) for i in range(len(self._at))]
        )


def check_moments(low: PyTree, state: optax.OptState, structure: Any) -> None:
    """Raises ValueError where a state has arrays that are neither moments nor counters."""
    inside = {id(x) for leaves in Moments(low, state, structure).of(state) for x in leaves}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if id(x) not in inside and jnp.ndim(x) > 0:
            raise ValueError(
                f"inner: expected a state of counters and of moments shaped like the projected gradients, which can "
                f"be reset, rotated or stepped leafwise, got {jnp.shape(x)} at {jax.tree_util.keystr(path)}; "
                "use moments='keep' and leafwise=False"
            )


def second_moments(inner: optax.GradientTransformation, low: PyTree, state: optax.OptState, structure: Any) -> list:
    """For each moment of a state whether it is a second one, from two steps on small gradients and on their negatives.

    Names of fields don't tell: Adan keeps first moments in ``v`` and second ones in ``n``.  Negated gradients change
    the sign of a first moment, and leave a second one, which is never negative, as it is.

    Raises:
      ValueError: A moment is neither, or the inner transform can't be run on gradients of other sizes.
    """
    kind, dtypes = jax.tree.structure(low), [(x.ndim, x.dtype) for x in jax.tree.leaves(low)]

    def ends():
        # Sizes that no other array of a state is likely to have.
        shapes = [jax.ShapeDtypeStruct((2, 3, 5, 7)[:ndim], dtype) for ndim, dtype in dtypes]
        small = kind.unflatten(shapes)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), small)
        start = inner.init(zeros)
        found = Moments(small, start, kind)
        for sign in (1, -1):
            after = start
            for seed in range(2):
                rng = np.random.default_rng(seed)
                grads = [jnp.asarray(sign * rng.standard_normal(x.shape), x.dtype) for x in shapes]
                _, after = inner.update(kind.unflatten(grads), after, zeros)
            yield [[np.asarray(x, np.float64) for x in leaves] for leaves in found.of(after)]

    try:
        with jax.ensure_compile_time_eval():
            plus, minus = ends()
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"inner: its first and second moments can't be found, which moments='rotate' needs: {error}"
        ) from error
    names = Moments(low, state, structure).names
    if len(names) != len(plus):
        raise ValueError(f"inner: moments='rotate' needs moments that don't depend on sizes, got {', '.join(names)}")
    return [_is_second(*args) for args in zip(names, plus, minus, strict=True)]


def _is_second(name, plus, minus):
    pairs = list(zip(plus, minus, strict=True))
    if all(np.allclose(x, -y, rtol=1e-3, atol=1e-9) for x, y in pairs):
        return False
    if all(np.allclose(x, y, rtol=1e-3, atol=1e-9) and np.all(x >= 0) for x, y in pairs):
        return True
    raise ValueError(
        f"inner: {name} of its state is neither a first nor a second moment and can't be rotated; "
        "use moments='keep' or 'reset'"
    )
