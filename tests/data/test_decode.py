"""Decoding: one way from files, bytes and Pillow images to 8-bit RGB, with the right pixels or a named refusal."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from subspace_jax import data

PLAIN = data.ImageProcessor(size=None, crop=None, scale=1.0)


def stored(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width, height, depth, color, rows, transparent=b""):
    """A PNG as Pillow doesn't write it."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    key = chunk(b"tRNS", transparent) if transparent else b""
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + key + pixels + chunk(b"IEND", b"")


def tiff(pixels, bits, photometric, width):
    """A gray TIFF of one row as Pillow doesn't write it."""
    tags = [(256, 4, width), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, 1), (279, 4, len(pixels))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory


def numbers(image):
    """The channels of gray, or the pixels in one row."""
    pixels = data.decode_image(image).astype(int)
    return pixels[0, :, 0].tolist() if (pixels == pixels[..., :1]).all() else pixels[0].tolist()


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("La", (100, 255), (100, 100, 100)),
        ("RGBa", (40, 20, 0, 51), (244, 224, 204)),
        ("PA", (0, 0), (255, 255, 255)),
        ("RGBX", (200, 100, 0, 0), (200, 100, 0)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("YCbCr", (255, 128, 128), (255, 255, 255)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
        ("I;16B", 257 * 77, (77, 77, 77)),
        ("I;16L", 257 * 77, (77, 77, 77)),
    ],
)
def test_decode_image_takes_pillow_images_of_every_mode_with_a_known_range(mode, color, expected):
    pixels = data.decode_image(Image.new(mode, (3, 2), color))
    assert (pixels.shape, pixels.dtype) == ((2, 3, 3), np.uint8)
    np.testing.assert_allclose(pixels[0, 0].astype(int), expected, atol=1)  # blending rounds to bytes


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (png(2, 1, 1, 0, [b"\x40"], struct.pack(">H", 0)), [255, 255]),
        (png(4, 1, 2, 0, [b"\x1b"], struct.pack(">H", 1)), [0, 255, 170, 255]),
        (png(2, 1, 4, 0, [b"\x07"], struct.pack(">H", 7)), [0, 255]),
        (png(3, 1, 16, 0, [struct.pack(">3H", 0, 20000, 40000)], struct.pack(">H", 20000)), [0, 255, 156]),
        (png(2, 1, 16, 2, [struct.pack(">6H", *[0, 40000] * 3)]), [[0, 156, 0], [156, 0, 156]]),
        (png(2, 1, 16, 4, [struct.pack(">4H", 20000, 65535, 20000, 0)]), [78, 255]),
        (b"P5 2 1 1023\n" + struct.pack(">2H", 0, 1023), [0, 255]),
        (tiff(struct.pack("<3H", 0, 40000, 65535), 16, 1, 3), [0, 156, 255]),
        (tiff(struct.pack("<3H", 0, 40000, 65535), 16, 0, 3), [255, 99, 0]),
        (tiff(bytes([0xFF, 0xF0, 0x00]), 12, 1, 2), [255, 0]),
    ],
    ids=[
        "1 bit",
        "2 bits",
        "4 bits",
        "16 bits",
        "RGB of 16",
        "LA of 16",
        "PGM of 10",
        "TIFF",
        "white is zero",
        "12 bits",
    ],
)
def test_decode_image_scales_every_depth_to_8_bits_and_knows_its_transparent_color(image, expected):
    assert numbers(image) == expected
    np.testing.assert_array_equal(PLAIN(Image.open(io.BytesIO(image))), data.decode_image(image))


def test_decode_image_blends_transparent_entries_of_a_palette():
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 200, 10, 20, 100, 100, 100] + [0] * 759)
    wanted = np.array([[255, 255, 255], [200, 10, 20], [100, 100, 100]])
    for kind, transparent in (("PNG", 0), ("GIF", 0), ("PNG", bytes([0, 255, 255]))):
        np.testing.assert_array_equal(data.decode_image(stored(palette, kind, transparency=transparent))[0], wanted)
    half = data.decode_image(stored(palette, transparency=bytes([255, 128, 255])))[0, 1].astype(int)
    np.testing.assert_allclose(half, 255 + (wanted[1] - 255) * 128 / 255, atol=1)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (stored(Image.new("F", (2, 2), 0.5), "TIFF"), "floating-point pixels"),
        (stored(Image.new("I", (2, 2), 70000), "TIFF"), "32-bit or signed integer pixels"),
        (Image.new("F", (2, 2), float("nan")), "floating-point pixels"),
        (Image.new("I", (2, 2), 5), "32-bit or signed integer pixels"),
        (png(1, 1, 16, 2, [bytes(6)], bytes(6)), "16-bit RGB with a transparent color"),
    ],
)
def test_decode_image_refuses_pixels_of_unknown_range(image, message):
    with pytest.raises(ValueError, match=message):
        data.decode_image(image)
    with pytest.raises(ValueError, match=message):
        PLAIN(image if isinstance(image, Image.Image) else Image.open(io.BytesIO(image)))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_decode_image_applies_the_exif_orientation_of_files_and_pillow_images(kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    file = stored(Image.fromarray(pixels), kind, exif=exif, **lossless)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))))
    assert wanted.shape == ((7, 5, 3) if orientation in (5, 6, 7, 8) else (5, 7, 3))
    np.testing.assert_array_equal(data.decode_image(file), wanted)
    np.testing.assert_array_equal(PLAIN(Image.open(io.BytesIO(file))), wanted)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_decode_image_takes_the_first_of_several_frames(kind, options):
    frames = [Image.new("RGB", (4, 3), color) for color in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    file = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(data.decode_image(file), np.asarray(frames[0]))


@pytest.mark.filterwarnings("error")
def test_images_of_too_many_pixels_are_refused_with_file_and_size_before_they_are_decoded(tmp_path, monkeypatch):
    rows = zlib.compress(bytes(100))  # the header alone says 30000 x 20000
    head = png(30000, 20000, 8, 0, [b""])
    (tmp_path / "bomb.png").write_bytes(head.replace(zlib.compress(b"\0"), rows))
    with pytest.raises(ValueError, match=r"bomb.png: image: 30000 x 20000 pixels"):
        data.decode_image(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image = Image.new("L", (15, 10))
    for kind in ("PNG", "WEBP", "TIFF", "GIF", "JPEG"):
        with pytest.raises(ValueError, match=r"15 x 10 pixels.*at most 100"):
            data.decode_image(stored(image, kind))
    with pytest.raises(ValueError, match=r"15 x 10 pixels"):
        PLAIN(image)
    with pytest.raises(ValueError, match=r"15 x 10 pixels"):
        PLAIN(np.zeros((10, 15, 3), np.uint8))


def test_decode_image_names_what_it_can_not_read(tmp_path):
    whole = stored(Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)))
    for content in (b"", b"no image", whole[:40], whole[:-30], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(OSError, match=r"x.png: can't be read as an image: \w+: .") as caught:
            data.decode_image(tmp_path / "x.png")
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        data.decode_image(tmp_path / "none.png")
    with pytest.raises(TypeError, match="source: expected a path, bytes or a Pillow image, got int"):
        data.decode_image(3)
    with pytest.raises(ValueError, match="0 x 5 pixels; expected at least one"):
        data.decode_image(Image.new("RGB", (0, 5)))
