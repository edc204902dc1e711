"""The command that shows versions, devices and the mesh."""

import argparse
import importlib.metadata
import sys

from subspace_jax.cli import shared

_PACKAGES = ("subspace-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")

_INFO = """
    subspace-jax info
    JAX_NUM_CPU_DEVICES=8 subspace-jax info --fsdp 2 --tensor 4
    """


def add_commands(commands) -> None:
    """Adds ``info``."""
    info = shared.add_command(commands, "info", "show versions, devices and the mesh", _info, _INFO)
    for axis, default in (("data", -1), ("fsdp", 1), ("sequence", 1), ("tensor", 1)):
        info.add_argument(f"--{axis}", type=int, default=default, help=f"size of the mesh axis (default: {default})")


def _info(args: argparse.Namespace, overrides: list[str]) -> None:
    import jax

    from subspace_jax import train

    print(f"python {sys.version.split()[0]}")
    for package in _PACKAGES:
        print(f"{package} {importlib.metadata.version(package)}")
    devices = jax.devices()
    print(
        f"devices: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {jax.process_count()} processes"
    )
    mesh = train.make_mesh(args.data, args.fsdp, args.tensor, sequence=args.sequence)
    print("mesh: " + ", ".join(f"{name}={size}" for name, size in mesh.shape.items()))
