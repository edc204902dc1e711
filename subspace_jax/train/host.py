"""Host code of a run of several processes: it runs on process 0, and all processes get its result."""

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")


@contextlib.contextmanager
def noted(where: str) -> Iterator[None]:
    """Adds to what is raised within it a note of where that was, such as ``"in stop"``."""
    try:
        yield
    except Exception as error:
        error.add_note(where)
        raise


def on_first_process(action: Callable[[], T]) -> T:
    """Returns what ``action`` returns on process 0, on every process; what it raises there is raised everywhere.

    Args:
      action: What to do; its result can be pickled.
    """
    if jax.process_count() == 1:
        return action()
    outcome: tuple[Any, Exception | None] = (None, None)
    if jax.process_index() == 0:
        try:
            outcome = action(), None
        except Exception as error:  # raised below, on all processes
            outcome = None, error
    result, error = _broadcast(outcome)
    if error is not None:
        raise error
    return result


def _broadcast(value: Any) -> Any:
    """Returns process 0's value on every process."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(pickle.dumps(value), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(data.size)))
    sent = np.zeros(size, np.uint8)
    sent[: data.size] = data
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8).tobytes())


def to_host(tree: Any) -> Any:
    """Returns whole arrays in NumPy; every process calls it, and gets them."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, jax.device_get(tree))
    from jax.experimental import multihost_utils

    def one(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(jax.device_get(x))

    return jax.tree.map(one, tree)


def run_on_host(fn: Callable[..., T], *arrays: Any) -> T:
    """Returns ``fn`` of whole arrays in NumPy, called on process 0, on every process."""
    whole = to_host(arrays)
    return on_first_process(lambda: fn(*whole))
