"""Queries and the images they found, drawn as one picture: a row per query."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from vlkd.report.gallery import SearchQuery

TILE, GAP, HEADING = 128, 6, 26
"""Pixels of a thumbnail's side, between thumbnails, and of the line above a row."""


def contact_sheet(queries: Sequence[SearchQuery]) -> Image.Image:
    """One row per query: its text, its picture where it is one, and the images it found, best first, with scores."""
    columns = max(1, *(len(query.found) + (query.image is not None) for query in queries))
    row_height = HEADING + TILE + GAP
    sheet = Image.new("RGB", (GAP + columns * (TILE + GAP), GAP + len(queries) * row_height), "white")
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(15), ImageFont.load_default(11)
    for row, query in enumerate(queries):
        top = GAP + row * row_height
        pen.text((GAP, top + 3), query.text, fill="black", font=large)
        tiles = [(found.image, f"{found.score:.3f}") for found in query.found]
        if query.image is not None:
            tiles.insert(0, (query.image, "query"))
        for column, (image, words) in enumerate(tiles):
            place = (GAP + column * (TILE + GAP), top + HEADING)
            sheet.paste(ImageOps.pad(image, (TILE, TILE), color="#dddddd"), place)
            box = pen.textbbox((place[0] + 4, place[1] + 3), words, font=small)
            pen.rectangle((box[0] - 3, box[1] - 2, box[2] + 3, box[3] + 2), fill="white")
            pen.text((place[0] + 4, place[1] + 3), words, fill="black", font=small)
    return sheet
