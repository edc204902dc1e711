"""Trains softmax and Grassmann heads on real images, compares them, and resumes one of the runs.

    python scripts/demo.py --workdir work/demo      # about one minute on two cores; `make demo` calls this
    python scripts/demo.py --workdir work/one --seeds 1 --heads softmax k8

The images are the 1797 handwritten digits that come with scikit-learn; every run trains an MLP 64-128-64 with the head
on top for 60 epochs of 1200 images (arXiv 2308.01547).  On a machine without accelerator the CPU serves as four
devices: batches are sharded over two of them, classes over the other two.

A demo that was stopped goes on where it stopped; one that is started again reuses its runs and trains one epoch more.
"""

import argparse
import json
import logging
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from subspace_jax import linalg, metrics, represent, train

CONFIG = Path(__file__).parents[1] / "configs" / "gcr" / "digits.py"
HEADS = ("softmax", "cosine", "k1", "k8")


def mesh_fields():
    """Returns a mesh of 2 x 2 over examples and classes on four CPU devices, else one over examples."""
    four_cpus = jax.default_backend() == "cpu" and jax.device_count() == 4
    return ["mesh.data=2", "mesh.tensor=2"] if four_cpus else []


def config_of(head, seed, *, epochs=60):
    return train.override(
        train.load_config(f"{CONFIG}:{head}"), [f"seed={seed}", f"train.epochs={epochs}", *mesh_fields()]
    )


def train_one(head, seed, workdir, progress):
    """Trains one head with one seed, and returns its row of the table."""
    reused = (workdir / "config.json").exists()
    start = time.perf_counter()
    state, result, *_ = train.run(config_of(head, seed), workdir, progress=progress)
    seconds = time.perf_counter() - start
    (phase,) = train.build(config_of(head, seed)).phases
    features, labels = represent.features_of(phase.task, state, phase.data.evaluate["eval"]())
    bases = state.params["head"].get("bases")
    return {
        "head": head,
        "seed": seed,
        "step": int(state.step),
        "accuracy": result["accuracy"],
        "loss": result["loss"],
        "orthonormality_error": None if bases is None else float(jnp.max(linalg.orthonormality_error(bases))),
        "variability_degrees": float(metrics.intra_class_variability(jnp.asarray(features), jnp.asarray(labels))),
        "class_separation_r2": float(metrics.class_separation_r2(jnp.asarray(features), jnp.asarray(labels))),
        "seconds": None if reused else seconds,
    }


def table_of(rows, heads):
    table = Table(title="scikit-learn digits, 597 test images")
    columns = ("head", "accuracy", "orthonormality error", "variability (deg)", "separation R2", "seconds a run")
    for name in columns:
        table.add_column(name, justify="left" if name == "head" else "right")
    for head in heads:
        runs = [row for row in rows if row["head"] == head]
        column = {name: [row[name] for row in runs] for name in runs[0]}
        errors = column["orthonormality_error"]
        table.add_row(
            head,
            spread(column["accuracy"], ".4f"),
            "-" if None in errors else f"{max(errors):.1e}",
            spread(column["variability_degrees"], ".1f"),
            spread(column["class_separation_r2"], ".3f"),
            "reused" if None in column["seconds"] else f"{statistics.mean(column['seconds']):.1f}",
        )
    return table


def spread(values, form):
    """Returns mean and sample standard deviation as text."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def plot_angles(bases, path):
    """Plots the principal angles between all pairs of class subspaces: the smallest, and their mean."""
    from matplotlib.figure import Figure

    angles = np.rad2deg(jax.jit(linalg.principal_angles)(bases[:, None], bases[None, :]))
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = zip(figure.subplots(1, 2), ("smallest", "mean"), (angles[..., 0], angles.mean(-1)), strict=True)
    for axis, name, values in panels:
        np.fill_diagonal(values, np.nan)
        image = axis.imshow(values, cmap="viridis")
        axis.set(title=f"{name} principal angle between classes", xlabel="digit", ylabel="digit")
        axis.set(xticks=range(len(values)), yticks=range(len(values)))
        figure.colorbar(image, ax=axis, label="degrees", shrink=0.8)
    figure.savefig(path, dpi=120)


def resume(head, workdir, progress):
    """Trains a finished run for one epoch more, from its last checkpoint."""
    restored = train.restore(workdir)
    step = int(restored.state.step)
    epochs = step / restored.phase.data.steps_per_epoch + 1
    logging.getLogger("subspace_jax").setLevel(logging.INFO)
    print(f"\nResuming {head}, seed 0, from the checkpoint of step {step} for one epoch more:")
    train.run(config_of(head, 0, epochs=epochs), workdir, progress=progress)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("work/demo"), help="folder of all runs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each head (%(default)s)")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["softmax", "k1", "k8"], help="what to train")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if args.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {args.seeds}")

    jax.config.update("jax_num_cpu_devices", 4)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    try:
        workdir = train.writable_folder(args.workdir)
    except OSError as error:
        parser.error(str(error))
    print(f"{jax.device_count()} {jax.default_backend()} devices, mesh {' '.join(mesh_fields()) or 'data'}")

    rows, runs = [], [(head, seed) for seed in range(args.seeds) for head in args.heads]
    for i, (head, seed) in enumerate(runs, start=1):
        print(f"\n{head}, seed {seed} ({i} of {len(runs)})", flush=True)
        rows.append(train_one(head, seed, workdir / f"{head}_seed{seed}", not args.quiet))
    print()
    Console(width=100).print(table_of(rows, args.heads))
    (workdir / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    train.plot_curves(
        {head: workdir / f"{head}_seed0" / "metrics.jsonl" for head in args.heads}, workdir / "curves.png"
    )
    written = ["table.json", "curves.png"]

    grassmann = [head for head in args.heads if head.startswith("k")]
    if grassmann:
        widest = max(grassmann, key=lambda head: int(head[1:]))
        folder = workdir / f"{widest}_seed0"
        state = train.restore(folder).state
        plot_angles(jax.device_get(state.params["head"]["bases"]), workdir / "angles.png")
        written.append("angles.png")
        resume(widest, folder, not args.quiet)
    print(f"\nWrote {', '.join(written)} and a folder with checkpoints, metrics and curves for every run to {workdir}")


if __name__ == "__main__":
    main()
