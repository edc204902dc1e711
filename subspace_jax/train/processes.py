"""Starts a run of several processes: finds them, and names the one that does not connect."""

import glob
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """The processes of a run.

    Attributes:
      found: Source of this information, for messages.
      coordinator: ``host:port`` at which process 0 listens; None lets JAX find all three.
      num_processes: Number of processes; None where only JAX knows it.
      process_id: Index of this process; None where only JAX knows it.
    """

    found: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def find_cluster(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Cluster | None:
    """Finds the processes of a run from arguments or from a scheduler's environment.

    In this order: the arguments; ``JAX_COORDINATOR_ADDRESS`` with ``JAX_NUM_PROCESSES`` (or ``NUM_PROCESSES``) and
    ``JAX_PROCESS_ID`` (or ``JOB_COMPLETION_INDEX``, that of an indexed Kubernetes job); a Slurm step of several
    tasks; a TPU slice of several hosts, on Google Cloud or in Kubernetes.  JAX resolves the last two.

    Args:
      coordinator: ``host:port`` of process 0.
      num_processes: Number of processes.
      process_id: Index of this process, from 0.
      environment: ``os.environ`` by default.

    Returns:
      The processes, or None for a run of one.

    Raises:
      ValueError: A value is missing or out of range.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    if any(value is not None for value in given.values()):
        if missing := [name for name, value in given.items() if value is None]:
            raise ValueError(f"{', '.join(missing)}: needed too; got {[n for n in given if n not in missing]}")
        return _checked("arguments", coordinator, num_processes, process_id)
    env = os.environ if environment is None else environment
    if address := env.get("JAX_COORDINATOR_ADDRESS"):
        counts = [env.get(name) for name in ("JAX_NUM_PROCESSES", "NUM_PROCESSES")]
        indices = [env.get(name) for name in ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX")]
        count, index = (next((text for text in texts if text), None) for texts in (counts, indices))
        if count is None or index is None or not count.isdecimal() or not index.isdecimal():
            raise ValueError(
                f"JAX_COORDINATOR_ADDRESS is set ({address}): expected integers in JAX_NUM_PROCESSES and "
                f"JAX_PROCESS_ID too, got {count!r} and {index!r}"
            )
        return _checked("JAX_COORDINATOR_ADDRESS", address, int(count), int(index))
    steps = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in env for name in steps) and int(env.get("SLURM_NTASKS", "1")) > 1:
        return Cluster("Slurm", None, int(env["SLURM_NTASKS"]), int(env["SLURM_PROCID"]))
    if "tpu" not in env.get("JAX_PLATFORMS", "tpu"):
        return None
    if len([host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]) > 1:
        return Cluster("a TPU slice")
    has_tpu = environment is None and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    if has_tpu and "TPU_SKIP_MDS_QUERY" not in env:
        return Cluster("a TPU machine")
    return None


def _checked(found: str, coordinator: str, num_processes: int, process_id: int) -> Cluster:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator: expected host:port, such as 10.0.0.1:8476, got {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process-id: expected 0 to {num_processes - 1} with {num_processes} processes, got {process_id}"
        )
    return Cluster(found, coordinator, num_processes, process_id)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
    heartbeat: float = 100.0,
) -> bool:
    """Connects the processes of a run by ``jax.distributed``; call it before any other use of JAX.

    Args:
      coordinator: ``host:port`` of process 0; found as :func:`find_cluster` says by default.
      num_processes: Number of processes.
      process_id: Index of this process.
      timeout: Seconds to wait for all processes.
      heartbeat: Seconds without a heartbeat after which a process counts as dead, and the others end.

    Returns:
      Whether there are other processes.

    Raises:
      ValueError: Arguments or environment are incomplete.
      TimeoutError: The coordinator does not answer, or a process does not connect; the address is named.
    """
    cluster = find_cluster(coordinator, num_processes, process_id)
    if cluster is None or cluster.num_processes == 1:
        return False
    deadline = time.monotonic() + timeout
    if cluster.coordinator and cluster.process_id:
        _await_coordinator(cluster, timeout, deadline)
    arguments = {}
    if cluster.coordinator is not None:
        arguments = {
            "coordinator_address": cluster.coordinator,
            "num_processes": cluster.num_processes,
            "process_id": cluster.process_id,
            "cluster_detection_method": "deactivate",
        }
    failure: list[BaseException] = []

    def join():
        try:
            jax.distributed.initialize(
                **arguments,
                # JAX aborts the process at its own timeout: longer, so that the message below comes first.
                initialization_timeout=int(timeout) + 60,
                heartbeat_timeout_seconds=max(int(heartbeat), 1),
                shutdown_timeout_seconds=60,
            )
        except BaseException as error:  # raised below
            failure.append(error)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(max(deadline - time.monotonic(), 0.1))
    if thread.is_alive():
        shown = cluster.coordinator or f"the address of {cluster.found}"
        raise TimeoutError(
            f"coordinator: not all of {cluster.num_processes or 'the'} processes connected to {shown} within "
            f"{timeout:.0f} s (found by {cluster.found}; this is process {cluster.process_id})"
        )
    if failure:
        if isinstance(failure[0], ValueError) and cluster.found == "a TPU machine":
            return False  # a single host
        raise failure[0]
    log.info("Process %d of %d, by %s.", jax.process_index(), jax.process_count(), cluster.found)
    return jax.process_count() > 1


def _await_coordinator(cluster: Cluster, timeout: float, deadline: float) -> None:
    """Waits until process 0 listens, as JAX aborts the process where it does not."""
    host, _, port = cluster.coordinator.rpartition(":")
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(5.0, timeout)):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"coordinator: process {cluster.process_id} of {cluster.num_processes} got no answer from "
                    f"{cluster.coordinator} within {timeout:.0f} s ({error}); is process 0 up, and the port open?"
                ) from error
        time.sleep(0.2)
