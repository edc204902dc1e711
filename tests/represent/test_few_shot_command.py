"""The table of few-shot methods, by the command: what it prints and writes, and what it refuses."""

import json

import jax
import numpy as np
import pytest

from subspace_jax import represent
from subspace_jax.cli.main import main
from subspace_jax.represent import few_shot_survey as fs
from subspace_jax.represent.few_shot_survey.fitting import fit_steps

NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Features of three classes, of which the prototypes know two apart: shots help."""
    folder, rng = tmp_path_factory.mktemp("features"), np.random.default_rng(0)
    centers = 2.0 * np.eye(3, 8)
    texts = np.concatenate([centers, centers + 0.1 * rng.standard_normal((3, 8))])
    texts[[0, 3]] = texts[[1, 4]] + 0.1
    labels = {
        "support": np.tile(np.arange(3), 10),
        "query": np.tile(np.arange(3), 40),
        "text": np.tile(np.arange(3), 2),
    }
    features = {name: centers[own] + 0.3 * rng.standard_normal((len(own), 8)) for name, own in labels.items()}
    for name, own in labels.items():
        found = represent.Features((features | {"text": texts})[name].astype(np.float32), own.astype(np.int32), NAMES)
        represent.save_features(folder / f"{name}.npz", found)
    return folder


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to int32 powers
        yield


def run(files, out, *arguments):
    paths = [f"--{name}={files}/{name}.npz" for name in ("support", "query", "text")]
    return main(["few-shot", *paths, f"--out={out}", *arguments])


def test_few_shot_prints_and_writes_a_table_and_compiles_once_for_each_number_of_shots(files, tmp_path, capsys):
    before = fit_steps._cache_size()
    methods = "--methods=zero-shot,tip,tip-f"
    assert run(files, tmp_path / "out", methods, "--shots=5,1", "--seeds=2", f"--source={files}/support.npz") == 0
    # One program of tip-f for each number of shots, not for each of four draws.
    assert fit_steps._cache_size() == before + 2
    printed, progress = capsys.readouterr()
    lines = printed.splitlines()
    assert lines[0] == "accuracy by shots of a class, prototypes from texts"
    assert lines[1].split() == ["method", "1", "5", "width", "at", "5"]
    assert [line.split()[0] for line in lines[2:5]] == ["zero-shot", "tip", "tip-f"]
    assert lines[5].startswith("gap source to query: proxy a 0, mmd2 ")
    assert "6/6  tip-f, shots 5: " in progress
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    rows = {(row["method"], row["shots"]): row for row in table["rows"]}
    assert rows["tip", 5]["mean"] == np.mean(rows["tip", 5]["accuracies"])
    assert rows["tip", 5]["deviation"] == pytest.approx(np.std(rows["tip", 5]["accuracies"], ddof=1))
    # The texts of two classes are nearly the same.
    assert rows["zero-shot", 1]["mean"] < 0.8 < rows["tip", 5]["mean"]
    assert (rows["tip", 5]["capacity"], rows["zero-shot", 5]["width"]) == (15, 0.0)
    assert json.loads((tmp_path / "out" / "result.json").read_text())["tip_5"] == rows["tip", 5]["mean"]
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 5000
    assert table["settings"]["shots"] == [1, 5]


def test_few_shot_without_texts_takes_the_means_of_the_shots_and_says_so(files, tmp_path, capsys):
    paths = [f"--{name}={files}/{name}.npz" for name in ("support", "query")]
    options = ["--methods=zero-shot", "--shots=2", "--seeds=1", "--quiet", f"--out={tmp_path}"]
    assert main(["few-shot", *paths, *options]) == 0
    printed, progress = capsys.readouterr()
    assert printed.startswith("accuracy by shots of a class, prototypes from means of each class's shots")
    assert not progress
    assert json.loads((tmp_path / "result.json").read_text())["zero-shot_2"] > 0.9


def test_compare_few_shot_never_validates_on_shots_and_keeps_a_seed_s_validation(files, monkeypatch):
    seen = {}

    def fit(draw):
        seen[len(draw.train.labels)] = (draw.train, draw.validation)
        return lambda queries: queries[:, :3]

    monkeypatch.setitem(fs.METHODS, "tip", fs.METHODS["tip"]._replace(fit=fit))
    sets = [represent.read_features(files / f"{name}.npz") for name in ("support", "query", "text")]
    fs.compare_few_shot(*sets, fs.Comparison((4, 6), 1, ("tip",)))
    (few, validation), (many, same) = seen[12], seen[18]
    np.testing.assert_array_equal(validation.labels, np.repeat(np.arange(3), 4))
    np.testing.assert_array_equal(validation.features, same.features)
    rows = {tuple(np.asarray(x)) for x in many.features}
    assert {tuple(np.asarray(x)) for x in few.features} < rows
    assert rows.isdisjoint({tuple(np.asarray(x)) for x in same.features})


def test_compare_few_shot_takes_no_examples_that_no_method_needs(files):
    sets = [represent.read_features(files / f"{name}.npz") for name in ("support", "query", "text")]
    (row,) = fs.compare_few_shot(*sets, fs.Comparison((99,), 1, ("zero-shot",)))  # of each class there are 10
    assert row.accuracies == fs.compare_few_shot(*sets, fs.Comparison((1,), 1, ("zero-shot",)))[0].accuracies
    (row,) = fs.compare_few_shot(*sets[:2], None, fs.Comparison((10,), 1, ("zero-shot",)))
    assert row.mean > 0.9


@pytest.mark.slow
def test_every_method_of_the_table_is_better_than_texts_that_confuse_two_classes(files):
    sets = [represent.read_features(files / f"{name}.npz") for name in ("support", "query", "text")]
    for subspace in ("", "text:3", "cca:2"):
        how = fs.Comparison((5,), 2, tuple(fs.METHODS), subspace=subspace)
        rows = {row.method: row.mean for row in fs.compare_few_shot(*sets, how)}
        for name in ("tip", "tip-f", "linear-probe", "logistic", "residual"):
            assert rows[name] > rows["zero-shot"] - 0.02, (subspace, name)
        assert rows["tip"] > 0.8, subspace


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("--shots: expected numbers separated by commas, got 'few'", ["--shots=few"]),
        ("shots: expected numbers of at least 1", ["--shots=0,1"]),
        (
            "shots: 8 of each class and 4 others to validate on take 12 examples, but class 'cat' has 10 ",
            ["--shots=8,2"],
        ),
        ("shots: 11 of each class take 11 examples, but class", ["--shots=11", "--methods=zero-shot,logistic"]),
        ("methods: expected some of zero-shot, clip-adapter", ["--methods=tap"]),
        ("seeds: expected at least 1", ["--seeds=0"]),
        ("scale: expected a positive number", ["--scale=0"]),
        ("subspace: expected text:K or cca:K", ["--subspace=pca"]),
        ("k: expected 1 to the smaller of", ["--subspace=text:4", "--shots=1"]),
        ("cache: expected alpha and beta", ["--cache=1"]),
        ("nothing.npz: no such file", ["--text=nothing.npz"]),
        ("text: expected features of width 8, that of the support, got 7", ["--text=WIDTH"]),
        ("query: expected the support's classes in its order, 'owl'; got 'emu'", ["--query=CLASSES"]),
        ("query: expected the support's classes in its order, 'cat'; got '0'; a file without", ["--query=UNNAMED"]),
        ("query features: expected finite vectors other than 0", ["--query=ZERO"]),
        ("support features: expected vectors that differ, got 6 times the first", ["--support=ALIKE", "--shots=1"]),
        ("labels: expected an example of each of 3 classes, none of", ["--text=FEW", "--shots=1"]),
    ],
)
def test_few_shot_refuses_by_name_what_can_t_serve(files, tmp_path, capsys, message, arguments):
    x = np.ones((6, 8), np.float32)
    labels = np.tile(np.arange(3, dtype=np.int32), 2)
    wrong = {
        "WIDTH": represent.Features(x[:, 1:], labels, NAMES),
        "CLASSES": represent.Features(x, labels, ("cat", "dog", "emu")),
        "UNNAMED": represent.Features(x, labels, tuple("012")),
        "ALIKE": represent.Features(x, labels, NAMES),
        "ZERO": represent.Features(x * np.arange(6, dtype=np.float32)[:, None], labels, NAMES),
        "FEW": represent.Features(x, labels % 2, NAMES),
    }
    option, _, value = arguments[0].partition("=")
    if value in wrong:
        represent.save_features(tmp_path / "wrong.npz", wrong[value])
        arguments = [f"{option}={tmp_path}/wrong.npz", *arguments[1:]]
    assert run(files, tmp_path / "out", "--quiet", *arguments) == 2
    assert message in capsys.readouterr().err
