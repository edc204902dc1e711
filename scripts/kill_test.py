"""Kills a run at random times, again and again, and looks whether it ends as if nothing had happened.

    python scripts/kill_test.py --kills 100 --workdir work/kills     # the digits config
    python scripts/kill_test.py --kills 2 --workdir work/kills --config my.py --config.train.steps=60

A run in one go comes first.  Then runs are started and killed with SIGKILL, started again with the same folder, killed
again, and so on until one ends by itself; then the next one begins in a new folder.  One kill of four comes at a random
time while the process starts, restores and compiles; the others a random moment after a step that is drawn from those
that are left, however slow the machine is.  Checked are:

- the final state of every run has the bits of the one that was never killed, and its metrics.jsonl the same rows;
- a run goes on from the latest checkpoint that was whole when it was killed, and loses no more steps than
  ``train.checkpoint_every``, whether or not the kill met a checkpoint that was being written.

Ends with 1 where something differs.  One line of JSON with the counts is printed last.
"""

import argparse
import contextlib
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
    """The last step that a run has logged, 0 before it; a line that a kill cut off does not count."""
    file = workdir / "metrics.jsonl"
    lines = file.read_bytes()[-2000:].split(b"\n")[:-1] if file.is_file() else []
    return json.loads(lines[-1])["step"] if lines else 0


def whole_checkpoints(workdir):
    folder = workdir / "checkpoints"
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []


def is_half_written(workdir):
    """Whether a kill interrupted the writing of a checkpoint, which has a temporary name until it is complete."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("tmp" in p.name for p in folder.iterdir())


def bits(workdir):
    import jax
    import numpy as np

    from subspace_jax import train

    return [np.asarray(x).tobytes() for x in jax.tree.leaves(train.restore(workdir).state)]


def run_to_end(config, workdir, settings):
    with (workdir.parent / "log.txt").open("w+") as log:
        began = time.monotonic()
        if start(config, workdir, settings, log).wait() != 0:
            log.seek(0)
            raise RuntimeError(f"the run that nobody killed failed:\n{log.read()}")
    return time.monotonic() - began


def let_live(process, workdir, draw, seconds, steps):
    """Waits for the moment at which a run is to be killed, or until it ends; returns whether steps were waited for."""
    if draw.random() < 0.25:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, seconds / 2))
        return False
    before = last_step(workdir)
    step, pause = draw.randint(min(before + 1, steps), steps), draw.uniform(0, 0.1)
    seen = before
    # Rows after the checkpoint that it goes on from are dropped when the run starts: that it has begun shows there.
    while process.poll() is None and not (seen != before and seen >= step):
        time.sleep(0.01)
        seen = last_step(workdir)
    time.sleep(pause)
    return True


def kill_runs(config, workdir, settings, kills, seed):
    """Returns counts and a list of faults."""
    from subspace_jax import train

    draw = random.Random(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    seconds = run_to_end(config, workdir / "whole", settings)
    expected, rows = bits(workdir / "whole"), (workdir / "whole/metrics.jsonl").read_text()
    steps = last_step(workdir / "whole")
    every = train.read_config(workdir / "whole/config.json").train.checkpoint_every or steps
    wrong, lost, writing, runs, done, in_steps = [], [], 0, 0, 0, 0
    while done < kills:
        target, killed_at = workdir / f"run_{runs}", None
        while True:
            with (workdir / "log.txt").open("w+") as log:
                process = start(config, target, settings, log)
                if done < kills:
                    stepping = let_live(process, target, draw, seconds, steps)
                else:
                    process.wait()
                if process.poll() is None:
                    before = whole_checkpoints(target)
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    done, in_steps = done + 1, in_steps + stepping
                log.seek(0)
                text = log.read()
            found = re.search(r"Going on from step (\d+)", text)
            if killed_at is not None and (found or process.returncode == 0):
                step, whole, half_written = killed_at
                resumed = int(found[1]) if found else 0
                if resumed < max(whole, default=0):
                    wrong.append(f"{target}: went on from {resumed}, though {whole} were whole")
                lost.append(step - resumed)
                writing += half_written
                if lost[-1] > every:
                    wrong.append(f"{target}: went on from {resumed} after step {step}, with {whole} whole")
            if process.returncode == 0:
                break
            if process.returncode != -signal.SIGKILL:
                wrong.append(f"{target}: ended with {process.returncode}:\n{text[-2000:]}")
                break
            killed_at = (last_step(target), before, is_half_written(target))
        runs += 1
        if process.returncode == 0:
            if bits(target) != expected:
                wrong.append(f"{target}: the final state differs")
            if (target / "metrics.jsonl").read_text() != rows:
                wrong.append(f"{target}: the metrics differ")
        print(f"run {runs}: {done} kills so far, {len(wrong)} faults", flush=True)
    return {
        **{"kills": done, "in_steps": in_steps, "runs": runs, "steps": steps, "checkpoint_every": every},
        **{"seconds": round(seconds, 1), "resumes": len(lost), "most_steps_lost": max(lost, default=0)},
        **{"mean_steps_lost": round(sum(lost) / max(len(lost), 1), 1), "resumes_from_a_kill_while_writing": writing},
    }, wrong


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
