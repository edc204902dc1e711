"""The command that clusters a file of images by deep subspace clustering."""

import json

import jax
import numpy as np
import pytest

from subspace_jax.cli.main import main
from subspace_jax.cluster import dsc


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    images = dsc.subspace_images(0, 10)
    x = images.inputs[..., 0]
    np.savez(folder / "images.npz", images=x, labels=images.labels)
    np.save(folder / "nan.npy", np.where(np.arange(30)[:, None, None] == 7, np.nan, x))
    np.save(folder / "odd.npy", x[:, :7])
    np.save(folder / "flat.npy", x.reshape(30, -1))
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.savez(folder / "other.npz", pixels=x)
    np.save(folder / "number.npy", np.float32(1))
    (folder / "text.npy").write_text("no array")
    (folder / "cut.npz").write_bytes((folder / "images.npz").read_bytes()[:500])
    return folder


@pytest.mark.slow
def test_cluster_by_dsc_writes_labels_report_and_picture(files, tmp_path):
    given = ["--method=dsc", "--k=3", "--keep=5", "--seeds=1", f"--input={files}/images.npz", f"--out={tmp_path}"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert main(["cluster", *given, f"--labels={files}/images.npz"]) == 0
    report = json.loads((tmp_path / "clusters.json").read_text())
    assert sum(report["sizes"]) == len(np.load(tmp_path / "labels.npy")) == 30
    assert report["scores"]["accuracy"][0] > 0.8
    assert (tmp_path / "clusters.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        ("--k: expected a number of clusters, for dsc is given it", []),
        ("--k: expected 2 to 30, the number of examples, got 1", ["--k=1"]),
        ("--keep: expected 1 to 30, the number of examples, got 31", ["--k=3", "--keep=31"]),
        ("--keep: is for dsc, not for tsc", ["--k=3", "--keep=3", "--method=tsc"]),
        ("--neighbors: is for tsc and spectral, not for dsc", ["--k=3", "--neighbors=3"]),
        ("--raw: is not for dsc", ["--k=3", "--raw"]),
        ("nan.npy: expected finite images, got NaN or infinity in 1: 7", ["--k=3", "--input={root}/nan.npy"]),
        ("odd.npy: expected sides that are multiples of 2", ["--k=3", "--input={root}/odd.npy"]),
        ("flat.npy: expected images [n, height, width, channels]", ["--k=3", "--input={root}/flat.npy"]),
        ("words.npy: expected floating-point numbers or bytes", ["--k=3", "--input={root}/words.npy"]),
        ("other.npz: expected an array images, got ['pixels']", ["--k=3", "--input={root}/other.npz"]),
        ("text.npy: expected .npy, or .npz with images", ["--k=3", "--input={root}/text.npy"]),
        ("cut.npz: expected .npy, or .npz with images", ["--k=3", "--input={root}/cut.npz"]),
        ("number.npy: expected images [n, height", ["--k=3", "--input={root}/number.npy"]),
        ("input: {root}: no such file", ["--k=3", "--input={root}"]),
        ("none.npy: no such file", ["--k=3", "--input={root}/none.npy"]),
    ],
)
def test_cluster_by_dsc_refuses_what_can_not_serve_and_writes_nothing(error, arguments, files, tmp_path, capsys):
    given = ["--method=dsc", f"--input={files}/images.npz", *(text.format(root=files) for text in arguments)]
    assert main(["cluster", f"--out={tmp_path}/out", *given]) == 2
    assert error.format(root=files) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
