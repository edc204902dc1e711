"""Plans train steps on TPU slices of growing size, on the CPU of this machine, and plots how they scale.

    python scripts/bench/scaling.py --only tiny            # some seconds for each slice
    python scripts/bench/scaling.py                        # all cases, minutes for each slice of the large ones

Each case is a config (None: a head over ten million classes), and slices with their meshes.  The batch grows with the
chips, so that the work per chip is constant and any loss is due to the network; in cases whose name ends with "fixed"
the batch is constant.  Every step is compiled for its slice as by ``subspace-jax plan``; nothing runs, and times are
roofline estimates.  Plans are saved in the file of ``--json`` one by one; a stopped bench resumes with the next one.

  GiB                        memory per chip
  compute, memory, network   milliseconds of a step per chip, by the rate of each
  examples/chip-s            examples per second and chip: with full overlap of the three, and without overlap
  kept                       the latter, relative to the first slice of the case
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from subspace_jax import optim, planning, represent, train

ROOT = Path(__file__).parents[2]
LARGE = "configs/lm/large.py"
DORA = ("adapter.method=dora", "adapter.rank=384", "optim.kwargs.weight_decay=0.0", "optim.learning_rate=2e-4")
LORA = ("adapter.method=lora", "adapter.rank=384", "optim.name=adaprelora", "optim.kwargs.weight_decay=0.0")
GALORE = ("optim.name=galore", "optim.kwargs.rank=1024")
V5P = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")


def slices(chip, sides, **axes):
    """Slices of a chip with one mesh; an axis of -1 takes the remaining chips."""
    return [(f"{chip}:{side}", axes) for side in sides]


# name: (config, fields, examples per shard of data x fsdp or None for a fixed batch, [(slice, mesh), ...])
CASES = {
    "tiny": ("configs/optim/tiny_gpt.py:adamw", (), 16, slices("v5p", V5P, data=-1)),
    "tiny-fixed": ("configs/optim/tiny_gpt.py:adamw", ("data.batch_size=1024",), None, slices("v5p", V5P, data=-1)),
    "tiny-galore": ("configs/optim/tiny_gpt.py:galore", (), 16, slices("v5p", V5P, data=-1)),
    "resnet50d": ("configs/gcr/imagenet_resnet.py:resnet50d_k8", (), 16, slices("v5e", ("4x4", "16x16"), data=-1)),
    "swin-t": ("configs/gcr/imagenet_swin.py:k8", (), 64, slices("v5e", ("4x4", "16x16"), data=-1)),
    "deit3-s": ("configs/gcr/imagenet_deit3.py:k8", (), 128, slices("v5e", ("4x4", "16x16"), data=-1)),
    "head-10m-fixed": (None, (), None, slices("v5p", ("4x4x4", "4x8x8", "8x8x8"), data=1, tensor=-1)),
    "llama3-8b-dora": (
        f"{LARGE}:llama3-8b",
        DORA,
        1,
        slices("v5p", ("2x2x2", "4x4x4", "8x8x8"), data=1, fsdp=-1),
    ),
    # The batch is sharded over all chips, weights over the sixteen of a group only.
    "llama3-8b-dora-groups": (f"{LARGE}:llama3-8b", DORA, 1, slices("v5p", ("4x4x4", "8x8x8"), data=-1, fsdp=16)),
    "llama3-8b-lora-adaprelora": (f"{LARGE}:llama3-8b", LORA, 1, slices("v5p", ("4x4x4",), data=1, fsdp=-1)),
    "llama3-70b-dora": (
        f"{LARGE}:llama3-70b",
        DORA,
        1,
        slices("v5p", ("4x4x8", "8x8x8"), data=1, fsdp=-1, tensor=4),
    ),
    "mistral-7b-galore": (f"{LARGE}:mistral-7b", GALORE, 1, slices("v5p", ("2x2x2", "4x4x4"), data=1, fsdp=-1)),
    "mistral-7b-galore-groups": (f"{LARGE}:mistral-7b", GALORE, 1, slices("v5p", ("4x4x4",), data=-1, fsdp=16)),
}


def plan(name, topology, mesh):
    """Plans one slice of a case."""
    path, fields, examples, _ = CASES[name]
    sizes = planning.mesh_sizes(mesh, topology, planning.find_topology(topology)[1])
    if path is None:
        return plan_head(topology, sizes).as_dict()
    config = train.override(train.load_config(str(ROOT / path)), fields)
    if examples is not None:
        config.data.batch_size = examples * sizes["data"] * sizes["fsdp"]
    (step,) = planning.plan_run(config, topology, sizes, evaluations=False)
    return step.as_dict()


def plan_head(topology, sizes):
    """Plans the Riemannian step of a Grassmann head over ten million classes for 1024 examples of 2048 features."""
    tile = 8 * sizes["tensor"]  # a divisor of the classes, by the layout of TPUs
    classes = -(-10_000_000 // tile) * tile
    make = functools.partial(
        represent.make_classifier, input_shape=(2048,), num_classes=classes, features=(), head="grassmann", dims=8
    )
    tx = optim.with_geometry(optax.sgd(0.1), optim.riemannian_sgd(0.1, reorth_every=5))
    mesh = train.make_mesh(**sizes, devices=planning.tpu_devices(topology))
    batch = {
        "inputs": jax.ShapeDtypeStruct((1024, 2048), jnp.float32),
        "labels": jax.ShapeDtypeStruct((1024,), jnp.int32),
    }
    # With a check of the whole state, old bases and momentum would stay beside the new ones.
    return planning.plan_step(represent.ClassifierTask(make), tx, batch, mesh, topology, finite_check="gradients")


def rate(found, kind):
    """Returns examples per second and chip, with full overlap ("best") or without ("worst")."""
    return found["examples"] / found["time"][kind] / chips(found) if found["time"] else 0.0


def chips(found):
    """Number of chips of a plan."""
    return planning.find_topology(found["topology"])[1]


def table(cases):
    """Returns all plans as a table in Markdown."""
    head = ("case", "slice", "mesh", "examples", "GiB", "fits", "compute", "memory", "network", "bound by")
    head += ("examples/chip-s, full overlap", "no overlap", "kept")
    lines = [head]
    for name, plans in cases.items():
        for found in plans:
            line = [name, found["topology"], " x ".join(map(str, found["mesh"].values())), str(found["examples"])]
            line += [f"{found['total'] / 2**30:.2f}", "yes" if found["fits"] else "no"]
            if found["time"]:
                times = [found["time"][part] for part in ("compute", "memory", "network")]
                line += ["?" if seconds is None else f"{1e3 * seconds:.3g}" for seconds in times]
                line += [found["time"]["bound"], *(f"{rate(found, kind):.4g}" for kind in ("best", "worst"))]
                line.append(f"{rate(found, 'worst') / rate(plans[0], 'worst'):.2f}" if plans[0]["time"] else "")
            lines.append(line + [""] * (len(head) - len(line)))
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|---" * len(head) + "|", *rows[1:]])


def draw(cases, output):
    """Plots examples per second and chip, relative to the first slice, over the number of chips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, plans in cases.items():
        timed = [found for found in plans if found["time"]]
        if len(timed) > 1:
            kept = [rate(found, "worst") / rate(timed[0], "worst") for found in timed]
            axes.plot([chips(found) for found in timed], kept, "o-", label=name)
    axes.set(xscale="log", xlabel="chips", ylabel="examples/s per chip, first slice = 1", ylim=(0, None))
    axes.legend(fontsize="small")
    figure.savefig(output, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--chips", type=int, nargs="+", help="only slices of these numbers of chips")
    parser.add_argument("--json", type=Path, default=ROOT / "scripts/bench/results/scaling.json")
    parser.add_argument("--plot", type=Path, help="image file to plot to")
    args = parser.parse_args()
    kept = json.loads(args.json.read_text()) if args.json.is_file() else {}
    for name in args.only:
        plans = kept.setdefault(name, [])
        for topology, mesh in CASES[name][3]:
            count = planning.find_topology(topology)[1]
            if count not in (args.chips or [count]) or topology in [found["topology"] for found in plans]:
                continue
            print(f"{name} {topology} …", flush=True)
            plans.append(plan(name, topology, mesh))
            plans.sort(key=chips)
            args.json.write_text(json.dumps(kept, indent=1) + "\n")
    shown = {name: plans for name, plans in kept.items() if name in args.only and plans}
    print(table(shown))
    if args.plot:
        draw(shown, args.plot)


if __name__ == "__main__":
    main()
