"""Draws a Grafana dashboard from the answers to its questions, without Grafana.

Panels lie in the dashboard's own grid, and have its titles, units, limits and legends.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

COLUMN, ROW = 0.56, 0.27  # inches of the grid's cell
GAP, LEFT, RIGHT, TOP, BOTTOM = 0.05, 0.62, 0.18, 0.36, 0.29  # inches: between panels; in them
LEGEND = 0.17  # inches: a line of it
COLOURS = ("#3274d9", "#e0752d", "#56a64b", "#b877d9", "#e02f44", "#e0b400", "#37a6a6", "#8f3bb8")
NAMED = {"green": "#37872d", "red": "#c4162a", "blue": "#1f60c4"}
TEXT, FAINT = "#24292e", "#8e959b"
SUFFIX = {"eps": " /s", "ops": " /s", "reqps": " /s"}

Json = dict[str, Any]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """A series on the picture's grid of times; NaN where there is nothing."""

    name: str
    labels: dict[str, str]
    values: Values

    @property
    def last(self) -> float:
        """The latest number."""
        found = self.values[np.isfinite(self.values)]
        return float(found[-1]) if found.size else math.nan


@dataclass(frozen=True)
class Answers:
    """What was asked from `start` to `end`, in seconds: series by expression."""

    start: float
    end: float
    step: float
    series: Mapping[str, list[Json]]

    @property
    def minutes(self) -> Values:
        """The grid of times."""
        return np.arange(0, self.end - self.start, self.step) / 60

    def lines(self, expression: str, legend: str) -> list[Line]:
        """Series of an expression, sorted by name."""
        size = self.minutes.size
        found = []
        for one in self.series[expression]:
            values = np.full(size, np.nan)
            for moment, text in one["values"]:
                if (index := round((moment - self.start) / self.step)) < size:
                    values[index] = float(text)
            found.append(Line(named(legend, one["metric"]), one["metric"], values))
        return sorted(found, key=lambda line: line.name)


def named(legend: str, labels: Mapping[str, str]) -> str:
    """A legend with its labels filled in."""
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), legend)


def told(value: float, unit: str) -> str:
    """A number as people read it."""
    match unit:
        case _ if not math.isfinite(value):
            return "-"
        case "percentunit":
            return f"{100 * value:.4g} %"
        case "sci":
            return f"{value:.1e}" if value else "0"
        case "s":
            return _scaled(value, ((3600, " h"), (60, " min"), (1, " s"), (1e-3, " ms")))
        case "bytes":
            return _scaled(value, ((2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"), (1, " B")))
        case _:
            return _scaled(value, ((1e6, " M"), (1e3, " K"), (1, ""))) + SUFFIX.get(unit, "")


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    for size, name in steps:
        if abs(value) >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.2g}{dict(steps).get(1, '')}"


def draw(board: Json, answers: Answers, fill: Callable[[str], str], out: Path) -> None:
    """A dashboard into a PNG; `fill` puts the chosen values into its expressions."""
    places = [panel["gridPos"] for panel in board["panels"]]
    width = max(place["x"] + place["w"] for place in places) * COLUMN
    height = max(place["y"] + place["h"] for place in places) * ROW
    figure = plt.figure(figsize=(width, height), facecolor="#f4f5f5")
    for panel in board["panels"]:
        place = panel["gridPos"]
        x, y = place["x"] * COLUMN, height - (place["y"] + place["h"]) * ROW
        box = Box(figure, x, y, place["w"] * COLUMN, place["h"] * ROW)
        if panel["type"] == "row":
            box.write(GAP + 0.05, ROW / 2, panel["title"], size=11, weight="bold", va="center")
            continue
        box.frame()
        size = 8 if panel["type"] == "stat" else 9
        box.write(0.13, box.height - 0.2, panel["title"], size=size, weight="bold", va="center")
        lines = [
            answers.lines(fill(target["expr"]), target.get("legendFormat", ""))
            for target in panel["targets"]
        ]
        PAINTERS[panel["type"]](box, panel, lines, answers.minutes)
    figure.savefig(out, dpi=90)
    plt.close(figure)


@dataclass(frozen=True)
class Box:
    """A panel's place on the figure, in inches."""

    figure: Figure
    x: float
    y: float
    width: float
    height: float

    def frame(self) -> None:
        """White, with a thin edge."""
        corner = self.share(GAP, GAP)
        size = self._size(self.width - 2 * GAP, self.height - 2 * GAP)
        edge: Json = {"facecolor": "white", "edgecolor": "#d8dbde", "linewidth": 0.8}
        self.figure.add_artist(
            Rectangle(corner, *size, transform=self.figure.transFigure, zorder=-1, **edge)
        )

    def write(self, x: float, y: float, text: str, **how: Any) -> None:
        """Text, from the box's lower left corner."""
        self.figure.text(*self.share(x, y), text, **{"color": TEXT, **how})

    def axes(self, left: float, bottom: float, right: float, top: float) -> Axes:
        """Axes with these margins."""
        size = self._size(self.width - left - right, self.height - bottom - top)
        return self.figure.add_axes((*self.share(left, bottom), *size))

    def share(self, x: float, y: float) -> tuple[float, float]:
        """A point of the box as shares of the figure."""
        return self._size(self.x + x, self.y + y)

    def _size(self, width: float, height: float) -> tuple[float, float]:
        whole = self.figure.get_size_inches()
        return width / whole[0], height / whole[1]


def graph(box: Box, panel: Json, questions: list[list[Line]], minutes: Values) -> None:
    """Lines over time."""
    lines = [line for found in questions for line in found]
    defaults = panel["fieldConfig"]["defaults"]
    columns = legend_columns([line.name for line in lines], box.width)
    below = LEGEND * math.ceil(len(lines) / columns)
    axes = box.axes(LEFT, BOTTOM + below, RIGHT, TOP)
    if defaults["custom"]["stacking"]["mode"] == "normal":
        heights = [np.nan_to_num(line.values) for line in lines]
        names = [line.name for line in lines]
        axes.stackplot(minutes, heights, labels=names, colors=COLOURS, alpha=0.75, linewidth=0)
        top = float(np.sum(heights, axis=0).max())
    else:
        dashed = {one["matcher"]["options"] for one in panel["fieldConfig"]["overrides"]}
        for line, colour in zip(lines, COLOURS, strict=False):
            how: Json = {"color": FAINT, "linestyle": "--"} if line.name in dashed else {}
            how = {"color": colour, "linewidth": 1.3, "label": line.name, **how}
            axes.plot(minutes, line.values, **how)
        top = max(float(np.nan_to_num(line.values).max()) for line in lines)
    limit(axes, top, defaults)
    whole = all(not np.mod(line.values[np.isfinite(line.values)], 1).any() for line in lines)
    dress(axes, minutes, defaults["unit"], whole and defaults["unit"] == "short")
    box.figure.legend(
        handles=axes.get_legend_handles_labels()[0],
        loc="lower left",
        bbox_to_anchor=box.share(0.1, 0.06),
        ncols=columns,
        fontsize=7.5,
        frameon=False,
        borderpad=0.2,
        labelspacing=0.3,
        handlelength=1,
        handletextpad=0.4,
        columnspacing=1.1,
    )


def legend_columns(names: list[str], width: float) -> int:
    """All names in a row where they have room, else in two."""
    inches = sum(0.36 + 0.062 * len(name) for name in names)
    return len(names) if inches < width - 0.2 else math.ceil(len(names) / 2)


def limit(axes: Axes, top: float, defaults: Json) -> None:
    """The panel's own limits, else from its lowest to a bit above its highest value."""
    low, high = defaults.get("min"), defaults.get("max")
    if low is not None or top == 0:
        margin = 0.02 * high if high is not None else 0
        axes.set_ylim((low or 0) - margin, (high or 1.05 * top or 1) + margin)
    elif high is not None:
        axes.set_ylim(top=high)


def dress(axes: Axes, minutes: Values, unit: str, whole: bool) -> None:
    """Ticks with units, a faint grid, no frame; `whole`: there is nothing between numbers."""
    high = axes.get_ylim()[1]
    axes.yaxis.set_major_locator(
        MultipleLocator(2.0 ** (math.ceil(math.log2(high)) - 2))
        if unit == "bytes"
        else MaxNLocator(4, steps=[1, 2, 5, 10] if whole else [1, 2, 2.5, 5, 10], integer=whole)
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: told(value, unit)))
    axes.set_xlim(0, minutes[-1])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f} min"))
    axes.tick_params(labelsize=7.5, colors="#585f66", length=0)
    axes.grid(color="#e6e8ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def number(box: Box, panel: Json, questions: list[list[Line]], minutes: Values) -> None:
    """The latest number, large; where it is one, what it was over time."""
    lines = [line for found in questions for line in found]
    defaults = panel["fieldConfig"]["defaults"]
    if len(lines) == 1:
        axes = box.axes(GAP, GAP, GAP, 0.74)
        values = lines[0].values
        colour = coloured(lines[0].last, defaults)
        axes.plot(minutes, values, color=colour, linewidth=1, alpha=0.7)
        bottom = min(0.0, float(np.nanmin(values)))
        axes.fill_between(minutes, values, bottom, color=colour, alpha=0.12, linewidth=0)
        axes.set(xlim=(0, minutes[-1]), ylim=(bottom, max(float(np.nanmax(values)), 1e-9) * 1.05))
        axes.axis("off")
    share = (box.width - 2 * GAP) / max(len(lines), 1)
    for place, line in enumerate(lines):
        middle = GAP + share * (place + 0.5)
        how: Json = {"ha": "center", "va": "center"}
        height = 0.54
        text = told(line.last, defaults["unit"])
        box.write(middle, height, text, size=19, color=coloured(line.last, defaults), **how)
        box.write(middle, 0.2, line.name, size=8, color="#585f66", **how)


def coloured(value: float, defaults: Json) -> str:
    """The colour of the highest threshold below a value."""
    steps = defaults.get("thresholds", {"steps": [{"color": "green", "value": None}]})["steps"]
    below = [one["color"] for one in steps if one["value"] is None or value >= one["value"]]
    return NAMED[below[-1]]


def table(box: Box, panel: Json, questions: list[list[Line]], minutes: Values) -> None:
    """A row per run, a column per question."""
    units = {
        one["matcher"]["options"]: one["properties"][0]["value"]
        for one in panel["fieldConfig"]["overrides"]
        if one["properties"][0]["id"] == "unit"
    }
    cells: dict[tuple[str, str], list[str]] = {}
    for lines, unit in zip(questions, units.values(), strict=True):
        for line in lines:
            key = (line.labels["namespace"], line.labels["run"])
            cells.setdefault(key, []).append(told(line.last, unit))
    widths = (2, 3, *(2 for _ in units))
    rows = [("namespace", "run", *units), *((*key, *texts) for key, texts in cells.items())]
    for down, row in enumerate(rows):
        left = 0.14
        for text, width in zip(row, widths, strict=True):
            how: Json = {"weight": "bold", "color": "#585f66"} if down == 0 else {}
            box.write(left, box.height - 0.55 - 0.28 * down, text, size=8.5, va="center", **how)
            left += (box.width - 0.28) * width / sum(widths)


PAINTERS: dict[str, Callable[[Box, Json, list[list[Line]], Values], None]] = {
    "timeseries": graph,
    "stat": number,
    "table": table,
}
