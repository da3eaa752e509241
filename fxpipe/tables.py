"""Tables as text. The only file that imports tabulate."""

from collections.abc import Sequence

from tabulate import tabulate


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """A table with one line per row. Columns of numbers and quantities (``1.50 KiB``) lean right; None is empty."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = zip(*cells, strict=True) if cells else ([] for _ in headers)
    align = ["right" if any(column) and all(map(_is_quantity, column)) else "left" for column in columns]
    # Without disable_numparse the text 1.50 would become the number 1.5.
    return tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True, colalign=align if cells else None)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_quantity(cell: str) -> bool:
    return not cell or cell.lstrip("-")[:1].isdigit() or cell in ("inf", "nan")
