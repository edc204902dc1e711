"""The command that plans a run."""

import argparse
import json
import os
from pathlib import Path

from subspace_jax.cli import shared

_AXES = ("data", "fsdp", "sequence", "tensor")

_PLAN = """
    subspace-jax plan --config lm/large:llama3-8b --topology v5e:4x4
    subspace-jax plan --config lm/large:llama3-70b --topology v5p:4x4x8 --mesh fsdp=32,tensor=4 \\
        --config.adapter.method=dora --config.adapter.rank=384 --json plan.json
    subspace-jax plan --config lm/large:llama3-8b --topology v6e:4x4 --sweep --examples-per-shard 1
    """


def add_commands(commands) -> None:
    """Adds ``plan``."""
    summary = "compile the train step of a config for a TPU or GPU slice on this host, and estimate memory and time"
    plan = shared.add_command(commands, "plan", summary, _plan, _PLAN, fields=True)
    shared.add_config(plan)
    plan.add_argument("--topology", required=True, metavar="CHIP:SIDES", help="such as v5e:16x16, v5p:4x4x8, h100:8")
    plan.add_argument(
        "--mesh",
        action="append",
        metavar="AXIS=SIZE,…",
        help="such as fsdp=8,tensor=2; data takes the rest (default: the mesh of the config; more than once: --sweep)",
    )
    plan.add_argument("--model", metavar="DIR", help="model of finetune; its weights are not read")
    plan.add_argument(
        "--sweep",
        action="store_true",
        help="plan several meshes on slices of 8 to 512 of these chips, as a scaling table",
    )
    plan.add_argument("--min-chips", type=int, default=8, help="smallest slice of --sweep (default: 8)")
    plan.add_argument("--max-chips", type=int, default=512, help="largest slice of --sweep (default: 512)")
    plan.add_argument(
        "--examples-per-shard",
        type=int,
        default=0,
        help="examples for each shard of data x fsdp, instead of data.batch_size: the batch grows with the slice",
    )
    plan.add_argument(
        "--no-cache",
        action="store_true",
        help="plan anew, and replace the plan in the cache, which is of the same config, slice, versions and sources",
    )
    plan.add_argument("--json", metavar="FILE", help="write the plans as a JSON list")
    plan.add_argument("--plot", metavar="FILE", help="plot of --sweep (default: plan.png)")


def _plan(args: argparse.Namespace, overrides: list[str]) -> None:
    # Planning needs no accelerator, and uses none.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _silence_libtpu()
    from subspace_jax import planning, train

    planning.find_topology(args.topology)
    meshes = [parse_mesh(text) for text in args.mesh or ()]
    if args.examples_per_shard < 0:
        raise ValueError(
            f"--examples-per-shard: expected at least 1, or 0 for data.batch_size, got {args.examples_per_shard}"
        )
    for name, file in (("--json", args.json), ("--plot", args.plot)):
        if file and not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{name}: no folder {Path(file).absolute().parent}")
    config = train.load_config(args.config)
    settings = list(overrides)
    if args.model:
        has_tokenizer = os.path.isfile(args.model) or os.path.isfile(os.path.join(args.model, "tokenizer.json"))
        settings[:0] = [f"model.folder={args.model}", f"model.tokenizer={'' if has_tokenizer else 'bytes'}"]
    config = train.override(config, [*shared.recipe_of(overrides), *settings])
    if args.sweep or len(meshes) > 1:
        plans = _sweep(args, config, meshes)
    else:
        plans, cached = _plans(args, config, args.topology, meshes[0] if meshes else None, evaluations=True)
        if cached:
            print("From the cache; --no-cache plans anew.\n")
        print("\n\n".join(map(planning.plan_text, plans)))
    if args.json:
        with train.replacing(args.json) as partial:
            partial.write_text(json.dumps([plan.as_dict() for plan in plans], indent=2) + "\n")
        print(f"Wrote the plan to {os.path.abspath(args.json)}")


def _silence_libtpu() -> None:
    """Answers what libtpu looks for on a TPU host, where it is only a compiler; otherwise it prints errors.

    The topology that is planned for does not depend on these variables.
    """
    if os.environ["JAX_PLATFORMS"] == "cpu":
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _plans(
    args: argparse.Namespace, config, topology: str, mesh: dict[str, int] | None, *, evaluations: bool
) -> tuple[list, bool]:
    """Returns the plans of a config on a slice, and whether they are from the cache."""
    from subspace_jax import planning, train

    if args.examples_per_shard:
        num_chips = planning.find_topology(topology)[1]
        sizes = planning.mesh_sizes(config.mesh if mesh is None else mesh, topology, num_chips)
        rows = args.examples_per_shard * sizes["data"] * sizes["fsdp"]
        config = train.override(config, [f"data.batch_size={rows}"])
    key = planning.plan_key(config, topology, mesh, evaluations=evaluations)
    plans = None if args.no_cache else planning.read_plans(key)
    if plans is not None:
        return plans, True
    where = topology if mesh is None else f"{topology} {_shown(mesh)}"
    with planning.waiting(f"{where}: reading the config"):
        programs = planning.plan_programs(config, topology, mesh, evaluations=evaluations)
    verb, plans = "compiling" if planning.find_topology(topology)[0].platform == "tpu" else "lowering", []
    for number, program in enumerate(programs, 1):
        with planning.waiting(f"{where}: {verb} {program.name} ({number} of {len(programs)})"):
            plans.append(program.plan())
    planning.write_plans(key, plans)
    return plans, False


def _sweep(args: argparse.Namespace, config, meshes: list[dict[str, int]]) -> list:
    from subspace_jax import planning

    chip, _ = planning.find_topology(args.topology)
    topologies = planning.topologies_of(chip, args.min_chips, args.max_chips) if args.sweep else [args.topology]
    plans, left_out, num_cached = [], [], 0
    for topology in topologies:
        for mesh in meshes or planning.usual_meshes(topology):
            try:
                steps, cached = _plans(args, config, topology, mesh, evaluations=False)
                plans.append(max(steps, key=lambda plan: plan.total))  # of several phases, the largest step
                num_cached += cached
            except ValueError as error:
                left_out.append(f"{topology} {_shown(mesh)}: {error}")
    for text in left_out:
        print(f"skipped: {text}")
    if not plans:
        raise ValueError("--sweep: no slice and mesh fits this config; the reasons are above")
    print(planning.sweep_text(plans))
    if num_cached:
        print(f"{num_cached} of {len(plans)} plans are from the cache; --no-cache plans anew")
    output = args.plot or "plan.png"
    planning.plot_sweep(plans, output)
    print(f"Wrote the plot to {os.path.abspath(output)}")
    return plans


def _shown(mesh: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in mesh.items())


def parse_mesh(text: str) -> dict[str, int]:
    """Reads ``fsdp=8,tensor=2``; raises ValueError for another form."""
    # Imported here: modules of the command import no JAX.
    from subspace_jax.train.fields import nearest

    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if equals and name not in _AXES:
            raise ValueError(f"--mesh: expected axes among {_AXES}, got {name!r}{nearest(name, _AXES)}")
        if not equals or not size.removeprefix("-").isdecimal() or name in sizes:
            raise ValueError(f"--mesh: expected a form such as data=2,fsdp=8,tensor=2, got {text!r}")
        sizes[name] = int(size)
    return sizes
