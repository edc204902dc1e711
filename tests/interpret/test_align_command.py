"""``subspace-jax align``: maps, reports, mapped items, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax.cli.main import main
from subspace_jax.data import open_vectors
from subspace_jax.interpret.platos_cave_3d import data, evaluate, fit, pairs, report

COUNT, ANCHORS, K = 200, 150, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of 200 pairs and of 30 others, and the alignment that the command fits to the pairs."""
    root = tmp_path_factory.mktemp("align")
    x, y = (np.asarray(z) for z in data.planted_pairs(jax.random.key(0), COUNT + 30))
    np.savez(root / "x.npz", features=x[:COUNT] + 3.0)
    np.save(root / "y.npy", y[:COUNT].astype(np.float64))
    np.save(root / "new_x.npy", x[COUNT:] + 3.0)
    np.save(root / "new_y.npy", y[COUNT:])
    assert run(root, "--anchors", ANCHORS, "--k", K, "--out", root / "up") == 0
    return root


def run(root, *arguments):
    given = [] if "--map" in arguments else ["--x", root / "x.npz", "--y", root / "y.npy"]
    return main(["align", "--quiet", *map(str, [*given, *arguments])])


def test_align_reports_the_subspace_beside_all_features_and_chance(folder):
    found = json.loads((folder / "up" / "align.json").read_text())
    assert (found["anchors"], found["queries"], found["widths"]) == (ANCHORS, 40, [20, 14])
    assert found["chance"] == [1 / 40, 1 / 40, 5 / 40, 10 / 40]
    for method in evaluate.METHODS:
        matching, top1, top5, _ = found["subspace"][method]
        assert matching >= 0.9
        assert top1 <= top5 == 1
        assert found["full"][method][0] < 0.9
    assert set(found["curve"]) == {"1", "2", "4", "5", "10", "14"}
    assert found["curve"]["4"] == found["subspace"]["affine"]
    # One direction tells forty items less well than the four that are shared.
    assert found["curve"]["1"][0] < 0.5 < found["curve"]["4"][0]
    assert found["reg"] in fit.RIDGES
    assert min(found["held_out_rho"]) > 0.95
    assert (folder / "up" / "curve.png").stat().st_size > 10_000
    result = json.loads((folder / "up" / "result.json").read_text())
    assert result["top_5"] == found["subspace"]["affine"][2]
    assert result["full_top_5"] == found["full"]["affine"][2]


def test_align_maps_new_items_to_one_space_and_finds_their_partners(folder, tmp_path):
    files = ["--x", folder / "new_x.npy", "--y", folder / "new_y.npy"]
    assert run(folder, "--map", folder / "up", *files, "--top", 3, "--out", tmp_path) == 0
    lines = (tmp_path / "nearest.csv").read_text().splitlines()
    assert lines[0] == "y,rank,x,cosine"
    rows = np.asarray([line.split(",") for line in lines[1:]], float)
    assert rows.shape == (90, 4)
    first = rows[rows[:, 1] == 1]
    assert np.mean(first[:, 0] == first[:, 2]) > 0.9
    x, y = (np.load(tmp_path / f"{name}.npy") for name in "xy")
    assert x.shape == y.shape == (30, K)
    cosines = np.asarray(evaluate.cosine_scores(jnp.asarray(y), jnp.asarray(x)))
    np.testing.assert_allclose(rows[:, 3], cosines[rows[:, 0].astype(int), rows[:, 2].astype(int)], atol=1e-5)
    maps = fit.load_maps(folder / "up")
    np.testing.assert_allclose(x, maps.of_x(jnp.asarray(np.load(folder / "new_x.npy"))), atol=1e-5)
    np.testing.assert_allclose(y, maps.of_y(jnp.asarray(np.load(folder / "new_y.npy"))), atol=1e-5)
    assert run(folder, "--map", folder / "up", *files[:2], "--out", tmp_path / "x") == 0
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["x.npy"]


def test_pairs_are_read_in_blocks_as_at_once_and_no_query_is_an_anchor(folder, monkeypatch):
    sources = [open_vectors(name, folder / file) for name, file in (("x", "x.npz"), ("y", "y.npy"))]
    whole = pairs.read_pairs(*sources, ANCHORS, seed=1)
    monkeypatch.setattr(pairs, "BLOCK_BYTES", 4 * 20 * 80)  # 80, 80 and 40 pairs
    parts = pairs.read_pairs(*sources, ANCHORS, seed=1)
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-2)  # sums of 150 squares
    assert (int(whole.fit.count), int(whole.held.count), whole.anchors) == (120, 30, ANCHORS)
    assert whole.xq.shape == (40, 20)
    assert whole.ys.shape == (150, 14)
    assert not {tuple(row) for row in whole.xq} & {tuple(row) for row in whole.xs}
    x = sources[0].read()
    # The sample has all anchors here, so that their mean is that of the moments.
    mean = (120 * whole.fit.mean_x + 30 * whole.held.mean_x) / 150
    np.testing.assert_allclose(mean, whole.xs.mean(0), atol=1e-4)
    assert all(any(np.array_equal(row, own) for own in x) for row in whole.xq[:3])


def test_report_says_where_correlations_of_anchors_are_over_fitted_and_which_k_is_best():
    values = {name: (0.2, 0.2, 0.3, 0.4) for name in evaluate.METHODS}
    curve = {2: (0.1, 0.1, 0.2, 0.3), 4: (0.2, 0.2, 0.3, 0.4), 10: (0.4, 0.3, 0.5, 0.6)}
    found = fit.Found("affine", 4, 1e-3, 60, (20, 14), 40, values, values, curve, (0.9,) * 4, (0.5,) * 4)
    text = report.table(found)
    assert "Mean correlation of directions 0.900 on the anchors, 0.500 on held-out pairs; ridge 0.001." in text
    assert "over-fitted (60 anchors for 34 features): go by the held-out ones, or add anchors." in text
    assert "Top-5 by affine is highest, 0.500, with --k 10." in text
    calm = report.table(found._replace(anchors=900, rho=(0.55,) * 4, curve={4: curve[4]}))
    assert "over-fitted" not in calm
    assert "highest" not in calm
    assert "the same items" not in calm
    lost = found._replace(subspace=dict.fromkeys(evaluate.METHODS, (0.02, 0.03, 0.1, 0.26)))
    assert "Held-out pairs are hardly found: are the rows of both files the same items?" in report.table(lost)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        ("--map: applies an earlier alignment, and takes no --k", ["--map", "{root}/up", "--k", "3"]),
        ("--map: expected --x, --y or both", ["--map", "{root}/up"]),
        ("map: {root}/none: expected maps.safetensors", ["--map", "{root}/none", "--x", "{root}/new_x.npy"]),
        ("--x: expected features of width 20", ["--map", "{root}/up", "--x", "{root}/new_y.npy"]),
        ("--k: expected 1 to 14, the smaller width of --x and --y, got 15", ["--k", "15"]),
        ("anchors: expected 5 to 160, 40 of 200 items being queries; got 161", ["--anchors", "161"]),
        ("anchors: expected more than 13 for 10 directions, got 10", ["--anchors", "10", "--k", "10"]),
        ("reg: expected more than 0, as 15 anchors", ["--anchors", "15", "--k", "4", "--reg", "0"]),
        ("--top: expected 1 or more, got 0", ["--top", "0"]),
        ("x: {root}/none.npy: no such file", ["--x", "{root}/none.npy"]),
        ("x, y: expected features of the same items, got 30 and 200", ["--x", "{root}/new_x.npy"]),
    ],
)
def test_align_refuses_what_can_not_serve(folder, tmp_path, capsys, error, arguments):
    arguments = [text.format(root=folder) for text in arguments]
    wanted = error.format(root=folder)
    assert run(folder, *arguments, "--out", tmp_path / "out") == 2
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_align_refuses_nan_few_items_constant_features_and_files_that_it_reads(folder, tmp_path, capsys):
    x, y = np.load(folder / "new_x.npy"), np.load(folder / "new_y.npy")
    cases = {
        "0x.npy: expected finite vectors, got NaN or infinity in 1: vector 7": (
            np.where(np.arange(30)[:, None] == 7, np.nan, x),
            y,
        ),
        "x, y: expected at least 20 items, got 19": (x[:19], y[:19]),
        "y: all features are constant over the anchors": (x, np.ones_like(y)),
    }
    for i, (error, arrays) in enumerate(cases.items()):
        files = []
        for name, array in zip("xy", arrays, strict=True):
            np.save(tmp_path / f"{i}{name}.npy", array)
            files += [f"--{name}", str(tmp_path / f"{i}{name}.npy")]
        assert main(["align", "--quiet", "--k", "2", *files, "--out", str(tmp_path / "out")]) == 2
        assert error in capsys.readouterr().err
    np.save(tmp_path / "x.npy", x)
    assert run(folder, "--map", folder / "up", "--x", tmp_path / "x.npy", "--out", tmp_path) == 2
    assert "expected a folder in which no file is replaced that is read" in capsys.readouterr().err
    (tmp_path / "maps.safetensors").write_bytes((folder / "up" / "maps.safetensors").read_bytes()[:-40])
    assert run(folder, "--map", tmp_path, "--x", tmp_path / "x.npy", "--out", tmp_path / "out") == 2
    assert main(["align", "--quiet", "--x", "a.npy", "--out", str(tmp_path)]) == 2
    assert "--x, --y: expected both" in capsys.readouterr().err
