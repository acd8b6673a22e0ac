"""A report on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from .report import Report
from .summary import HEADINGS, headline, run_rows, title

# Off a terminal the table is not squeezed into 80 columns.
LOG_WIDTH = 140
# Letters that a table takes between two of its columns, and at both of its edges.
GAP, EDGES = 3, 2


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the comparison on stdout, with what to be wary of below it."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(title(report), markup=False, soft_wrap=True)
    for table in _tables(run_rows(report), console.width):
        console.print(table)
    for line in (headline(report), *(f"Note: {warning}." for warning in report.warnings)):
        if line:
            console.print(line, markup=False, soft_wrap=True)


def _tables(rows: Sequence[Sequence[str]], width: int) -> Iterator[Table]:
    """One table, or as many as a narrow terminal asks for, each with the names: no figure is cut off."""
    columns = list(zip(HEADINGS, *rows, strict=True))
    widths = [max(len(line) for cell in column for line in cell.splitlines()) for column in columns]
    start = 1
    while start < len(columns):
        end, used = start + 1, EDGES + widths[0] + GAP + widths[start]
        while end < len(columns) and used + GAP + widths[end] <= width:
            used += GAP + widths[end]
            end += 1
        yield _table([columns[0], *columns[start:end]])
        start = end


def _table(columns: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, (heading, *_) in enumerate(columns):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in zip(*(cells for _, *cells in columns), strict=True):
        table.add_row(*row)
    return table
