"""Decoding one picture safely: any common file in, an upright RGB image out, or a sentence about what is wrong."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlkd.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The decoders in use; Pillow's others (EPS runs a program) are never reached."""


class BadImage(UserError):
    """A picture that cannot be used: unreadable, cut short, too large, or in a form without defined colours."""


class Unavailable(BadImage):
    """A picture that cannot be read now, because its disk or server does not answer."""


def open_image(data: bytes | Path, *, max_pixels: int = 50_000_000, size_hint: int | None = None) -> Image.Image:
    """Decode a picture to mode RGB, upright (EXIF), alpha and palette transparency on white.

    16-bit grey is scaled to 8 bits, CMYK converted; of an animation the first frame is taken.

    Args:
        data: the file's bytes, or its path.
        max_pixels: width x height above which the picture is refused from its header, before anything is decoded.
        size_hint: decode a JPEG at 1/2, 1/4 or 1/8 where its short side stays at or above this many pixels: several
            times faster. Other formats ignore it.

    Raises:
        BadImage: for anything that is not a whole, decodable picture of at most `max_pixels`.
    """
    name = str(data) if isinstance(data, Path) else f"the picture of {len(data)} bytes"
    with _open_header(data, name) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(
                f"{name} declares {width} x {height} pixels, more than the limit of {max_pixels}; shrink it first."
            )
        if size_hint is not None:
            image.draft(None, (size_hint, size_hint))
        # Decoders of damaged files raise nearly every kind of exception, so all of them are one here.
        try:
            image.load()
            return _to_rgb(_upright(image))
        except BadImage as error:
            raise BadImage(f"{name} {error}") from None
        except Exception as error:
            raise BadImage(f"{name} is damaged ({error}); replace or remove it.") from error


def image_format(data: bytes) -> str:
    """Pillow's name of the file format ("JPEG", "PNG", ...), read from the content; raises `BadImage` for none."""
    with _open_header(data, f"the picture of {len(data)} bytes") as image:
        return "JPEG" if image.format == "MPO" else str(image.format)


def _open_header(data: bytes | Path, name: str) -> Image.Image:
    try:
        # Pillow warns about sizes that `max_pixels` refuses anyway.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(data if isinstance(data, Path) else io.BytesIO(data), formats=FORMATS)
    except FileNotFoundError:
        raise BadImage(f"There is no file {name}; check the path.") from None
    except UnidentifiedImageError:
        raise BadImage(f"{name} is no picture; expected one of {', '.join(FORMATS)}.") from None
    except Exception as error:
        raise BadImage(f"{name} cannot be opened ({error}); replace or remove it.") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; damaged EXIF data leaves a sound picture as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadImage("stores floating-point values without a defined range; convert it to 8 bits.")
    if image.mode.startswith("I"):
        return _grey16_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey16_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit grey, 0..65535, to 8 bits: divided by 257, rounded. Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("stores integers outside 0..65535; convert it to 8 bits.")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
