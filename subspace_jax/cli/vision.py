"""The commands for features of images and texts: compute them, measure them, compare data sets."""

import argparse

from subspace_jax.cli import shared

_FEATURES = """
    subspace-jax features --model DIR --data cifar10 --split=train --out work/train.npz
    subspace-jax features --model DIR --data photos --split val --out work/val.npz    # photos/val/CLASS/*.jpg
    subspace-jax features --model work/digits_resnet_k8 --data digits --split=test --out work/test.npz
    subspace-jax features --model work/models/minilm --texts reviews.jsonl --out work/reviews.npz
    """
_PROBE = """
    subspace-jax probe --features work/train.npz --test work/test.npz
    subspace-jax probe --features work/train.npz --test work/test.npz --method svm
    subspace-jax probe --features work/train.npz --test work/test.npz --method few-shot --shots 1,5,10 --seeds 10
    """
_TRANSFER = """
    subspace-jax transfer --model DIR                             # the six sets of the Grassmann study
    subspace-jax transfer --model DIR --data cifar10,photos --method logistic
    """


def add_commands(commands) -> None:
    """Adds ``features``, ``probe`` and ``transfer``."""
    summary = "compute the features of a set of images or of texts"
    features = shared.add_command(commands, "features", summary, _features, _FEATURES)
    _add_model(features)
    what = features.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", help="TFDS set, or a folder with one folder for each class")
    what.add_argument(
        "--texts", metavar="FILE", help="file of texts: JSON lines with text and label (.jsonl), or a text in each line"
    )
    features.add_argument("--split", default="", help="split of the set (default: train), or folder in the folder")
    features.add_argument("--out", required=True, metavar="FILE.npz", help="file to write")

    summary = "measure features by a linear classifier, nearest neighbours or few-shot classification"
    probe = shared.add_command(commands, "probe", summary, _probe, _PROBE)
    probe.add_argument("--features", required=True, metavar="FILE.npz", help="features to fit to")
    probe.add_argument("--test", required=True, metavar="FILE.npz", help="features to test on")
    _add_method(probe, "logistic")

    summary = "measure the features of a model on other data sets"
    transfer = shared.add_command(commands, "transfer", summary, _transfer, _TRANSFER)
    _add_model(transfer)
    transfer.add_argument(
        "--data", default="", metavar="SET,SET,...", help="TFDS sets and folders (default: the six of the study)"
    )
    _add_method(transfer, "svm")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face or timm folder, or a run's workdir")
    parser.add_argument("--data-dir", default=None, help="folder of prepared sets (default: the usual place)")
    parser.add_argument("--batch-size", type=int, default=64, help="examples in a batch, over all devices")
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16"), help="type of a folder's activations")
    parser.add_argument(
        "--resample", action="store_true", help="resample position embeddings for images of another size"
    )
    parser.add_argument("--skip-unreadable", action="store_true", help="skip damaged images")
    parser.add_argument("--best", action="store_true", help="a run's best checkpoint (default: the latest)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    shared.add_trust(parser)


def _add_method(parser: argparse.ArgumentParser, default: str) -> None:
    methods = ("logistic", "svm", "knn", "few-shot")
    parser.add_argument("--method", choices=methods, default=default, help=f"default: {default}")
    parser.add_argument("--l2", type=float, default=None, help="penalty (default: chosen on held-out examples)")
    parser.add_argument("--neighbours", type=int, default=20, help="of knn")
    parser.add_argument("--shots", default="5", help="examples of a class, of few-shot; several by commas")
    parser.add_argument("--seeds", type=int, default=5, help="random draws of few-shot")


def _features(args: argparse.Namespace, overrides: list[str]) -> None:
    import os

    import jax

    from subspace_jax import represent
    from subspace_jax.represent.features_file import check_features_path

    out = check_features_path(args.out)
    if args.texts is not None:
        _text_features(args, out)
        return
    split = args.split or ("" if os.path.isdir(os.path.expanduser(args.data)) else "train")
    images = represent.open_labelled_images(args.data, split, args.data_dir, **_unreadable(args))
    found = _extract(args, _open(args), images)
    if jax.process_index() == 0:
        represent.save_features(out, found, model=os.path.abspath(args.model), data=args.data, split=split)
        count, width = found.features.shape
        print(f"Wrote {count} features of width {width}, {len(found.class_names)} classes, to {out}")


def _text_features(args: argparse.Namespace, out: str) -> None:
    import os

    import jax

    from subspace_jax import represent

    for name in ("split", "resample", "skip_unreadable", "best"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')}: is for images, not for --texts")
    _check_batch_size(args)
    read = represent.read_labelled_texts(args.texts)
    model = represent.open_text_model(args.model, dtype=args.dtype)
    found = represent.features_of_texts(model, *read, batch_size=args.batch_size, progress=not args.quiet)
    if jax.process_index() == 0:
        represent.save_features(out, found, model=os.path.abspath(args.model), data=os.path.abspath(args.texts))
        count, width = found.features.shape
        classes = f", {len(found.class_names)} classes" if len(found.class_names) > 1 else ""
        print(f"Wrote {count} features of width {width}{classes}, to {out}")


def _probe(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import represent

    sets = [represent.read_features(path) for path in (args.features, args.test)]
    chosen = _options(args)
    try:
        reports = [represent.probe_features(*sets, **options) for options in chosen]
    except ValueError as error:
        raise ValueError(f"{args.features}, {args.test}: {error}") from error
    for report in reports:
        by_class = "" if report.class_accuracy is None else f"; mean over classes {report.class_accuracy:.4f}"
        print(f"accuracy {report.accuracy:.4f}{by_class}; {report.detail}")
    print(f"variability {reports[0].variability:.2f} degrees; class separation R2 {reports[0].separation:.3f}")


def _transfer(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax import represent

    options = _options(args)
    if len(options) > 1:
        raise ValueError(f"--shots: expected one number for a table, got {args.shots!r}")
    names = [name.strip() for name in args.data.split(",") if name.strip()] or list(represent.TRANSFER_SETS)
    sets, missing = {}, {}
    for name in names:
        try:
            sets[name] = represent.open_transfer_set(name, args.data_dir, **_unreadable(args))
        except FileNotFoundError as error:
            missing[name] = str(error)
    for name, why in missing.items():
        print(f"missing {name}: {why}")
    if not sets:
        raise FileNotFoundError(f"--data: none of {', '.join(names)} is there")
    model = _open(args)
    print(f"{'set':<20} {'train':>7} {'test':>7} {'accuracy':>9} {'by class':>9} {'degrees':>8} {'R2':>6}")
    accuracies = []
    for name, pair in sets.items():
        found = [_extract(args, model, images) for images in pair]
        report = represent.probe_features(*found, **options[0])
        counts = " ".join(f"{len(part.labels):>7}" for part in found)
        by_class = "" if report.class_accuracy is None else f"{report.class_accuracy:.4f}"
        spread = f"{report.variability:>8.2f} {report.separation:>6.3f}"
        print(f"{name:<20} {counts} {report.accuracy:>9.4f} {by_class:>9} {spread}  {report.detail}", flush=True)
        accuracies.append(report.accuracy)
    what = f"mean of {len(sets)} of {len(names)}"
    print(f"{what:<36} {sum(accuracies) / len(accuracies):>9.4f}")


def _options(args: argparse.Namespace) -> list[dict]:
    """Keyword arguments of the method: one set of them, or one for each number of shots."""
    try:
        shots = [int(text) for text in args.shots.split(",")]
    except ValueError as error:
        raise ValueError(f"--shots: expected numbers separated by commas, got {args.shots!r}") from error
    common = {"method": args.method, "l2": args.l2, "neighbours": args.neighbours, "seeds": args.seeds}
    return [{**common, "shots": n} for n in (shots if args.method == "few-shot" else shots[:1])]


def _unreadable(args: argparse.Namespace) -> dict[str, str]:
    return {"on_unreadable": "skip" if args.skip_unreadable else "raise"}


def _open(args: argparse.Namespace):
    from subspace_jax import represent

    _check_batch_size(args)
    step = "best" if args.best else None
    options = {"dtype": args.dtype, "resample": args.resample, "trust_remote_code": args.trust_remote_code}
    return represent.open_feature_model(args.model, step=step, **options)


def _check_batch_size(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {args.batch_size}")


def _extract(args: argparse.Namespace, model, images):
    import jax

    from subspace_jax import represent

    found = represent.features_of_images(model, images, batch_size=args.batch_size, progress=not args.quiet)
    if images.unreadable and jax.process_index() == 0:
        total = len(images) + len(images.unreadable)
        print(f"{len(images.unreadable)} of {total} images can't be read and are skipped:")
        for name, why in images.unreadable.items():
            # Names of files may hold bytes that are no UTF-8.
            print(f"  {name}: {why}".encode(errors="backslashreplace").decode())
    return found
