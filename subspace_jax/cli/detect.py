"""The command that finds defects on images."""

import argparse
from pathlib import Path

from subspace_jax.cli import output, shared

_DETECT = """
    subspace-jax detect --normal photos/good --test photos/new --out work/detect
    subspace-jax detect --normal photos/good --test photos/new --backbone dinov2-small --threshold 0.95 --out work/new
    subspace-jax detect --data mvtec --categories bottle,cable --backbone dinov2-small --out work/mvtec
    subspace-jax detect --data mvtec --config anomaly/mvtec:shots4 --out work/mvtec4    # the settings of the paper

    Nothing is trained.  Without --backbone pixels of patches are compared, which takes no model; textures do well with
    them, objects need a model.  `subspace-jax fetch dinov2-small` writes a small one.

    Folders in --test named good, normal or ok hold normal images and others then anomalous ones, for AUROC and so on;
    masks are looked for in ground_truth beside a folder test.  --data takes the layouts of MVTec-AD and VisA.
    Settings are set by --config.FIELD=VALUE: --config.side=672 for larger images, --config.shots=4 for four normal
    images, --config.rotations=0 for no rotated copies of them, which objects with one orientation do better without.

    On two cores an image takes about 0.1 s with pixels, 0.2 s with dinov2-small at 224 pixels and 1 s at 448; so does
    each rotated copy of a normal image, 30 of each if there are no more than 8.
    """


def add_commands(commands) -> None:
    """Adds ``detect``."""
    summary = "score images by how unlike some normal ones they are, with heat maps and a page, without training"
    parser = shared.add_command(commands, "detect", summary, _detect, _DETECT, fields=True)
    parser.add_argument("--normal", metavar="DIR", help="normal images, at any depth")
    parser.add_argument("--test", metavar="DIR", help="images to score, at any depth")
    parser.add_argument("--masks", metavar="DIR", help="masks of defects (default: ground_truth beside a folder test)")
    parser.add_argument("--data", metavar="DIR", help="instead: a set in the layout of MVTec-AD or VisA")
    parser.add_argument("--categories", default="", metavar="NAME,...", help="with --data: some of them (default: all)")
    parser.add_argument(
        "--backbone", metavar="DIR|NAME", help='folder of a vision transformer, dinov2-small, or "pixels" (the default)'
    )
    parser.add_argument(
        "--config", dest="settings", metavar="NAME[:VARIANT]", help="settings, such as anomaly/mvtec:shots4"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="QUANTILE",
        help="flag scores above this quantile of normal images, each scored without its fold of five",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for scores, maps and page")
    parser.add_argument("--seed", type=int, help="seed of draws and rotations")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _detect(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import train
    from subspace_jax.anomaly import subspacead
    from subspace_jax.anomaly.subspacead import config as fields
    from subspace_jax.anomaly.subspacead import report

    _check(args)
    config = train.load_config(args.settings) if args.settings else fields.default_config()
    given = [f"{name}={getattr(args, name)}" for name in ("backbone", "seed") if getattr(args, name) is not None]
    if unlike := set(fields.default_config()) ^ set(config):
        raise ValueError(f"--config: expected the fields of `detect`, got a config of another task ({min(unlike)})")
    config = train.override(config, [*given, *overrides])
    categories = _categories(args)
    out = train.writable_folder(args.out)
    backbone, params = fields.open_backbone(config)
    found, pictures = [], []
    with output.all_or_nothing(out) as folder:
        for category in categories:
            category = _drawn(category, config)
            settings = fields.settings_of(config, category.name, len(category.normal))
            model = subspacead.SubspaceAD(backbone, params, settings, batch_size=config.batch_size)
            own = _one_category(model, category, folder, args, config.seed)
            found.append(own[0])
            pictures.append(own[1])
            place = folder / "models" / category.name
            subspacead.save_subspacead(model, place, backbone_name=config.backbone, threshold=own[0].threshold)
        head, rows = report.table_rows(found, config.published)
        report.write_scores(found, folder / "scores.csv")
        shared.write_result(folder, report.mean_metrics(found))
        described = f"SubspaceAD with {config.backbone} at {backbone.side} pixels, seed {config.seed}"
        report.write_page(found, pictures, folder / "report.html", described=described, published=config.published)
    print(report.table_text(head, rows))
    skipped = [path for own in found for path in own.skipped]
    if skipped:
        print(f"Skipped {len(skipped)} files that can't be read: {', '.join(skipped[:5])}{' ...' * (len(skipped) > 5)}")
    print(f"Wrote to {out}:\n  scores.csv: a line for each image\n  maps/: the images with their anomaly maps")
    print("  models/: what was fitted\n  result.json: metrics\n  report.html: all of this as a page")


def _one_category(model, category, folder: Path, args: argparse.Namespace, seed: int):
    import jax

    from subspace_jax.anomaly.subspacead import detect, report

    raw = folder / "maps.raw"
    options = {"quantile": args.threshold, "progress": not args.quiet}
    try:
        found = detect.detect(model, category, raw, key=jax.random.key(seed), **options)
        overlays = folder / "maps" / category.name
        return found, report.write_overlays(found, raw, model.side, overlays, progress=not args.quiet)
    finally:
        raw.unlink(missing_ok=True)


def _check(args: argparse.Namespace) -> None:
    if args.data and (args.normal or args.test or args.masks):
        raise ValueError("--data: holds normal and test images, and takes no --normal, --test or --masks")
    if not args.data and not (args.normal and args.test):
        raise ValueError("--normal, --test: expected both, a folder of normal images and one to score; or --data")
    if args.categories and not args.data:
        raise ValueError("--categories: is for --data")
    if args.threshold is not None and not 0 < args.threshold <= 1:
        raise ValueError(f"--threshold: expected a quantile in (0, 1], such as 0.95, got {args.threshold}")


def _categories(args: argparse.Namespace) -> list:
    from subspace_jax.anomaly import image_sets

    if args.data:
        names = [name.strip() for name in args.categories.split(",") if name.strip()]
        return image_sets.open_categories(args.data, names)
    return [image_sets.open_category(args.normal, args.test, args.masks)]


def _drawn(category, config):
    """Draws the shots of a category."""
    import numpy as np

    if config.shots < 0:
        raise ValueError(f"--config.shots: expected at least 0, got {config.shots}")
    if not config.shots or config.shots >= len(category.normal):
        return category
    chosen = np.random.default_rng(config.seed).choice(len(category.normal), config.shots, replace=False)
    return category._replace(normal=[category.normal[i] for i in sorted(chosen)])
