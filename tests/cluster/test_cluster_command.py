"""The command that clusters features."""

import contextlib
import json

import jax
import numpy as np
import pytest
from PIL import Image

from subspace_jax import interop, linalg, metrics, nn
from subspace_jax.cli.main import main
from subspace_jax.cluster.classical import run
from tests.cluster.test_clustering_common import subspaces


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    x, y, _ = subspaces(1, 12, 2, 3, 20)
    np.savez(folder / "features.npz", features=(3 * x).astype(np.float16), labels=y + 5)
    np.save(folder / "nan.npy", np.where(np.arange(60)[:, None] == 7, np.nan, x).astype(np.float32))
    np.save(folder / "short.npy", y[:9])
    rng = np.random.default_rng(0)
    for kind, pattern in {"columns": np.ones((8, 1)), "rows": np.ones((1, 8))}.items():
        (folder / "images" / kind).mkdir(parents=True)
        for i in range(10):
            stripes = np.resize([0, 255], 8).reshape(pattern.shape[::-1]) * pattern
            noise = rng.integers(0, 30, (8, 8))
            Image.fromarray(np.clip(stripes + noise, 0, 255).astype(np.uint8)).save(
                folder / "images" / kind / f"{i}.png"
            )
    (folder / "images" / "rows" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.mark.slow
def test_cluster_finds_subspaces_chooses_k_by_the_eigengap_and_writes_report_and_picture(files, tmp_path, capsys):
    arguments = ["cluster", f"--input={files}/features.npz", f"--labels={files}/features.npz", f"--out={tmp_path}"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main([*arguments, "--seeds=2", "--neighbors=15"]) == 0
    labels, report = np.load(tmp_path / "labels.npy"), json.loads((tmp_path / "clusters.json").read_text())
    assert (report["k"], report["chosen"], sum(report["sizes"])) == (3, True, 60)
    assert metrics.clustering_accuracy(np.repeat([0, 1, 2], 20), labels) == report["scores"]["accuracy"][0] > 0.9
    assert len(report["agreement"]) == 1
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] == report["scores"]["accuracy"][0]
    assert (tmp_path / "clusters.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "3 clusters, chosen by the eigengap, of 20 to 20 items" in printed
    assert "labels.npy: the cluster of each item" in printed
    assert "clusters.png: items by cluster, and the affinity in blocks\n" in printed


@pytest.mark.slow
def test_cluster_runs_without_a_graph_and_without_labels(files, tmp_path, capsys):
    arguments = ["cluster", f"--input={files}/features.npz", f"--out={tmp_path}", "--seeds=1", "--k=3", "--raw"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main([*arguments, "--method=k-subspaces", "--dim=2"]) == 0
    assert "scores" not in json.loads((tmp_path / "clusters.json").read_text())
    assert "clusters.png: items by cluster\n" in capsys.readouterr().out


@pytest.mark.slow
def test_cluster_takes_images_whose_folders_are_labels_and_skips_what_is_no_image(files, tmp_path, capsys):
    arguments = ["cluster", f"--images={files}/images", f"--out={tmp_path}", "--seeds=1", "--k=2", "--neighbors=5"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Skipped 1 file that can't be read: " in printed
    assert "images.png: some images of each cluster" in printed
    assert json.loads((tmp_path / "clusters.json").read_text())["scores"]["accuracy"][0] == 1
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    assert lines[0] == "image,cluster"
    labels = np.load(tmp_path / "labels.npy").tolist()
    assert [line.split(",") for line in lines[1:]] == [
        [f"{kind}/{i}.png", str(labels[10 * at + i])] for at, kind in enumerate(("columns", "rows")) for i in range(10)
    ]
    assert (tmp_path / "images.png").read_bytes().startswith(b"\x89PNG")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # features have no pictures
        assert main(["cluster", f"--input={files}/features.npz", f"--out={tmp_path}", "--seeds=1", "--k=3"]) == 0
    assert not (tmp_path / "images.png").exists()
    assert not (tmp_path / "labels.csv").exists()


@pytest.mark.slow
def test_cluster_takes_a_set_of_tensorflow_datasets_and_a_model(files, tmp_path):
    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 32, "patch_size": 4}
    model = nn.VisionTransformerConfig.dinov2("small", 0, image_size=(8, 8), **sizes)
    interop.save_vision(tmp_path / "vit", model, nn.init_params(jax.random.key(0), model))
    side = {"height": 8, "width": 8}
    fields = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 8},
        "crop_size": side,
        "resample": 3,
    }
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(fields))
    arguments = ["cluster", "--input=tfds:digits", "--split=test[:60]", f"--out={tmp_path}/out", "--seeds=1", "--k=10"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main([*arguments, f"--backbone={tmp_path}/vit"]) == 0
    report = json.loads((tmp_path / "out" / "clusters.json").read_text())
    assert (report["input"], sum(report["sizes"])) == ("tfds:digits", 60)
    assert report["scores"]["accuracy"][0] > 0.2
    assert not (tmp_path / "out" / "labels.csv").exists()


@pytest.mark.parametrize(("n", "most"), [(2, 1), (60, 7), (10000, 30)])
def test_candidates_of_the_eigengap_end_at_the_root_of_n_and_30(n, most, monkeypatch):
    def embedding(graph, k):
        values = np.linspace(1, 0.5, k)
        values[-1] = 0  # the widest gap is the last one
        return linalg.SpectralEmbedding(None, values, None)

    monkeypatch.setattr(linalg, "spectral_embedding", embedding)
    assert run._by_eigengap(None, n) == most


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        ("{root}/nan.npy: expected finite vectors, got NaN or infinity in 1: vector 7", ["--input={root}/nan.npy"]),
        ("input: {root}/none.npy: no such file", ["--input={root}/none.npy"]),
        ("--k: expected 1 to 60, the number of items in", ["--k=61"]),
        ("--k: expected 1 to 60, the number of items in", ["--k=0"]),
        ("--k: expected a number of clusters, for kmeans has no graph", ["--method=kmeans"]),
        ("--dim: is for k-subspaces, not for tsc", ["--dim=2"]),
        ("--neighbors: expected 1 or more, got 0", ["--neighbors=0"]),
        ("--dim: expected 1 to 12, the width of {root}/features.npz", ["--method=k-subspaces", "--k=3", "--dim=13"]),
        ("--seed: expected 0 to 4294967293, got -1", ["--seed=-1"]),
        ("--seeds: expected at least 1, got 0", ["--seeds=0"]),
        ("--backbone: is for images, by --images DIR or", ["--backbone=dinov2-small"]),
        ("--split: is for --input tfds:NAME", ["--split=train"]),
        ("labels: {root}/short.npy: expected one for each of 60 vectors, got 9", ["--labels={root}/short.npy"]),
    ],
)  # fmt: skip
def test_cluster_refuses_what_can_not_serve_and_writes_nothing(error, arguments, files, tmp_path, capsys):
    given = [f"--input={files}/features.npz", *(text.format(root=files) for text in arguments)]
    assert main(["cluster", f"--out={tmp_path}/out", *given]) == 2
    assert error.format(root=files) in capsys.readouterr().err
    out = tmp_path / "out"
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize(
    ("error", "given"),
    [
        ("one of the arguments --input --images is required", []),
        ("argument --images: not allowed with argument --input", ["--input={root}/features.npz", "--images={root}"]),
        ("{root}/none: no such folder of images", ["--images={root}/none"]),
        ("--backbone: there is no {root}/none", ["--images={root}/images", "--backbone={root}/none"]),
        ("TFDS knows no set", ["--input=tfds:digitz"]),
        ("--k: expected 1 to 20, the number of items in {root}/images", ["--images={root}/images", "--k=21"]),
        ("gamma: expected more than 1, got 1.0", ["--input={root}/features.npz", "--method=lrr-l21", "--gamma=1"]),
    ],
)
def test_cluster_refuses_other_inputs_that_are_not_there(error, given, files, tmp_path, capsys):
    found = []
    with contextlib.suppress(SystemExit):  # of the parser
        found.append(main(["cluster", f"--out={tmp_path}/out", *(text.format(root=files) for text in given)]))
    assert found in ([], [2])
    assert error.format(root=files) in capsys.readouterr().err
    out = tmp_path / "out"
    assert not out.exists() or not list(out.iterdir())
