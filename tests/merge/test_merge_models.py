"""The command that merges folders: what it writes is what the rules make of the parameters."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from subspace_jax import interop
from subspace_jax.cli.main import main
from subspace_jax.merge import subspace_fusion as fusion
from subspace_jax.merge.subspace_fusion import folders as merging
from subspace_jax.merge.subspace_fusion.settings import MergeSettings
from subspace_jax.merge.subspace_fusion.thresholds import Thresholds

from ..variants import rest_slow

SHAPES = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.up.weight": (6, 4),
    "model.layers.1.up.weight": (6, 4),
    "model.norm.weight": (4,),
}
BF16 = np.dtype(ml_dtypes.bfloat16)


def tensors_of(seed):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    tensors["model.layers.1.up.weight"] = tensors["model.layers.1.up.weight"].astype(BF16)
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"], "steps": np.array([seed])}


def write(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    interop.write_safetensors(folder / "model.safetensors", shapes, tensors.values())
    (folder / "config.json").write_text(json.dumps({"folder": folder.name}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def made(tmp_path):
    """The folders of a base and two models."""
    return {name: write(tmp_path / name, tensors_of(i)) for i, name in enumerate(("base", "a", "b"))}


def call(made, tmp_path, *more, base=True):
    own = ("--base", str(made["base"])) if base else ()
    models = ("--models", str(made["a"]), str(made["b"]))
    return main(["merge-models", "--quiet", *own, *models, "--out", str(tmp_path / "out"), *more])


def read(folder):
    return {name: np.array(x.read()) for name, x in interop.open_folder(folder).items()}


def trees():
    """The parameters of the folders, each weight once."""
    kept = [*SHAPES, "steps"]
    return [{name: jnp.asarray(tensors_of(i)[name]) for name in kept} for i in range(3)]


def expected(method):
    base, *models = trees()
    taus = fusion.task_vectors(base, models)
    if method == "average":
        return fusion.average(models) | {"steps": base["steps"]}
    if method == "task-arithmetic":
        return fusion.apply_task_vectors(base, taus, jnp.asarray([0.4, -0.2]))
    return fusion.apply_task_vectors(base, [fusion.ties_merge(taus, 0.5, "mean")], 0.7)


@pytest.mark.parametrize(
    ("method", "more"),
    rest_slow(
        [
            ("ties", ["--lam", "0.7", "--keep", "0.5", "--combine", "mean"]),
            ("task-arithmetic", ["--lam", "0.4", "-0.2"]),
            ("average", []),
        ]
    ),
)
def test_merge_models_writes_what_the_rule_makes_of_the_parameters(made, tmp_path, capsys, monkeypatch, method, more):
    monkeypatch.setattr(merging, "PIECE", 16)  # several pieces of a tensor
    assert call(made, tmp_path, "--method", method, *more) == 0
    got, want = read(tmp_path / "out"), expected(method)
    np.testing.assert_array_equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    for name, x in want.items():
        assert got[name].dtype == tensors_of(0)[name].dtype
        np.testing.assert_allclose(got[name].astype(np.float32), np.asarray(x, np.float32), atol=1e-6, rtol=1e-2)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"folder": "base"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "merge.png").read_bytes().startswith(b"\x89PNG")
    assert f"Wrote the model to {tmp_path / 'out'}" in capsys.readouterr().out


def test_merge_models_reports_norms_cosines_and_conflicts_of_task_vectors(made, tmp_path):
    assert call(made, tmp_path) == 0
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    base, *models = trees()
    taus = fusion.task_vectors(base, models)
    one, two = (np.concatenate([np.asarray(x, np.float32).reshape(-1) for x in jax.tree.leaves(tau)]) for tau in taus)
    np.testing.assert_allclose(
        report["cosines"][0][1], one @ two / np.linalg.norm(one) / np.linalg.norm(two), rtol=1e-4
    )
    np.testing.assert_allclose(report["conflicts"], np.mean(one * two < 0), rtol=1e-5)
    found = report["tensors"]["model.norm.weight"]
    want = [np.linalg.norm(tau["model.norm.weight"]) for tau in taus]
    np.testing.assert_allclose(found["task_vector_norms"], want, rtol=1e-5)


def test_merge_models_averages_without_a_base_with_the_files_of_the_first_model(made, tmp_path):
    assert call(made, tmp_path, base=False) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"folder": "a"}
    assert read(tmp_path / "out")["steps"] == 1
    assert not (tmp_path / "out" / "merge.png").exists()


@pytest.mark.slow
def test_merge_folders_weighs_by_fisher_information_as_fisher_merge(made, tmp_path):
    fishers = []
    for i in range(2):
        values = {name: np.abs(x).astype(np.float32) for name, x in tensors_of(10 + i).items() if name in SHAPES}
        fishers.append(values)
        write(tmp_path / f"f{i}", values)
    merging.merge_folders(
        [made["a"], made["b"]],
        tmp_path / "out",
        MergeSettings("fisher"),
        fishers=[tmp_path / "f0", tmp_path / "f1"],
    )
    models = [{name: x for name, x in tree.items() if name in SHAPES} for tree in trees()[1:]]
    want, got = fusion.fisher_merge(models, jax.tree.map(jnp.asarray, fishers)), read(tmp_path / "out")
    for name, x in want.items():
        np.testing.assert_allclose(got[name].astype(np.float32), np.asarray(x, np.float32), atol=1e-6, rtol=1e-2)


def test_thresholds_of_pieces_are_order_statistics_and_count_signs():
    vectors = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32)
    vectors[1, :200] = 0.25  # many equal ones
    found = Thresholds(3)
    for look in (found.count_high, found.count_low, found.count_signs):
        for part in np.split(vectors, 5, axis=1):
            look(part)
        found.narrow(410)
    assert found.values == tuple(np.sort(np.abs(vectors), axis=1)[:, 409].tolist())
    kept = np.where(np.abs(vectors) >= np.array(found.values)[:, None], vectors, 0)
    assert found.majority == np.sign(np.sign(kept.sum(axis=0)).sum())


def change(name, **tensors):
    return name, lambda old: {k: x for k, x in (old | tensors).items() if x is not None}


@pytest.mark.parametrize(
    ("error", "changed"),
    [
        (
            r"--models: .*b: expected the tensors of .*base; missing: .'model.norm.weight'.; unexpected: .'other'",
            change("b", **{"model.norm.weight": None, "other": np.ones(2)}),
        ),
        (
            r"--models: .*a: model.norm.weight: expected shape \(4,\) as in .*base, got \(5,\); steps: expected shape",
            change("a", **{"model.norm.weight": np.ones(5, np.float32), "steps": np.ones((2, 2), np.int64)}),
        ),
        (
            "--models: .*b: model.norm.weight: expected finite numbers",
            change("b", **{"model.norm.weight": np.array([1, np.nan, 1, 1], np.float32)}),
        ),
        (
            "--base: .*base: model.norm.weight: expected finite numbers",
            change("base", **{"model.norm.weight": np.array([1, np.inf, 1, 1], np.float32)}),
        ),
    ],
)
def test_merge_models_refuses_folders_that_can_not_serve(made, tmp_path, capsys, error, changed):
    name, new = changed
    write(made[name], new(tensors_of(("base", "a", "b").index(name))))
    assert call(made, tmp_path) == 2
    message = capsys.readouterr().err
    assert re.search(error, message), message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "base"]


@pytest.mark.parametrize(
    ("error", "more"),
    [
        (
            "--lam: expected a finite number, or 2, one for each",
            ["--method", "task-arithmetic", "--lam", "1", "2", "3"],
        ),
        ("--lam: expected a finite number, got 1.0 2.0", ["--method", "ties", "--lam", "1", "2"]),
        ("--lam: expected a finite number", ["--method", "ties", "--lam", "nan"]),
        ("keep: expected a share", ["--method", "ties", "--keep", "0"]),
        ("no such folder", ["--models", "{out}/nowhere"]),
        ("--out: expected another folder than that of --models", ["--out", "{out}/a"]),
        ("--data: is for --method regmean and fisher", ["--data", "docstrings"]),
        ("--data: expected a text for all models", ["--method", "fisher"]),
        ("--data: expected a text for all models, or one for each of 2, got ()", ["--method", "regmean"]),
        ("alpha: expected a factor in [0, 1], got 1.5", ["--method", "regmean", "--alpha", "1.5"]),
        ("damping: expected at least 0, got nan", ["--method", "regmean", "--damping", "nan"]),
        # Before the models are run on the text.
        (
            "--out: expected another folder than that of --models",
            ["--method", "regmean", "--data", "{out}/nothing.txt", "--out", "{out}/a"],
        ),
        ("--batches: expected at least 1", ["--method", "fisher", "--data", "docstrings", "--batches", "0"]),
    ],
)
def test_merge_models_refuses_arguments_that_can_not_serve(made, tmp_path, capsys, error, more):
    assert call(made, tmp_path, *(text.format(out=tmp_path) for text in more)) == 2
    assert error in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "base"]


def test_merge_models_refuses_adapters_and_what_is_there_already(made, tmp_path, capsys):
    out = tmp_path / "out"
    out.write_text("")
    assert call(made, tmp_path) == 2
    assert "exists and is not a folder" in capsys.readouterr().err
    out.unlink()
    out.mkdir()
    (out / "config.json").write_text("other")
    assert call(made, tmp_path) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert (out / "config.json").read_text() == "other"
    (made["b"] / "adapter_config.json").write_text("{}")
    assert call(made, tmp_path, "--out", str(tmp_path / "new")) == 2
    assert re.search("b: is an adapter; merge it into its model by `subspace-jax merge` first", capsys.readouterr().err)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_merge_models_needs_a_base_for_task_vectors(made, tmp_path, capsys, method):
    assert call(made, tmp_path, "--method", method, base=False) == 2
    assert "--base: expected the model that all were fine-tuned from" in capsys.readouterr().err


def ties_of_numpy(base, models, keep, lam):
    """TIES by its definition, on one vector of all entries."""
    taus = np.stack([model - base for model in models])
    rank = base.size - int(keep * base.size)
    lows = np.partition(np.abs(taus), rank - 1, axis=1)[:, rank - 1]
    kept = np.where(np.abs(taus) >= lows[:, None], taus, 0)
    signs = np.sign(kept.sum(axis=0))
    signs = np.where(signs == 0, np.sign(signs.sum()), signs)
    agreeing = np.where(np.where(signs > 0, kept > 0, kept < 0), kept, 0)
    return base + np.float32(lam) * agreeing.sum(axis=0), lows


@pytest.mark.slow
def test_merge_models_by_ties_of_tensors_of_smollm2_is_that_of_numpy(tmp_path, capsys):
    folder = pathlib.Path("work/models/smollm2")
    if not (folder / "config.json").exists():
        pytest.skip("subspace-jax fetch smollm2 writes the model")
    stored, rng = interop.open_folder(folder), np.random.default_rng(0)
    names = [f"model.layers.{i}.{name}.weight" for i in (0, 29) for name in ("self_attn.q_proj", "mlp.down_proj")]
    base = {name: np.array(stored[name].read(), np.float32) for name in names}
    # Changes of low rank, as adapters leave them, which differ in size by layer.
    models = [
        {
            name: x
            + 0.01 * (rng.standard_normal((x.shape[0], 2)) @ rng.standard_normal((2, x.shape[1]))).astype(x.dtype)
            for name, x in base.items()
        }
        for _ in range(3)
    ]
    for i, tensors in enumerate((base, *models)):
        write(tmp_path / str(i), tensors)
    given = ["--base", str(tmp_path / "0"), "--models", *(str(tmp_path / str(i)) for i in (1, 2, 3))]
    more = ["--method", "ties", "--keep", "0.2", "--lam", "0.7", "--out", str(tmp_path / "out")]
    assert main(["merge-models", "--quiet", *given, *more]) == 0, capsys.readouterr().err
    flat = [np.concatenate([tensors[name].reshape(-1) for name in names]) for tensors in (base, *models)]
    want, lows = ties_of_numpy(flat[0], flat[1:], 0.2, 0.7)
    got = read(tmp_path / "out")
    np.testing.assert_allclose(np.concatenate([got[name].reshape(-1) for name in names]), want, atol=1e-7)
    np.testing.assert_array_equal(json.loads((tmp_path / "out" / "merge.json").read_text())["thresholds"], lows)
    assert np.mean(want != flat[0]) > 0.2
