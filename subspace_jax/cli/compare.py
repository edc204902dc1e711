"""The command that compares the representations of two networks."""

import argparse
import logging
import os

from subspace_jax.cli import shared

log = logging.getLogger(__name__)

_COMPARE = """
    subspace-jax compare a.npy b.npy --out work/compare          # row i of both is the same example
    subspace-jax compare a.npz b.npz --out work/layers           # every matrix of a file is a layer
    subspace-jax compare work/models/minilm work/models/smollm2 --text reviews.txt --out work/models_compare
    subspace-jax compare vit_a vit_b --images photos --split val --layers 0,6,12 --out work/vits

    Every number stands beside the same number of shuffled examples.  A pair of layers of 2,000 examples and 384 units
    takes some minutes on two cores with all measures, some seconds with those that are the default for several layers;
    more examples than --null-examples are streamed, and only the shuffles are of a random part of them.  Two models
    have many pairs, MiniLM and SmolLM2 217, of about a second each with 300 texts: name some layers by --layers.
    """


def add_commands(commands) -> None:
    """Adds ``compare``."""
    summary = "compare the representations of two networks, layer by layer, with a permutation null for every number"
    parser = shared.add_command(commands, "compare", summary, _compare, _COMPARE)
    parser.add_argument("a", metavar="A", help="features .npy or .npz, or the folder of a pretrained model")
    parser.add_argument("b", metavar="B", help="the same of the other network")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text", metavar="FILE", help="texts for models: .jsonl with text, or a text in each line")
    what.add_argument("--images", metavar="SET", help="images for models: a TFDS set, or a folder of folders")
    parser.add_argument("--split", default="", help="split of the images (default: train), or folder in the folder")
    parser.add_argument("--data-dir", default=None, help="folder of prepared sets (default: the usual place)")
    parser.add_argument("--batch-size", type=int, default=64, help="examples in a batch of a model")
    parser.add_argument("--layers", default="", metavar="NAME,...", help="layers of A (default: all)")
    parser.add_argument("--layers-b", default=None, metavar="NAME,...", help="layers of B (default: as --layers)")
    parser.add_argument("--measures", default="", metavar="NAME,...", help="default: all for one pair, else the fast")
    parser.add_argument("--permutations", type=int, default=199, help="shuffles (default: 199)")
    parser.add_argument("--null-examples", type=int, default=2000, help="most examples of a shuffle (default: 2000)")
    parser.add_argument("--k", type=int, default=10, help="neighbours of neighbourhood measures (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for table, heat maps and page")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _compare(args: argparse.Namespace, overrides: list[str]) -> None:
    from tqdm.auto import tqdm

    from subspace_jax import train
    from subspace_jax.interpret import convergent_learning as convergent
    from subspace_jax.interpret.convergent_learning import report

    measures = convergent.check_measures(_names(args.measures)) if args.measures else None
    _check(args)
    layers = _names(args.layers)
    x, y = _features(args, layers, layers if args.layers_b is None else _names(args.layers_b))
    out = train.writable_folder(args.out)
    null = convergent.Null(args.permutations, args.null_examples, args.seed)
    total = len(x) * len(y) * (args.permutations + 1)
    with tqdm(total=total, unit="shuffle", disable=True if args.quiet else None) as bar:
        try:
            found = convergent.compare_layers(x, y, measures=measures, null=null, k=args.k, progress=bar.update)
        except ValueError as error:
            raise ValueError(f"{args.a}, {args.b}: {error}") from error
    files = ["compare.json: all numbers", "report.html: all of this as a page"]
    if len(found.scores) > 1:
        report.write_heat_maps(found, out)
        files.append("layers.png: heat maps over the layers")
    else:
        shared.write_result(out, _scalars(found))
    report.write_report(found, out, {"a": args.a, "b": args.b, "null": null._asdict(), "k": args.k})
    print("\n\n".join(report.table_text(*table) for table in report.tables(found)))
    print("\n".join(report.constant_lines(found)), end="\n" if found.constant else "")
    print("\n".join([f"Wrote to {os.path.abspath(out)}:", *(f"  {file}" for file in files)]))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _check(args: argparse.Namespace) -> None:
    for argument, path in (("A", args.a), ("B", args.b)):
        if not path.endswith((".npy", ".npz")):
            shared.check_model_folder(path, argument)
    models = [path for path in (args.a, args.b) if _is_folder(path)]
    if models and not (args.text or args.images):
        raise ValueError(f"--text, --images: expected examples for the model {models[0]}")
    if not models and (args.text or args.images):
        raise ValueError("--text, --images: are for models; A and B are files of features")
    for path in models:  # before the features of the first are computed
        if args.text and not os.path.isfile(os.path.join(os.path.expanduser(path), "tokenizer.json")):
            raise ValueError(f"--text: expected a language model or text encoder, and {path} has no tokenizer.json")
    for name in ("permutations", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")


def _features(args: argparse.Namespace, layers: tuple[str, ...], layers_b: tuple[str, ...]) -> list[dict]:
    """Reads features of files, then computes those of models: what can be refused early is."""
    from subspace_jax import represent
    from subspace_jax.interpret import convergent_learning as convergent

    sides = ((args.a, layers), (args.b, layers_b))
    found = [None if _is_folder(path) else convergent.read_layers(path, names) for path, names in sides]
    texts = represent.read_labelled_texts(args.text).texts if args.text else None
    images = None
    if args.images:
        split = args.split or ("" if _is_folder(args.images) else "train")
        images = represent.open_labelled_images(args.images, split, args.data_dir)
    given, examples = (args.text, texts) if args.text else (args.images, images)
    for (path, _), side in zip(sides, found, strict=True):
        if side and examples is not None and (count := len(next(iter(side.values())))) != len(examples):
            raise ValueError(f"{path}: expected features of the {len(examples)} examples of {given}, got {count}")
    options = {"batch_size": args.batch_size, "progress": not args.quiet}
    for i, (path, names) in enumerate(sides):
        if found[i] is not None:
            continue
        if not args.quiet:
            log.info("%s: features of all layers", path)
        if texts is not None:
            computed = represent.layer_features_of_texts(path, texts, **options)
        else:
            computed = represent.layer_features_of_images(path, images, **options)
        if missing := [name for name in names if name not in computed]:
            raise ValueError(f"--layers: expected some of {', '.join(computed)} of {path}, got {missing[0]!r}")
        found[i] = {name: computed[name] for name in names} if names else computed
    return found


def _is_folder(path: str) -> bool:
    return os.path.isdir(os.path.expanduser(path))


def _scalars(found) -> dict[str, float]:
    (scores,) = found.scores.values()
    fields = (("", "value"), ("calibrated_", "calibrated"), ("p_", "p_value"))
    return {f"{prefix}{name}": getattr(s, field) for name, s in scores.items() for prefix, field in fields}
