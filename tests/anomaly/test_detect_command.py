"""The command detect: folders of images and masks, scores, maps, the page, and what it refuses."""

import csv
import html
import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from PIL import Image

from subspace_jax import interop, nn
from subspace_jax.anomaly import image_sets, subspacead
from subspace_jax.anomaly.subspacead import config as fields
from subspace_jax.anomaly.subspacead import report
from subspace_jax.cli.main import main

from .test_subspacead_model import stripes

SMALL = ("--quiet", "--config.side=16", "--config.rotations=0", "--config.batch_size=4")


def write_images(folder, images, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}{suffix}")


def write_mvtec(root, seed=0, normal=6):
    images, masks = stripes(8, seed + 1, defects=4)
    write_images(root / "train" / "good", stripes(normal, seed)[0])
    write_images(root / "test" / "good", images[:4])
    write_images(root / "test" / "hole", images[4:])
    for i, mask in enumerate(masks[4:]):
        truth = root / "ground_truth" / "hole"
        truth.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 * mask.astype(np.uint8)).save(truth / f"{i:03d}_mask.png")


@pytest.fixture(scope="module")
def bottle(tmp_path_factory):
    root = tmp_path_factory.mktemp("mvtec") / "bottle"
    write_mvtec(root)
    (root / "train" / "good" / "broken.png").write_bytes(b"no image")
    (root / "test" / "good" / "empty.png").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def written(bottle, tmp_path_factory):
    """What the command wrote for a category with two files that can't be read."""
    out = tmp_path_factory.mktemp("out")
    found = main(["detect", "--normal", f"{bottle}/train/good", "--test", f"{bottle}/test", "--out", f"{out}",
                  "--threshold", "1.0", *SMALL])  # fmt: skip
    assert found == 0
    return out


def test_detect_writes_scores_maps_metrics_and_a_model(written, bottle):
    assert {path.name for path in written.iterdir() if not path.name.startswith(".")} >= {
        *("scores.csv", "result.json", "report.html", "maps", "models"),
    }
    with (written / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{kind}/{i:03d}.png" for kind in ("good", "hole") for i in range(4)]
    assert [row["label"] for row in rows] == ["0"] * 4 + ["1"] * 4
    assert [row["flagged"] for row in rows[4:]] == ["1"] * 4
    result = json.loads((written / "result.json").read_text())
    assert result["image_auroc"] == 1
    assert result["pixel_auroc"] > 0.95
    assert (result["images"], result["skipped"]) == (8, 2)
    with Image.open(written / "maps" / "bottle" / "hole" / "002.png") as image:
        assert image.size == (16, 16)
    model = subspacead.load_subspacead(written / "models" / "bottle")
    hole = np.asarray(Image.open(bottle / "test" / "hole" / "000.png"))
    assert float(rows[4]["score"]) == pytest.approx(model.score([hole]).scores[0], rel=1e-3)


def test_detect_names_and_counts_what_it_skips(written):
    page = html.unescape((written / "report.html").read_text())
    assert "Skipped, as they can't be read: 2" in page
    assert re.search(r"train/good/broken.png: can't be read as an image", page)
    assert re.search(r"test/good/empty.png: can't be read as an image", page)


def test_the_page_shows_the_highest_scores_first_and_needs_nothing_else(written):
    page = (written / "report.html").read_text()
    names = re.findall(r"<br>(\w+/\d+\.png)</figcaption>", page)
    assert len(names) == 8
    assert all(name.startswith("hole/") for name in names[:4])
    assert page.count('<figure class="flagged">') >= 4
    assert not re.search(r"https?://|<script|<link", page)


def test_the_page_has_the_outline_of_a_known_defect(written):
    assert "A white line is the outline of a known defect." in (written / "report.html").read_text()
    mask = np.zeros((9, 9), bool)
    mask[3:6, 3:6] = True
    drawn = report.outlined(np.full((9, 9, 3), 7, np.uint8), mask)[..., 0]
    np.testing.assert_array_equal(drawn[mask], 7)
    assert np.sum(drawn == 255) == 12  # beside the edges
    assert np.sum(drawn == 0) == 16
    np.testing.assert_array_equal(drawn[:, 4], [7, 0, 255, 7, 7, 7, 255, 0, 7])


def test_detect_replaces_the_folders_of_an_earlier_run(bottle, tmp_path):
    given = ["--normal", f"{bottle}/train/good", "--out", f"{tmp_path}", "--config.shots=1", *SMALL]
    assert main(["detect", "--test", f"{bottle}/test", *given]) == 0
    (tmp_path / "unfinished").mkdir()  # as a run that was killed leaves it
    (tmp_path / "unfinished" / "maps.raw").write_bytes(b"x")
    assert main(["detect", "--test", f"{bottle}/test/good", *given]) == 0
    assert [path.name for path in (tmp_path / "maps").iterdir()] == ["good"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["good"]
    assert not (tmp_path / "unfinished").exists()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_of_detect_opens_in_chromium_and_shows_its_pictures(written, tmp_path):
    def browse(*options):
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", *options]
        page = (written / "report.html").as_uri()
        ended = subprocess.run([CHROMIUM, *options, page], capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr[-2000:]
        # What a page logs and what it can't load come as CONSOLE.
        assert "CONSOLE" not in ended.stderr
        return ended.stdout

    dom = browse("--enable-logging=stderr", "--v=0", "--dump-dom")
    assert dom.count("<figure") == dom.count("<img") == 8
    browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,1000")
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # The frame of what is flagged, and the red of the map's largest values.
    flagged = np.sum(np.abs(pixels - (198, 40, 40)).sum(2) < 12)
    assert flagged > 2000
    hot = (pixels[..., 0] > 120) & (pixels[..., 1] < 110) & (pixels[..., 2] < 110)
    assert np.sum(hot) > flagged + 500


def write_visa(root):
    images, masks = stripes(8, 3, defects=3)
    data = root / "candle" / "Data"
    write_images(data / "Images" / "Normal", images[:5], ".jpg")
    write_images(data / "Images" / "Anomaly", images[5:], ".jpg")
    (data / "Masks" / "Anomaly").mkdir(parents=True)
    lines = ["object,split,label,image,mask"]
    for i in range(5):
        lines.append(f"candle,{'train' if i < 3 else 'test'},normal,candle/Data/Images/Normal/{i:03d}.jpg,")
    for i, mask in enumerate(masks[5:]):
        # Masks of VisA number the kinds of defects.
        Image.fromarray((1 + i) * mask.astype(np.uint8)).save(data / "Masks" / "Anomaly" / f"{i:03d}.png")
        place = f"candle/Data/Images/Anomaly/{i:03d}.jpg,candle/Data/Masks/Anomaly/{i:03d}.png"
        lines.append(f"candle,test,anomaly,{place}")
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(lines) + "\n")


def test_several_categories_are_scored_in_one_call_by_a_config(tmp_path, capsys):
    for i, name in enumerate(("cable", "hazelnut", "screw")):
        write_mvtec(tmp_path / "mvtec" / name, 10 * i, normal=2)
    out, data = tmp_path / "out", tmp_path / "mvtec"
    config = ("--config", "anomaly/mvtec:shots1", "--backbone", "pixels", "--categories", "cable,screw")
    assert main(["detect", "--data", str(data), *config, "--out", str(out), *SMALL]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^cable +1 +8 ", printed, re.MULTILINE)  # one shot
    assert re.search(r"^screw +1 +8 ", printed, re.MULTILINE)
    assert re.search(r"^mean .* 1.0000 ", printed, re.MULTILINE)
    assert re.search(r"^published, not rerun +0.9710", printed, re.MULTILINE)


def test_open_categories_reads_the_split_of_visa(tmp_path):
    write_visa(tmp_path)
    (found,) = image_sets.open_categories(tmp_path)
    assert (found.name, len(found.normal), len(found.test)) == ("candle", 3, 5)
    assert [image.label for image in found.test] == [0, 0, 1, 1, 1]
    assert [image.mask is not None for image in found.test] == [False, False, True, True, True]
    found.test[0].path.unlink()
    with pytest.raises(FileNotFoundError, match=r"1cls.csv, line 5: there is no .*003.jpg"):
        image_sets.open_categories(tmp_path)
    (tmp_path / "split_csv" / "1cls.csv").write_text("object,image\n")
    with pytest.raises(ValueError, match="expected the columns object, split, label, image, mask"):
        image_sets.open_categories(tmp_path)


def test_open_category_takes_labels_of_folders_or_masks_or_none(tmp_path):
    images, masks = stripes(4, defects=1)
    write_images(tmp_path / "normal", images[:2])
    write_images(tmp_path / "flat", images)
    found = image_sets.open_category(tmp_path / "normal", tmp_path / "flat")
    assert [image.label for image in found.test] == [None] * 4
    (tmp_path / "masks").mkdir()
    Image.fromarray(masks[3]).save(tmp_path / "masks" / "003.png")
    found = image_sets.open_category(tmp_path / "normal", tmp_path / "flat", tmp_path / "masks")
    assert [image.label for image in found.test] == [0, 0, 0, 1]
    Image.fromarray(masks[3]).save(tmp_path / "masks" / "009_mask.png")
    with pytest.raises(ValueError, match=r"masks: .*009_mask.png: there is no image 009 in "):
        image_sets.open_category(tmp_path / "normal", tmp_path / "flat", tmp_path / "masks")


def test_detect_warns_of_a_threshold_from_few_images(bottle, tmp_path, caplog):
    given = ["--normal", f"{bottle}/train/good", "--test", f"{bottle}/test/good", "--out", f"{tmp_path}"]
    assert main(["detect", *given, "--threshold", "0.95", *SMALL]) == 0
    assert "the quantile 0.95 lies between the two largest scores" in caplog.text


def test_open_category_knows_nothing_of_images_beside_folders_of_labels(tmp_path):
    images, _ = stripes(3, defects=0)
    for folder in ("normal", "test/good", "test/bent", "test"):
        write_images(tmp_path / folder, images[:2])
    found = image_sets.open_category(tmp_path / "normal", tmp_path / "test")
    assert {image.name: image.label for image in found.test if "001" in image.name} == {
        "001.png": None,
        "bent/001.png": 1,
        "good/001.png": 0,
    }


@pytest.mark.slow
def test_open_backbone_opens_a_model_by_its_folder(tmp_path, monkeypatch):
    sizes = {"width": 16, "num_layers": 2, "num_heads": 2, "mlp_size": 32, "patch_size": 4}
    model = nn.VisionTransformerConfig.dinov2("small", 0, image_size=(12, 12), **sizes)
    params = nn.init_params(jax.random.key(0), model)
    interop.save_vision(tmp_path / "vit", model, params)
    config = fields.default_config()
    config.backbone, config.side, config.layers = str(tmp_path / "vit"), 16, (1, 2)
    backbone, _ = fields.open_backbone(config)
    assert (backbone.side, backbone.width, backbone.layers) == (16, 16, (1, 2))
    monkeypatch.chdir(tmp_path)
    config.backbone = "dinov2-small"
    with pytest.raises(FileNotFoundError, match="`subspace-jax fetch dinov2-small` writes it"):
        fields.open_backbone(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--normal", "{}/train/good"], "--normal, --test: expected both"),
        (["--data", "{}", "--test", "{}/test"], "--data: holds normal and test images"),
        (["--normal", "{}/train/good", "--test", "{}/test", "--categories", "a"], "--categories: is for --data"),
        (["--normal", "{}/train/good", "--test", "{}/test", "--threshold", "2"], "--threshold: expected a quantile"),
        (["--normal", "{}/nothing", "--test", "{}/test"], "nothing: no such folder of images"),
        (["--normal", "{}/train/good", "--test", "{}/void"], "void: no images; expected files ending in"),
        (["--data", "{}/void"], "expected CATEGORY/train/good"),
        (["--data", "{}", "--categories", "cup"], "categories: expected some of bottle of .*, got 'cup'"),
        (["--data", "{}", "--backbone", "nowhere"], "backbone: there is no folder nowhere"),
        (["--data", "{}", "--config.shots=-1"], "--config.shots: expected at least 0, got -1"),
        (["--data", "{}", "--config.shots=1", "--threshold", "0.9"], "expected at least 2 normal images"),
        (["--data", "{}", "--config.methud=cosine"], "method"),
        (["--data", "{}", "--config", "gcr/digits:k8"], "got a config of another task"),
        (["--normal", "{}/bad", "--test", "{}/test"], "normal: bottle: none of 1 images can be read"),
        (["--normal", "{}/train/good", "--test", "{}/bad"], "test: bad: none of 1 images can be read"),
    ],
)
def test_detect_refuses_bad_input_and_writes_nothing(bottle, arguments, message, tmp_path, capsys):
    (bottle / "void").mkdir(exist_ok=True)
    (bottle / "bad").mkdir(exist_ok=True)
    (bottle / "bad" / "x.png").write_bytes(b"no image")
    arguments = [text.format(bottle) for text in arguments]
    assert main(["detect", *arguments, "--out", str(tmp_path / "out"), *SMALL]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")]
