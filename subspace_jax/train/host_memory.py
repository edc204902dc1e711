"""Memory of a process that trains on CPUs."""

import ctypes
import glob
import os
import platform

# Parameters of mallopt(3), by glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, for the next step, instead of giving it back to the system.

    XLA takes what is temporary anew in each step, and where that is a CPU's memory the C library maps such large blocks
    for it and unmaps them afterwards: the system clears every page again, and a training step waits for it.  After this
    call there is one pool that only grows.  The process holds on to its peak until it ends, and as a pool has gaps, it
    may be twice of what is needed at a time.

    Call it before anything is computed, for threads that are there keep the pools that they have.  The commands of
    ``subspace-jax`` do so where they train without an accelerator.  The same without Python::

        MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 python train.py

    Returns:
      Whether it could be done: the C library is glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(name, value) == 1 for name, value in settings])


def only_cpus() -> bool:
    """Whether JAX will compute on CPUs: it is told to, or there is nothing else; found out without starting it."""
    told = os.environ.get("JAX_PLATFORMS", "")
    return told == "cpu" or (not told and not any(map(glob.glob, _ACCELERATORS)))
