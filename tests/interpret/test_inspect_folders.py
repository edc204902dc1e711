"""The inspection of folders and adapters: planted edits, what PEFT computes, the report, and bad input."""

import json
import pathlib
import re
import shutil
import subprocess

import jax
import ml_dtypes
import numpy as np
import pytest

from subspace_jax import adapters, interop
from subspace_jax.cli.main import main
from subspace_jax.interop.tensors import at, to_stored
from subspace_jax.interpret import inspector
from subspace_jax.interpret.inspector import changes, folders, matrix, svg

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
KINDS = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.up_proj": (48, 32)}
NAMES = [f"model.layers.{layer}.{kind}.weight" for layer in range(2) for kind in KINDS]


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights(dtype=np.float32):
    tensors = {name: 0.02 * gaussian(i, *KINDS[name[15:-7]]) for i, name in enumerate(NAMES)}
    tensors["model.embed_tokens.weight"] = 0.02 * gaussian(90, 48, 32)
    tensors["model.layers.0.input_layernorm.weight"] = np.ones(32, np.float32)
    return {name: x.astype(dtype) for name, x in tensors.items()}


def edited(tensors, ranks, scale=0.01, seed=1):
    """The tensors with updates of these ranks, by name."""
    made = dict(tensors)
    for i, (name, rank) in enumerate(ranks.items()):
        w = tensors[name]
        delta = gaussian((seed, i), w.shape[0], rank) @ gaussian((seed, i, 1), rank, w.shape[1])
        made[name] = (w.astype(np.float32) + scale * delta).astype(w.dtype)
    return made


@pytest.fixture
def write(tmp_path):
    """Writes the weights of a folder."""

    def write(name, tensors):
        folder = tmp_path / name
        folder.mkdir()
        shapes = {key: (x.shape, x.dtype) for key, x in tensors.items()}
        interop.write_safetensors(folder / "model.safetensors", shapes, tensors.values())
        return str(folder)

    return write


@pytest.fixture
def write_adapter(tmp_path):
    """Writes a PEFT folder."""

    def write(name, tensors, **fields):
        folder = tmp_path / name
        folder.mkdir()
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], **fields}
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        tensors = {f"base_model.model.{key}": np.ascontiguousarray(x) for key, x in tensors.items()}
        shapes = {key: (x.shape, x.dtype) for key, x in tensors.items()}
        interop.write_safetensors(folder / "adapter_model.safetensors", shapes, tensors.values())
        return str(folder)

    return write


def factors(module, out, n, rank=2, seed=0):
    a, b = 0.1 * gaussian((seed, 1), rank, n), 0.1 * gaussian((seed, 2), out, rank)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_inspect_updates_finds_planted_edits_at_their_ranks_and_nothing_else(write, dtype):
    ranks = dict(zip(NAMES, (1, 2, 4, 3, 8, 5), strict=True))
    base = weights(dtype)
    found = inspector.inspect_updates(write("base", base), [write("tuned", edited(base, ranks))])
    by_name = {change.weight: change for change in found.changes[0]}
    assert {name: change.spectrum.rank for name, change in by_name.items() if change.spectrum} == ranks
    assert set(by_name) == set(base)
    for name, change in by_name.items():
        assert (change.relative_norm > 0) == (name in ranks)
    q = by_name[NAMES[0]]
    assert (q.group, q.layer, q.kind, q.shape) == ("model.layers", 0, "self_attn.q_proj", (32, 32))
    assert len(q.left.angles) == 1
    assert q.left.random == 16 / 32
    assert q.spectrum.kept[1] > 0.99


def test_inspect_updates_tells_no_rank_where_a_change_is_rounding_alone(write):
    base = weights()
    tuned = {name: x.astype(ml_dtypes.bfloat16) for name, x in base.items()}
    (found,) = inspector.inspect_updates(write("base", base), [write("tuned", tuned)]).changes
    spectra = [change.spectrum for change in found if change.spectrum]
    assert [s.rank for s in spectra] == [0] * 7
    # The floor is of the size of what it bounds.
    assert all(0.5 * s.floor < s.singular_values[0] for s in spectra)
    assert all(change.intruders is None for change in found)


def test_inspect_updates_says_that_nothing_changed(write):
    tensors = weights()
    found = inspector.inspect_updates(write("base", tensors), [write("tuned", tensors)])
    assert all(change.relative_norm == 0 and change.spectrum is None for change in found.changes[0])
    text = inspector.to_text(found)
    assert text == "tuned: Nothing changed: all 8 weights equal those of the base."
    assert "Nothing changed" in inspector.to_html(found)


def test_inspect_updates_of_several_compares_their_directions(write):
    base = weights()
    first = edited(base, dict.fromkeys(NAMES[:3], 2))
    twice = {name: (base[name] + 2 * (x - base[name])) for name, x in first.items()}
    other = edited(base, dict.fromkeys(NAMES[:2], 4), seed=5)
    sources = [write("first", first), write("twice", twice), write("other", other)]
    found = inspector.inspect_updates(write("base", base), sources)
    assert found.labels == ["first", "twice", "other"]
    overlap, random, count = found.overlaps
    np.testing.assert_allclose(overlap[:2, :2], 1, atol=1e-3)
    np.testing.assert_allclose(overlap, overlap.T, atol=1e-6)
    assert count.tolist() == [[3, 3, 2], [3, 3, 2], [2, 2, 2]]
    # Four directions of q [32, 32] and of k [16, 32].
    assert random[0, 2] == pytest.approx((4 / 32 + (4 / 16 + 4 / 32) / 2) / 2)
    assert overlap[0, 2] < 3 * random[0, 2]
    assert "Overlap of leading directions" in inspector.to_html(found)


def test_inspect_updates_takes_the_factors_of_an_adapter_and_agrees_with_the_merged_folder(write, write_adapter):
    base = weights()
    q, up = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
    tensors = {**factors(q, 32, 32), **factors(up, 48, 32, seed=3)}
    merged = dict(base)
    for module in (q, up):
        delta = 2 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        merged[f"{module}.weight"] = base[f"{module}.weight"] + delta
    sources = [write_adapter("lora", tensors), write("merged", merged)]
    lora, whole = inspector.inspect_updates(write("base", base), sources).changes
    whole = [change for change in whole if change.relative_norm > 0]
    assert [change.weight for change in lora] == [change.weight for change in whole] == [f"{q}.weight", f"{up}.weight"]
    for one, two in zip(lora, whole, strict=True):
        assert one.spectrum.rank == two.spectrum.rank == 2
        assert len(one.spectrum.singular_values) == 2
        np.testing.assert_allclose(one.spectrum.singular_values, two.spectrum.singular_values[:2], rtol=1e-4)
        assert one.relative_norm == pytest.approx(two.relative_norm, rel=1e-4)
        np.testing.assert_allclose(one.left.angles, two.left.angles, atol=0.1)
        np.testing.assert_allclose(one.intruders.high, two.intruders.high, atol=1e-3)


def test_inspect_updates_of_blocks_of_rows_gives_the_same(write, write_adapter, monkeypatch):
    base = weights()
    sources = [write("tuned", edited(base, {NAMES[2]: 3}))]
    sources.append(write_adapter("lora", factors("model.layers.0.mlp.up_proj", 48, 32)))
    folder = write("base", base)
    whole = inspector.inspect_updates(folder, sources)
    monkeypatch.setattr(matrix, "_HELD", 0)
    monkeypatch.setattr(matrix, "_BLOCK", 20 * 32)
    monkeypatch.setattr(changes, "_SCANNED", 7 * 32)
    for one, two in zip(whole.changes, inspector.inspect_updates(folder, sources).changes, strict=True):
        one, two = ([change for change in own if change.spectrum] for own in (one, two))
        assert one[0].relative_norm == pytest.approx(two[0].relative_norm, rel=1e-5)
        assert one[0].spectrum.rank == two[0].spectrum.rank
        np.testing.assert_allclose(one[0].spectrum.floor, two[0].spectrum.floor, rtol=1e-4)
        np.testing.assert_allclose(one[0].intruders.high, two[0].intruders.high, atol=1e-3)


QUICK = ("gpt2/rslora", "llama/dora", "llama/lora_embed")
ADAPTERS = sorted("/".join(p.parent.parts[-2:]) for p in (GOLDEN / "peft").glob("*/*/adapter_config.json"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ADAPTERS]
)
def test_open_updates_reads_of_an_adapter_the_weights_that_the_library_merges(name):
    base = GOLDEN / "interop" / name.split("/")[0]
    (update,) = folders.open_updates(folders.open_base(base), [str(GOLDEN / "peft" / name)])
    config, params = interop.load_causal_lm(base, dtype=np.float32)
    adapter = interop.load_peft_adapter(GOLDEN / "peft" / name, config, untie=True)
    if adapter.config != config:
        params = {**params, "head": {"kernel": params["embed"]["embedding"].T}}
    with jax.numpy_dtype_promotion("standard"):
        merged = adapters.merge(params, adapter.trainable, adapter.settings)
    own = {folders._plain(key): change for key, change in update.changes.items()}
    stored = {folders._plain(key): tensor for key, tensor in interop.open_folder(base).items()}
    changed_names = set()
    for tensor in interop.tensor_names(adapter.config):
        value = at(merged, tensor.place.path)
        value = to_stored(tensor, np.asarray(value if tensor.place.layer is None else value[tensor.place.layer]))
        plain = folders._plain(tensor.name)
        # The head of a tied model has no tensor of its own.
        if plain in stored and np.any(value != np.asarray(stored[plain].read())):
            changed_names.add(plain)
            found = own[plain].tuned_rows(0, own[plain].shape[0])
            np.testing.assert_allclose(found, value.reshape(found.shape), atol=2e-6, err_msg=tensor.name)
    assert changed_names
    assert changed_names == own.keys() or adapter.config != config


def test_shown_numbers_keep_two_digits_or_more():
    assert [svg.shown(x) for x in (0.00098, 0.00109, 0.5, 3.0, 123456.7, np.nan)] == [
        "9.8e-04", "0.00109", "0.5", "3", "1.2e+05", "–"
    ]  # fmt: skip


def test_inspect_writes_a_page_with_its_numbers_beside_it(write, tmp_path, capsys):
    base = weights()
    arguments = [write("base", base), write("tuned", edited(base, {NAMES[0]: 2, NAMES[3]: 1})), "--quiet"]
    assert main(["inspect", *arguments, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "tuned: 2 of 8 weights differ from the base" in shown
    assert "from 1 to 2" in shown
    assert f"Wrote to {tmp_path / 'out'}" in shown
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    (update,) = found["updates"]
    ranks = {weight["weight"]: weight["spectrum"]["rank"] for weight in update["weights"] if weight["spectrum"]}
    assert ranks == {NAMES[0]: 2, NAMES[3]: 1}
    assert main(["inspect", *arguments, "--out", str(tmp_path / "some" / "page.html")]) == 0
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["page.html", "page.json"]
    page = (tmp_path / "some" / "page.html").read_text()
    assert "<script" not in page
    # A page of its own: the name of SVG's namespace is the only address.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_of_inspect_opens_in_chromium_and_shows_its_pictures(write, tmp_path):
    from PIL import Image

    base = weights()
    sources = [write(name, edited(base, dict.fromkeys(NAMES, rank))) for name, rank in (("a", 1), ("b", 4))]
    found = inspector.inspect_updates(write("base", base), sources)
    page = tmp_path / "page.html"
    inspector.write_report(found, page, tmp_path / "page.json")

    def browse(*options):
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", *options]
        ended = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr[-2000:]
        # What a page logs and what it can't load come as CONSOLE.
        assert "CONSOLE" not in ended.stderr
        return ended.stdout

    dom = browse("--enable-logging=stderr", "--v=0", "--dump-dom")
    # Six heat maps and a chart for each update, and two of overlaps.
    assert dom.count("<svg") == dom.count("</svg>") == 16
    assert "<h2>What the numbers are</h2>" in dom
    browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,1400")
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    # The dark blue of a heat map's largest values, the colour of the last curve, and paper.
    for colour, least in (((30, 50, 140), 1000), ((44, 160, 44), 100), ((255, 255, 255), 100_000)):
        assert np.sum(np.abs(pixels - colour).sum(1) < 12) > least


def changed(change):
    """Weights with something changed."""
    tensors = weights()
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.pop(NAMES[0]), f"tuned: expected the weights of the base; missing: {NAMES[0]}"),
        (lambda t: t.update(extra=gaussian(0, 2, 3)), "not in the base: extra"),
        (
            lambda t: t.update({NAMES[1]: gaussian(0, 8, 32)}),
            rf"of another shape: {NAMES[1]} \[16, 32\] -> \[8, 32\]",
        ),
        (
            lambda t: t.update({NAMES[1]: np.full((16, 32), np.nan, np.float32)}),
            rf"model.safetensors: {NAMES[1]}: expected finite weights, got nan at \[0, 0\]",
        ),
    ],
)
def test_inspect_refuses_another_architecture_and_nan_and_writes_no_report(write, tmp_path, capsys, change, error):
    base, tuned = write("base", weights()), write("tuned", changed(change))
    assert main(["inspect", base, tuned, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert re.search(error, capsys.readouterr().err)
    assert not list((tmp_path / "out").iterdir())


def test_open_updates_labels_each_by_the_shortest_end_of_its_path_that_differs(write, write_adapter, tmp_path):
    base = folders.open_base(write("base", weights()))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    tensors = factors("model.layers.0.mlp.up_proj", 48, 32)
    sources = [write_adapter(name, tensors) for name in ("one/adapter", "two/adapter")]
    updates = folders.open_updates(base, sources)
    assert [(update.label, update.source) for update in updates] == [
        ("one/adapter", sources[0]),
        ("two/adapter", sources[1]),
    ]
    assert folders.open_updates(base, sources[:1])[0].label == "adapter"


def test_open_updates_passes_over_buffers_copies_of_a_tied_table_and_prefixes_of_gpt2(write):
    base = {"h.0.attn.c_proj.weight": gaussian(0, 4, 4), "wte.weight": gaussian(1, 5, 4)}
    tuned = {f"transformer.{name}": x for name, x in base.items()}
    tuned["lm_head.weight"] = base["wte.weight"]
    tuned["transformer.h.0.attn.bias"] = np.ones((1, 4), bool)
    opened = folders.open_base(write("base", base))
    (update,) = folders.open_updates(opened, [write("tuned", tuned)])
    assert set(update.changes) == set(base)


@pytest.mark.parametrize(
    ("tensors", "fields", "error"),
    [
        (factors("model.layers.7.self_attn.q_proj", 32, 32), {}, "the base has no weights for model.layers.7"),
        (
            factors("model.layers.0.self_attn.q_proj", 32, 40),
            {},
            r"expected factors of rank 2 for the base's .*q_proj.weight \[32, 32\], got \[2, 40\] and \[32, 2\]",
        ),
        (factors("model.layers.0.self_attn.q_proj", 32, 32), {"r": 3}, "expected factors of rank 3"),
        ({"model.layers.0.mlp.up_proj.lora_A.weight": gaussian(0, 2, 32)}, {}, "has no lora_B.weight"),
        ({"model.layers.0.mlp.up_proj.rotation": gaussian(0, 2, 32)}, {}, "no part of LoRA or DoRA"),
        ({"model.layers.0.mlp.up_proj.weight": gaussian(0, 2, 32)}, {}, r"expected the shape of the base's"),
        (
            {
                **factors("model.layers.0.mlp.up_proj", 48, 32),
                "model.layers.0.mlp.up_proj.lora_magnitude_vector": np.ones(32, np.float32),
            },
            {"use_dora": True},
            "expected 48 norms, got 32",
        ),
        (
            {name: x * np.nan for name, x in factors("model.layers.0.mlp.up_proj", 48, 32).items()},
            {},
            "expected finite factors, got NaN",
        ),
        (factors("model.layers.0.mlp.up_proj", 48, 32), {"peft_type": "IA3"}, "adapter_config.json: peft_type"),
    ],
)
def test_open_updates_refuses_an_adapter_that_does_not_fit(write, write_adapter, tensors, fields, error):
    base = folders.open_base(write("base", weights()))
    with pytest.raises(ValueError, match=error):
        folders.open_updates(base, [write_adapter("adapter", tensors, **fields)])


def test_inspect_says_which_folder_or_file_is_missing_or_wrong(write, write_adapter, tmp_path, capsys):
    base = write("base", weights())
    adapter = write_adapter("adapter", factors("model.layers.0.mlp.up_proj", 48, 32))
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    shutil.copy(pathlib.Path(adapter) / "adapter_config.json", tmp_path / "half")
    (tmp_path / "file").write_text("")

    def error(*arguments, out="out"):
        assert main(["inspect", *map(str, arguments), "--out", str(tmp_path / out), "--quiet"]) == 2
        return capsys.readouterr().err

    assert "TUNED, --adapter: expected the folder" in error(base)
    assert f"TUNED: there is no {tmp_path}/nowhere" in error(base, tmp_path / "nowhere")
    assert "BASE: there is no work/models/none" in error("work/models/none", base)
    assert f"TUNED: there is nothing in {tmp_path}/empty" in error(base, tmp_path / "empty")
    assert "empty: has no adapter_config.json" in error(base, "--adapter", tmp_path / "empty")
    assert "half: has no adapter_model.safetensors" in error(base, "--adapter", tmp_path / "half")
    assert "adapter: is an adapter; expected the folder of a model" in error(adapter, base)
    assert "expected each update once" in error(base, adapter, "--adapter", adapter)
    assert "top: expected at least 1, got 0" in error(base, adapter, "--top", "0")
    assert "threshold: expected a cosine in (0, 1], got 2.0" in error(base, adapter, "--threshold", "2")
    assert "--out: expected a folder or a file NAME.html" in error(base, adapter, out="file")
