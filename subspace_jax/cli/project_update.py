"""The command that projects a fine-tuning update on the directions of another update."""

import argparse

from subspace_jax.cli import shared

_PROJECT_UPDATE = """
    subspace-jax project-update --base base --aligned chat --tuned mine --out work/projected    # measures only
    subspace-jax project-update --base base --aligned chat --tuned mine --frac 0.01 0.25 --method orth \\
        --out work/projected

    The folders are Hugging Face models of one architecture: aligned comes from base, tuned from aligned.  The update
    from aligned to tuned is projected, weight by weight, on the leading directions of the one from base to aligned
    ("same"), away from them ("orth"), or is taken with the opposite sign ("opp"), and added to aligned.

    It measures where an update lies, and says nothing about what a model does: evaluate the models that it writes.
    Mind the column of random directions, and the controls --basis random and random_k.

    Time: one SVD of each weight, whatever the number of fractions; about three minutes of processor time for
    SmolLM2-135M.  It goes with out x in x min(out, in), and the progress bar says what is left.
    """


def add_commands(commands) -> None:
    """Adds ``project-update``."""
    summary = "project a fine-tuning update on the directions of another update, and measure how much of it is in them"
    parser = shared.add_command(commands, "project-update", summary, _project_update, _PROJECT_UPDATE)
    parser.add_argument("--base", required=True, metavar="DIR", help="model before alignment, or any other reference")
    parser.add_argument("--aligned", required=True, metavar="DIR", help="model after it")
    parser.add_argument("--tuned", required=True, metavar="DIR", help="model fine-tuned from the aligned one")
    parser.add_argument(
        "--frac",
        nargs="+",
        type=float,
        default=[],
        metavar="F",
        help="fractions of the directions, in (0, 1], at each of which a model is written (default: none)",
    )
    parser.add_argument(
        "--method", choices=("same", "orth", "opp"), default="same", help="what is added to aligned (default: same)"
    )
    parser.add_argument(
        "--basis",
        choices=("top", "random", "random_k"),
        default="top",
        help="the leading directions (default), those of Gaussian values instead, or drawn ones",
    )
    parser.add_argument(
        "--side",
        choices=("output", "input"),
        default="output",
        help="whose space the directions are of, where matrices are stored as [out, in] (default: output)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the report and the models")
    parser.add_argument("--seed", type=int, default=0, help="seed of the controls")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _project_update(args: argparse.Namespace, overrides: list[str]) -> None:
    from subspace_jax.interpret.safety_subspaces import folders, report

    settings = folders.FolderSettings(tuple(args.frac), args.method, args.basis, args.side, args.seed)
    read = (args.base, args.aligned, args.tuned)
    for folder, name in zip(read, ("base", "aligned", "tuned"), strict=True):
        shared.check_model_folder(folder, f"--{name}")
    found = folders.project_folders(*read, args.out, settings, progress=not args.quiet)
    picture = report.draw(found, args.out)
    print(report.text_of(found))
    written = [f"  {folder.name}/: the model at fraction {frac:g}" for frac, folder in found.written.items()]
    print(
        "\n".join(
            [
                f"\nWrote to {picture.parent.resolve()}:",
                *written,
                f"  {folders.REPORT}: energies and cosines, of all weights",
                f"  {picture.name}: shares over fractions and layers",
            ]
        )
    )
