"""The ahead-of-time compilers of the kernel tests."""

from ..kernels.conftest import compile_for_tpu, topology, tpu_mesh

__all__ = ["compile_for_tpu", "topology", "tpu_mesh"]
