"""Decoding: against Pillow's and numpy's own results, and refusals of hostile or damaged files."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlkd.data.images import BadImage, image_format, open_image


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def ramp(height: int = 40, width: int = 60) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([4 * x, 5 * y, x + y], axis=2).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_give_the_pixels_back(kind: str, tmp_path: Path) -> None:
    data = encode(ramp(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (data, path):
        image = open_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(ramp()))
    assert image_format(data) == kind


def test_alpha_is_composited_on_white() -> None:
    rgba = np.zeros((2, 3, 4), dtype=np.uint8)
    rgba[..., 0] = 200
    rgba[:, 0, 3], rgba[:, 1, 3], rgba[:, 2, 3] = 0, 51, 255
    seen = np.asarray(open_image(encode(Image.fromarray(rgba), "PNG")))
    for column, alpha in enumerate((0.0, 0.2, 1.0)):
        expected = alpha * np.array([200, 0, 0]) + (1 - alpha) * 255
        np.testing.assert_allclose(seen[0, column], expected, atol=1)


def test_transparent_palette_entry_becomes_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    seen = np.asarray(open_image(encode(palette, "PNG", transparency=1)))
    assert seen.tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_grey_16_bit_is_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        seen = np.asarray(open_image(encode(Image.fromarray(values), kind)))
        assert seen[0, :, 0].tolist() == [0, 1, 128, 255]
        assert (seen == seen[..., :1]).all()


def test_grey_and_cmyk() -> None:
    grey = ramp().convert("L")
    np.testing.assert_array_equal(np.asarray(open_image(encode(grey, "PNG")))[..., 2], np.asarray(grey))
    red = open_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red.mode == "RGB"
    np.testing.assert_allclose(np.asarray(red).mean(axis=(0, 1)), [255, 0, 0], atol=4)


@pytest.mark.parametrize(("orientation", "turn"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(orientation: int, turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = np.asarray(open_image(encode(ramp(), "PNG", exif=exif)))
    np.testing.assert_array_equal(seen, np.rot90(np.asarray(ramp()), turn))


def test_size_hint_keeps_the_short_side_and_the_content() -> None:
    data = encode(ramp(400, 640).resize((1280, 800)), "JPEG", quality=95)
    small = open_image(data, size_hint=150)
    assert small.size == (320, 200)  # 1/4: 1/8 would fall below the hint
    whole = open_image(data).resize(small.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(small, dtype=float) - np.asarray(whole, dtype=float)).mean() < 3
    assert open_image(data, size_hint=5000).size == (1280, 800)


@pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_decompression_bomb_is_refused_from_its_header(size: tuple[int, int]) -> None:
    with pytest.raises(BadImage, match=r"limit|exceeds|cannot be opened"):
        open_image(png_header(*size))


def test_pixel_limit_is_inclusive() -> None:
    data = encode(ramp(10, 10), "PNG")
    assert open_image(data, max_pixels=100).size == (10, 10)
    with pytest.raises(BadImage, match="10 x 10 pixels, more than the limit of 99"):
        open_image(data, max_pixels=99)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.4, 0.9])
def test_truncated_files_are_refused(kind: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    with pytest.raises(BadImage):
        open_image(data[: int(part * len(data))])


@pytest.mark.parametrize("data", [b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8\xff" + b"\0" * 50])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        open_image(data)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="There is no file"):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(BadImage):
        open_image(tmp_path)


def test_floating_point_pictures_are_refused() -> None:
    with pytest.raises(BadImage, match="floating-point"):
        open_image(encode(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"))
