"""Runs of several processes, and how a run ends that could not go on."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what tells a process who the others are, where no scheduler does."""
    group = parser.add_argument_group(
        "several processes", "found without these on TPU slices, under Slurm and by JAX_COORDINATOR_ADDRESS"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address at which process 0 listens")
    group.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="place of this process, from 0")
    group.add_argument("--start-timeout", type=float, default=300.0, metavar="S", help="seconds to wait for the others")
    group.add_argument("--heartbeat", type=float, default=100.0, metavar="S", help="seconds until a silent one is lost")


def start(args: argparse.Namespace) -> None:
    """Joins the other processes, if there are any."""
    from subspace_jax import train

    if args.start_timeout <= 0 or args.heartbeat <= 0:
        raise ValueError(
            f"--start-timeout, --heartbeat: expected seconds above 0, got {args.start_timeout}, {args.heartbeat}"
        )
    train.initialize(
        args.coordinator, args.num_processes, args.process_id, timeout=args.start_timeout, heartbeat=args.heartbeat
    )


def ending(error: Exception) -> tuple[int | None, str]:
    """Returns exit status and message for what stops a run that was right; status None where it is a fault."""
    import jax

    from subspace_jax.train import interruptions

    if isinstance(error, interruptions.Preempted):
        return interruptions.PREEMPTED_EXIT, f"{error}; the same command goes on from there"
    if isinstance(error, interruptions.NotFiniteError):
        return interruptions.NOT_FINITE_EXIT, str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        first = str(error).strip().split("\n")[0][:300]
        return interruptions.LOST_PROCESS_EXIT, (
            f"process {jax.process_index()} of {jax.process_count()} lost another one ({first}); "
            "the same command on all of them goes on from the last checkpoint"
        )
    return None, ""
