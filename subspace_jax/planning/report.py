"""Plans as text, as a scaling table and as a plot."""

import math
from collections.abc import Sequence
from pathlib import Path

from subspace_jax.planning.chips import Chip, find_topology
from subspace_jax.planning.record import Plan
from subspace_jax.planning.roofline import ASSUMPTIONS, Roofline
from subspace_jax.planning.temporaries import Temporary
from subspace_jax.train.workdir import replacing


def plan_text(plan: Plan) -> str:
    """Returns a plan as text."""
    chip, _ = find_topology(plan.topology)
    head = f"{plan.topology}: {plan.program}, {plan.chips} chips, mesh {_mesh(plan)}"
    lines = [f"{head}, {plan.examples} examples per batch" if plan.examples else head, *_memory_lines(plan)]
    if plan.refusal:
        return "\n".join([*lines, "", f"The compiler refused the program: {plan.refusal}"])
    if chip.platform != "tpu":
        lines.append(
            "  GPUs: FLOPs are those of the traced program, which was lowered and not compiled: temporaries and "
            "collectives are unknown, memory traffic is that of matmuls and optimizer"
        )
    lines += _work_lines(plan, chip)
    if plan.collectives:
        lines += ["", "Collectives per chip", f"  {'kind':<20}{'axis':<20}{'devices':>8}{'runs':>8}{'bytes':>14}"]
        lines += [
            f"  {c.kind:<20}{c.axis:<20}{c.devices:>8}{c.count:>8}{_bytes(c.nbytes):>14}" for c in plan.collectives
        ]
    if plan.time is not None:
        lines += _time_lines(plan.time, chip)
    if plan.speeds:
        lines += _speed_lines(plan, chip)
    if plan.largest:
        lines += ["", "Largest temporaries"]
        lines += [f"  {_bytes(t.nbytes):>14}  {t.type:<28} {_source(t)}".rstrip() for t in plan.largest]
    return "\n".join(lines)


def memory_text(plan: Plan) -> str:
    """Returns the memory of a plan as text."""
    return "\n".join(_memory_lines(plan)).strip()


def _memory_lines(plan: Plan) -> list[str]:
    parts = [
        ("parameters", plan.params),
        ("optimizer state", plan.optimizer),
        ("other state", plan.variables),
        ("prepared arrays", plan.model),
        ("batch", plan.batch),
        ("padding", plan.padding),
        ("temporaries", plan.temporaries),
        ("program, other results", plan.code),
        ("total", plan.total),
        ("available", plan.limit),
    ]
    lines = [f"  {name:<24}{_bytes(nbytes):>14}" for name, nbytes in parts if nbytes or name != "prepared arrays"]
    return ["", "Memory per chip", *lines, f"  {_verdict(plan)}", *(f"  - {text}" for text in advice(plan))]


def _work_lines(plan: Plan, chip: Chip) -> list[str]:
    lines = ["", "Work per chip", f"  {'matmuls':<24}{plan.flops / 1e12:>11.4f} TFLOP"]
    if plan.flops and chip.platform == "tpu":
        # Below 1 if the compiler removes a matmul, above if several chips compute the same one.
        lines.append(f"  {'of the ideal':<24}{plan.flops / max(plan.needed_flops, 1):>11.3f}")
    lines.append(f"  {'memory traffic':<24}{_bytes(plan.memory_bytes):>14}")
    if plan.open_loops:
        lines.append(f"  {plan.open_loops} loops of unknown length, counted once")
    return lines


def _time_lines(time: Roofline, chip: Chip) -> list[str]:
    network = "unknown" if time.network is None else _seconds(time.network)
    times = (("compute", _seconds(time.compute)), ("memory", _seconds(time.memory)), ("network", network))
    return [
        "",
        "Roofline time",
        *(f"  {name:<24}{text:>14}" for name, text in times),
        f"  bound by {time.bound}: {_seconds(time.best)} at best, {_seconds(time.worst)} at worst",
        *(f"  - {text}" for text in ASSUMPTIONS),
        f"  - {chip.name}: {chip.flops / 1e12:.0f} TFLOP/s, memory {chip.memory_rate / 1e9:.0f} GB/s, "
        f"a link {chip.link_rate / 1e9:.0f} GB/s each way",
    ]


def _speed_lines(plan: Plan, chip: Chip) -> list[str]:
    steps = "steps/s" if plan.program.startswith("step") else "batches/s"
    best, worst = plan.speeds["best"], plan.speeds["worst"]
    rows = [
        (steps, _rate(best.steps), _rate(worst.steps)),
        (f"{plan.unit}/s", _rate(best.amount), _rate(worst.amount)),
        ("MFU", f"{100 * best.mfu:.1f} %", f"{100 * worst.mfu:.1f} %"),
    ]
    missing = "" if plan.collectives is not None else " or collectives"
    return [
        "",
        f"{'Estimated speed':<26}{'full overlap':>14}{'no overlap':>14}",
        *(f"  {name:<24}{full:>14}{none:>14}" for name, full, none in rows),
        f"  - by the roofline times, so upper bounds: no input, evaluations, checkpoints or latency{missing}",
        f"  - MFU: ideal matmul FLOPs, rematerialized ones included, over time x {chip.flops / 1e12:.0f} TFLOP/s",
    ]


def sweep_text(plans: Sequence[Plan]) -> str:
    """Returns a scaling table, and the fastest plan that fits."""
    head = f"{'topology':<12}{'chips':>6}  {'mesh (data x fsdp x tensor)':<28}{'examples':>10}{'GiB':>9}{'fits':>6}"
    lines = [head + f"{'compute':>11}{'memory':>11}{'network':>11}{'at best':>11}  {'bound by':<9}{'examples/s':>12}"]
    for plan in plans:
        line = f"{plan.topology:<12}{plan.chips:>6}  {' x '.join(map(str, plan.mesh.values())):<28}{plan.examples:>10}"
        line += f"{plan.total / 2**30:>9.2f}{'yes' if plan.fits else 'no':>6}"
        if plan.time is not None:
            network = "?" if plan.time.network is None else _seconds(plan.time.network)
            times = (_seconds(plan.time.compute), _seconds(plan.time.memory), network, _seconds(plan.time.best))
            line += (
                "".join(f"{text:>11}" for text in times)
                + f"  {plan.time.bound:<9}{plan.examples / plan.time.best:>12.1f}"
            )
        lines.append(line)
    best = best_plan(plans)
    if best is None:
        lines.append("None of these fits.")
    else:
        lines.append(
            f"Fastest that fits: {best.topology} with {_mesh(best)}, {_seconds(best.time.best)} for {best.examples} "
            f"examples at best, bound by {best.time.bound}"
        )
        frugal = min((p for p in plans if p.fits and p.time), key=_chip_seconds)
        lines.append(
            f"Fewest chip-seconds per example: {frugal.topology} with {_mesh(frugal)}, "
            f"{_chip_seconds(frugal):.4g} chip-s"
        )
    return "\n".join(lines)


def best_plan(plans: Sequence[Plan]) -> Plan | None:
    """Returns the plan with the most examples per second of those that fit, or None.

    Ties are broken by the time without overlap.
    """
    able = [plan for plan in plans if plan.fits and plan.time is not None]
    return max(able, key=lambda p: (p.examples / p.time.best, p.examples / p.time.worst), default=None)


def plot_sweep(plans: Sequence[Plan], output: str | Path) -> None:
    """Plots examples per second and memory per chip over the number of chips.

    Args:
      plans: The plans.
      output: The image file, in the format of its suffix.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    best = [best_plan([p for p in plans if p.topology == t]) for t in dict.fromkeys(p.topology for p in plans)]
    best = sorted((p for p in best if p is not None), key=lambda p: p.chips)
    if best:
        chips = [p.chips for p in best]
        speed.plot(chips, [p.examples / p.time.best for p in best], "o-", label="full overlap")
        speed.plot(chips, [p.examples / p.time.worst for p in best], "s--", label="no overlap")
        slope = best[0].examples / best[0].time.best / chips[0]
        speed.plot(chips, [slope * n for n in chips], ":", color="gray", label="linear")
        speed.set(xscale="log", yscale="log")
        speed.legend(fontsize="small")
    for fits, marker in ((True, "o"), (False, "x")):
        shown = [p for p in plans if p.fits == fits]
        memory.plot(
            [p.chips for p in shown], [p.total / 2**30 for p in shown], marker, label="fits" if fits else "does not fit"
        )
    memory.axhline(plans[0].limit / 2**30, color="gray", linestyle=":", label="available")
    memory.set(xscale="log", xlabel="chips", ylabel="GiB per chip")
    memory.legend(fontsize="small")
    speed.set(xlabel="chips", ylabel="examples/s, roofline")
    with replacing(output) as partial:
        figure.savefig(partial, dpi=120)


def advice(plan: Plan) -> list[str]:
    """Returns possible changes for a plan that does not fit."""
    if plan.fits:
        return []
    gib, found = 2**30, []
    state = plan.params + plan.optimizer + plan.variables
    ways = math.prod(size for name, size in plan.mesh.items() if name != "data")
    if state > 0.5 * plan.limit:
        wanted = 2 ** math.ceil(math.log2(max(2 * state / plan.limit, 2)))
        found.append(
            f"the state takes {state / gib:.2f} of {plan.limit / gib:.2f} GiB on {ways} shards (fsdp x tensor); "
            f"with {ways * wanted} shards it takes about {state / wanted / gib:.2f} GiB"
        )
        if plan.optimizer > plan.params:
            found.append(
                f"the optimizer keeps {plan.optimizer / gib:.2f} GiB beside {plan.params / gib:.2f} GiB of parameters: "
                "with adapters (--config.adapter.method=lora) it keeps only theirs"
            )
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    rest = plan.total - state
    found.append(
        f"all but the state takes {rest / gib:.2f} GiB with {plan.examples // shards} examples per chip: halve "
        "data.batch_size, set train.accumulate, model.remat=full, model.loss_chunk, or a larger tensor axis"
    )
    return found


def _chip_seconds(plan: Plan) -> float:
    return plan.time.best * plan.chips / plan.examples


def _verdict(plan: Plan) -> str:
    free = plan.limit - plan.total
    if plan.fits and plan.collectives is None:
        return f"the state fits, {_bytes(free).strip()} ({100 * free / plan.limit:.0f} %) remain for temporaries"
    if plan.fits:
        return f"fits, {_bytes(free).strip()} ({100 * free / plan.limit:.0f} %) free"
    return f"does not fit, {_bytes(max(-free, 0)).strip()} too much"


def _mesh(plan: Plan) -> str:
    return ", ".join(f"{name}={size}" for name, size in plan.mesh.items())


def _bytes(nbytes: int | None) -> str:
    if nbytes is None:
        return "unknown"
    power = min(int(math.log2(nbytes) // 10), 4) if nbytes >= 1024 else 0
    return f"{nbytes / 2 ** (10 * power):.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{1e3 * seconds:.3f} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.3f} us"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _source(temporary: Temporary) -> str:
    return f"{temporary.source} ({temporary.line})" if temporary.line else temporary.source
