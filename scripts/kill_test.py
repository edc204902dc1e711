"""Kills a run at random times, again and again, and looks whether it ends as if nothing had happened.

    python scripts/kill_test.py --kills 100 --workdir work/kills     # the digits config
    python scripts/kill_test.py --kills 2 --workdir work/kills --config my.py --config.train.steps=60

A run in one go comes first.  Then runs are started and killed with SIGKILL at a random time, started again with the
same folder, killed again, and so on until one ends by itself; then the next one begins in a new folder.  Checked are:

- the final state of every run has the bits of the one that was never killed, and its metrics.jsonl the same rows;
- a run goes on from the latest checkpoint that was whole when it was killed; a step is lost to at most the interval
  between two checkpoints and the one that was still being written.

Ends with 1 where something differs.  One line of JSON with the counts is printed last.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def command(config, workdir, settings):
    module = [sys.executable, "-m", "subspace_jax.cli.main", "train", "--quiet"]
    every = ["--config.train.log_every=1", *settings]
    return [*module, "--config", config, "--workdir", str(workdir), *every]


def start(config, workdir, settings, log):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command(config, workdir, settings), env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
    )


def last_step(workdir):
    from subspace_jax import train

    rows = train.read_metrics(workdir / "metrics.jsonl")
    return max((row["step"] for row in rows), default=0)


def whole_checkpoints(workdir):
    folder = workdir / "checkpoints"
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []


def bits(workdir):
    import jax
    import numpy as np

    from subspace_jax import train

    _, state = train.restore(workdir)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def run_to_end(config, workdir, settings):
    with (workdir.parent / "log.txt").open("w+") as log:
        began = time.monotonic()
        if start(config, workdir, settings, log).wait() != 0:
            log.seek(0)
            raise RuntimeError(f"the run that nobody killed failed:\n{log.read()}")
    return time.monotonic() - began


def kill_runs(config, workdir, settings, kills, seed):
    """Returns counts, and what was found wrong."""
    draw = random.Random(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    seconds = run_to_end(config, workdir / "whole", settings)
    expected, rows = bits(workdir / "whole"), (workdir / "whole/metrics.jsonl").read_text()
    steps = last_step(workdir / "whole")
    wrong, lost, runs, done = [], [], 0, 0
    while done < kills:
        target, killed_at = workdir / f"run_{runs}", None
        while True:
            with (workdir / "log.txt").open("w+") as log:
                process = start(config, target, settings, log)
                try:
                    process.wait(draw.uniform(0.2, 1.0) * seconds if done < kills else None)
                except subprocess.TimeoutExpired:
                    before = whole_checkpoints(target)
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    done += 1
                log.seek(0)
                text = log.read()
            found = re.search(r"Going on from step (\d+)", text)
            if killed_at is not None and (found or process.returncode == 0):
                resumed = int(found[1]) if found else 0
                lost.append(killed_at[0] - resumed)
                if resumed < max(killed_at[1], default=0):
                    wrong.append(f"{target}: went on from {resumed}, though {killed_at[1]} were whole")
            if process.returncode == 0:
                break
            if process.returncode != -signal.SIGKILL:
                wrong.append(f"{target}: ended with {process.returncode}:\n{text[-2000:]}")
                break
            killed_at = (last_step(target), before)
        runs += 1
        if process.returncode == 0:
            if bits(target) != expected:
                wrong.append(f"{target}: the final state differs")
            if (target / "metrics.jsonl").read_text() != rows:
                wrong.append(f"{target}: the metrics differ")
    counts = {"kills": done, "runs": runs, "steps": steps, "seconds": round(seconds, 1)}
    return {**counts, "resumes": len(lost), "most_steps_lost": max(lost, default=0)}, wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", default=str(ROOT / "configs/gcr/digits.py:k8"))
    parser.add_argument("--workdir", type=Path, required=True, help="folder for the runs; not there yet, or empty")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    args, settings = parser.parse_known_args()
    if unknown := [text for text in settings if not text.startswith("--config.")]:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if args.workdir.exists() and any(args.workdir.iterdir()):
        parser.error(f"--workdir: {args.workdir} is not empty")
    sys.path.insert(0, str(ROOT))
    counts, wrong = kill_runs(args.config, args.workdir.absolute(), settings, args.kills, args.seed)
    for text in wrong:
        print(text)
    print(json.dumps({**counts, "wrong": len(wrong)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
