"""SmolLM2-135M with a fifth of its kernels' storage removed, by all methods at equal bytes.

Calibrated and measured on docstrings of the standard library, of different modules.
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import data, interop, language, nn, train
from subspace_jax.compress import cospadi
from subspace_jax.compress.cospadi.kernels import kernel_of
from subspace_jax.data import text

pytestmark = pytest.mark.slow

FOLDER = pathlib.Path(__file__).parents[2] / "work" / "models" / "smollm2"
RATIO, ROWS, LENGTH = 0.2, 32, 256
ATTENTION = {"mlp/": 0.0}
METHODS = ("cospadi", "svd-llm", "asvd", "svd")


def rows_of(split):
    """Some packed rows, evenly drawn."""
    texts = [text.Completion("", docstring) for docstring in text.docstrings(split=split)]
    rows = text.pack_rows(texts, text.load_tokenizer(FOLDER), LENGTH)
    chosen = np.random.default_rng(0).permutation(len(rows["inputs"]))[:ROWS]
    return {name: column[chosen] for name, column in rows.items()}


@pytest.fixture(scope="module")
def calibrated():
    """The model, and the Gram matrices of all its kernels' inputs."""
    if not FOLDER.is_dir():
        pytest.skip("needs `subspace-jax fetch smollm2`")
    config, params = interop.load_causal_lm(FOLDER, dtype=jnp.float32)
    mesh = train.make_mesh(data=1, fsdp=1)
    units = cospadi.plan_units(config, "cospadi", RATIO)
    names = list(dict.fromkeys(name for unit in units for name in unit.inputs))
    batches = data.eval_batches(rows_of("train"), batch_size=8)
    sums = cospadi.grams_of_model(config, params, names, batches, mesh, progress=False)
    return config, params, sums, mesh


def compressed(calibrated, method, rules):
    """The parameters with compressed kernels, and the bytes of these."""
    config, params, sums, _ = calibrated
    learning = cospadi.Learning(n_iter=1, init="svd")
    made, stored = {}, 0
    for unit in cospadi.plan_units(config, method, RATIO, rules):
        [layer], (part, name) = unit.layers, unit.path.split("/")
        w = np.asarray(params["layers"][part][name]["kernel"][layer])
        found = cospadi.compress_kernels([w], [sums[unit.inputs[0]]], unit.ratio, method, learning).kernels[0]
        stored += found.first.nbytes + found.second.nbytes
        made.setdefault(unit.path, []).append(kernel_of(found))
    layers = {part: dict(inner) for part, inner in params["layers"].items()}
    for path, kernels in made.items():
        part, name = path.split("/")
        kernel = jax.tree.map(lambda *xs: jnp.stack(xs), *kernels)
        layers[part][name] = {**layers[part][name], "kernel": kernel}
    return {**params, "layers": layers}, stored


def measured(calibrated, params):
    """Perplexity, and accuracy of the next token."""
    config, _, _, mesh = calibrated
    task = language.CausalLMTask(config, axes=nn.factored_axes(params, nn.param_axes(config)), loss_chunk=64)
    score = train.jit_on_mesh(
        lambda params, batch: task.evaluate(params, {}, batch, key=jax.random.key(0)),
        mesh,
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )
    sums = [
        score(params, train.to_device(batch, train.batch_sharding(mesh)))
        for batch in data.eval_batches(rows_of("validation"), batch_size=8)
    ]
    loss, hits, count = (sum(float(s[name]) for s in sums) for name in ("loss", "accuracy", "count"))
    return math.exp(loss / count), hits / count


def compared(calibrated, rules, record_property, prefix):
    """Checks the order of the methods at equal bytes."""
    perplexity, stored = {}, {}
    perplexity["dense"], accuracy = measured(calibrated, calibrated[1])
    record_property(f"{prefix}_dense_perplexity", perplexity["dense"])
    record_property(f"{prefix}_dense_accuracy", accuracy)
    for method in METHODS:
        params, stored[method] = compressed(calibrated, method, rules)
        perplexity[method], accuracy = measured(calibrated, params)
        print(f"{prefix} {method}: {perplexity[method]:.3f}, {accuracy:.4f}, {stored[method]:,} bytes", flush=True)
        record_property(f"{prefix}_{method}_perplexity", perplexity[method])
        record_property(f"{prefix}_{method}_accuracy", accuracy)
    record_property(f"{prefix}_share", perplexity["cospadi"] / perplexity["svd-llm"])
    assert max(stored.values()) < 1.01 * min(stored.values())
    assert perplexity["dense"] < perplexity["cospadi"] <= perplexity["svd-llm"] <= perplexity["svd"]


def test_attention_of_smollm2_at_equal_bytes_is_best_by_cospadi_then_svd_llm_then_svd(calibrated, record_property):
    compared(calibrated, ATTENTION, record_property, "attention")


def test_smollm2_at_equal_bytes_is_best_by_cospadi_then_svd_llm_then_svd(calibrated, record_property):
    compared(calibrated, {}, record_property, "all")
