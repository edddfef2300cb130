"""Records to tables, figures and one self-contained HTML page.

Imports no torch, and matplotlib only when a chart is drawn.
"""

from deltafl.report.bars import task_bars
from deltafl.report.grids import heat_map, layer_profile
from deltafl.report.html import render
from deltafl.report.inspection import inspect_figure, inspect_page
from deltafl.report.lines import lambda_curves, rounds_curve
from deltafl.report.page import Code, Column, Facts, Figure, Listing, Page, Section, Table
from deltafl.report.story import quickstart_page, search_page
from deltafl.report.tables import to_csv, to_latex, to_markdown

__all__ = [
    "Code",
    "Column",
    "Facts",
    "Figure",
    "Listing",
    "Page",
    "Section",
    "Table",
    "heat_map",
    "inspect_figure",
    "inspect_page",
    "lambda_curves",
    "layer_profile",
    "quickstart_page",
    "render",
    "rounds_curve",
    "search_page",
    "task_bars",
    "to_csv",
    "to_latex",
    "to_markdown",
]
