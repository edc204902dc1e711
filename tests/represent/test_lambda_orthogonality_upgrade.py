"""``subspace-jax upgrade``: maps, predictions, streams, chains, and what it refuses."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import data, losses
from subspace_jax.cli.main import main
from subspace_jax.represent import lambda_orthogonality as upgrades
from subspace_jax.represent.lambda_orthogonality import maps, predict, report

PAIRS, OLD, NEW = 200, 6, 8


def vectors(count, seed=0):
    """Old, middle and new vectors of the same items: views of one latent vector, each with noise of its own."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    centers, mixes = fixed.standard_normal((5, 6)), [fixed.standard_normal((6, n)) for n in (OLD, 7, NEW)]
    latent = centers[rng.integers(5, size=count)] + 0.8 * rng.standard_normal((count, 6))
    noise = (0.3, 0.2, 0.0)
    return [
        (latent @ mix + size * rng.standard_normal((count, mix.shape[1]))).astype(np.float32)
        for mix, size in zip(mixes, noise, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of pairs and of other vectors, and the upgrade that the command fits to the pairs."""
    root = tmp_path_factory.mktemp("upgrade")
    old, _, new = vectors(PAIRS)
    np.savez(root / "old.npz", features=old)
    np.save(root / "new.npy", new.astype(np.float64))
    np.save(root / "alike.npy", np.ones_like(new))
    for name, x in zip(("old", "middle", "new"), vectors(90, seed=1), strict=True):
        np.save(root / f"other_{name}.npy", x)
    files = ["--gallery", root / "other_old.npy", "--queries", root / "other_new.npy"]
    # What a killed run of an earlier try has left.
    (root / "up" / "unfinished").mkdir(parents=True)
    (root / "up" / "unfinished" / "gallery.1234.partial.npy").touch()
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:  # Optax: float32 to int32 powers
        patch.setattr(maps, "_STEPS", 150)
        assert run(root, *files, "--out", root / "up") == 0
    return root


def run(root, *arguments):
    pairs = [] if "--maps" in arguments else ["--old", root / "old.npz", "--new", root / "new.npy"]
    return main(["upgrade", "--quiet", *map(str, [*pairs, *arguments])])


def test_fit_ridge_leaves_each_example_out_as_a_fit_without_it(x64):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 3)), rng.standard_normal((12, 2))
    weights = np.ones(12)
    weights[[2, 7]] = 0
    found = maps.fit_ridge(*map(jnp.asarray, (x, y, weights, [0.1])))
    eigenvalue = np.linalg.eigvalsh(np.cov(x[weights > 0].T, bias=True) * 10).mean()
    for i in range(12):
        kept = (weights > 0) & (np.arange(12) != i)
        mean_x, mean_y = x[kept].mean(0), y[kept].mean(0)
        a, b = x[kept] - mean_x, y[kept] - mean_y
        kernel = np.linalg.solve(a.T @ a + 0.1 * eigenvalue * np.eye(3), a.T @ b)
        np.testing.assert_allclose(found.outside[i], (x[i] - mean_x) @ kernel + mean_y, atol=1e-9)
        if not weights[i]:  # nothing is left out: the fit itself
            np.testing.assert_allclose(found.map(jnp.asarray(x[i : i + 1]))[0], found.outside[i], atol=1e-9)


def test_fit_ridge_takes_the_penalty_with_the_least_error_outside(x64):
    rng = np.random.default_rng(1)
    x, y = jnp.asarray(rng.standard_normal((30, 20))), jnp.asarray(rng.standard_normal((30, 4)))
    found = maps.fit_ridge(x, y, jnp.ones(30), jnp.asarray([1e-3, 1e2]))
    assert found.penalty == 1e2  # there is nothing to learn
    found = maps.fit_ridge(x, x[:, :4], jnp.ones(30), jnp.asarray([1e-3, 1e2]))
    assert found.penalty == 1e-3


def test_neighbour_recall_counts_true_neighbours_and_not_the_item_itself():
    gallery = jnp.asarray([[0.0], [1.0], [2.0], [5.0]])
    truth = jnp.asarray([[1, 2], [3, 2]])
    found = predict.neighbour_recall(jnp.asarray([[0.0], [1.9]]), gallery, truth, jnp.asarray([0, -1]))
    assert found == pytest.approx((1 + 0.5) / 2)


def test_the_command_maps_both_ways_and_its_prediction_holds_for_other_items(folder):
    found = json.loads((folder / "up" / "upgrade.json").read_text())
    said = found["prediction"]
    assert found["widths"] == [OLD, NEW]
    assert {curve[-1] for curve in said["curves"].values()} == {1}
    assert {curve[0] for curve in said["curves"].values()} == {said["recalls"][-1]}
    assert said["recalls"][-1] > said["unmapped"] + 0.2
    assert said["areas"][said["order"]] == max(said["areas"][name] for name in ("worst", "typical"))
    assert said["kept"] > 0.5
    old, _, new = (np.load(folder / f"other_{name}.npy") for name in ("old", "middle", "new"))
    chain, _ = upgrades.load_maps(folder / "up")
    mapped = np.load(folder / "up" / "gallery.npy")
    np.testing.assert_allclose(mapped, upgrades.map_forward(chain, jnp.asarray(old)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(mapped, axis=1), 1, atol=1e-5)
    backward = np.load(folder / "up" / "queries.npy")
    np.testing.assert_allclose(backward, upgrades.map_backward(chain, jnp.asarray(new)), atol=1e-6)
    scores = upgrades.backfill_scores(jnp.asarray(mapped), chain.links[-1].centers)
    steps = np.diff(np.asarray(scores)[np.load(folder / "up" / "order.npy")])
    assert np.max(-steps if said["order"] == "typical" else steps) <= 1e-5  # rounding of blocks of another size
    # 90 other items instead of 200 pairs: at 9 queries' worth of sampling error, and a smaller gallery.
    (row,) = upgrades.check_chain([chain], [old, new], 10)
    assert row["alone"] == row["from_here"] == pytest.approx(1 - row["cost"])
    assert row["alone"] > said["recalls"][-1] - 0.1
    page = (folder / "up" / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert f"{said['backward']:.3f}" in page
    assert (folder / "up" / "curve.csv").read_text().count("\n") == 12
    assert "Warning" not in page
    kinds = {path.suffix for path in (folder / "up").iterdir()}
    assert kinds == {".safetensors", ".json", ".png", ".csv", ".npy", ".html"}  # what was left is gone


@pytest.mark.slow
def test_long_vectors_that_are_compared_by_distance_are_upgraded_with_classes_that_leave_gaps():
    old, _, new = vectors(PAIRS)
    labels = np.where(np.arange(PAIRS) % 3 == 0, 2, 7).astype(np.int32)  # classes 0 to 6 but 2 have no example
    settings = upgrades.UpgradeSettings(metric="l2", lam=0.2)
    with jax.numpy_dtype_promotion("standard"):
        chain, found = upgrades.fit_upgrade(50 * old, 80 * new, labels, settings)
    assert found.mapped > found.unmapped + 0.2
    assert all(0 < area < 1 for area in found.areas.values())
    (link,) = chain.links
    assert link.centers.shape == (2, NEW)
    residual = losses.orthogonality_residual(link.maps.backward.kernel, normalize=True)
    assert residual < 0.2 + 5 / 20  # the gate opens within a few units of 1 / kappa
    lengths = np.linalg.norm(upgrades.map_forward(chain, jnp.asarray(50 * old)), axis=1)
    assert lengths.mean() > 40


def test_the_code_of_the_report_applies_the_maps_without_this_library(folder, monkeypatch):
    monkeypatch.chdir(folder / "up")
    chain, _ = upgrades.load_maps(folder / "up")
    names = {}
    exec(report.usage(chain), names)
    for direction, source, target in (("forward", "old", "gallery"), ("backward", "new", "queries")):
        x = np.load(folder / f"other_{source}.npy")
        np.testing.assert_allclose(names["mapped"](x, direction), np.load(f"{target}.npy"), atol=1e-5)


def test_a_store_in_blocks_is_mapped_as_a_whole_one_and_keeps_its_dtype(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data.vectors, "BLOCK_BYTES", 4 * NEW * 40)  # 40, 40 and 10 vectors
    old = np.load(folder / "other_old.npy").astype(np.float16)
    np.savez_compressed(tmp_path / "store.npz", ids=np.arange(90), vectors=old)
    source = data.open_vectors("gallery", tmp_path / "store.npz")
    assert [len(block) for block in source.blocks(40)] == [40, 40, 10]
    chain, _ = upgrades.load_maps(folder / "up")
    gallery, order = upgrades.map_store(chain, source, tmp_path / "out")
    mapped = np.load(gallery, mmap_mode="r")
    assert mapped.dtype == np.float16
    np.testing.assert_allclose(mapped, upgrades.map_forward(chain, jnp.asarray(old, jnp.float32)), atol=1e-3)
    assert sorted(np.load(order)) == list(range(90))


def test_a_store_with_nan_names_the_vectors_and_leaves_no_file(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data.vectors, "BLOCK_BYTES", 4 * NEW * 40)
    old = np.load(folder / "other_old.npy")
    old[[45, 61], 2] = np.nan
    np.save(tmp_path / "store.npy", old)
    source = data.open_vectors("gallery", tmp_path / "store.npy")
    chain, _ = upgrades.load_maps(folder / "up")
    with pytest.raises(
        ValueError, match=r"store\.npy: expected finite vectors, got NaN or infinity in 2: vector 45, 61"
    ):
        upgrades.map_store(chain, source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_run_that_fails_leaves_nothing_and_keeps_what_an_earlier_one_wrote(folder, tmp_path, capsys):
    store = np.load(folder / "other_old.npy")
    store[45, 2] = np.inf
    np.save(tmp_path / "store.npy", store)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "upgrade.json").write_text("earlier")
    assert run(folder, "--maps", folder / "up", "--gallery", tmp_path / "store.npy", "--out", tmp_path / "out") == 2
    assert f"gallery: {tmp_path}/store.npy: expected finite vectors, got NaN" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["upgrade.json"]
    assert (tmp_path / "out" / "upgrade.json").read_text() == "earlier"


def prediction(mapped, items=400):
    return predict.Prediction(
        10, items, (0.0, 1.0), {name: (mapped, 1.0) for name in ("worst", "typical", "random")}, {
            name: 0.5 for name in ("worst", "typical", "random")
        }, "worst", 0.3, 0.0, 0.2, 0.9, (100, 200, items), (0.6, 0.5, mapped),
    )  # fmt: skip


@pytest.mark.parametrize(("mapped", "items", "suspected"), [(0.02, 400, True), (0.12, 400, False), (0.6, 20, True)])
def test_the_command_warns_of_a_sample_in_which_recall_is_that_of_chance(
    mapped, items, suspected, folder, tmp_path, monkeypatch, caplog, capsys
):
    found = prediction(mapped, items)
    assert found.at_chance == suspected
    chain, _ = upgrades.load_maps(folder / "up")
    monkeypatch.setattr(upgrades, "fit_upgrade", lambda *_: (chain, found))
    assert run(folder, "--out", tmp_path) == 0
    assert "No vectors were mapped: --maps with this folder" in capsys.readouterr().out
    told = f"Row i of {folder}/old.npz and row i of {folder}/new.npy have to be the same item"
    assert (told in caplog.text) == suspected
    assert ("Warning: the old vectors tell next to nothing" in (tmp_path / "report.html").read_text()) == suspected


@pytest.mark.slow
def test_the_recall_of_shuffled_pairs_is_that_of_chance():
    old, _, new = vectors(PAIRS)
    with jax.numpy_dtype_promotion("standard"):
        assert upgrades.fit_upgrade(np.random.default_rng(0).permutation(old), new)[1].at_chance


def test_upgrades_are_chained_and_each_link_is_told_its_cost(folder, tmp_path, capsys):
    first, record = upgrades.load_maps(folder / "up")
    # As if a later model rotated the space: nothing is lost by that link.
    rotation = np.linalg.qr(np.random.default_rng(3).standard_normal((NEW, NEW)))[0].astype(np.float32)
    identity = upgrades.CompatParams(
        *(upgrades.Affine(jnp.asarray(kernel), jnp.zeros(NEW)) for kernel in (rotation.T, rotation))
    )
    second = upgrades.Chain((upgrades.Link(identity, jnp.eye(NEW)),), "cosine", "worst")
    upgrades.save_maps(tmp_path / "next", second, record)
    old, _, new = (folder / f"other_{name}.npy" for name in ("old", "middle", "new"))
    np.save(tmp_path / "newest.npy", np.load(new) @ rotation)
    assert run(
        folder, "--maps", folder / "up", tmp_path / "next", "--gallery", old, "--out", tmp_path / "both",
        "--check", old, new, tmp_path / "newest.npy",
    ) == 0  # fmt: skip
    np.testing.assert_allclose(
        np.load(tmp_path / "both" / "gallery.npy"), np.load(folder / "up" / "gallery.npy") @ rotation, atol=1e-5
    )
    one, two = json.loads((tmp_path / "both" / "upgrade.json").read_text())["check"]
    assert (two["alone"], two["cost"]) == (1, 0)
    assert one["cost"] == pytest.approx(1 - one["alone"])
    printed = capsys.readouterr().out
    product = record["prediction"]["recalls"][-1] ** 2
    assert f"the chain keeps about {product:.3f}" in printed
    again, _ = upgrades.load_maps(tmp_path / "both")
    assert maps.widths(again) == (OLD, NEW, NEW)
    mapped = upgrades.map_backward(again, jnp.asarray(np.load(tmp_path / "newest.npy")))
    np.testing.assert_allclose(mapped, np.load(folder / "up" / "queries.npy"), atol=1e-5)
    with pytest.raises(ValueError, match=r"two takes those of width 6; name the oldest upgrade first"):
        upgrades.joined([second, first], ["one", "two"])
    with pytest.raises(ValueError, match="one compares by cosine, two by l2"):
        upgrades.joined([first, second._replace(metric="l2")], ["one", "two"])


def test_labels_take_the_place_of_clusters(tmp_path):
    np.save(tmp_path / "labels.npy", np.array(["b", "a", "b"]))
    assert data.read_labels(tmp_path / "labels.npy", 3).tolist() == [1, 0, 1]
    np.savez(tmp_path / "labels.npz", labels=np.array([7, 7, 2]))
    assert data.read_labels(tmp_path / "labels.npz", 3).tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("error", "labels"),
    [
        ("expected one for each of 3 vectors, got 4", np.arange(4)),
        ("expected two classes or more, got 5 alone", np.full(3, 5)),
        (r"expected integers or texts \[vectors\], got float64 \[3\]", np.ones(3)),
        (r"expected integers or texts \[vectors\], got int64 \[3, 1\]", np.ones((3, 1), np.int64)),
        (r"expected integers or texts \[vectors\], got object \[3\]", np.array([None, 1, 2])),
    ],
)
def test_labels_that_can_not_serve_are_refused(error, labels, tmp_path):
    np.save(tmp_path / "labels.npy", labels, allow_pickle=True)
    with pytest.raises(ValueError, match=error):
        data.read_labels(tmp_path / "labels.npy", 3)


@pytest.mark.parametrize(
    ("error", "change"),
    [
        ("old, new: expected the vectors of the same .* got 200 old and 199 new", {"new": vectors(PAIRS)[2][:199]}),
        ("new: expected finite vectors, got NaN or infinity in 1: vector 7", {"new": np.nan}),
        ("new: expected vectors that differ, got 200 times that of vector 0", {"new": np.ones((PAIRS, NEW))}),
        ("old: expected vectors of width 2 or more, got width 1", {"old": np.ones((PAIRS, 1))}),
        ("old: expected vectors with a direction, got zeros alone in 1: vector 199", {"old": np.eye(PAIRS)[:, :-1]}),
        ("old, new: expected at least 20 pairs", {"old": vectors(9)[0], "new": vectors(9)[2]}),
        (r"labels: expected one of each pair, \[200\], got shape \[3\]", {"labels": np.arange(3)}),
        ("metric: expected one of .* got 'dot'", {"settings": upgrades.UpgradeSettings(metric="dot")}),
        ("k, lam: expected at least 1", {"settings": upgrades.UpgradeSettings(k=0)}),
        ("k, lam: expected at least 1", {"settings": upgrades.UpgradeSettings(lam=-1.0)}),
        ("old, new: expected at least 420 pairs", {"settings": upgrades.UpgradeSettings(k=210)}),
    ],
)
def test_fit_upgrade_refuses_what_can_not_serve(error, change):
    old, _, new = vectors(PAIRS)
    given = {"old": old, "new": new, "labels": None, "settings": upgrades.UpgradeSettings(), **change}
    if np.isscalar(given["new"]):
        given["new"] = new.copy()
        given["new"][7, 1] = np.nan
    with pytest.raises(ValueError, match=error):
        upgrades.fit_upgrade(**given)


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        ("--old, --new: expected both", ["--maps"]),
        ("--maps: joins earlier upgrades, and takes no --old", ["--old", "{root}/old.npz", "--maps", "{root}/up"]),
        (
            "--check: expected 2 files for 1 upgrades, a file for each model; got 1",
            ["--maps", "{root}/up", "--check", "a"],
        ),
        ("--maps: of one upgrade there is nothing to do without", ["--maps", "{root}/up"]),
        (
            "new: {root}/alike.npy: expected vectors that differ, got 200 times that of vector 0",
            ["--old", "{root}/old.npz", "--new", "{root}/alike.npy"],
        ),
        ("--check: is for --maps", ["--old", "{root}/old.npz", "--new", "{root}/new.npy", "--check", "a"]),
        (
            "maps: {root}/none: expected maps.safetensors and upgrade.json",
            ["--maps", "{root}/none", "--check", "a", "b"],
        ),
        ("gallery: {root}/none.npy: no such file", ["--maps", "{root}/up", "--gallery", "{root}/none.npy"]),
        (
            "gallery: expected vectors of the oldest model, of width 6; got 7",
            ["--maps", "{root}/up", "--gallery", "{root}/other_middle.npy"],
        ),
        (
            "queries: expected vectors of the newest model, of width 8; got 6",
            ["--maps", "{root}/up", "--queries", "{root}/other_old.npy"],
        ),
        (
            "--gallery: expected vectors of the width 6 of --old, got width 8",
            ["--old", "{root}/old.npz", "--new", "{root}/new.npy", "--gallery", "{root}/new.npy"],
        ),
        (
            "--out: expected another folder than those of --maps, whose files it would replace",
            ["--maps", "{root}/up", "--out", "{root}/up"],
        ),
        (
            "--out: expected a folder in which no file is replaced that is read, got that of {root}/gallery.npy",
            ["--maps", "{root}/up", "--gallery", "{root}/gallery.npy", "--out", "{root}"],
        ),
        (
            "check: expected vectors of widths [6, 8], a file for each model, got [6, 7]",
            ["--maps", "{root}/up", "--check", "{root}/other_old.npy", "{root}/other_middle.npy"],
        ),
        (
            "check: expected the vectors of the same items, got [90, 200] vectors",
            ["--maps", "{root}/up", "--check", "{root}/other_old.npy", "{root}/new.npy"],
        ),
    ],
)
def test_the_command_refuses_what_can_not_serve(error, arguments, folder, tmp_path, capsys):
    arguments = [text.format(root=folder) for text in arguments if text != "--maps" or len(arguments) > 1]
    assert main(["upgrade", "--quiet", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert error.format(root=folder) in capsys.readouterr().err


def test_files_without_vectors_are_refused(tmp_path):
    cases = {
        "columns.npy": (np.asfortranarray(np.ones((3, 2))), "is stored by columns; write numpy.ascontiguousarray"),
        "whole.npy": (np.ones((3, 2), int), r"expected floating-point vectors \[items, n\], got int64 \[3, 2\]"),
        "one.npy": (np.ones(3), r"got float64 \[3\]"),
        "none.npy": (np.ones((0, 3)), r"got float64 \[0, 3\]"),
    }
    for name, (array, error) in cases.items():
        np.save(tmp_path / name, array)
        with pytest.raises(ValueError, match=error):
            data.open_vectors("old", tmp_path / name)
    np.savez(tmp_path / "other.npz", ids=np.arange(3))
    with pytest.raises(ValueError, match="expected an array features or vectors or embeddings, got ids"):
        data.open_vectors("old", tmp_path / "other.npz")
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(ValueError, match="can't be read as an array"):
        data.open_vectors("old", tmp_path / "text.npy")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"can't be read as \.npz"):
        data.open_vectors("old", tmp_path / "text.npz")
    (tmp_path / "vectors.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"expected a file that ends in \.npy or \.npz"):
        data.open_vectors("old", tmp_path / "vectors.csv")
    np.save(tmp_path / "short.npy", np.ones((5, 4), np.float32))
    content = (tmp_path / "short.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(content[:-24])
    with pytest.raises(ValueError, match=re.escape("cut off")):
        data.open_vectors("old", tmp_path / "short.npy").read()


def test_recall_among_more_items_is_read_off_a_line_over_their_logarithm():
    found = prediction(0.4)
    assert found.recall_among(800) == pytest.approx(0.3)
    assert found.recall_among(10**9) == 0
    assert "about 0.300 of 800: an extrapolation" in report.summary_table(found, 800).text()
