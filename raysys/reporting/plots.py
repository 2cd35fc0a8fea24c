"""Plots as inline SVG.

In: plain numbers. Out: :class:`Plot`, an SVG that asks for nothing outside and takes the page's text colour, so that it is
readable in dark mode too. matplotlib's object API only: no pyplot, no global state. Leaves the choice of numbers to
:mod:`raysys.reporting.html` and :mod:`raysys.reporting.sweep_page`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

INK = "#101112"  # stands for the page's text colour: replaced by currentColor, so no data may be drawn in it
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#64748b")
STYLE: dict[Any, Any] = {  # matplotlib types its 300 keys one by one
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "text.parse_math": False,  # a reason or a model's name may hold a "$"
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    **{key: INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")},
}


MARKS: dict[str, dict[str, Any]] = {
    "points": {"marker": "o", "markersize": 5, "color": COLORS[0]},
    "front": {"marker": "*", "markersize": 10, "color": COLORS[1]},
    "not all seeds": {"marker": "o", "markersize": 5, "markerfacecolor": "none", "markeredgecolor": COLORS[5]},
    "best": {"marker": "o", "markersize": 14, "markerfacecolor": "none", "markeredgecolor": COLORS[3]},  # a ring around another
}
"""What the points of a sweep look like."""
MAX_NAME = 18
"""Characters of a tick's name."""
Interval = tuple[float, float | None, float | None]
"""Value, low end, high end; without an interval both ends are None."""


@dataclass
class Plot:
    title: str
    svg: Markup
    """Made by matplotlib, which escapes every text in it."""


@dataclass
class Spot:
    x: Interval
    y: Interval
    label: str = ""


def _draw(title: str, paint: Callable[[Axes], None], *, height_inch: float = 2.8) -> Plot:
    """4.6 inch wide: shown at about that size, so that 9 pt stay readable on a phone."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(4.6, height_inch), layout="constrained")
        paint(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    return Plot(title, Markup(svg[svg.index("<svg") :].replace(INK, "currentColor")))


def bars(title: str, values: Mapping[str, float], *, share: bool = False) -> Plot:
    """Horizontal bars with their numbers, the first on top."""

    def paint(axes: Axes) -> None:
        drawn = axes.barh(list(values), list(values.values()), color=COLORS[0])
        axes.bar_label(drawn, [f"{v:.1%}" if share else f"{v:,.0f}" for v in values.values()], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)

    return _draw(title, paint, height_inch=0.5 + 0.32 * len(values))


def grouped_bars(title: str, groups: Mapping[str, Mapping[str, float]]) -> Plot:
    """Group -> series -> share: a cluster of upright bars for each group, one colour for each series."""

    def paint(axes: Axes) -> None:
        series = list(dict.fromkeys(name for group in groups.values() for name in group))
        width = 0.8 / len(series)
        for i, name in enumerate(series):
            values = [group.get(name, float("nan")) for group in groups.values()]
            x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
            drawn = axes.bar(x, values, width * 0.95, label=name, color=COLORS[i % len(COLORS)])
            axes.bar_label(drawn, [f"{v:.0%}" for v in values], padding=2)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.margins(y=0.12)
        axes.figure.legend(loc="outside upper center", ncols=3)

    return _draw(title, paint)


def dots(title: str, groups: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> Plot:
    """Group -> series -> (share, low, high): a dot with its interval for each, one colour for each series, the first group on top."""

    def paint(axes: Axes) -> None:
        series = list(dict.fromkeys(name for group in groups.values() for name in group))
        step = 0.6 / max(len(series), 2)
        for i, name in enumerate(series):
            there = [(row, *group[name]) for row, group in enumerate(groups.values()) if name in group]
            row, value, low, high = np.array(there).T
            y = row + (i - (len(series) - 1) / 2) * step
            errors = np.abs([value - low, high - value])
            axes.errorbar(value, y, xerr=errors, fmt="o", markersize=4, capsize=3, label=name, color=COLORS[i % len(COLORS)])
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="x")
        axes.figure.legend(loc="outside upper center", ncols=3)

    return _draw(title, paint, height_inch=0.9 + 0.6 * len(groups))


def histogram(title: str, xlabel: str, series: Mapping[str, np.ndarray], *, share: bool = False) -> Plot:
    """Outlines of one histogram a series, 40 bins over what all of them span (0..1 for ``share``)."""

    def paint(axes: Axes) -> None:
        everything = np.concatenate(list(series.values()))
        span = (0.0, 1.0) if share or not everything.size else (float(everything.min()), float(everything.max()))
        for i, (name, values) in enumerate(series.items()):
            axes.hist(values, bins=40, range=span, label=name, histtype="stepfilled", alpha=0.55, color=COLORS[i % len(COLORS)])
        axes.set(xlabel=xlabel, ylabel="number")
        axes.grid(axis="y")
        if share:
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        if len(series) > 1:
            axes.legend()

    return _draw(title, paint)


def lines(title: str, xlabel: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, share: bool = False) -> Plot:
    """One line a series of (x, y); a legend where there are several."""

    def paint(axes: Axes) -> None:
        for i, (name, (x, y)) in enumerate(series.items()):
            axes.plot(x, y, label=name, color=COLORS[i % len(COLORS)], linewidth=1.4, marker="." if len(x) == 1 else "")
        axes.set_xlabel(xlabel)
        axes.grid()
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        if len(series) > 1:
            axes.legend()

    return _draw(title, paint)


def curve(title: str, x: Sequence[float], y: Sequence[float], *, own: int, last: str = "") -> tuple[Plot, list[float]]:
    """Share y at each x, with a line that a script may move: the group ``cursor``, which stands at ``x[own]``.

    :param last: what the last x is called, where it is no number.
    :returns: the plot, and for each x how far right of ``x[own]`` it lies, in units of the SVG.
    """
    drawn: list[Axes] = []

    def paint(axes: Axes) -> None:
        drawn.append(axes)
        axes.plot(x, y, color=COLORS[0], linewidth=1.4, marker=".", markersize=4)
        axes.axvline(x[own], color=COLORS[1], linewidth=1.4, gid="cursor")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_ylim(-0.03, 1.03)
        if last:
            ticks = [tick for tick in MaxNLocator(6, integer=True).tick_values(x[0], x[-2]) if x[0] <= tick <= x[-2] - 1]
            axes.set_xticks([*ticks, x[-1]], [*(f"{tick:g}" for tick in ticks), last])
        axes.grid()

    plot = _draw(title, paint, height_inch=2.0)
    [axes] = drawn
    places = [float(axes.transData.transform((value, 0))[0]) * 72 / axes.figure.dpi for value in x]  # an SVG's unit is a point
    return plot, [place - places[own] for place in places]


def scatter(
    title: str,
    xlabel: str,
    ylabel: str,
    groups: Mapping[str, Sequence[Spot]],
    *,
    x_share: bool = False,
    x_log: bool = False,
    x_names: Sequence[str] = (),
    stairs: str = "",
) -> Plot:
    """Estimates with their error bars, in the marks of :data:`MARKS`; y is a share.

    :param groups: one of MARKS -> its spots, drawn in this order; a group without spots is left out.
    :param x_names: of x = 0, 1, ..., where x is no number.
    :param stairs: group whose spots are joined by the border of what they beat (larger is better on both axes).
    """

    def paint(axes: Axes) -> None:
        for name, spots in groups.items():
            if not spots:
                continue
            x, y = np.array([(spot.x[0], spot.y[0]) for spot in spots]).T
            look = MARKS[name]
            color = look.get("color") or look["markeredgecolor"]
            across = [(spot.y[0], *spot.x[1:]) for spot in spots if spot.x[1] is not None]
            upright = [(spot.x[0], *spot.y[1:]) for spot in spots if spot.y[1] is not None]
            for draw, bars in ((axes.hlines, across), (axes.vlines, upright)):
                if bars:
                    draw(*np.array(bars, dtype=float).T, color=color, linewidth=1.2, alpha=0.6, zorder=2)
            axes.plot(x, y, linestyle="", label=name, zorder=3, **look)
            if name == stairs:
                order = np.lexsort((-y, x))
                axes.plot(x[order], y[order], drawstyle="steps-pre", color=color, linewidth=1, alpha=0.7, zorder=1)
            for spot in spots:
                axes.annotate(spot.label, (spot.x[0], spot.y[0]), (5, 5), textcoords="offset points", fontsize=8, zorder=4)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid()
        axes.margins(0.08)
        if x_log:
            _log(axes.xaxis, [spot.x[0] for spots in groups.values() for spot in spots])
        if x_names:
            _name(axes.xaxis, np.arange(len(x_names)), x_names)
            axes.set_xlim(-0.5, len(x_names) - 0.5)
        for axis, share in ((axes.xaxis, x_share), (axes.yaxis, True)):
            if share:
                axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
                axis.set_major_formatter(PercentFormatter(1))
                low, high = axis.get_view_interval()  # an interval of few seeds may leave 0..1; a share does not
                (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(max(low, -0.03), min(high, 1.03))
        axes.figure.legend(loc="outside upper center", ncols=4)

    return _draw(title, paint, height_inch=3.2)


def _log(axis: Axis, values: Sequence[float]) -> None:
    """A log axis with plain numbers on it: matplotlib's own are formulas."""
    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log")
    decades = np.log10(max(values) / min(values))
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _name(axis: Axis, places: np.ndarray, names: Sequence[str]) -> None:
    """Names as ticks: long ones are cut in their middle, and lean where they would run into each other."""
    short = [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 2]}…{name[-MAX_NAME // 2 + 1 :]}" for name in names]
    leans = axis is axis.axes.xaxis and sum(len(name) + 2 for name in short) > 48  # characters of 9 pt on the width of a plot
    axis.set_ticks(places, short)
    if leans:
        for label in axis.get_ticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")


def heat_map(title: str, xlabel: str, ylabel: str, cells: Mapping[tuple[str, str], float]) -> Plot:
    """(x, y) -> share as coloured cells with the number in each; a cell of NaN stays empty.

    :param cells: columns from the left and rows from the bottom, in the order in which they come; at least one is a number.
    """
    columns, rows = (list(dict.fromkeys(key[axis] for key in cells)) for axis in (0, 1))

    def paint(axes: Axes) -> None:
        values = np.array([[cells.get((x, y), np.nan) for x in columns] for y in rows], dtype=float)
        mesh = axes.pcolormesh(values, cmap="viridis", edgecolors="none")
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                # viridis is dark at its low end
                color = "white" if value <= middle else "black"
                size = 9 if len(columns) < 7 else 7
                axes.text(column + 0.5, row + 0.5, f"{value:.1%}", ha="center", va="center", color=color, fontsize=size)
        _name(axes.xaxis, np.arange(len(columns)) + 0.5, columns)
        _name(axes.yaxis, np.arange(len(rows)) + 0.5, rows)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.figure.colorbar(mesh, ax=axes, format=PercentFormatter(1)).outline.set_visible(False)

    return _draw(title, paint, height_inch=1.6 + 0.35 * len(rows))


def colored(
    title: str, xlabel: str, ylabel: str, spots: Sequence[tuple[float, float, float]], *, x_log: bool = False, y_log: bool = False
) -> Plot:
    """(x, y, share) as dots on two axes of numbers, in the colours of :func:`heat_map`: for values that share no cell."""

    def paint(axes: Axes) -> None:
        x, y, value = np.array(spots, dtype=float).T
        for axis, log, values in ((axes.xaxis, x_log, x), (axes.yaxis, y_log, y)):
            if log:
                _log(axis, values)
        drawn = axes.scatter(x, y, c=value, cmap="viridis", s=64)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid()
        axes.margins(0.08)
        axes.figure.colorbar(drawn, ax=axes, format=PercentFormatter(1)).outline.set_visible(False)

    return _draw(title, paint, height_inch=3.2)
