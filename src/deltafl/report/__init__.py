"""Records to tables, figures and one self-contained HTML page. Imports no torch."""

from deltafl.report.comparison import comparison_page
from deltafl.report.inspection import inspect_page, kinds_table, mask_page, shards_page
from deltafl.report.page import Page, page_files
from deltafl.report.run import run_page
from deltafl.report.search import results_table, search_page
from deltafl.report.tables import Column, Table

__all__ = [
    "Column",
    "Page",
    "Table",
    "comparison_page",
    "inspect_page",
    "kinds_table",
    "mask_page",
    "page_files",
    "results_table",
    "run_page",
    "search_page",
    "shards_page",
]
