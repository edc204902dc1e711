"""Deep subspace clustering of a file of images, for the command ``cluster``."""

import argparse
from pathlib import Path

from subspace_jax.cli.cluster_input import Found, Items


def open_images(args: argparse.Namespace) -> Items:
    """Opens a file of images.

    Raises:
      ValueError: The file holds no such images, or a number of the command is out of range.
      FileNotFoundError: There is no such file.
    """
    import numpy as np

    from subspace_jax.cluster.dsc import default_config
    from subspace_jax.cluster.dsc.task import check_fields

    if args.input is None or args.input.startswith("tfds:"):
        raise ValueError("--input: expected a file of images, .npy or .npz, for dsc")
    for flag in ("backbone", "split"):
        if getattr(args, flag) is not None:
            raise ValueError(f"--{flag}: is not for dsc, which reads a file of images")
    if args.k is None:
        raise ValueError("--k: expected a number of clusters, for dsc is given it")
    if args.raw:
        raise ValueError("--raw: is not for dsc, which divides each image by its length")
    found = _read(args.input)
    if found.dtype.kind not in "fu":
        raise ValueError(f"input: {args.input}: expected floating-point numbers or bytes, got {found.dtype}")
    x = found.astype(np.float32)
    x = x[..., None] if x.ndim == 3 else x
    bad = np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1)) if x.ndim and x.size else []
    if len(bad):
        raise ValueError(f"input: {args.input}: expected finite images, got NaN or infinity in {len(bad)}: {bad[0]}")
    config = default_config()
    config.clusters.update({"number": args.k, "keep": args.keep or 9})
    try:
        check_fields(config, x.shape)
    except ValueError as error:
        text = str(error).replace("clusters.number", "--k").replace("clusters.keep", "--keep")
        raise ValueError(text.replace("x:", f"input: {args.input}:")) from None
    return Items(len(x), None, lambda: Found(x.reshape(len(x), -1), images=x))


def _read(name: str):
    import zipfile
    import zlib

    import numpy as np

    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"input: {name}: no such file")
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            return found
        if "images" in found:
            return found["images"]
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"input: {name}: expected .npy, or .npz with images ({error})") from error
    raise ValueError(f"input: {name}: expected an array images, got {sorted(found)}")


def cluster(x, k: int, seeds: range, labels, keep: int = 9):
    """Returns what :func:`subspace_jax.cluster.classical.run.cluster_features` does, of images."""
    import numpy as np

    from subspace_jax import linalg, metrics
    from subspace_jax.cluster import dsc
    from subspace_jax.cluster.classical import run

    found = []
    for seed in seeds:
        config = dsc.default_config()
        config.seed = seed
        result = dsc.fit(x, k, keep, config, progress=True)
        found.append(result._replace(rows=()) if not found else result._replace(coef=None, affinity=None, rows=()))
    first = found[0]
    most = int(np.count_nonzero(first.affinity, axis=1).max())
    return run.Clusters(
        first.labels,
        k,
        () if labels is None else tuple(metrics.cluster_scores(labels, one.labels) for one in found),
        tuple(metrics.adjusted_rand_index(first.labels, one.labels) for one in found[1:]),
        linalg.top_entries(first.affinity / 2, max(1, most)),  # which stand for their sum with the transpose
    )
