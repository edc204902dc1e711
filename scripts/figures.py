"""Runs the commands of the index and compares what they reach with what they must reach.

    python scripts/figures.py --only gcr svfit      # or `make figures ONLY="gcr svfit"`; all methods without it
    python scripts/figures.py --list                # what would run
    python scripts/figures.py --tables              # the tables of README.md and docs/methods from docs/figures

Each command runs once for each seed, in a folder of work/figures.  Finished runs are not repeated, and an interrupted
one resumes: call the same command again.  ``--restart`` runs all of them anew.  The figures of a method are written to
docs/figures/NAME.json.  The exit status is 1 where a bound is missed.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from subspace_jax.methods import METHODS, Figure, Method, nearest_names

ROOT = Path(__file__).parents[1]
LIMIT = 1800.0  # seconds of one run, after which it is stopped; the next call resumes it
PACKAGES = ("subspace-jax", "jax", "jaxlib", "flax", "optax", "numpy")
BEGIN, END = "<!-- figures: written by scripts/figures.py --tables -->", "<!-- end of figures -->"


def commands_of(method: Method) -> list[tuple[str, int]]:
    """The commands of a method with their seeds, each once, baselines included."""
    runs = {
        (command, seed): None
        for figure in method.figures
        for command in (figure.command, figure.minus or figure.over)
        if command
        for seed in figure.seeds
    }
    return list(runs)


def folder_of(command: str, seed: int, work: Path) -> Path:
    name = re.sub(r"[^\w.=-]+", "_", command.removeprefix("subspace-jax ").replace("--config", ""))
    return work / name / f"seed{seed}"


def arguments_of(command: str, seed: int, folder: Path) -> list[str]:
    """What is run: the command with folder and seed appended."""
    program, *rest = shlex.split(command)
    if program == "subspace-jax":
        names = ("--workdir", "--config.seed") if "--config" in rest else ("--out", "--seed")
        own = [names[0], str(folder / "run"), f"{names[1]}={seed}"]
        return [sys.executable, "-m", "subspace_jax.cli.main", *rest, *own]
    return [sys.executable, *rest, f"--junitxml={folder / 'tests.xml'}"]


def results_of(folder: Path) -> dict[str, float]:
    """Reads what a run has left."""
    if (folder / "tests.xml").exists():
        root = ElementTree.parse(folder / "tests.xml").getroot()
        suites = list(root.iter("testsuite"))
        found = {"failures": sum(int(suite.get(name)) for suite in suites for name in ("failures", "errors"))}
        return found | {item.get("name"): float(item.get("value")) for item in root.iter("property")}
    return json.loads((folder / "run" / "result.json").read_text())


def run(command: str, seed: int, work: Path, *, quiet: bool = False, restart: bool = False) -> dict:
    """Runs a command with one seed, unless it has been run, and returns its numbers."""
    folder = folder_of(command, seed, work)
    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    done = folder / "done.json"
    if done.exists():
        return json.loads(done.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    arguments = arguments_of(command, seed, folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    try:
        with (folder / "log.txt").open("a") as log:
            output = {"stdout": log, "stderr": log} if quiet else {}
            ended = subprocess.run(arguments, cwd=ROOT, env=environment, timeout=LIMIT, check=False, **output)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{command}: stopped after {LIMIT:.0f} seconds; call again to resume") from None
    seconds = time.perf_counter() - start
    # pytest ends with 1 where tests fail, which is a figure.
    if ended.returncode and not (folder / "tests.xml").exists():
        told = f"; see {folder / 'log.txt'}" if quiet else ""
        raise SystemExit(f"{command}, seed {seed}: ended with status {ended.returncode}{told}")
    results = {"seconds": round(seconds, 1), "commit": commit(), **results_of(folder)}
    done.write_text(json.dumps(results, indent=2) + "\n")
    return results


def measured(figure: Figure, values: list[float], baseline: list[float]) -> dict:
    """The entry of a figure in its JSON file."""
    reduce = {"mean": statistics.mean, "median": statistics.median}[figure.reduce]
    reached = reduce(values)
    if figure.minus:
        reached -= reduce(baseline)
    if figure.over:
        reached /= reduce(baseline)
    low, high = figure.at_least, figure.at_most
    entry = {"name": figure.name, "command": figure.command, "metric": figure.metric, "seeds": list(figure.seeds)}
    entry |= {"values": values, "reduce": figure.reduce}
    if baseline:
        entry |= {"minus" if figure.minus else "over": figure.minus or figure.over, "baseline": baseline}
    met = (low is None or reached >= low) and (high is None or reached <= high)
    return entry | {"reached": reached, "at_least": low, "at_most": high, "met": met}


def measure(method: Method, args: argparse.Namespace) -> dict:
    """Runs all commands of a method, and returns what its JSON file holds."""
    for name in method.needs:
        subprocess.run([sys.executable, "-m", "subspace_jax.cli.main", "fetch", name], cwd=ROOT, check=True)
    runs = commands_of(method)
    results = {}
    for i, (command, seed) in enumerate(runs, start=1):
        print(f"{method.name} {i}/{len(runs)}: {command}, seed {seed}", flush=True)
        results[command, seed] = run(command, seed, args.work, quiet=args.quiet, restart=args.restart)
    entries = []
    for figure in method.figures:
        other = figure.minus or figure.over
        values = [results[figure.command, seed][figure.metric] for seed in figure.seeds]
        baseline = [results[other, seed][figure.metric] for seed in figure.seeds] if other else []
        entries.append(measured(figure, values, baseline))
    commits = ", ".join(sorted({result["commit"] for result in results.values()}))
    return {"method": method.name, "figures": entries, "device": device(), "commit": commits, "versions": versions()}


def device() -> str:
    """The machine, in words."""
    code = "import jax; print(len(jax.devices()), jax.devices()[0].platform, jax.devices()[0].device_kind)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    count, kind, name = told.strip().split("\n")[-1].split(" ", 2)
    if kind != "cpu":
        return f"{count} x {name}"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def commit() -> str:
    """The commit that is checked out, with a plus sign where the package has changed since."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "subspace_jax"], check=False, capture_output=True)
    return head.stdout.strip() + "+" * bool(changed.returncode)


def versions() -> dict[str, str]:
    """Python and packages."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def shown(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def reached_text(entry: dict) -> str:
    """Value of a figure, with the standard deviation where it is a mean over seeds of one command."""
    values, reached = entry["values"], entry["reached"]
    if len(values) == 1 or entry["reduce"] != "mean" or "baseline" in entry:
        return shown(reached)
    return f"{reached:.4f} ± {statistics.stdev(values):.4f}"


def stored(method: Method) -> list[dict]:
    """The measured figures of a method."""
    path = ROOT / method.figure_file
    return json.loads(path.read_text())["figures"] if path.exists() else []


def methods_table(folder: str) -> str:
    """The table of methods: one row for each, with its first figure; pages are linked in ``folder``."""
    rows = ["| Method | Paper | Figure | Required | Reached | Command |", "| --- | --- | --- | --- | --- | --- |"]
    for method in METHODS:
        paper = f"[{method.arxiv[0]}](https://arxiv.org/abs/{method.arxiv[0]})" if method.arxiv else ""
        first, entries = method.figures[0], stored(method)
        reached = reached_text(entries[0]) if entries else "not measured yet"
        title = f"[{method.title}]({folder}{method.name}.md)"
        cells = (title, paper, first.name, first.requirement, reached, f"`{method.command}`")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def page_table(method: Method) -> str:
    """The table of all figures of a method."""
    rows = ["| Figure | Required | Reached | Seeds | Command |", "| --- | --- | --- | --- | --- |"]
    path = ROOT / method.figure_file
    found = json.loads(path.read_text()) if path.exists() else {"figures": []}
    entries = {entry["name"]: entry for entry in found["figures"]}
    for figure in method.figures:
        entry = entries.get(figure.name)
        reached = reached_text(entry) if entry else "not measured yet"
        seeds = f"{len(figure.seeds)}, {figure.reduce}" if len(figure.seeds) > 1 else "1"
        rows.append(f"| {figure.name} | {figure.requirement} | {reached} | {seeds} | `{figure.command}` |")
    if entries:
        again = f"`make figures ONLY={method.name}` measures again."
        rows += ["", f"Measured on {found['device']} at commit {found['commit']}; {again}"]
    return "\n".join(rows)


def with_table(text: str, table: str) -> str:
    """Replaces what stands between the two markers of a page; raises ValueError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def pages() -> dict[Path, str]:
    """Returns README and the pages of methods with the tables of the stored figures."""
    tables = {
        ROOT / "README.md": methods_table("docs/methods/"),
        ROOT / "docs/methods/index.md": methods_table(""),
        **{ROOT / method.doc: page_table(method) for method in METHODS},
    }
    return {path: with_table(path.read_text(), table) for path, table in tables.items()}


def report(found: dict) -> bool:
    """Prints reached beside required; returns whether all bounds are met."""
    print(f"\n{found['method']}")
    for entry in found["figures"]:
        figure = Figure(entry["name"], "", "", entry["at_least"], entry["at_most"])
        verdict = "" if not figure.requirement else "  met" if entry["met"] else "  MISSED"
        print(f"  {entry['name']}: {reached_text(entry)}  {figure.requirement}{verdict}")
    print(flush=True)
    return all(entry["met"] for entry in found["figures"])


def main(argv: list[str] | None = None) -> int:
    names = [method.name for method in METHODS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=names, metavar="NAME", help="methods (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "figures", help="folder of the runs (%(default)s)")
    parser.add_argument("--restart", action="store_true", help="run anew what has been run")
    parser.add_argument("--quiet", action="store_true", help="what the commands print goes to log.txt in their folders")
    parser.add_argument("--list", action="store_true", help="print the commands, and run nothing")
    parser.add_argument("--tables", action="store_true", help="rewrite the tables, and run nothing")
    args = parser.parse_args(argv)
    for name in args.only:
        if name not in names:
            parser.error(f"--only: no method {name!r}; {nearest_names(name)}")
    args.work = args.work.resolve()
    chosen = [method for method in METHODS if method.name in args.only]
    if args.list:
        print("\n".join(f"{command}, seed {seed}" for method in chosen for command, seed in commands_of(method)))
        return 0
    missed = []
    for method in [] if args.tables else chosen:
        found = measure(method, args)
        path = ROOT / method.figure_file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
        if not report(found):
            missed.append(method.name)
    for path, text in pages().items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"Wrote the table of {path.relative_to(ROOT)}")
    if missed:
        print(f"Bounds are missed by: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
