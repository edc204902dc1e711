"""Plans as text, as a scaling table and as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path

from subspace_jax.planning.chips import find_topology
from subspace_jax.planning.plan import Plan
from subspace_jax.planning.roofline import ASSUMPTIONS
from subspace_jax.train.workdir import replacing


def plan_text(plan: Plan) -> str:
    """Returns what a plan says, for people."""
    chip, _ = find_topology(plan.topology)
    lines = [
        f"{plan.topology}: {plan.chips} chips, mesh {_mesh(plan)}, {plan.rows} rows in a batch",
        "",
        "Memory of a chip",
    ]
    parts = [
        ("parameters", plan.params),
        ("optimizer state", plan.optimizer),
        ("other state", plan.variables),
        ("batch", plan.batch),
        ("filling up to tiles", plan.padding),
        ("temporaries", plan.temporaries),
        ("program, other results", plan.code),
        ("total", plan.total),
        ("there is", plan.limit),
    ]
    lines += [f"  {name:<24}{_bytes(nbytes):>14}" for name, nbytes in parts]
    lines.append(f"  {_verdict(plan)}")
    lines += [f"  - {text}" for text in advice(plan)]
    if plan.refusal:
        return "\n".join([*lines, "", f"The compiler refused the program: {plan.refusal}"])
    if chip.platform != "tpu":
        lines.append(
            "  GPUs: counted in the traced step, which was lowered and not compiled: temporaries and collectives are "
            "not known, memory traffic is that of products and optimizer"
        )
    lines += ["", "Work of a chip in a step", f"  {'products':<24}{plan.flops / 1e12:>11.4f} TFLOP"]
    if plan.flops and chip.platform == "tpu":
        # Below 1 where the compiler finds a product superfluous, above where several chips do the same one.
        share = plan.flops / max(plan.needed_flops, 1)
        lines.append(f"  {'of the even share':<24}{share:>11.3f}")
    lines.append(f"  {'memory traffic':<24}{_bytes(plan.memory_bytes):>14}")
    if plan.open_loops:
        lines.append(f"  {plan.open_loops} loops of unknown length, counted once")
    if plan.collectives:
        lines += [
            "",
            "Collectives of a chip in a step",
            f"  {'kind':<20}{'axis':<20}{'devices':>8}{'runs':>8}{'bytes':>14}",
        ]
        lines += [
            f"  {c.kind:<20}{c.axis:<20}{c.devices:>8}{c.count:>8}{_bytes(c.nbytes):>14}" for c in plan.collectives
        ]
    if plan.time is not None:
        lines += ["", "Time of a step, by the chip's rates"]
        network = "not known" if plan.time.network is None else _seconds(plan.time.network)
        for name, text in (
            ("compute", _seconds(plan.time.compute)),
            ("memory", _seconds(plan.time.memory)),
            ("network", network),
        ):
            lines.append(f"  {name:<24}{text:>14}")
        lines.append(
            f"  bound by {plan.time.bound}: {_seconds(plan.time.best)} at best, {_seconds(plan.time.worst)} at worst"
        )
        lines += [f"  - {text}" for text in ASSUMPTIONS]
        lines.append(
            f"  - {chip.name}: {chip.flops / 1e12:.0f} TFLOP/s, memory {chip.memory_rate / 1e9:.0f} GB/s, "
            f"a link {chip.link_rate / 1e9:.0f} GB/s each way"
        )
    if plan.largest:
        lines += ["", "Largest temporaries"]
        lines += [f"  {_bytes(t.nbytes):>14}  {t.type:<28} {t.source}" for t in plan.largest]
    return "\n".join(lines)


def sweep_text(plans: Sequence[Plan]) -> str:
    """Returns a scaling table, and which plan is fastest of those that fit."""
    head = f"{'topology':<12}{'chips':>6}  {'mesh (data x fsdp x tensor)':<28}{'rows':>6}{'GiB':>9}{'fits':>6}"
    lines = [head + f"{'compute':>11}{'memory':>11}{'network':>11}{'at best':>11}  {'bound by':<9}{'rows/s':>9}"]
    for plan in plans:
        line = f"{plan.topology:<12}{plan.chips:>6}  {' x '.join(map(str, plan.mesh.values())):<28}{plan.rows:>6}"
        line += f"{plan.total / 2**30:>9.2f}{'yes' if plan.fits else 'no':>6}"
        if plan.time is not None:
            network = "?" if plan.time.network is None else _seconds(plan.time.network)
            times = (_seconds(plan.time.compute), _seconds(plan.time.memory), network, _seconds(plan.time.best))
            line += (
                "".join(f"{text:>11}" for text in times) + f"  {plan.time.bound:<9}{plan.rows / plan.time.best:>9.1f}"
            )
        lines.append(line)
    best = best_plan(plans)
    if best is None:
        lines.append("None of these fits.")
    else:
        lines.append(
            f"Fastest that fits: {best.topology} with {_mesh(best)}, {_seconds(best.time.best)} for {best.rows} rows "
            f"at best, bound by {best.time.bound}"
        )
        frugal = min((p for p in plans if p.fits and p.time), key=_chip_seconds)
        lines.append(
            f"Fewest chip-seconds for a row: {frugal.topology} with {_mesh(frugal)}, {_chip_seconds(frugal):.4g} chip-s"
        )
    return "\n".join(lines)


def best_plan(plans: Sequence[Plan]) -> Plan | None:
    """Returns the plan with the most rows a second, at best overlap, of those that fit; None where none does.

    Of equal ones, that with the shorter time without any overlap.
    """
    able = [plan for plan in plans if plan.fits and plan.time is not None]
    return max(able, key=lambda p: (p.rows / p.time.best, p.rows / p.time.worst), default=None)


def plot_sweep(plans: Sequence[Plan], output: str | Path) -> None:
    """Draws rows a second over chips and the memory of a chip, for the best mesh of each topology.

    Args:
      plans: The plans.
      output: The picture to write, PNG or whatever its suffix says.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    best = [best_plan([p for p in plans if p.topology == t]) for t in dict.fromkeys(p.topology for p in plans)]
    best = sorted((p for p in best if p is not None), key=lambda p: p.chips)
    if best:
        chips = [p.chips for p in best]
        speed.plot(chips, [p.rows / p.time.best for p in best], "o-", label="all overlaps")
        speed.plot(chips, [p.rows / p.time.worst for p in best], "s--", label="nothing overlaps")
        slope = best[0].rows / best[0].time.best / chips[0]
        speed.plot(chips, [slope * n for n in chips], ":", color="gray", label="in proportion")
        speed.set(xscale="log", yscale="log")
        speed.legend(fontsize="small")
    for fits, marker in ((True, "o"), (False, "x")):
        shown = [p for p in plans if p.fits == fits]
        memory.plot(
            [p.chips for p in shown], [p.total / 2**30 for p in shown], marker, label="fits" if fits else "does not"
        )
    memory.axhline(plans[0].limit / 2**30, color="gray", linestyle=":", label="there is")
    memory.set(xscale="log", xlabel="chips", ylabel="GiB of a chip")
    memory.legend(fontsize="small")
    speed.set(xlabel="chips", ylabel="rows/s, by the chip's rates")
    with replacing(output) as partial:
        figure.savefig(partial, dpi=120)


def advice(plan: Plan) -> list[str]:
    """Returns what could be changed where a run does not fit, with the numbers; nothing where it does."""
    if plan.fits:
        return []
    gib, found = 2**30, []
    state = plan.params + plan.optimizer + plan.variables
    ways = math.prod(size for name, size in plan.mesh.items() if name != "data")
    if state > 0.5 * plan.limit:
        wanted = 2 ** math.ceil(math.log2(max(2 * state / plan.limit, 2)))
        found.append(
            f"the state takes {state / gib:.2f} of {plan.limit / gib:.2f} GiB on {ways} shares (fsdp x tensor); "
            f"with {ways * wanted} shares it takes about {state / wanted / gib:.2f} GiB"
        )
        if plan.optimizer > plan.params:
            found.append(
                f"the optimizer keeps {plan.optimizer / gib:.2f} GiB beside {plan.params / gib:.2f} GiB of parameters: "
                "with adapters (--config.adapter.method=lora) it keeps theirs only"
            )
    shares = plan.mesh["data"] * plan.mesh["fsdp"]
    rest = plan.total - state
    found.append(
        f"all but the state takes {rest / gib:.2f} GiB with {plan.rows // shares} rows on a chip: halve "
        "data.batch_size, set train.accumulate, model.remat=full, model.loss_chunk, or a larger tensor axis"
    )
    return found


def _chip_seconds(plan: Plan) -> float:
    return plan.time.best * plan.chips / plan.rows


def _verdict(plan: Plan) -> str:
    free = plan.limit - plan.total
    if plan.fits and plan.collectives is None:
        return f"the state fits, {_bytes(free).strip()} ({100 * free / plan.limit:.0f} %) are left for temporaries"
    if plan.fits:
        return f"fits, {_bytes(free).strip()} ({100 * free / plan.limit:.0f} %) free"
    return f"does not fit, {_bytes(max(-free, 0)).strip()} too much"


def _mesh(plan: Plan) -> str:
    return ", ".join(f"{name}={size}" for name, size in plan.mesh.items())


def _bytes(nbytes: int | None) -> str:
    if nbytes is None:
        return "not known"
    power = min(int(math.log2(nbytes) // 10), 4) if nbytes >= 1024 else 0
    return f"{nbytes / 2 ** (10 * power):.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.3f} ms"
