"""Duplicates between two sets of pictures, side by side on one HTML page."""

from __future__ import annotations

from vlkd.errors import UserError
from vlkd.report import Exhibit, ExhibitLine, Figure, Report
from vlkd.suite.duplicates import Duplicate, Found, Kind, Pictures

KINDS: dict[Kind, str] = {
    "same file": "Equal bytes",
    "near": "Saved again, resized or slightly changed",
    "mirrored": "Mirrored",
    "similar": "Close in the model's embeddings; look whether they are the same",
}
SHOWN = 30
"""Pairs of each kind on the page, those that differ most."""


def duplicates_page(found: Found, train: Pictures, data: Pictures, train_name: str, data_name: str) -> Report:
    """Counts, then the pairs of each kind, the least alike first: those are the ones to check."""
    report = Report(
        "Duplicates between training and evaluation data",
        f"Left: {train_name} ({len(train):,} pictures). Right: {data_name} ({len(data):,} pictures).",
    )
    report.figures(
        [
            Figure(label=kind, value=f"{count:,}", note=f"{100 * count / len(data):.2g} % of the evaluation pictures")
            for kind in KINDS
            if (count := found.images(kind))
        ]
    )
    bad = len(found.unreadable_train), len(found.unreadable_data)
    if any(bad):
        report.text(f"Not compared because unreadable: {bad[0]:,} training and {bad[1]:,} evaluation pictures.")
    if not found.duplicates:
        report.text("No duplicate was found. Crops, collages and strong changes of colour are not looked for.")
    for kind, title in KINDS.items():
        pairs = sorted((pair for pair in found.duplicates if pair.kind == kind), key=_likeness)
        if not pairs:
            continue
        report.section(title)
        shown = pairs[:SHOWN]
        report.text(
            f"{len(shown):,} of {len(pairs):,} pairs" + (", the least alike ones." if len(pairs) > SHOWN else ".")
        )
        report.gallery([card for pair in shown if (card := _card(pair, train, data)) is not None])
    return report


def _likeness(pair: Duplicate) -> float:
    return -pair.distance if pair.distance is not None else pair.similarity or 0.0


def _card(pair: Duplicate, train: Pictures, data: Pictures) -> Exhibit | None:
    try:
        images = [(train.image(pair.train), train.keys[pair.train]), (data.image(pair.data), data.keys[pair.data])]
    except UserError:
        return None
    captions = [*train.captions[pair.train][:1], *data.captions[pair.data][:1]]
    distance = f"distance {pair.distance:.3f}" if pair.distance is not None else f"cosine {pair.similarity:.3f}"
    return Exhibit(images=images, lines=[ExhibitLine(who="caption", text=text) for text in captions], verdict=distance)
