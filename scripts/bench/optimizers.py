"""Times optimizers beside those that users have: low-rank projections on kernels, and LoRA optimizers in train steps.

    python scripts/bench/optimizers.py                  # some minutes on two cores
    python scripts/bench/optimizers.py --quick          # small shapes, to see that all runs
    python scripts/bench/optimizers.py --only refresh   # one part

Five parts, each at growing widths where that says something:

  refresh   one square kernel: a step that keeps its projection and one that renews it, of optax.contrib.galore and
            galore-torch (full singular value decompositions) and of ours (two rounds of subspace iteration, and the
            others by name)
  steps     the optimizer's share of a step on sixteen kernels, as leaves and as one stack, beside optax.adamw,
            optax.contrib.muon and galore-torch: median and worst step over two periods of refreshes, and the bytes of
            the state
  lora      whole train steps of a Llama-like decoder with LoRA on queries and values, beside optax.adamw on the same
            factors, and Hugging Face PEFT with torch's AdamW on a decoder of the same sizes
  projected a network of two layers that learns another one, all weights by projected gradients: loss after equal steps
            and after equal time, beside optax.adamw and optax.contrib.galore
  problem   axis-scaled regression onto a rank-4 target by LoRA of rank 8: loss after equal steps and after equal time

Medians over rounds in which all take turns (the least for "lora"); read the ratios.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import galore_peer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing

from subspace_jax import adapters, nn, optim

PARTS = ("refresh", "steps", "lora", "projected", "problem")


class Steps:
    """A jitted optimizer and what it works on; a call makes one step."""

    def __init__(self, tx, params, grads):
        self._step = jax.jit(lambda g, s, p: self._apply(tx, g, s, p), donate_argnums=(1, 2))
        self.params, self._grads = jax.tree.map(jnp.copy, params), grads
        self.state = tx.init(self.params)

    @staticmethod
    def _apply(tx, grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def __call__(self):
        """Makes one step and returns the parameters, which may not be there yet."""
        self.params, self.state = self._step(self._grads, self.state, self.params)
        return self.params


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def has_galore_torch(part):
    """Whether the peer galore-torch is there; says so if not."""
    try:
        galore_peer.load()
    except ImportError as error:
        print(f"  {part}: without galore-torch ({error})")
        return False
    return True


# optax.contrib.muon orthonormalises every momentum in each step: a second and more for sixteen kernels of 1024.
SLOW = ("optax.contrib.muon", "galore-torch")


def refresh(quick, rounds):
    """Milliseconds with and without a refresh, of one kernel."""
    rows = []
    for width, rank in [(64, 8)] if quick else [(512, 32), (1024, 64), (2048, 128)]:
        params, grads = {"kernel": jnp.zeros((width, width))}, {"kernel": normal(0, width, width)}
        never = 10**6
        makers = {
            "optax.contrib.galore": lambda gap, rank=rank: optax.contrib.galore(1e-3, rank, update_proj_gap=gap),
            "subspace_iteration": lambda gap, rank=rank: optim.galore(1e-3, rank, refresh_every=gap),
            "randomized": lambda gap, rank=rank: optim.galore(1e-3, rank, refresh_every=gap, method="randomized"),
            "random": lambda gap, rank=rank: optim.galore(1e-3, rank, refresh_every=gap, method="random"),
        }
        plain = {name: Steps(make(never), params, grads) for name, make in makers.items()}
        renewing = {name: Steps(make(1), params, grads) for name, make in makers.items()}
        if has_galore_torch("refresh"):
            for gap, calls in ((never, plain), (1, renewing)):
                calls["galore-torch"] = galore_peer.Steps(rank, gap, params, grads)
        for step in plain.values():
            timing.wait(step())  # the first step renews in any case
        plain_times = timing.in_turns(plain, rounds)
        # A decomposition of 2048 x 2048 takes half a minute.
        renewing_times = timing.in_turns(renewing, 1 if width > 1024 else min(rounds, 3))
        for name in plain:
            cost = renewing_times[name] - plain_times[name]
            rows.append(
                {
                    "width": width,
                    "rank": rank,
                    "name": name,
                    "plain": plain_times[name],
                    "renewing": renewing_times[name],
                }
                | {"refresh": cost, "over_plain": renewing_times[name] / plain_times[name]}
            )
        base = rows[-len(plain)]["refresh"]
        for row in rows[-len(plain) :]:
            row["faster"] = base / row["refresh"]
            print(
                f"  refresh  {width:>5} rank {rank:<4} {row['name']:<22} plain {1e3 * row['plain']:8.1f} ms  renewing "
                f"{1e3 * row['renewing']:9.1f} ms  {row['over_plain']:6.1f} x plain  {row['faster']:6.1f} x faster",
                flush=True,
            )
    return rows


def steps(quick, rounds):
    """Median and worst of optimizer steps over two periods of refreshes."""
    del rounds
    rows = []
    leaves, period = (4, 4) if quick else (16, 16)
    for width in [64] if quick else [256, 512, 1024]:
        rank = width // 8
        names = [f"kernel{i}" for i in range(leaves)]
        params = {name: jnp.zeros((width, width)) for name in names}
        grads = {name: normal(i, width, width) for i, name in enumerate(names)}
        options = {"refresh_every": period}
        txs = {
            "optax.adamw": optax.adamw(1e-3),
            "optax.contrib.muon": optax.contrib.muon(1e-3),
            "galore": optim.galore(1e-3, rank, **options),
            "galore, all at once": optim.galore(1e-3, rank, staggered=False, **options),
            "fira": optim.fira(1e-3, rank, **options),
            "apollo": optim.apollo(1e-3, rank, **options),
            "online_subspace_descent": optim.online_subspace_descent(1e-3, rank, refresh_every=period),
            "galore, one stack": optim.galore(1e-3, rank, **options),
            "fira, one stack": optim.fira(1e-3, rank, **options),
        }
        stacks = [{"kernel": jnp.stack(list(tree.values()))} for tree in (params, grads)]
        calls = {
            name: functools.partial(Steps, tx, *(stacks if name.endswith("stack") else (params, grads)))
            for name, tx in txs.items()
        }
        if has_galore_torch("steps"):
            calls["galore-torch"] = functools.partial(galore_peer.Steps, rank, period, params, grads)
        for name, make in calls.items():
            step, times = make(), []
            for _ in range(2):
                timing.wait(step())
            # Each step's least time over three passes of two periods: what else the machine does is no spike of ours.
            # What takes seconds is seen for one period.
            slow = name in SLOW and width > 512
            for _ in range(1 if slow else 3):
                one = []
                for _ in range(period if slow else 2 * period):
                    start = time.perf_counter()
                    timing.wait(step())
                    one.append(time.perf_counter() - start)
                times.append(one)
            least = np.min(np.asarray(times), axis=0)
            median, worst = float(np.median(least)), float(np.max(least))
            rows.append({"width": width, "rank": rank, "kernels": leaves, "name": name, "median": median})
            size = step.state_bytes if name == "galore-torch" else bytes_of(step.state)
            rows[-1] |= {"worst": worst, "worst_over_median": worst / median, "state_bytes": size}
            print(
                f"  steps    {width:>5} rank {rank:<4} {name:<24} median {1e3 * median:8.1f} ms  worst / median "
                f"{worst / median:5.2f}  state {rows[-1]['state_bytes'] / 1e6:8.2f} MB",
                flush=True,
            )
    return rows


LORA = {"rank": 8, "alpha": 16.0}


def decoder(width, layers, vocab):
    heads = width // 64
    sizes = {"num_layers": layers, "num_heads": heads, "num_kv_heads": heads, "mlp_size": 4 * width, "head_dim": 64}
    return nn.CausalLMConfig(family="llama", vocab_size=vocab, hidden_size=width, max_length=512, **sizes)


def lora_steps(config, tokens):
    """Train steps of factors by each optimizer, in JAX."""
    params = nn.init_params(jax.random.key(0), config)
    rules = {"attn/q": adapters.LoRA(**LORA), "attn/v": adapters.LoRA(**LORA)}
    trainable = adapters.init(jax.random.key(1), params, rules)
    scale = rules["attn/q"].scale

    def loss(trainable, params):
        logits = nn.causal_lm_apply(config, adapters.bind(params, trainable, rules), tokens[:, :-1]).logits
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    calls, states = {}, {}
    for name, tx in {
        "optax.adamw": optax.adamw(1e-4),
        "adaprelora full": optim.adaprelora(1e-4, scale=scale),
        "adaprelora projected": optim.adaprelora(1e-4, scale=scale, stats="projected"),
        "lora_plus": optim.lora_plus(1e-4),
        "scaled_adamw_lora": optim.scaled_adamw_lora(1e-4),
        "lora_rite": optim.lora_rite(1e-4),
        "lora_pro adamw": optim.lora_pro(1e-4, scale=scale),
    }.items():
        start = adapters.add_gradient_probes(trainable) if name.endswith("full") else trainable

        def step(carry, params, tx=tx):
            factors, state = carry
            grads = jax.grad(loss)(factors, params)
            updates, state = tx.update(grads, state, factors)
            return optax.apply_updates(factors, updates), state

        jitted, box = jax.jit(step), [(start, tx.init(start))]

        def call(jitted=jitted, box=box):
            box[0] = jitted(box[0], params)
            return box[0]

        calls[name], states[name] = call, bytes_of(box[0][1])
    return calls, states


def peft_step(config, tokens):
    """The same by PyTorch, Hugging Face transformers and PEFT."""
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": config.mlp_size}
    heads = {"num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=512))
    settings = peft.LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    inputs, labels = (torch.tensor(np.asarray(x), dtype=torch.long) for x in (tokens[:, :-1], tokens[:, 1:]))

    def call():
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def lora(quick, rounds):
    """Seconds of whole train steps with LoRA."""
    rows = []
    for width, layers in [(64, 2)] if quick else [(256, 4), (512, 4), (768, 4)]:
        config = decoder(width, layers, 128 if quick else 8192)
        length = 16 if quick else 256
        tokens = jnp.asarray(np.random.default_rng(0).integers(config.vocab_size, size=(4, length + 1)), jnp.int32)
        calls, states = lora_steps(config, tokens)
        try:
            calls["PEFT + torch AdamW"] = peft_step(config, tokens)
        except ImportError:
            print("  lora: peft or transformers is not installed, so that there is no peer")
        # Differences are of some percent, and what else a machine does is more: the least is what the work takes.
        seconds = timing.in_turns(calls, 2 * rounds, of=min)
        for name, t in seconds.items():
            rows.append({"width": width, "layers": layers, "tokens": 4 * length, "name": name, "seconds": t})
            rows[-1] |= {"over_adamw": t / seconds["optax.adamw"], "state_bytes": states.get(name)}
            state = "" if name not in states else f"  state {states[name] / 1e3:8.1f} kB"
            print(
                f"  lora     {width:>5} x {layers}  {4 * length} tokens  {name:<22} {1e3 * t:8.1f} ms  "
                f"{rows[-1]['over_adamw']:5.2f} of optax.adamw{state}",
                flush=True,
            )
    return rows


def projected(quick, rounds):
    """Loss of a student of the width of its teacher, of three seeds: after equal steps, and after the time of Adam."""
    del rounds
    count, seeds, width = (20, 1, 32) if quick else (1000, 3, 256)
    rank, period = width // 8, count // 10

    def answer(params, x):
        return jnp.tanh(x @ params["first"]) @ params["second"]

    def loss(params, x, y):
        return jnp.mean(jnp.square(answer(params, x) - y))

    makers = {
        "optax.adamw": lambda rate: optax.adamw(rate, weight_decay=0.0),
        "optax.contrib.galore": lambda rate: optax.contrib.galore(rate, rank, update_proj_gap=period),
        "galore": lambda rate: optim.galore(rate, rank, refresh_every=period),
        "galore, moments rotate": lambda rate: optim.galore(rate, rank, refresh_every=period, moments="rotate"),
        "fira": lambda rate: optim.fira(rate, rank, refresh_every=period),
    }

    def run(make, steps, seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        scale = 1 / np.sqrt(width)
        teacher, student = (
            {
                name: scale * jax.random.normal(k, (width, width))
                for name, k in zip(("first", "second"), ks, strict=True)
            }
            for ks in (jax.random.split(k) for k in keys[:2])
        )
        x = jax.random.normal(keys[2], (4096, width))
        y, tx = answer(teacher, x), make(optax.cosine_decay_schedule(1e-2, steps))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, i):
            rows = (
                jax.lax.dynamic_slice_in_dim(x, i % 32 * 128, 128),
                jax.lax.dynamic_slice_in_dim(y, i % 32 * 128, 128),
            )
            updates, state = tx.update(jax.grad(loss)(params, *rows), state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(student)
        step(*jax.tree.map(jnp.copy, (student, state)), 0)  # compiles
        start = time.perf_counter()
        for i in range(steps):
            student, state = step(student, state, i)
        timing.wait(student)
        return float(loss(student, x, y)), time.perf_counter() - start

    rows, allowed = [], None
    for name, make in makers.items():
        ends, taken = (statistics.median(c) for c in zip(*(run(make, count, s) for s in range(seeds)), strict=True))
        allowed = taken if allowed is None else allowed
        in_time = max(1, round(count * allowed / taken))
        row = {"name": name, "width": width, "rank": rank, "steps": count, "loss": ends, "seconds": taken}
        row["steps_in_time"] = in_time
        row["loss_in_time"] = (
            ends if in_time == count else statistics.median(run(make, in_time, s)[0] for s in range(seeds))
        )
        rows.append(row)
        print(
            f"  projected {width} rank {rank:<4} {name:<24} after {count} steps {ends:8.2e}  {1e3 * taken:7.1f} ms  in "
            f"the time of the first ({in_time} steps) {row['loss_in_time']:8.2e}",
            flush=True,
        )
    return rows


def synthetic(seed):
    """Axis-scaled inputs, and outputs by a rank-4 target of scaled rows: what statistics of rows can see."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2000, 64)) * np.exp(0.8 * rng.standard_normal(64))
    target = rng.standard_normal((48, 4)) @ rng.standard_normal((4, 64)) / 16
    return x, x @ (np.exp(0.8 * rng.standard_normal(48))[:, None] * target).T


def problem(quick, rounds):
    """Final over initial loss, in float64, of three seeds: after equal steps, and after the time of optax's Adam."""
    del rounds
    count, seeds = (20, 1) if quick else (400, 3)
    rules = {"kernel": adapters.LoRA(8, 8.0)}

    def loss(params, x, y):
        kernel = adapters.bind({"kernel": jnp.zeros((64, 48))}, params, rules)["kernel"]
        return jnp.mean(jnp.square(nn.linear(x, kernel) - y))

    def run(tx, key, x, y, picks):
        params = adapters.init(key, {"kernel": jnp.zeros((64, 48))}, rules)
        params = adapters.add_gradient_probes(params)

        def step(carry, rows):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, x[rows], y[rows]), state, params)
            return (optax.apply_updates(params, updates), state), None

        (end, _), _ = jax.lax.scan(step, (params, tx.init(params)), picks)
        return loss(end, x, y) / loss(params, x, y)

    rows = []
    with jax.enable_x64(True):
        data = [tuple(map(jnp.asarray, synthetic(seed))) for seed in range(seeds)]
        makers = {
            "lora_plus, ratio 1 (Adam)": (lambda rate: optim.lora_plus(rate, ratio=1.0), 0.1),
            "lora_plus": (optim.lora_plus, 0.01),
            "scaled_adamw_lora": (optim.scaled_adamw_lora, 0.1),
            "adaprelora full": (optim.adaprelora, 0.1),
            "adaprelora projected": (functools.partial(optim.adaprelora, stats="projected"), 0.1),
        }
        allowed = None
        for name, (make, peak) in makers.items():

            def times_and_losses(steps, make=make, peak=peak):
                rate = optax.cosine_decay_schedule(peak, steps)
                jitted = jax.jit(functools.partial(run, make(lambda step: rate(step.astype(jnp.float64)))))
                ends, taken = [], []
                for seed, (x, y) in enumerate(data):
                    picks = jnp.asarray(np.random.default_rng(100 + seed).integers(2000, size=(steps, 128)))
                    args = jax.random.key(seed), x, y, picks
                    jax.block_until_ready(jitted(*args))
                    start = time.perf_counter()
                    ends.append(float(jitted(*args)))
                    taken.append(time.perf_counter() - start)
                return statistics.median(ends), statistics.median(taken)

            end, taken = times_and_losses(count)
            allowed = taken if allowed is None else allowed
            in_time = max(1, round(count * allowed / taken))
            row = {"name": name, "rate": peak, "steps": count, "loss": end, "seconds": taken, "steps_in_time": in_time}
            row["loss_in_time"] = end if in_time == count else times_and_losses(in_time)[0]
            rows.append(row)
            print(
                f"  problem  {name:<26} after {count} steps {end:8.1e}  {1e3 * taken:7.1f} ms  in the time of the "
                f"first ({in_time} steps) {row['loss_in_time']:8.1e}",
                flush=True,
            )
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, which say nothing about speed")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to run (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file (default: results/optimizers_<device>.json)")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    print(f"{timing.device_name()}, jax {jax.__version__}, optax {optax.__version__}, {args.rounds} rounds")
    name = f"optimizers_{timing.file_label()}{'_quick' if args.quick else ''}.json"
    output = args.output or Path(__file__).parent / "results" / name
    # Parts that are not run again stay.
    report = json.loads(output.read_text()) if output.is_file() and len(args.only) < len(PARTS) else {}
    report |= {"device": timing.device_name(), "jax": jax.__version__, "optax": optax.__version__}
    report["rounds"] = args.rounds
    runs = dict(zip(PARTS, (refresh, steps, lora, projected, problem), strict=True))
    for part in args.only:
        report[part] = runs[part](args.quick, args.rounds)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {output} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
