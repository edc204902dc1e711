"""Fine-tunes SmolLM2-135M-Instruct by LoRA and DoRA on the docstrings of the standard library, and merges an adapter.

    python scripts/demo_lm.py --workdir work/demo_lm     # `make demo-lm` calls this

Every step is a command of its own, which is printed before it runs.  At the end a table compares the perplexity on
held-out docstrings before and after, the size of the adapters and the peak memory of the runs.  A demo that was stopped
goes on where it stopped.
"""

import argparse
import json
import math
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

MODEL = "work/models/smollm2"
PROMPT = 'def read_lines(path, encoding=\'utf-8\'):\n    """Return'


def call(*arguments):
    """Runs a command of the library; returns its output lines and the largest memory of its process so far, in MB."""
    print(f"\n$ subspace-jax {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "subspace_jax.cli.main", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    if process.wait():
        raise SystemExit(process.returncode)
    return lines, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3


def finetune(variant, workdir):
    """Runs a variant of the config; returns the row of the table."""
    folder = workdir / variant
    _, memory = call("finetune", "--config", f"lm/smollm2:{variant}", "--workdir", str(folder))
    adapter = folder / "adapter" / "adapter_model.safetensors"
    return {
        "perplexity": math.exp(json.loads((folder / "result.json").read_text())["loss"]),
        "adapter": adapter.stat().st_size / 1e6,
        "memory": memory,
    }


def sample(*arguments):
    call("generate", "--model", MODEL, "--prompt", PROMPT, "--max-new-tokens", "48", *arguments)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("work/demo_lm"), help="default: work/demo_lm")
    args = parser.parse_args()

    call("fetch", "smollm2")
    before = finetune("base", args.workdir)
    sample()
    rows = {variant: finetune(variant, args.workdir) for variant in ("lora", "dora")}
    sample("--adapter", str(args.workdir / "dora" / "adapter"))
    merged = args.workdir / "merged"
    if not merged.exists():
        call("merge", "--model", MODEL, "--adapter", str(args.workdir / "dora" / "adapter"), "--out", str(merged))

    table = Table(title="SmolLM2-135M-Instruct on held-out docstrings")
    for name in ("", "perplexity", "adapter, MB", "peak memory so far, MB"):
        table.add_column(name, justify="left" if name == "" else "right")
    table.add_row("before", f"{before['perplexity']:.2f}", "", f"{before['memory']:.0f}")
    for variant, row in rows.items():
        table.add_row(variant, f"{row['perplexity']:.2f}", f"{row['adapter']:.1f}", f"{row['memory']:.0f}")
    print()
    Console().print(table)
    print(f"Adapters, for PEFT, are in {args.workdir}/*/adapter, curves beside them; the merged model is in {merged}")
    print(f'Next: subspace-jax generate --model {os.fspath(merged)} --chat --prompt "What does a docstring say?"')


if __name__ == "__main__":
    main()
