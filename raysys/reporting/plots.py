"""Plots as inline SVG.

In: plain numbers. Out: :class:`Plot`, an SVG that asks for nothing outside and takes the page's text colour, so that it is
readable in dark mode too. matplotlib's object API only: no pyplot, no global state. Leaves the choice of numbers to
:mod:`raysys.reporting.html`.
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
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

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


@dataclass
class Plot:
    title: str
    svg: Markup
    """Made by matplotlib, which escapes every text in it."""


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
        axes.legend()

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


def scatter(title: str, xlabel: str, points: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Plot:
    """Shares against shares, one colour a group of points."""

    def paint(axes: Axes) -> None:
        for i, (name, (x, y)) in enumerate(points.items()):
            axes.scatter(x, y, label=name, color=COLORS[i % len(COLORS)], s=36, alpha=0.85)
        axes.set_xlabel(xlabel)
        axes.grid()
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend()

    return _draw(title, paint)


def heat_map(title: str, xlabel: str, ylabel: str, cells: Mapping[tuple[str, str], float]) -> Plot:
    """(x, y) -> value as coloured cells with the number in each; a missing cell stays empty."""
    columns, rows = (list(dict.fromkeys(key[axis] for key in cells)) for axis in (0, 1))

    def paint(axes: Axes) -> None:
        values = np.array([[cells.get((x, y), np.nan) for x in columns] for y in rows], dtype=float)
        mesh = axes.pcolormesh(values, cmap="viridis", edgecolors="none")
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                # viridis is dark at its low end
                axes.text(
                    column + 0.5, row + 0.5, f"{value:.3f}", ha="center", va="center", color="white" if value <= middle else "black"
                )
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.figure.colorbar(mesh, ax=axes).outline.set_visible(False)

    return _draw(title, paint, height_inch=1.6 + 0.35 * len(rows))
