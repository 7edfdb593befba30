"""Galleries of queries and what they found, with thumbnails embedded in the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from vlkd.report.markup import Markup, escape, join

THUMBNAIL = 160
"""Longest side of an embedded picture in pixels."""

NEAR = 10
"""Up to this rank a query counts as nearly right."""


@dataclass(frozen=True, kw_only=True)
class RankedImage:
    """An image that a text query found; `right` if it is one the text belongs to."""

    image: Image
    score: float
    right: bool
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class RankedText:
    """A caption that an image query found; `right` if it is one of the image's own."""

    text: str
    score: float
    right: bool


@dataclass(frozen=True, kw_only=True)
class TextQuery:
    """A text, the images it found first, best first, and the rank of the best right one (from 1) in the gallery.

    `missed` is the right image, to be shown after the others when it is not among them.

    Raises:
        ValueError: The rank does not lie in the gallery.
    """

    text: str
    found: Sequence[RankedImage]
    rank: int
    gallery_size: int
    missed: RankedImage | None = None

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.gallery_size)


@dataclass(frozen=True, kw_only=True)
class ImageQuery:
    """An image, the captions it found first, best first, and the rank of the best right one (from 1) in the gallery.

    `missed` is a right caption, to be shown after the others when none is among them.

    Raises:
        ValueError: The rank does not lie in the gallery.
    """

    image: Image
    found: Sequence[RankedText]
    rank: int
    gallery_size: int
    missed: RankedText | None = None
    label: str = ""

    def __post_init__(self) -> None:
        _check_rank(self.rank, self.gallery_size)


@dataclass(frozen=True, kw_only=True)
class FoundImage:
    """An image that a search found; nothing is known about whether it is right."""

    image: Image
    score: float
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class SearchQuery:
    """A text that was searched for, or an image and its name, and the images found, best first."""

    text: str
    found: Sequence[FoundImage]
    image: Image | None = None


@dataclass(frozen=True, kw_only=True)
class ExhibitLine:
    """A line beside a picture: who says what, `right` or wrong, or neither."""

    who: str
    text: str
    right: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """One picture, or several side by side, each with its name, and lines of text about them.

    `verdict` is a word or two in the corner, good or bad news, or neither.
    """

    images: Sequence[tuple[Image, str]]
    lines: Sequence[ExhibitLine] = ()
    verdict: str = ""
    good: bool | None = None


GalleryItem = TextQuery | ImageQuery | SearchQuery | Exhibit


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Queries under one heading: the best, the worst, ten sentences."""

    title: str
    items: Sequence[GalleryItem]
    note: str = ""


def gallery_markup(items: Sequence[GalleryItem]) -> Markup:
    """The items as cards side by side."""
    return Markup(f'<div class="gallery">{join([_card(item) for item in items])}</div>')


def _card(item: GalleryItem) -> Markup:
    if isinstance(item, SearchQuery):
        return _search_query(item)
    if isinstance(item, Exhibit):
        return _exhibit(item)
    return _text_query(item) if isinstance(item, TextQuery) else _image_query(item)


def thumbnail(image: Image) -> str:
    """The image as a JPEG data URI, shrunk to at most `THUMBNAIL` pixels on its longest side; never enlarged."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _text_query(query: TextQuery) -> Markup:
    tiles = [_tile(image, f"{place}") for place, image in enumerate(query.found, start=1)]
    if query.missed is not None:
        tiles.append(_tile(query.missed, f"{query.rank}", missed=True))
    return Markup(
        f'<article class="query"><header><q dir="auto">{escape(query.text)}</q>{_chip(query.rank, query.gallery_size)}'
        f'</header><ol class="tiles" style="--tiles:{max(len(tiles), 5)}">{join(tiles)}</ol></article>'
    )


def _search_query(query: SearchQuery) -> Markup:
    tiles = [
        Markup(
            f"<li>{_picture(found.image, found.label or f'found at rank {place}')}"
            f'<span class="place"><b>{place}</b> <span>{found.score:.3f}</span></span>'
            f'<span class="label">{escape(found.label)}</span></li>'
        )
        for place, found in enumerate(query.found, start=1)
    ]
    if query.image is not None:
        tiles.insert(
            0, Markup(f'<li>{_picture(query.image, "query image")}<span class="place"><b>query</b></span></li>')
        )
    return Markup(
        f'<article class="query"><header><q dir="auto">{escape(query.text)}</q></header>'
        f'<ol class="tiles" style="--tiles:{max(len(tiles), 5)}">{join(tiles)}</ol></article>'
    )


def _image_query(query: ImageQuery) -> Markup:
    lines = [_line(text, f"{place}") for place, text in enumerate(query.found, start=1)]
    if query.missed is not None:
        lines.append(_line(query.missed, f"{query.rank}", missed=True))
    label = f"<figcaption>{escape(query.label)}</figcaption>" if query.label else ""
    return Markup(
        f'<article class="query image"><figure>{_picture(query.image, query.label or "query image")}{label}</figure>'
        f"<div>{_chip(query.rank, query.gallery_size)}"
        f'<ol class="captions">{join(lines)}</ol></div></article>'
    )


def _exhibit(item: Exhibit) -> Markup:
    state = "near" if item.good is None else "hit" if item.good else "miss"
    chip = f'<span class="chip {state}">{escape(item.verdict)}</span>' if item.verdict else ""
    lines = [
        Markup(
            f'<li class="{"right" if line.right else "wrong"}"><b>{_mark(bool(line.right))}{escape(line.who)}</b>'
            f'<span class="caption" dir="auto">{escape(line.text)}</span></li>'
        )
        for line in item.lines
    ]
    figures = [
        f"<figure>{_picture(image, label)}<figcaption>{escape(label)}</figcaption></figure>"
        for image, label in item.images
    ]
    words = f'<ol class="captions">{join(lines)}</ol>' if lines else ""
    if len(figures) == 1:
        return Markup(f'<article class="query image">{figures[0]}<div>{chip}{words}</div></article>')
    return Markup(f'<article class="query">{chip}<div class="pair">{"".join(figures)}</div>{words}</article>')


def _tile(found: RankedImage, place: str, *, missed: bool = False) -> Markup:
    verdict = "right" if found.right else "wrong"
    label = f'<span class="label">{escape(found.label)}</span>' if found.label else ""
    return Markup(
        f'<li class="{_classes(found.right, missed)}">'
        f"{_picture(found.image, found.label or f'found at rank {place}, {verdict}')}"
        f'<span class="place"><b>{_mark(found.right)}{place}</b> <span>{found.score:.3f}</span></span>{label}</li>'
    )


def _line(found: RankedText, place: str, *, missed: bool = False) -> Markup:
    return Markup(
        f'<li class="{_classes(found.right, missed)}"><b>{_mark(found.right)}{place}</b>'
        f'<span class="caption" dir="auto">{escape(found.text)}</span><span class="score">{found.score:.3f}</span></li>'
    )


def _picture(image: Image, words: str) -> str:
    return f'<img src="{thumbnail(image)}" alt="{escape(words)}">'


def _chip(rank: int, gallery_size: int) -> str:
    state = "hit" if rank == 1 else "near" if rank <= NEAR else "miss"
    return f'<span class="chip {state}">rank {rank:,} of {gallery_size:,}</span>'


def _classes(right: bool, missed: bool) -> str:
    return ("right" if right else "wrong") + (" missed" if missed else "")


def _mark(right: bool) -> str:
    # Not by colour alone.
    return "✓ " if right else ""


def _check_rank(rank: int, gallery_size: int) -> None:
    if not 1 <= rank <= gallery_size:
        raise ValueError(f"Found rank {rank} in a gallery of {gallery_size}; expected a rank from 1 to the size.")
