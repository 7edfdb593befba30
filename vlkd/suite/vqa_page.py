"""Answers to questions about pictures as text and as one HTML page with pictures, right and wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vlkd.protocols.vqa import MeasuredAnswers
from vlkd.report import Bar, Estimate, Figure, Report, Table, answer_galleries, grouped_bar_plot
from vlkd.report.table import Value
from vlkd.suite.table_markdown import grid

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlkd.metrics.answers import Tally

_ALL = "all questions"
_YES_NO = ("accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed")


def answers_markdown(found: MeasuredAnswers) -> str:
    """A line per kind and one for all in percent, then the figures of questions of yes or no and of choices."""
    rows = []
    for name, own in _named(found):
        low, high = own.interval
        percents = [f"{100 * own.accuracy:.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
        rows.append([name, str(own.questions), *percents, f"{100 * own.parse_failures:.1f}"])
    lines = [grid(("kind", "questions", "right", "95 % interval", "unparsed"), rows), ""]
    figures, counts = found.measured.metrics, found.measured.counts
    lines.append(f"always the commonest answer of each kind: {100 * figures['commonest_answer']:.1f} right")
    if "exact_match" in figures:
        lines.append(f"exact match of all without options: {100 * figures['exact_match']:.1f}")
    if counts["yes_or_no"]:
        words = ", ".join(f"{name.replace('_', ' ')} {100 * figures[f'yes_no_{name}']:.1f}" for name in _YES_NO)
        lines.append(f"{counts['yes_or_no']:,} of yes or no, yes being positive: {words}")
    if counts["multiple_choice"]:
        lines.append(
            f"{counts['multiple_choice']:,} with options: accuracy {100 * figures['choice_accuracy']:.1f}, unparsed "
            f"{100 * figures['choice_unparsed']:.1f}"
        )
    if found.unreadable:
        key, reason = found.unreadable[0]
        lines.append(f"{len(found.unreadable):,} left out, their pictures cannot be read; first {key}: {reason}")
    return "\n".join(lines)


def answers_page(
    found: MeasuredAnswers, picture: Callable[[str], Image], *, model: str, settings: Mapping[str, Any]
) -> Report:
    """Accuracy by kind with intervals, the other figures, and answers with their pictures.

    Args:
        found: what was measured.
        picture: the decoded picture of a question by its key; raises `UserError` or `OSError` where it cannot be read.
        model: its name.
        settings: how it was measured.
    """
    figures, (low, high) = found.measured.metrics, found.total.interval
    report = Report(
        f"Answers of {model}",
        "Accuracy in percent with 95 % intervals (Wilson). An open answer is right if it equals the truth once both "
        "are normalised.",
    )
    report.figures(
        [
            Figure(
                label="right", value=f"{100 * found.total.accuracy:.1f} %", note=f"{100 * low:.1f} to {100 * high:.1f}"
            ),
            Figure(
                label="commonest answer", value=f"{100 * figures['commonest_answer']:.1f} %", note="without a picture"
            ),
            Figure(label="not parsed", value=f"{100 * figures['parse_failures']:.1f} %"),
            Figure(
                label="questions",
                value=f"{found.total.questions:,}",
                note=f"{len(found.unreadable):,} more without a readable picture",
            ),
        ]
    )
    report.section("By kind")
    bars = {name: [_bar(name, own)] for name, own in _named(found)}
    report.plot(grouped_bar_plot(bars, [model], title="Right answers by kind", x_label="percent"))
    rows: list[list[Value]] = [
        [name, own.questions, _bar_estimate(own), Estimate(value=100 * own.parse_failures)]
        for name, own in _named(found)
    ]
    report.table(Table(("kind", "questions", "right", "unparsed"), rows))
    if found.measured.counts["yes_or_no"]:
        report.heading("Yes or no")
        cells: list[Value] = ["yes is positive", *(Estimate(value=100 * figures[f"yes_no_{n}"]) for n in _YES_NO)]
        report.table(Table(("", *(name.replace("_", " ") for name in _YES_NO)), [cells]))
    for gallery in answer_galleries(found.rows, picture):
        report.section(gallery.title)
        report.text(gallery.note)
        report.gallery(gallery.items)
    report.details("Settings", {name: str(value) for name, value in settings.items()})
    return report


def _named(found: MeasuredAnswers) -> list[tuple[str, Tally]]:
    return [*found.kinds.items(), (_ALL, found.total)]


def _bar(name: str, own: Tally) -> Bar:
    low, high = own.interval
    return Bar(label=name, value=100 * own.accuracy, low=100 * low, high=100 * high)


def _bar_estimate(own: Tally) -> Estimate:
    bar = _bar("", own)
    return Estimate(value=bar.value, low=bar.low, high=bar.high)
