"""An evaluation as a table that fits the terminal."""

from collections.abc import Callable, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from demoreset_trainer.evaluate import Cell


def _points(score: float) -> str:
    """A score that need not be whole: in games of few points the tenths matter."""
    return f"{score:,.1f}".removesuffix(".0")


def _short(score: float) -> str:
    return f"{score:,.0f}" if abs(score) >= 1000 else _points(score)


def _interval(cell: Cell, said: Callable[[float], str]) -> str:
    return f"{said(cell.iqm)} ({said(cell.iqm_low)} to {said(cell.iqm_high)})"


NARROW: dict[str, Callable[[Cell], str]] = {  # n: of a column, what is said of a cell
    "ties": lambda cell: f"{cell.ties:.0%}",
    "mean": lambda cell: _short(cell.mean),
    "median": lambda cell: _short(cell.median),
    "IQM (95 %)": lambda cell: _interval(cell, _short),
    "max": lambda cell: f"{cell.max:,}",
    "n": lambda cell: str(cell.episodes),
    "frames": lambda cell: f"{cell.frames:,.0f}",
}
LEAST = ("frames", "median", "IQM (95 %)", "n", "max")  # what a terminal may lack, the least first
UNBOUNDED = 1000  # columns, more than any table wants


def fitting(cells: Sequence[Cell], console: Console) -> Table:
    """The results in as many columns as a terminal has room for, so that no row wraps."""

    def fits(table: Table) -> bool:
        wanted = console.measure(table, options=console.options.update(width=UNBOUNDED))
        return wanted.maximum <= console.width

    table = full(cells)
    for left_out in range(len(LEAST) + 1):
        for gap in (2, 1):
            if fits(table):
                return table
            table = _narrow(cells, LEAST[:left_out], gap)
    return table


def full(cells: Sequence[Cell]) -> Table:
    """The results with all that is known of them, as wide as it is."""
    table = Table()
    for name in ("noise", "act"):
        table.add_column(name)
    for name in ("ties", "mean", "median", "IQM (95 %)", "max", "episodes", "frames"):
        table.add_column(name, justify="right")
    for cell in cells:
        table.add_row(
            cell.noise,
            cell.act,
            f"{cell.ties:.0%}",
            f"{cell.mean:,.1f}",
            _points(cell.median),
            _interval(cell, _points),
            f"{cell.max:,}",
            str(cell.episodes),
            f"{cell.frames:,.0f}",
        )
    return table


def _narrow(cells: Sequence[Cell], left_out: Sequence[str], gap: int) -> Table:
    """Each noise is a line of its own, above the ways to act."""
    shown = {name: said for name, said in NARROW.items() if name not in left_out}
    told = ["n: episodes"] if "n" in shown else []
    if left_out:
        told.append(f"no room for {', '.join(left_out)}")
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, caption="; ".join(told))
    table.add_column("", no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for noise, group in groupby(cells, key=lambda cell: cell.noise):
        table.add_row(noise, style="bold")
        for cell in group:
            table.add_row(f"  {cell.act}", *(said(cell) for said in shown.values()))
    return table
