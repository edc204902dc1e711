"""The command that shows the gates of a run of Hydra."""

import argparse

from subspace_jax.cli import shared

_CLASS_GATES = """
    subspace-jax class-gates --workdir work/hydra                 # after: train --config represent/hydra_digits
    subspace-jax class-gates --workdir work/hydra --best --out work/gates

    Writes the gates [classes, classes, d] as OUT.npz and a picture of them as OUT.png; takes some ten seconds.
    """


def add_commands(commands) -> None:
    """Adds ``class-gates``."""
    summary = "show which classes a run of represent/hydra relates, by the gates of their pairs"
    gates = shared.add_command(commands, "class-gates", summary, _class_gates, _CLASS_GATES)
    gates.add_argument("--workdir", required=True, help="folder of the run")
    gates.add_argument(
        "--out", metavar="PATH", help="files to write, without their endings (default: WORKDIR/class_gates)"
    )
    shared.add_trust(gates)
    shared.add_checkpoint(gates)


def _class_gates(args: argparse.Namespace, overrides: list[str]) -> None:
    from pathlib import Path

    import numpy as np

    from subspace_jax import train
    from subspace_jax.represent import hydra

    out = Path(args.out or Path(args.workdir) / "class_gates").expanduser().absolute()
    if args.out:
        train.writable_folder(out.parent)
    step = "best" if args.best else args.step
    gates = hydra.class_gates_of_run(args.workdir, step=step, trust_remote_code=args.trust_remote_code)
    relation = gates.mean(axis=-1)
    with train.replacing(out.with_suffix(".npz")) as partial:
        np.savez(partial, gates=gates, relation=relation, order=hydra.class_order(relation))
    hydra.plot_class_gates(gates, out.with_suffix(".png"))
    first, second = np.triu_indices(len(relation), 1)
    ranked = np.argsort(-relation[first, second], kind="stable")
    for what, chosen in (("most", ranked[:5]), ("least", ranked[::-1][:5])):
        pairs = ", ".join(f"{first[i]} and {second[i]} {relation[first[i], second[i]]:.3f}" for i in chosen)
        print(f"{what} related classes (mean gate): {pairs}")
    print(f"Wrote {out.with_suffix('.png')} and {out.with_suffix('.npz')}")
