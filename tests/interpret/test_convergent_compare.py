"""compare: values are those of the metrics, the null is right, what is trivial is said; and the command over files."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import linalg, metrics
from subspace_jax.cli.main import main
from subspace_jax.interpret import convergent_learning as convergent

# Of one shape, so that all tests compile once.
N, P = 30, 6


def gaussian(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pair():
    x = gaussian(0, N, P)
    return x, x @ gaussian(1, P, P) + 2 * gaussian(2, N, P)


@jax.jit
def METRICS(x, y):
    rho, c = linalg.cca(x, y).rho, convergent.between_correlation(x, y)
    kernels = metrics.rbf_kernel(x), metrics.rbf_kernel(y)
    return {
        "linear_cka": metrics.linear_cka(x, y),
        "debiased_cka": metrics.linear_cka(x, y, debiased=True),
        "procrustes": metrics.procrustes_similarity(x, y),
        "cca_mean": metrics.cca_mean(rho),
        "cca_r2": metrics.cca_mean(jnp.square(rho)),
        "pwcca": metrics.pwcca(x, y),
        "svcca": metrics.svcca(x, y),
        "r2_x_from_y": metrics.linear_regression_r2(x, y),
        "r2_y_from_x": metrics.linear_regression_r2(y, x),
        "semi_match": convergent.semi_match(c).values.mean(),
        "rbf_cka": metrics.kernel_cka(*kernels),
        "debiased_rbf_cka": metrics.kernel_cka(*kernels, debiased=True),
        "mutual_knn": metrics.mutual_knn(x, y, k=5),
        "cycle_knn": metrics.cycle_knn(x, y, k=5),
        "lcs_knn": metrics.lcs_knn(x, y, k=5) / 5,
        "cknna": metrics.cknna(x, y, k=5),
    }


@pytest.fixture(scope="module")
def related():
    return convergent.compare(*pair(), k=5, null=convergent.Null(49))


def test_compare_has_the_values_of_the_metrics(related):
    expected = METRICS(*map(jnp.asarray, pair()))
    c = convergent.between_correlation(*map(jnp.asarray, pair()))
    expected["max_match"] = convergent.max_match(c).values.mean()
    assert tuple(related) == convergent.MEASURES == tuple(name for name in related if name in expected)
    for name, score in related.items():
        np.testing.assert_allclose(score.value, expected[name], atol=2e-5, err_msg=name)
        assert (score.examples, score.null_examples, score.note) == (N, N, "")


def test_compare_shuffles_are_those_of_the_examples_of_y(related):
    # The same measures of y in a random order, by the metrics themselves.
    x, y = pair()
    orders = [np.random.default_rng(seed).permutation(N) for seed in range(30)]
    null = [METRICS(jnp.asarray(x), jnp.asarray(y[order])) for order in orders]
    for name, score in related.items():
        if name == "max_match":
            continue
        values = np.array([float(found[name]) for found in null])
        error = np.hypot(values.std() / np.sqrt(30), score.null_std / np.sqrt(49))
        assert abs(values.mean() - score.null_mean) < 4 * error + 1e-6, name


def test_compare_finds_what_is_related_and_calibrates_equal_representations_to_1(related):
    for name in ("linear_cka", "debiased_cka", "cca_r2", "r2_x_from_y", "semi_match", "mutual_knn"):
        assert related[name].p_value <= 0.1, name
        assert 0 < related[name].calibrated < 1
    x, _ = pair()
    for name, score in convergent.compare(x, x, k=5, null=convergent.Null(49)).items():
        np.testing.assert_allclose([score.value, score.calibrated], 1, atol=1e-4, err_msg=name)
        assert score.p_value == 1 / 50, name


def test_compare_is_reproducible_and_calls_progress_for_every_shuffle():
    done = []
    twice = [
        convergent.compare(*pair(), k=5, null=convergent.Null(14, seed=seed), progress=done.append)
        for seed in (3, 3, 4)
    ]
    assert twice[0] == twice[1]
    assert twice[0]["linear_cka"].null_mean != twice[2]["linear_cka"].null_mean
    assert sum(done) == 3 * 15


@pytest.mark.slow
def test_compare_streams_what_follows_from_covariances_and_shuffles_a_subset():
    x, y = gaussian(0, 100, P) + 30, gaussian(1, 100, P)
    y += x @ gaussian(2, P, P)
    found = convergent.compare(x, y, k=5, null=convergent.Null(9, N))
    expected = METRICS(*map(jnp.asarray, (x, y)))
    subset = {"debiased_cka", "rbf_cka", "debiased_rbf_cka", "mutual_knn", "cycle_knn", "lcs_knn", "cknna"}
    for name, score in found.items():
        assert (score.examples, score.null_examples) == (N if name in subset else 100, N), name
        if name not in subset | {"max_match"}:
            np.testing.assert_allclose(score.value, expected[name], atol=1e-3, err_msg=name)
    c = convergent.between_correlation(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(found["max_match"].value, convergent.max_match(c).values.mean(), atol=1e-4)


def test_compare_says_what_is_trivial_where_examples_are_no_more_than_columns():
    trivial = ("cca_r2", "r2_x_from_y", "r2_y_from_x")
    found = convergent.compare(
        gaussian(0, 8, 9), gaussian(1, 8, 3), measures=(*trivial, "linear_cka"), null=convergent.Null(4)
    )
    for name in ("cca_r2", "r2_y_from_x"):
        assert np.isnan([found[name].value, found[name].calibrated, found[name].p_value]).all()
        assert found[name].note.startswith("trivial: x spans all 8 examples")
    for name in ("r2_x_from_y", "linear_cka"):
        assert np.isfinite(found[name].calibrated)


def test_compare_of_more_columns_than_examples_has_the_cka_of_features_and_of_their_shuffles():
    x, y = gaussian(0, 8, 9), gaussian(1, 8, 12)
    found = convergent.compare(x, y, measures=("linear_cka", "cca_r2"), null=convergent.Null(3))
    rng = np.random.default_rng(0)
    cka = [float(metrics.linear_cka(x, y[order])) for order in (np.arange(8), *(rng.permutation(8) for _ in range(3)))]
    np.testing.assert_allclose([found["linear_cka"].value, found["linear_cka"].null_mean], [cka[0], np.mean(cka[1:])],
        rtol=1e-5)  # fmt: skip
    assert found["cca_r2"].note.startswith("trivial: y spans all 8 examples")


@pytest.mark.slow
@pytest.mark.parametrize("n", [32, 64, 256])
def test_compare_of_independent_features_is_calibrated(n):
    stats = pytest.importorskip("scipy.stats")
    repeats, found = 200, {}
    for seed in range(repeats):
        x, y = gaussian(2 * seed, n, 64), gaussian(2 * seed + 1, n, 64)
        for name, score in convergent.compare(x, y, null=convergent.Null(39, seed=seed)).items():
            found.setdefault(name, []).append((score.calibrated, score.p_value))
    rng = np.random.default_rng(0)
    for name, values in found.items():
        calibrated, p = np.array(values).T
        if np.isnan(calibrated).all():
            assert n <= 64, name
            continue
        assert np.isfinite(calibrated).all(), name
        assert abs(calibrated.mean()) <= 4 * calibrated.std(ddof=1) / np.sqrt(repeats), name
        # p-values are multiples of 1/40; those of measures with ties are above uniform ones.
        spread = p - rng.uniform(0, 1 / 40, repeats)
        side = "greater" if name in ("mutual_knn", "cycle_knn", "lcs_knn") else "two-sided"
        assert stats.kstest(spread, "uniform", alternative=side).pvalue > 1e-3, name


ONES = np.ones((8, 2), np.float32)
VARIED = gaussian(0, 8, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: convergent.compare(VARIED, VARIED[:7]), ValueError, "x, y: expected the same examples, got 8 and 7"),
        (lambda: convergent.compare(VARIED[:4], VARIED[:4]), ValueError, "x: expected features .* of 5 examples"),
        (lambda: convergent.compare(VARIED[0], VARIED), ValueError, r"x: expected features \[n, p\]"),
        (lambda: convergent.compare(ONES, VARIED, k=3), ValueError, "x: expected units that vary, got 2 constant ones"),
        (lambda: convergent.compare(VARIED, VARIED.astype(str)), TypeError, "y: expected real numbers"),
        (lambda: convergent.compare(VARIED, VARIED * np.nan, k=3), ValueError, "y: .* in example 0"),
        (lambda: convergent.compare(VARIED, VARIED, measures=["cka"]), ValueError, "measures: expected some of"),
        (lambda: convergent.compare(VARIED, VARIED, measures=[]), ValueError, "measures: expected at least one"),
        (
            lambda: convergent.compare(VARIED, VARIED, null=convergent.Null(0)),
            ValueError,
            "null.permutations: expected at least 1",
        ),
        (lambda: convergent.compare(VARIED, VARIED, k=8), ValueError, "k: expected 2 to 7 neighbours of 8"),
        (
            lambda: convergent.compare(VARIED, VARIED, null=convergent.Null(examples=3)),
            ValueError,
            "null.examples: expected at least 5",
        ),
    ],
)
def test_compare_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    x, y = pair()
    np.save(folder / "a.npy", x)
    np.savez(folder / "b.npz", first=y, second=gaussian(9, N, P), labels=np.arange(N))
    dead = x * (np.arange(P) != 2)
    np.savez(folder / "c.npz", early=x, dead=dead, class_names=np.array(["a"]))
    np.save(folder / "short.npy", x[:20])
    (folder / "three.txt").write_text("one\ntwo\nthree\n")
    (folder / "model").mkdir()
    (folder / "model" / "tokenizer.json").write_text("{}")
    return folder


def test_compare_command_writes_a_table_and_its_numbers(files, capsys):
    out = files / "out"
    with jax.numpy_dtype_promotion("standard"):
        command = ["compare", files / "a.npy", files / "b.npz", "--layers-b", "first", "--out", out, "--k", "5"]
        assert main([*map(str, command), "--permutations", "9", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "correlation with the matched unit" in shown
    assert "report.html" in shown
    scores = json.loads((out / "compare.json").read_text())["pairs"][0]["scores"]
    result = json.loads((out / "result.json").read_text())
    own = convergent.compare(*pair(), k=5, null=convergent.Null(9))
    assert scores.keys() == own.keys()
    np.testing.assert_allclose(scores["cknna"]["value"], own["cknna"].value, rtol=1e-6)
    np.testing.assert_allclose(result["calibrated_debiased_cka"], own["debiased_cka"].calibrated, rtol=1e-6)
    page = (out / "report.html").read_text()
    assert "RBF CKA, debiased" in page
    assert "http" not in page


def test_compare_command_draws_heat_maps_over_layers(files, capsys):
    out = files / "layers"
    command = ["compare", files / "c.npz", files / "b.npz", "--out", out, "--permutations", "9", "--quiet"]
    assert main([*map(str, command), "--measures", "debiased_cka,semi_match"]) == 0
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "1 constant unit in layer dead of A" in page
    found = json.loads((out / "compare.json").read_text())
    assert [(pair["a"], pair["b"]) for pair in found["pairs"]] == [
        ("early", "first"), ("early", "second"), ("dead", "first"), ("dead", "second")
    ]  # fmt: skip
    assert re.search("early +first", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.npy", "short.npy"], "a and short: x, y: expected the same examples, got 30 and 20"),
        (["a.npy", "none.npy"], "none.npy: no such file"),
        (["a.npy", "b.npz", "--layers-b", "third"], "expected some of the layers first, second, got 'third'"),
        (["a.npy", "b.npz", "--measures", "cka"], "measures: expected some of"),
        (["a.npy", "b.npz", "--text", "texts.txt"], "--text, --images: are for models"),
        (["a.npy", "work/models/none"], "B: there is no work/models/none"),
        (
            ["a.npy", "model", "--text", "three.txt"],
            "a.npy: expected features of the 3 examples of three.txt, got 30",
        ),
        (["a.npy", ".", "--text", "texts.txt"], "and . has no tokenizer.json"),
        (["a.npy", "."], "--text, --images: expected examples for the model"),
        (["a.npy", "b.npz", "--permutations", "0"], "--permutations: expected at least 1, got 0"),
    ],
)
def test_compare_command_refuses_and_writes_nothing(files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(files)
    assert main(["compare", *arguments, "--out", "refused", "--quiet"]) == 2
    assert message in capsys.readouterr().err
    assert not any((files / "refused").glob("*"))


def test_read_layers_refuses_what_holds_no_features(tmp_path):
    np.savez(tmp_path / "odd.npz", labels=np.arange(9))
    np.savez(tmp_path / "uneven.npz", a=np.ones((9, 2)), b=np.ones((8, 2)))
    (tmp_path / "broken.npz").write_bytes(b"PK")
    (tmp_path / "words.npy").write_text("words")
    np.save(tmp_path / "complex.npy", np.ones((9, 2), complex))
    for name, message in (
        ("odd.npz", "expected matrices of features"),
        ("uneven.npz", "layers of the same examples"),
        ("broken.npz", "can't be read as .npz"),
        ("words.npy", "not in the format of numpy.save"),
        ("complex.npy", "complex: expected real numbers, got complex"),
        ("text.txt", "no such file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convergent.read_layers(tmp_path / name)
