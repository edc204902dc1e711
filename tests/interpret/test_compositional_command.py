"""``subspace-jax compositional``: tables of labels, what is written, and what is refused."""

import json

import jax
import numpy as np
import pytest

from subspace_jax.cli.main import main
from subspace_jax.interpret import compositional_linear as cl

QUICK = ["--quiet", "--epochs", "20", "--splits", "1", "--fraction", "0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of vectors of one grid, the second without structure, and labels as text."""
    root = tmp_path_factory.mktemp("compositional")
    grid = cl.orthogonal_factor_embedding(jax.random.key(0), (3, 2), 6, noise=0.01)
    x, labels = np.tile(np.asarray(grid.x, np.float32), (4, 1)), np.tile(np.asarray(grid.labels), (4, 1))
    np.savez(root / "ideal.npz", features=x)
    np.save(root / "noise.npy", np.random.default_rng(0).standard_normal(x.shape).astype(np.float32))
    np.save(root / "labels.npy", labels)
    lines = [f"{('red', 'green', 'blue')[a]},{10 * b}" for a, b in labels]
    (root / "labels.csv").write_text("\n".join(["colour,size", *lines, ""]))
    return root


def run(*arguments):
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        return main(["compositional", *map(str, arguments)])


def test_read_label_table_numbers_texts_and_integers(folder):
    table = cl.read_label_table(folder / "labels.csv")
    assert (table.names, table.values) == (("colour", "size"), (("blue", "green", "red"), ("0", "10")))
    text = (folder / "labels.csv").read_text()
    (folder / "marked.csv").write_text(text, encoding="utf-8-sig")  # as spreadsheets save it
    assert cl.read_label_table(folder / "marked.csv").names == table.names
    given = np.load(folder / "labels.npy")
    assert np.array_equal(table.labels, np.stack([np.asarray([2, 1, 0])[given[:, 0]], given[:, 1]], axis=1))
    assert np.array_equal(cl.read_label_table(folder / "labels.npy").labels, given)
    np.savez(folder / "labels.npz", labels=given[:, 0], factors=3 * given)
    assert np.array_equal(cl.read_label_table(folder / "labels.npz").labels, given)


def test_the_command_writes_scores_of_each_set_of_features_and_a_picture(folder, tmp_path, capsys):
    files = ["--features", folder / "ideal.npz", folder / "noise.npy", "--labels", folder / "labels.csv"]
    assert run(*files, "--out", tmp_path, *QUICK) == 0
    printed = capsys.readouterr().out
    assert "colour" in printed
    assert f"Wrote table.json, result.json and geometry.png to {tmp_path}" in printed
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ideal_r2_raw"] > 0.99
    assert result["ideal_r2_projected"] > 0.95
    assert result["ideal_across"] < 0.05
    assert result["ideal_accuracy"] > result["noise_accuracy"]
    assert result["noise_r2_raw"] < 0.5
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["names"] == ["colour", "size"]
    assert table["features"][0]["ranks"] == [2, 1]
    assert [own["examples"] for own in table["features"]] == [24, 24]
    assert (tmp_path / "geometry.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n0,1\n1\n", "line 3: expected 2 cells, got 1"),
        ("a,b\n0,1\n1, \n", "line 3, column 'b': expected a value, got an empty cell"),
        ("a,a\n0,1\n", "line 1: expected a name for each column"),
        ("a,b\n", "expected a line of names and one for each example, got 1 lines"),
        ("a,b\n0,1\n-1,0\n", "column 'a', example 1: expected 0 or more, got -1"),
        ("a,b\n0,1\n0,0\n", "column 'a': expected 2 values or more, got 0 alone"),
    ],
)
def test_read_label_table_names_file_line_and_column_of_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        cl.read_label_table(path)
    assert str(path) in str(caught.value)


def test_the_command_refuses_bad_files_and_writes_nothing(folder, tmp_path, capsys):
    out = tmp_path / "out"
    x = np.load(folder / "noise.npy")
    np.save(tmp_path / "short.npy", x[:20])
    x[7, 1] = np.nan
    np.save(tmp_path / "nan.npy", x)
    np.save(tmp_path / "floats.npy", x)
    np.save(tmp_path / "one.npy", np.load(folder / "labels.npy")[:, :1])
    good, labels = folder / "noise.npy", folder / "labels.npy"
    (tmp_path / "labels.txt").write_text("0,1\n")
    for features, table, message in (
        (tmp_path / "none.npy", labels, "no such file"),
        (tmp_path / "short.npy", labels, "short.npy has 20 vectors"),
        (
            tmp_path / "nan.npy",
            labels,
            "nan.npy: expected finite vectors, got NaN or infinity in 1: vector 7",
        ),
        (good, tmp_path / "none.csv", "none.csv: no such file"),
        (good, tmp_path / "labels.txt", "expected a file that ends in .csv, .npy or .npz"),
        (good, tmp_path / "floats.npy", "floats.npy: expected integers [examples, concepts], got float32"),
        (good, folder / "ideal.npz", "expected an array factors or labels, got features"),
        (good, tmp_path / "one.npy", "labels: expected 2 concepts or more, got 1"),
    ):
        assert run("--features", features, "--labels", table, "--out", out, *QUICK) == 2
        assert message in capsys.readouterr().err
        assert not list(out.glob("*"))
    for option, value, message in (
        ("--splits", 0, "splits: expected at least 1"),
        ("--fraction", 1.5, "fraction"),
        ("--epochs", 0, "epochs"),
    ):
        assert run("--features", good, "--labels", labels, "--out", out, *QUICK, option, value) == 2
        assert message in capsys.readouterr().err
        assert not list(out.glob("*"))
