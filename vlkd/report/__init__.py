"""Reports: one self-contained HTML page with tables, plots and galleries, knowing nothing of training.

A page needs no network, no script and no font of its own. All text is escaped: captions come from anywhere.
"""

from vlkd.report.answer_galleries import answer_galleries
from vlkd.report.gallery import (
    Exhibit,
    ExhibitLine,
    FoundImage,
    Gallery,
    ImageQuery,
    RankedImage,
    RankedText,
    SearchQuery,
    TextQuery,
)
from vlkd.report.grouped_bars import grouped_bar_plot
from vlkd.report.page import Report
from vlkd.report.plots import Bar, bar_plot, line_plot
from vlkd.report.run import read_metrics, write_run_report
from vlkd.report.scatter import Dot, scatter_plot
from vlkd.report.table import Estimate, Figure, Table

__all__ = [
    "Bar",
    "Dot",
    "Estimate",
    "Exhibit",
    "ExhibitLine",
    "Figure",
    "FoundImage",
    "Gallery",
    "ImageQuery",
    "RankedImage",
    "RankedText",
    "Report",
    "SearchQuery",
    "Table",
    "TextQuery",
    "answer_galleries",
    "bar_plot",
    "grouped_bar_plot",
    "line_plot",
    "read_metrics",
    "scatter_plot",
    "write_run_report",
]
