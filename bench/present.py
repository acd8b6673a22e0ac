"""A report on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from .report import Report
from .summary import HEADINGS, headline, run_rows, title

# Off a terminal the table is not squeezed into 80 columns.
LOG_WIDTH = 140


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the comparison on stdout, with what to be wary of below it."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(title(report), markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in run_rows(report):
        table.add_row(*row)
    console.print(table)
    for line in (headline(report), *(f"Note: {warning}." for warning in report.warnings)):
        if line:
            console.print(line, markup=False, soft_wrap=True)
