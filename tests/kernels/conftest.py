"""Ahead-of-time compilers for machines that the tests don't have."""

import functools

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = ("v5e:4x4", *(pytest.param(other, marks=pytest.mark.slow) for other in ("v5p:2x2x1", "v6e:2x2")))


@functools.cache
def _devices(topology):
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


@pytest.fixture(params=TOPOLOGIES)
def topology(request):
    """Each TPU generation in turn."""
    return request.param


@pytest.fixture
def compile_for_tpu():
    """Compiles ``f`` for one chip: ``compile_for_tpu(f, *shapes, topology=...)`` with ``(shape, dtype)`` pairs."""

    def compile_(f, *shapes, topology="v5e:4x4", **how):
        one = jax.sharding.SingleDeviceSharding(_devices(topology)[0])
        return jax.jit(f, in_shardings=one, out_shardings=one, **how).lower(*map(_shape, shapes)).compile()

    return compile_


@pytest.fixture
def tpu_mesh():
    """Makes a mesh of TPU chips to compile for: ``tpu_mesh({"data": 8, "tensor": 2}, AxisType.Explicit, topology)``."""

    def make(sizes, axis_type=AxisType.Explicit, topology="v5e:4x4"):
        devices = np.array(_devices(topology)[: int(np.prod(list(sizes.values())))]).reshape(*sizes.values())
        return Mesh(devices, tuple(sizes), axis_types=(axis_type,) * len(sizes))

    return make


@pytest.fixture
def lower_for_cuda():
    """The program text of ``f`` lowered for NVIDIA GPUs: ``lower_for_cuda(f, *shapes)``."""

    def lower(f, *shapes):
        return jax.jit(f).trace(*map(_shape, shapes)).lower(lowering_platforms=("cuda",)).as_text()

    return lower


@pytest.fixture
def cpu_mesh():
    """Makes a mesh of CPU devices: ``cpu_mesh({"data": 4, "tensor": 2}, AxisType.Explicit)``."""

    def make(sizes, axis_type=AxisType.Explicit):
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes))

    return make


@pytest.fixture
def put():
    """Places an array on a mesh: ``put(x, mesh, "data", None)``."""
    return lambda x, mesh, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


def _shape(pair):
    return jax.ShapeDtypeStruct(*pair)
