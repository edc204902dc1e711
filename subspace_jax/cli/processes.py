"""Runs of several processes, and exit statuses of runs that were interrupted."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that describe the processes of a run."""
    group = parser.add_argument_group(
        "several processes", "not needed on TPU slices, under Slurm and with JAX_COORDINATOR_ADDRESS"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address at which process 0 listens")
    group.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="index of this process, from 0")
    group.add_argument(
        "--start-timeout", type=float, default=300.0, metavar="S", help="seconds to wait for the other processes"
    )
    group.add_argument(
        "--heartbeat",
        type=float,
        default=100.0,
        metavar="S",
        help="seconds after which a silent process counts as lost",
    )


def start(args: argparse.Namespace) -> None:
    """Connects to the other processes, if there are any."""
    from subspace_jax import train

    if args.start_timeout <= 0 or args.heartbeat <= 0:
        raise ValueError(
            f"--start-timeout, --heartbeat: expected seconds above 0, got {args.start_timeout}, {args.heartbeat}"
        )
    train.initialize(
        args.coordinator, args.num_processes, args.process_id, timeout=args.start_timeout, heartbeat=args.heartbeat
    )


def ending(error: Exception) -> tuple[int | None, str]:
    """Returns exit status and message for an interrupted run; the status is None for any other error."""
    import jax

    from subspace_jax.train import interruptions

    if isinstance(error, interruptions.Preempted):
        return interruptions.PREEMPTED_EXIT, f"{error}; the same command resumes from there"
    if isinstance(error, interruptions.NotFiniteError):
        return interruptions.NOT_FINITE_EXIT, str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
        first = str(error).strip().split("\n")[0][:300]
        return interruptions.LOST_PROCESS_EXIT, (
            f"process {jax.process_index()} of {jax.process_count()} lost another one ({first}); "
            "the same command on all of them resumes from the last checkpoint"
        )
    return None, ""
