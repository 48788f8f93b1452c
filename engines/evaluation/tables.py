"""Results as tables for people: plain text for a terminal, Markdown for a document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows under named columns. Numbers are shown with three decimals, None as a dash."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"'{self.title}': every row needs {len(self.columns)} cells")


def table_of(
    title: str, first: str, columns: Sequence[str], rows: dict[str, dict[str, float]], note: str = ""
) -> Table:
    """A table of one line for each entry of `rows`, named in the column `first`."""
    cells = tuple((name, *(values.get(column) for column in columns)) for name, values in rows.items())
    return Table(title, (first, *columns), cells, note)


def as_text(tables: Iterable[Table]) -> str:
    """All tables with aligned columns."""
    return "\n\n".join(_text(table) for table in tables) + "\n"


def as_markdown(tables: Iterable[Table]) -> str:
    """All tables in Markdown, each under a heading."""
    return "\n\n".join(_markdown(table) for table in tables) + "\n"


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _text(table: Table) -> str:
    lines = [table.columns, *([_shown(cell) for cell in row] for row in table.rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    body = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells)).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join([table.title, *body, *([table.note] if table.note else [])])


def _markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *([_shown(cell) for cell in row] for row in table.rows)]
    body = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
    return "\n".join([f"### {table.title}", "", *body, *(["", table.note] if table.note else [])])
