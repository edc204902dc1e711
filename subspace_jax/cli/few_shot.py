"""The command that compares few-shot methods on files of features."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

from subspace_jax.cli import shared

_FEW_SHOT = """
    subspace-jax few-shot --support work/train.npz --query work/test.npz --text work/classes.npz --out work/few_shot
    subspace-jax few-shot --support work/train.npz --query work/test.npz --text work/classes.npz --out work/few_shot \\
        --shots 1,4,16 --seeds 5 --methods zero-shot,tip,tip-f --subspace text:8

    The files are those of `subspace-jax features`; classes.npz holds embeddings of texts about each class, by the text
    encoder that belongs to the image encoder:
    subspace-jax features --model work/models/minilm --texts classes.jsonl --out work/classes.npz

    On one core, all methods with the default shots and draws take about two minutes for ten classes of features of
    width 384; --methods zero-shot takes seconds.  Beside the shots, methods that choose settings take up to four
    examples of each class of the support.

    Without --text, the prototype of a class is the mean of its shots, and "zero-shot" the nearest of these means.
    """


def add_commands(commands) -> None:
    """Adds ``few-shot``."""
    summary = "compare few-shot methods on features of images and texts, over shots and random draws"
    parser = shared.add_command(commands, "few-shot", summary, _few_shot, _FEW_SHOT)
    parser.add_argument("--support", required=True, metavar="FILE.npz", help="labelled features to draw the shots from")
    parser.add_argument("--query", required=True, metavar="FILE.npz", help="labelled features to test on")
    parser.add_argument(
        "--text", metavar="FILE.npz", help="embeddings of texts about each class (default: class means of the shots)"
    )
    parser.add_argument(
        "--source", metavar="FILE.npz", help="features of the pre-training domain; its gap to the queries is printed"
    )
    parser.add_argument("--shots", default="1,2,4,8,16", metavar="N,N,...", help="of a class (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="random draws (default: %(default)s)")
    parser.add_argument("--methods", default="", metavar="NAME,...", help="default: all; a wrong name lists them")
    parser.add_argument("--scale", type=float, default=100.0, help="factor on cosines (default: %(default)s, of CLIP)")
    parser.add_argument(
        "--subspace", default="", metavar="text:K|cca:K", help="compare in K dimensions of the prototypes, or of CCA"
    )
    parser.add_argument(
        "--cache", default="", metavar="ALPHA,BETA", help="weight and sharpness of tip and tip-f (default: searched)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for table.json, result.json, accuracy.png")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def _few_shot(args: argparse.Namespace, overrides: list[str]) -> None:
    import sys

    from subspace_jax import represent, train
    from subspace_jax.represent import few_shot_survey

    shots = tuple(sorted(set(_numbers("--shots", args.shots, int))))
    cache = _numbers("--cache", args.cache, float) if args.cache else None
    names = tuple(name.strip() for name in args.methods.split(",") if name.strip()) or tuple(few_shot_survey.METHODS)
    how = few_shot_survey.Comparison(shots, args.seeds, names, args.scale, args.subspace, cache)
    paths = {"support": args.support, "query": args.query, "text": args.text, "source": args.source}
    sets = {name: represent.read_features(path) for name, path in paths.items() if path}
    out = train.writable_folder(args.out)

    total, done = len(names) * len(shots), []

    def show(row) -> None:
        done.append(row)
        if not args.quiet:
            print(f"{len(done)}/{total}  {row.method}, shots {row.shots}: {row.mean:.4f}", file=sys.stderr, flush=True)

    rows = few_shot_survey.compare_few_shot(sets["support"], sets["query"], sets.get("text"), how, progress=show)
    gaps = {
        f"{name} to query": few_shot_survey.domain_gap(sets[name].features, sets["query"].features)._asdict()
        for name in ("source", "support")
        if name in sets
    }
    print(_table(rows, shots, prototypes="texts" if args.text else "means of each class's shots"))
    for name, gap in gaps.items():
        print(f"gap {name}: " + ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in gap.items()))
    settings = {
        **dataclasses.asdict(how),
        "files": {name: os.path.abspath(path) for name, path in paths.items() if path},
    }
    with train.replacing(out / "table.json") as partial:
        found = {"settings": settings, "rows": [row._asdict() for row in rows], "gaps": gaps}
        partial.write_text(json.dumps(found, indent=2) + "\n")
    shared.write_result(out, {f"{row.method}_{row.shots}": row.mean for row in rows})
    few_shot_survey.plot_few_shot(rows, Path(out) / "accuracy.png")
    print(f"Wrote table.json, result.json and accuracy.png to {out}")


def _numbers(option: str, text: str, kind: type) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option}: expected numbers separated by commas, got {text!r}") from error


def _table(rows, shots: tuple[int, ...], prototypes: str) -> str:
    """Methods by shots: mean accuracy and deviation over the draws; then the sample-size term of the bound."""
    cells = {(row.method, row.shots): row for row in rows}
    lines = [f"accuracy by shots of a class, prototypes from {prototypes}"]
    lines.append(f"{'method':<20}" + "".join(f"{n:>18}" for n in shots) + f"{'width at ' + str(shots[-1]):>14}")
    for name in dict.fromkeys(row.method for row in rows):
        own = [cells[name, n] for n in shots]
        texts = (f"{row.mean:.4f} +- {row.deviation:.4f}" for row in own)
        width = f"{own[-1].width:.2f}" if own[-1].capacity else "-"
        lines.append(f"{name:<20}" + "".join(f"{text:>18}" for text in texts) + f"{width:>14}")
    return "\n".join(lines)
