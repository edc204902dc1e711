"""Image folders and sets of varying size: decoding, classes, damaged files, batches."""

import errno
import io
import itertools
import logging

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from subspace_jax import data
from tests.data.conftest import TinyRgb, tiny_pixels


class Flowers(TinyRgb):
    """Images of no fixed size, as ImageNet has them."""

    def _info(self):
        info = {
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["a", "b"]),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(info),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _generate_examples(self, count):
        for i in range(3):
            yield i, {"image": Image.fromarray(picture(i)), "label": i % 2}


class Stored(Flowers):
    """Files as they are: one with an orientation, one with a palette and a transparent entry."""

    def _generate_examples(self, count):
        # As of many a set, the labels of one split are not known.
        unknown = count == 20
        exif = Image.Exif()
        exif[274] = 6
        palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
        palette.putpalette([9, 9, 9, 200, 10, 20] + [0] * 762)
        for i, (image, options) in enumerate(((Image.fromarray(picture(0)), {"exif": exif}), (palette, {}))):
            file = io.BytesIO()
            image.save(file, "PNG", **options, **({"transparency": 0} if i else {}))
            yield i, {"image": io.BytesIO(file.getvalue()), "label": -i if unknown else i}


class Deep(Flowers):
    """16-bit images."""

    def _info(self):
        info = {
            "image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["a", "b"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(info), supervised_keys=("image", "label")
        )

    def _generate_examples(self, count):
        file = io.BytesIO()
        Image.new("I;16", (2, 2), 40000).save(file, "PNG")
        yield 0, {"image": io.BytesIO(file.getvalue()), "label": 0}


def picture(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (20 + 3 * seed, 31 - 2 * seed, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three classes with two images each, one of them deeper down, and a file that is none."""
    for i, name in enumerate(("cat", "dog", "emu")):
        (tmp_path / name / "more").mkdir(parents=True)
        Image.fromarray(picture(2 * i)).save(tmp_path / name / "a.png")
        Image.fromarray(picture(2 * i + 1)).save(tmp_path / name / "more" / "b.PNG")
        (tmp_path / name / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_gives_bytes_and_labels_in_the_order_of_its_paths(folder):
    images = data.image_folder(folder)
    assert (len(images), images.num_classes, images.class_names) == (6, 3, ("cat", "dog", "emu"))
    for i, example in enumerate(images):
        np.testing.assert_array_equal(example["inputs"], picture(i))
        assert example["labels"] == i // 2
        assert example["labels"].dtype == np.int32
    np.testing.assert_array_equal(images[-1]["inputs"], picture(5))
    with pytest.raises(IndexError):
        images[6]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 100, (100, 100, 100)),
        ("RGBA", (200, 100, 0, 51), (244, 224, 204)),
        ("LA", (100, 255), (100, 100, 100)),
        ("P", 0, (0, 0, 0)),
        ("I;16", 257 * 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_three_channels_of_bytes(mode, color, expected, tmp_path):
    Image.new(mode, (3, 2), color).save(tmp_path / "x.png")
    pixels = data.decode_image((tmp_path / "x.png").read_bytes())
    assert (pixels.shape, pixels.dtype) == ((2, 3, 3), np.uint8)
    # Blending rounds to bytes.
    np.testing.assert_allclose(pixels[0, 0].astype(int), expected, atol=1)


def test_a_damaged_file_is_named_and_counted(folder, caplog):
    whole = (folder / "dog" / "a.png").read_bytes()
    (folder / "dog" / "a.png").write_bytes(whole[: len(whole) // 2])
    (folder / "emu" / "more" / "b.PNG").write_bytes(b"")
    strict = data.image_folder(folder)
    with pytest.raises(ValueError, match=r"dog/a.png: can't be read as an image"):
        strict[2]
    assert list(strict.unreadable) == [str(folder / "dog" / "a.png")]

    with caplog.at_level(logging.WARNING):
        images = data.image_folder(folder, on_unreadable="skip")
    assert (len(images), len(images.unreadable)) == (4, 2)
    for example, seed in zip(images, (0, 1, 3, 4), strict=True):
        np.testing.assert_array_equal(example["inputs"], picture(seed))
        assert example["labels"] == seed // 2
    assert "2 so far" in caplog.text
    assert list(data.image_folder(folder).check()) == list(images.unreadable)


def test_a_folder_of_nothing_but_damaged_files_is_an_error(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "x.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of its 1 images can be read"):
        data.image_folder(tmp_path, on_unreadable="skip")[0]


def test_classes_of_another_set_have_to_be_the_same(folder):
    names = ("emu", "dog", "cat")
    assert data.image_folder(folder, class_names=names)[0]["labels"] == 0
    with pytest.raises(ValueError, match=r"2 classes of class_names, found 3; missing: \['ant'\]; unexpected: \['dog'"):
        data.image_folder(folder, class_names=("ant", "cat"))


def test_what_is_no_folder_of_images_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder of images"):
        data.image_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="expected a folder for each class, found none"):
        data.image_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="cat: no images; expected files ending in one of"):
        data.image_folder(tmp_path)
    (tmp_path / "cat" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="on_unreadable: expected one of"):
        data.image_folder(tmp_path, on_unreadable="ignore")


def test_sets_of_varying_size_are_read(tmp_path, tfds_dir):
    Flowers(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    images = data.image_set("flowers", "train", tmp_path)
    assert (len(images), images.class_names) == (3, ("a", "b"))
    np.testing.assert_array_equal(images[2]["inputs"], picture(2))
    assert [int(x["labels"]) for x in images] == [0, 1, 0]
    np.testing.assert_array_equal(data.image_set("tiny_rgb", "test", tfds_dir)[3]["inputs"], tiny_pixels(7)[0][3])
    digits = data.image_set("digits", "train", tfds_dir)[0]["inputs"]
    assert (digits.shape, digits.max()) == ((8, 8, 3), 255)


def test_sets_hold_files_that_are_decoded_as_any_other_and_8_bits(tmp_path):
    for builder in (Stored, Deep):
        builder(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    images = data.image_set("stored", "train", tmp_path)
    np.testing.assert_array_equal(images[0]["inputs"], np.rot90(picture(0), -1))
    with pytest.raises(ValueError, match="stored train record 1: label -1, expected 0 to 1"):
        images[1]
    images = data.image_set("stored", "test", tmp_path)
    np.testing.assert_array_equal(images[1]["inputs"], [[[255] * 3, [200, 10, 20]]])
    for read in (data.image_set, data.image_source):
        with pytest.raises(ValueError, match=r"one or three 8-bit channels, but .*'deep' are uint16"):
            read("deep", "train", tmp_path)


@pytest.fixture
def partly_damaged(tmp_path):
    """Two classes with twelve images each, of one colour that tells which; 3, 11 and 23 are damaged."""
    for i in range(24):
        folder = tmp_path / "ab"[i // 12]
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (6, 5), (10 * i, 0, 0)).save(folder / f"{i:02}.png")
        if i in (3, 11, 23):
            (folder / f"{i:02}.png").write_bytes((folder / f"{i:02}.png").read_bytes()[:50])
    return tmp_path


def test_images_that_are_left_out_leave_every_other_once_with_its_label(partly_damaged):
    images = data.image_folder(partly_damaged, on_unreadable="skip").map(
        data.ImageProcessor.evaluation(4, as_bytes=True)
    )
    readable = [i for i in range(24) if i not in (3, 11, 23)]
    assert (len(images), len(images.unreadable), images.num_classes) == (21, 3, 2)
    assert [int(example["inputs"][0, 0, 0]) // 10 for example in images] == readable

    def seen(batches):
        rows = [(batch["inputs"][:, 0, 0, 0] // 10, batch["labels"], batch.get("mask")) for batch in batches]
        which, labels, mask = (None if x[0] is None else np.concatenate(x) for x in zip(*rows, strict=True))
        kept = slice(None) if mask is None else mask > 0
        np.testing.assert_array_equal(labels[kept], which[kept] // 12)
        return which[kept].tolist()

    assert seen(data.eval_batches(images, batch_size=8)) == readable
    shares = [seen(data.eval_batches(images, batch_size=8, process=(i, 2))) for i in (0, 1)]
    assert sorted(shares[0] + shares[1]) == readable
    epoch = seen(data.train_batches(images, batch_size=7, seed=0, num_epochs=1))
    assert sorted(epoch) == readable
    assert epoch != readable


def test_an_error_of_the_system_is_no_fault_of_an_image(folder, monkeypatch):
    def failing(source):
        raise OSError(errno.EIO, "Input/output error", source)

    monkeypatch.setattr("subspace_jax.data.sources.folders.decode_image", failing)
    with pytest.raises(OSError, match=r"a.png: Input/output error"):
        data.image_folder(folder, on_unreadable="skip")
    with pytest.raises(OSError, match=r"a.png: Input/output error"):
        data.image_folder(folder)[0]


def test_what_systems_and_archives_leave_behind_is_no_image_and_no_class(folder):
    for name in (".hidden", "__MACOSX", "@eaDir"):
        (folder / name).mkdir()
        (folder / name / "x.png").write_bytes(b"")
    (folder / "cat" / ".cache").mkdir()
    for name in ("._a.png", ".DS_Store", "Thumbs.db", ".cache/x.png"):
        (folder / "cat" / name).write_bytes(b"")
    images = data.image_folder(folder)
    assert (len(images), images.class_names, images.check()) == (6, ("cat", "dog", "emu"), {})


def test_links_are_followed_and_loops_end(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.fromarray(picture(9)).save(elsewhere / "z.jfif", "JPEG")
    (folder / "cat" / "more" / "back").symlink_to(folder / "cat", target_is_directory=True)
    (folder / "cat" / "zoo").symlink_to(elsewhere, target_is_directory=True)
    (folder / "dog" / "gone.png").symlink_to(elsewhere / "none.png")
    assert len(data.image_folder(folder)) == 8
    images = data.image_folder(folder, on_unreadable="skip")
    assert (len(images), list(images.unreadable)) == (7, [str(folder / "dog" / "gone.png")])


def test_what_is_wrong_with_an_image_is_said_with_its_file(folder, monkeypatch):
    Image.new("RGB", (60, 1)).save(folder / "cat" / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"cat/a.png: image of 60 x 1, resized: 780 x 13 pixels"):
        data.image_folder(folder).map(data.ImageProcessor.evaluation(12))[0]
    with pytest.raises(ValueError, match=r"inputs of one shape in a batch, got \[1, 60, 3\] and \[23, 29, 3\]"):
        next(data.eval_batches(data.image_folder(folder), batch_size=2))
    with pytest.raises(FileNotFoundError, match=r"cot: no such folder of images; did you mean 'cat'"):
        data.image_folder(folder / "cot")
    with pytest.raises(FileNotFoundError, match=r"notes.txt: a file, expected a folder of images"):
        data.image_folder(folder / "cat" / "notes.txt")


def test_batches_of_a_folder_depend_on_seed_and_step_alone_and_resume(folder):
    images = data.image_folder(folder)

    def batches(seed=0, **options):
        change = data.TrainImage(8, operations=2, jitter=(0.4, 0.4, 0.4, 0.1), erase=0.5)
        return data.train_batches(images, batch_size=4, seed=seed, transform=change, **options)

    first, again, other = (list(itertools.islice(batches(seed), 3)) for seed in (0, 0, 1))
    assert first[0]["inputs"].shape == (4, 8, 8, 3)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
    assert np.any(first[0]["inputs"] != other[0]["inputs"])
    stream = batches()
    next(stream)
    resumed = batches()
    resumed.set_state(stream.get_state())
    np.testing.assert_array_equal(next(resumed)["inputs"], first[1]["inputs"])
    halves = [next(batches(process=(i, 2)))["inputs"] for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), first[0]["inputs"])


def test_repeated_augmentation_shows_an_example_several_times_in_a_batch(numbered):
    def change(example, rng):
        return {**example, "inputs": example["inputs"] + rng.random(1).astype(np.float32)}

    batches = list(data.train_batches(numbered(13), batch_size=6, seed=0, transform=change, repeats=3, num_epochs=2))
    assert len(batches) == 4
    for batch in batches:
        np.testing.assert_array_equal(batch["labels"], np.repeat(batch["labels"][::3], 3))
        assert len(np.unique(batch["inputs"])) == 6
    seen = [set(np.concatenate([b["labels"] for b in epoch])) for epoch in (batches[:2], batches[2:])]
    assert [len(s) for s in seen] == [4, 4]
    with pytest.raises(ValueError, match="repeats: expected at least 1, got 0"):
        data.train_batches(numbered(13), batch_size=6, seed=0, repeats=0)


def test_evaluation_sees_every_image_once_at_one_size(folder):
    images = data.image_folder(folder).map(data.ImageProcessor.evaluation(12, as_bytes=True))
    (batch,) = data.eval_batches(images, batch_size=8)
    assert batch["inputs"].shape == (8, 12, 12, 3)
    assert batch["inputs"].dtype == np.uint8
    np.testing.assert_array_equal(batch["mask"], [1] * 6 + [0] * 2)
    np.testing.assert_array_equal(batch["inputs"][3], images[3]["inputs"])
