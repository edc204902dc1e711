"""The command that aligns two paired feature spaces in a subspace."""

import argparse
import functools
from pathlib import Path

from subspace_jax.cli import shared

_ALIGN = """
    subspace-jax align --x images.npy --y captions.npy --out work/align    # half a minute for some thousand pairs
    subspace-jax align --x images.npy --y captions.npy --anchors 3000 --k 20 --method local-cka --out work/align
    subspace-jax align --map work/align --x new_images.npy --y new_captions.npy --out work/found

    Files hold features [items, n] of float16, float32 or float64: .npy, or .npz with features (as `subspace-jax
    features` writes), vectors or embeddings.  Row i of --x and of --y is the same item, but with --map, where the files
    hold any items: they are mapped to one space, and nearest.csv says which x are nearest to each y.

    A pass over the files takes the memory of a block; a million pairs of width 1,000 take minutes.
    """


def add_commands(commands) -> None:
    """Adds ``align``."""
    summary = "align two paired feature spaces in the subspace in which they are correlated, and match their items"
    parser = shared.add_command(commands, "align", summary, _align, _ALIGN)
    parser.add_argument("--x", metavar="FILE", help="features of items in the first space")
    parser.add_argument("--y", metavar="FILE", help="features of the same items in the second, in the same order")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for maps, report and mapped items")
    parser.add_argument("--map", metavar="DIR", help="an earlier alignment, by which to map --x, --y or both")
    parser.add_argument(
        "--anchors", type=int, metavar="N", help="pairs to fit to (default: all but the fifth, 500 at most, held out)"
    )
    parser.add_argument("--k", type=int, help="directions of the subspace (default: 50, or the smaller width)")
    parser.add_argument(
        "--method", choices=("affine", "local-cka", "relative"), help="method of the curve over k (default: affine)"
    )
    parser.add_argument(
        "--reg", type=float, help="ridge as a share of the largest variance (default: chosen on held-out anchors)"
    )
    parser.add_argument("--top", type=int, default=5, help="with --map: nearest x of each y to list (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _align(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax.data import open_vectors

    fitting = {name: getattr(args, name) for name in ("anchors", "k", "method", "reg")}
    if args.map is None and not (args.x and args.y):
        raise ValueError("--x, --y: expected both, features of the same items in two spaces; or --map")
    if args.map is not None and (given := [f"--{name}" for name, value in fitting.items() if value is not None]):
        raise ValueError(f"--map: applies an earlier alignment, and takes no {', '.join(given)}")
    if args.map is not None and not (args.x or args.y):
        raise ValueError("--map: expected --x, --y or both, the features to map")
    if args.top < 1:
        raise ValueError(f"--top: expected 1 or more, got {args.top}")
    sources = {name: open_vectors(name, path) for name in "xy" if (path := getattr(args, name)) is not None}
    written = (_mapped if args.map is not None else _fitted)(args, sources)
    print("\n".join([f"Wrote to {args.out}:", *(f"  {file}" for file in written)]))


def _fitted(args: argparse.Namespace, sources: dict) -> list[str]:
    """Fits maps to pairs; prints the report, and returns a line for each file."""
    from subspace_jax import train
    from subspace_jax.interpret.platos_cave_3d import fit, pairs, report

    width = min(source.shape[1] for source in sources.values())
    k = min(50, width) if args.k is None else args.k
    if not 1 <= k <= width:
        raise ValueError(f"--k: expected 1 to {width}, the smaller width of --x and --y, got {k}")
    out = train.writable_folder(args.out)
    read = pairs.read_pairs(sources["x"], sources["y"], args.anchors, seed=args.seed, progress=not args.quiet)
    maps, found = fit.fit_maps(read, k, args.method or "affine", reg=args.reg, seed=args.seed, progress=not args.quiet)
    fit.save_maps(out, maps, found)
    report.write_curve(found, out)
    shared.write_result(out, _scalars(found))
    print(report.table(found), end="\n\n", flush=True)
    return [
        "maps.safetensors: the projections of both spaces, and the map between them, float32",
        "align.json: all figures",
        "curve.png: matching and retrieval over the number of directions",
    ]


def _scalars(found) -> dict[str, float]:
    """Returns what ``result.json`` holds."""
    import numpy as np

    (matching, top1, top5, top10), full = found.subspace[found.method], found.full[found.method]
    return {
        "matching": matching,
        "top_1": top1,
        "top_5": top5,
        "top_10": top10,
        "full_matching": full[0],
        "full_top_1": full[1],
        "full_top_5": full[2],
        "rho": float(np.nanmean(found.rho)),
        "held_out_rho": float(np.nanmean(found.held_out_rho)),
        "reg": found.reg,
    }


def _mapped(args: argparse.Namespace, sources: dict) -> list[str]:
    """Maps features by an earlier alignment, and returns a line for each file."""
    import jax
    import numpy as np

    from subspace_jax import data, train
    from subspace_jax.interpret.platos_cave_3d import fit

    maps = fit.load_maps(args.map)
    apply = {"x": maps.of_x, "y": maps.of_y}
    for name, source in sources.items():
        width = getattr(maps.subspace, f"w{name}").shape[0]
        if source.shape[1] != width:
            raise ValueError(f"--{name}: expected features of width {width}, as of {args.map}, got {source.shape[1]}")
    # Resolved, as names of one file may differ.
    out = Path(args.out).expanduser().resolve()
    if own := [s.path for s in sources.values() if s.path.resolve() in (out / "x.npy", out / "y.npy")]:
        raise ValueError(f"--out: expected a folder in which no file is replaced that is read, got that of {own[0]}")
    out = train.writable_folder(args.out)
    written = []
    for name, source in sources.items():
        project = jax.jit(apply[name])

        def of_block(block, project=project):
            return jax.device_get(project(block)), np.zeros(len(block), np.float32)

        path = out / f"{name}.npy"
        with train.replacing(path) as partial, partial.open("wb") as file:
            data.map_blocks(source, file, maps.subspace.rho.shape[0], of_block, progress=not args.quiet)
        written.append(f"{name}.npy: {name} in the common space, in which they compare by cosines")
    if len(sources) == 2:
        _write_nearest(out, args.top)
        written.append("nearest.csv: for each row of y, the rows of x with the highest cosines")
    return written


def _write_nearest(out: Path, top: int) -> None:
    """Writes the nearest rows of ``x.npy`` to each of ``y.npy``."""
    import jax
    import numpy as np

    from subspace_jax import linalg, train

    x, y = (linalg.unit_vectors(np.load(out / f"{name}.npy").astype(np.float32)) for name in "xy")
    squares, index = jax.jit(functools.partial(linalg.nearest_rows, k=min(top, len(x))))(y, x)
    with train.replacing(out / "nearest.csv") as partial, partial.open("w") as file:
        file.write("y,rank,x,cosine\n")
        for row, (distances, nearest) in enumerate(zip(np.asarray(squares), np.asarray(index), strict=True)):
            for rank, (square, at) in enumerate(zip(distances, nearest, strict=True), 1):
                file.write(f"{row},{rank},{at},{1 - square / 2:.6f}\n")
