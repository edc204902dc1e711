"""Compares merges of four adapters with PEFT's ``add_weighted_adapter``, then times both, in one run.

    python scripts/bench/merge_adapters.py           # widths 128, 256 and 512, some minutes on two cores
    python scripts/bench/merge_adapters.py --quick   # a small one, to see that all runs

Two layers of a Llama of random weights with LoRA of rank 16 on all linear layers.  Both sides merge four adapters in
memory to rank 16: PEFT by ``combination_type="svd"``, which forms each update and takes its full SVD; and both to the
sum of the ranks, PEFT by "cat".  Results are first compared.  All is float32.

  ms      a merge; medians over rounds in which the sides take turns: read the ratio
  ratio   time of PEFT divided by that of subspace_jax
  peak    most resident memory of a process of its own that merges to rank 16, over that when the adapters were read, in
          multiples of the adapters' bytes; compiling is included
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import timing

from subspace_jax import adapters, interop, nn
from subspace_jax.adapters.rules import adapters_of
from subspace_jax.merge.adapters import Adapter, AdapterMerge, merge_adapters

WIDTHS = (128, 256, 512)
WEIGHTS = (0.5, -0.3, 0.4, 0.4)
RANK = 16
ALLOWED = 1e-3  # singular vectors of dense float32 matrices by another library


def write(folder, width):
    """Writes a model and the adapters; returns the bytes of these."""
    import torch
    import transformers

    heads = max(1, width // 64)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=64,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    model = interop.read_config(folder / "base")
    rules = {"layers/*/*": adapters.LoRA(RANK, 2.0 * RANK)}
    start = adapters.init(jax.random.key(0), nn.init_params(jax.random.key(1), model), rules)
    for i in range(len(WEIGHTS)):
        rng = np.random.default_rng(i)
        moved = jax.tree.map(lambda x, rng=rng: 0.05 * rng.standard_normal(x.shape, np.float32), start)
        interop.save_peft_adapter(folder / str(i), model, moved, rules, base_model=str(folder / "base"))
    return len(WEIGHTS) * sum(x.nbytes for x in jax.tree.leaves(start))


def ours(folder):
    config = interop.read_config(folder / "base")
    found = [interop.load_peft_adapter(folder / str(i), config) for i in range(len(WEIGHTS))]
    own = [Adapter(one.trainable, one.settings) for one in found]
    shapes = nn.param_shapes(config)

    def merge(rank):
        merged = merge_adapters(shapes, own, WEIGHTS, AdapterMerge(rank=rank))
        return jax.block_until_ready(merged.trainable)

    return merge


def theirs(folder):
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / "0", adapter_name="0")
    for i in range(1, len(WEIGHTS)):
        model.load_adapter(folder / str(i), adapter_name=str(i))
    names = [str(i) for i in range(len(WEIGHTS))]

    def merge(rank):
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        how = {"combination_type": "cat"} if rank > RANK else {"combination_type": "svd", "svd_rank": rank}
        model.add_weighted_adapter(names, list(WEIGHTS), "merged", **how)
        return model

    return merge


SIDES = {"subspace_jax": ours, "peft": theirs}


def error_between(mine, peers):
    """The largest relative difference of an update."""
    modules, worst = dict(peers.base_model.model.named_modules()), 0.0
    names = {"attn/q": "self_attn.q_proj", "mlp/down": "mlp.down_proj", "mlp/up": "mlp.up_proj"}
    for path, arrays in adapters_of(mine).items():
        if (module := names.get(path.removeprefix("layers/").removesuffix("/kernel"))) is None:
            continue
        for i in range(arrays["a"].shape[0]):
            wanted = modules[f"model.layers.{i}.{module}"].get_delta_weight("merged").detach().numpy().T
            got = np.asarray(arrays["a"][i]) @ np.asarray(arrays["b"][i])
            worst = max(worst, float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)))
    return worst


def resident():
    """Most resident memory of this process alone, in bytes."""
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def worker(side, folder):
    merge = SIDES[side](pathlib.Path(folder))
    before = resident()
    merge(RANK)
    print(resident() - before)


def peak_of(side, folder):
    command = [sys.executable, __file__, "--worker", side, str(folder)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small width, which says nothing about speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=pathlib.Path, help="JSON file (default: results/merge_adapters_cpu.json)")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(*args.worker)
        return
    rows = []
    for width in (64,) if args.quick else WIDTHS:
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            size = write(folder, width)
            sides = {name: make(folder) for name, make in SIDES.items()}
            peaks = {name: peak_of(name, folder) / size for name in SIDES}
            for rank in (RANK, RANK * len(WEIGHTS)):
                error = error_between(*(merge(rank) for merge in sides.values()))
                if not error <= ALLOWED:
                    raise SystemExit(f"the sides differ by {error:.1e} at width {width} and rank {rank}")
                calls = {name: lambda merge=merge, rank=rank: merge(rank) for name, merge in sides.items()}
                seconds = timing.in_turns(calls, args.rounds)
                row = {"width": width, "rank": rank, "seconds": seconds, "error": error}
                row |= {"ratio": seconds["peft"] / seconds["subspace_jax"], "peak_over_adapters": peaks}
                rows.append(row)
                print(
                    f"{width:>5}  rank {rank:<3}  {1e3 * seconds['subspace_jax']:8.0f} ms  ratio {row['ratio']:6.2f}  "
                    f"peak {peaks['subspace_jax']:5.1f}, of PEFT {peaks['peft']:5.1f}  error {error:.1e}",
                    flush=True,
                )
    file = args.output or pathlib.Path(__file__).parent / "results" / f"merge_adapters_{jax.devices()[0].platform}.json"
    if not args.quick or args.output:
        file.write_text(json.dumps({"weights": WEIGHTS, "rows": rows}, indent=2) + "\n")
        print(f"Wrote {file}")


if __name__ == "__main__":
    main()
