"""Prepares a TFDS set: ``python -m subspace_jax.data.prepare cifar10 --data_dir DIR``.

It downloads the set and writes array_record files, which :func:`subspace_jax.data.image_source` reads without network
and without TensorFlow.  Preparing most sets needs TensorFlow (``digits`` needs neither it nor a network).
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from subspace_jax.data.sources.tfds import check_name, default_data_dir

__all__ = ["main", "prepare"]

_EXAMPLES = """examples:
  python -m subspace_jax.data.prepare digits
  python -m subspace_jax.data.prepare cifar10 --data_dir /shared/tensorflow_datasets

Most sets need `pip install tensorflow-cpu importlib_resources` on the machine that prepares them;
the files are then read without either.
"""


def prepare(name: str, data_dir: str | os.PathLike) -> str:
    """Downloads a set and writes it as array_record files, unless it exists.

    Args:
      name: TFDS name, such as ``"cifar10"``.
      data_dir: Folder of TFDS sets.

    Returns:
      The folder of the set.

    Raises:
      ModuleNotFoundError: TFDS needs a package for this set that is not installed; the message names it.
      ValueError: TFDS has no such set.
      OSError: Files can't be written or downloaded.
    """
    data_dir = os.path.expanduser(os.fspath(data_dir))
    if name == "digits":
        from subspace_jax.data.sources.digits import prepare_digits

        return str(prepare_digits(data_dir))
    import tensorflow_datasets as tfds

    check_name(name, data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except ImportError as error:
        needed = ("tensorflow", "importlib_resources")
        missing = [module for module in needed if importlib.util.find_spec(module) is None]
        if not missing:
            raise
        packages = " ".join("tensorflow-cpu" if module == "tensorflow" else module for module in missing)
        raise ModuleNotFoundError(
            f"preparing {name!r} needs packages that reading it doesn't: pip install {packages}"
        ) from error
    return str(builder.data_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: Arguments; those of the process by default.

    Returns:
      Exit status: 0 if the set is prepared, 1 otherwise.
    """
    parser = argparse.ArgumentParser(
        prog="python -m subspace_jax.data.prepare",
        description="Prepare a TensorFlow Datasets image set as array_record files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="TFDS name, such as cifar10")
    parser.add_argument("--data_dir", default=default_data_dir(), help="folder of TFDS sets (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        print(f"{arguments.name} is in {prepare(arguments.name, arguments.data_dir)}")
    except (ValueError, OSError, ImportError) as error:
        print(f"could not prepare {arguments.name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
