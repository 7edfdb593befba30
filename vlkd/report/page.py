"""A page put together section by section and written as one file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlkd.errors import UserError
from vlkd.report.gallery import GalleryItem, gallery_markup
from vlkd.report.markup import Markup, escape, join
from vlkd.report.style import STYLE
from vlkd.report.table import Figure, Table, figures_markup, table_markup

# Even if a hostile caption found a way past the escaping, the browser would load and run nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Report:
    """A self-contained HTML page: `section` opens a section, the other methods add to the one open.

    What is added before the first section stands in the page's header. Text is escaped everywhere; only plots, which
    are markup of `vlkd.report.plots`, go in as they are.

    Args:
        title: The page's name and main heading.
        lead: One sentence below it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self._title = title
        self._lead = lead
        self._header: list[Markup] = []
        self._sections: list[tuple[str, list[Markup]]] = []

    def section(self, title: str) -> None:
        """Open a section, which the page's navigation lists."""
        self._sections.append((title, []))

    def heading(self, title: str) -> None:
        """A heading within the section."""
        self._add(f"<h3>{escape(title)}</h3>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add(f"<p>{escape(text, longest=4000)}</p>")

    def figures(self, figures: Sequence[Figure]) -> None:
        """Key figures side by side."""
        self._add(figures_markup(figures))

    def table(self, table: Table) -> None:
        """A table, which scrolls sideways where the screen is narrow."""
        self._add(table_markup(table))

    def plot(self, *plots: Markup) -> None:
        """Plots made by `line_plot` and its like, side by side where there is room."""
        self._add(f'<div class="plots">{join(list(plots))}</div>')

    def gallery(self, items: Sequence[GalleryItem]) -> None:
        """Queries and what they found, or pictures and what is said about them."""
        self._add(gallery_markup(items))

    def details(self, summary: str, settings: Mapping[str, str]) -> None:
        """Names and values, folded away under a line that opens them."""
        table = table_markup(Table(("name", "value"), tuple(settings.items())))
        self._add(f'<details class="names"><summary>{escape(summary)}</summary>{table}</details>')

    def folded(self, summary: str, table: Table) -> None:
        """A table, folded away under a line that opens it."""
        self._add(f"<details><summary>{escape(summary)}</summary>{table_markup(table)}</details>")

    def html(self) -> str:
        """The whole page; the same content always gives the same text."""
        links = [f'<a href="#section-{n}">{escape(title)}</a>' for n, (title, _) in enumerate(self._sections)]
        lead = f'<p class="lead">{escape(self._lead)}</p>' if self._lead else ""
        navigation = f"<nav>{' '.join(links)}</nav>" if links else ""
        sections = [
            f'<section id="section-{n}"><h2>{escape(title)}</h2>\n{join(parts)}\n</section>'
            for n, (title, parts) in enumerate(self._sections)
        ]
        lines = [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(self._title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            f"<header><h1>{escape(self._title)}</h1>{lead}{navigation}\n{join(self._header)}</header>",
            *sections,
            "</main>\n</body>\n</html>\n",
        ]
        return "\n".join(lines)

    def write(self, path: Path) -> Path:
        """Write the page under a temporary name, then rename it: `path` is never half a page.

        Raises:
            UserError: The folder does not exist or cannot be written, or `path` is a folder.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self.html(), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"The report cannot be written to {path} ({error.strerror}); name a file in a folder that exists and "
                "is writable."
            ) from error
        return path

    def _add(self, markup: str) -> None:
        (self._sections[-1][1] if self._sections else self._header).append(Markup(markup))
