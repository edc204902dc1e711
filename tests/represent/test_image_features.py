"""Features of image sets by pretrained models, in Python and on the command line."""

import json
import re
import shutil

import chex
import numpy as np
import pytest
from PIL import Image

from subspace_jax import nn, represent, train
from subspace_jax.cli.main import main
from subspace_jax.represent.gcr import task as classify
from tests.interop.vision_goldens import GOLDEN, jit, loaded, pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ViT for 32 x 32 images with its image processor, and images of three colours in two splits."""
    folder = tmp_path_factory.mktemp("vision")
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "vit" / name, folder / "model" / name)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("blue", "green", "red")):
            place = folder / "photos" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 60, (20 + i, 31, 3), np.uint8)
                image[..., 2 - label] += 180
                Image.fromarray(image).save(place / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", ["vit", "resnet", "swin"])
def test_vision_apply_equals_the_function_of_each_family(name):
    config, params = loaded(name)
    own = {
        "vit": lambda p, x: nn.vision_transformer_apply(config, p, x, capture=(0,)),
        "resnet": lambda p, x: nn.resnet_apply(config, p["params"], p["batch_stats"], x, capture=(0,)),
        "swin": lambda p, x: nn.swin_apply(config, p, x, capture=(0,)),
    }[name]
    one, other = jit(lambda p, x: (own(p, x), nn.vision_apply(config, p, x, capture=(0,), resample=False)))(
        params, pixels(name)
    )
    assert one.pooled.shape == (pixels(name).shape[0], one.pooled.shape[1])
    chex.assert_trees_all_equal(one, other)


def test_vision_apply_refuses_other_configs_and_missing_statistics():
    config, params = loaded("resnet")
    with pytest.raises(ValueError, match="expected params and batch_stats, got"):
        nn.vision_apply(config, params["params"], pixels("resnet"))
    with pytest.raises(TypeError, match=r"config: expected one of .*got dict"):
        nn.vision_apply({}, params, pixels("resnet"))


@pytest.mark.eight_devices
def test_sharded_features_of_images_equal_those_of_one_device(folder):
    images = represent.open_labelled_images(folder / "photos", "train")
    model = represent.open_feature_model(folder / "model")
    assert model.mesh.size == 8
    found = represent.features_of_images(model, images, batch_size=10)  # batches of 16 on 8 devices, 18 images
    assert found.class_names == ("blue", "green", "red")
    assert found.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    config, params = loaded("vit")
    inputs = np.stack([model.prepare(images[i]["inputs"]) for i in range(18)])
    # The weights are random; differences between images are far above the rounding of sums.
    wanted = jit(lambda p, x: nn.vision_apply(config, p, x).pooled)(params, inputs)
    np.testing.assert_allclose(found.features, wanted, atol=2e-4)


def test_features_probe_and_transfer_commands(folder, tmp_path, capsys):
    photos, model = str(folder / "photos"), str(folder / "model")
    for split in ("train", "val"):
        out = str(tmp_path / f"{split}.npz")
        assert main(["features", "--model", model, "--data", photos, "--split", split, "--out", out, "--quiet"]) == 0
    assert "Wrote 9 features of width 32, 3 classes, to" in capsys.readouterr().out
    pair = ["--features", str(tmp_path / "train.npz"), "--test", out]
    for method in (
        ["knn", "--neighbours", "3"],
        ["svm", "--l2", "0.01"],
        ["few-shot", "--shots", "2,4", "--seeds", "2"],
    ):
        assert main(["probe", *pair, "--method", *method]) == 0
        printed = capsys.readouterr().out
        # A random network separates colours too; a single example per class may be an outlier.
        assert min(float(share) for share in re.findall(r"accuracy (\d\.\d+)", printed)) > 0.85
        assert re.search(r"variability \d+\.\d+ degrees; class separation R2 0\.\d+", printed)
    sets = ["--data", f"{photos},cifar10,food101", "--data-dir", str(tmp_path / "none")]
    assert main(["transfer", "--model", model, *sets, "--method", "knn", "--neighbours", "3", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "missing cifar10: the set 'cifar10' is not prepared" in printed
    assert "subspace_jax.data.prepare food101" in printed
    assert "mean of 1 of 3" in printed
    assert main(["transfer", "--model", model, "--data-dir", str(tmp_path / "none"), "--quiet"]) == 2
    assert "none of cifar10, cifar100, food101" in capsys.readouterr().err


def test_features_command_skips_damaged_images_and_reports_them(folder, tmp_path, capsys):
    photos = tmp_path / "photos"
    shutil.copytree(folder / "photos" / "train", photos)
    for name in ("blue/5.png", "red/0.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:60])
    (photos / "green" / "._0.png").write_bytes(b"Mac OS X")
    out = str(tmp_path / "f.npz")
    arguments = ["features", "--model", str(folder / "model"), "--data", str(photos), "--out", out, "--quiet"]
    assert main(arguments) == 2
    assert "blue/5.png: can't be read as an image" in capsys.readouterr().err
    assert main([*arguments, "--skip-unreadable"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 18 images can't be read and are skipped" in printed
    assert "Wrote 16 features of width 32, 3 classes" in printed
    found = represent.read_features(out)
    assert found.labels.tolist() == [0] * 5 + [1] * 6 + [2] * 5
    assert len(np.unique(found.features, axis=0)) == 16


def test_open_labelled_images_suggests_near_names(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"TFDS knows no set 'photo'.*or the folder 'photos'"):
        represent.open_labelled_images("photo", "train", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"photos/vall: no such folder of images; did you mean 'val'"):
        represent.open_labelled_images("photos", "vall", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none/photos: no such folder of images"):
        represent.open_transfer_set("none/photos", tmp_path)
    with pytest.raises(ValueError, match=r"split: expected one of the folders \('train', 'val'\) in photos"):
        represent.open_labelled_images("photos", "")


@pytest.mark.slow
def test_features_of_a_run_are_the_inputs_of_its_head(tmp_path):
    config = classify.default_config()
    config.data.data_dir = str(tmp_path / "sets")
    config.data.image.size, config.data.image.eval_crop = 8, 1.0
    config.model.backbone, config.model.features, config.model.head = "mlp", (4,), "softmax"
    config.train.steps = 1
    config.data.eval_batch_size = 600
    train.run(config, tmp_path / "run", progress=False)
    model = represent.open_feature_model(tmp_path / "run")
    images = represent.open_labelled_images("digits", "test[:20]", tmp_path / "sets")
    found = represent.features_of_images(model, images, batch_size=24)
    restored = train.restore(tmp_path / "run")
    evaluation = restored.phase.data.evaluate["eval"]()
    wanted, labels = represent.features_of(restored.phase.task, restored.state, evaluation)
    np.testing.assert_array_equal(found.labels, labels[:20])
    np.testing.assert_allclose(found.features, wanted[:20], atol=1e-5)


def test_commands_name_missing_and_invalid_files(folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(GOLDEN / "vit" / "config.json", bare)
    common = ["--data", str(folder / "photos"), "--split", "val", "--quiet"]
    out = str(tmp_path / "f.npz")
    (tmp_path / "damaged" / "a").mkdir(parents=True)
    (tmp_path / "damaged" / "a" / "x.png").write_bytes(b"no image")
    model = str(folder / "model")
    for arguments, message in (
        (["features", "--model", str(bare), *common, "--out", out], "preprocessor_config.json"),
        (["features", "--model", str(tmp_path / "none"), *common, "--out", out], "none"),
        (["features", "--model", model, *common, "--out", str(tmp_path / "f.txt")], "ends in .npz"),
        (["features", "--model", model, "--data", str(tmp_path / "damaged"), "--out", out, "--quiet"], "x.png"),
        (["probe", "--features", out, "--test", out], "no such file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    np.savez(out, features=np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"lacks \['labels'\]"):
        represent.read_features(out)
    cases = ((2, "abcd"), (3, "abcd"), (2, "abc"), (2, "acbd"))
    labels = np.arange(3, dtype=np.int32)
    sets = [represent.Features(np.ones((3, n), np.float32), labels, tuple(names)) for n, names in cases]
    for other, message in zip(
        sets[1:], ("one width, got 2 and 3", "4 in training and 3", "label 1 is 'b'"), strict=True
    ):
        with pytest.raises(ValueError, match=message):
            represent.probe_features(sets[0], other)


def test_save_features_and_read_features_round_trip(tmp_path):
    found = represent.Features(np.eye(3, dtype=np.float32), np.arange(3, dtype=np.int32), ("a", "b", "ü"))
    represent.save_features(tmp_path / "f.npz", found, model="m")
    again = represent.read_features(tmp_path / "f.npz")
    assert again.class_names == found.class_names
    np.testing.assert_array_equal(again.features, found.features)
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]
