"""Figures as SVG, by matplotlib."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from bonnx.errors import InputError

from .read import Figure, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["picture", "plot"]

# Okabe and Ito's colours, which colour-blind people tell apart; markers and dashes say the same once more.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_MARKERS, _DASHES = "osD^vPX", ("-", "--", "-.", ":")


def picture(figure: Figure) -> str:
    """An SVG element; its text is text, so that it can be read aloud and searched.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as Canvas
    except ModuleNotFoundError as e:
        raise InputError("a run with figures needs matplotlib; run `pip install bonnx[report]`") from e
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "svg.hashsalt": "bonnx"}
    ):
        canvas = Canvas(figsize=(5.4, 4.6), layout="constrained")
        axes = canvas.subplots()
        plot(axes, figure)
        long = len(figure.series) < 4 or max(len(series.name) for series in figure.series) > 28
        canvas.legend(loc="outside lower center", ncols=1 if long else 2, frameon=False, fontsize=9.5)
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    svg = text[text.index("<svg") :]
    # Ids are the page's: two pictures must not share one.
    for name in sorted(set(re.findall(r' id="([^"]+)"', svg)), key=len, reverse=True):
        svg = svg.replace(f'id="{name}"', f'id="{figure.id}-{name}"')
        svg = svg.replace(f'#{name}"', f'#{figure.id}-{name}"').replace(f"url(#{name})", f"url(#{figure.id}-{name})")
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg height="[^"]*" ', _scalable, svg, count=1)


def plot(axes: Axes, figure: Figure) -> None:
    """Draw a figure into axes of matplotlib, without its legend."""
    (_bars if figure.x_scale == "category" else _lines)(axes, figure)
    axes.set_xlabel(figure.x_label)
    axes.set_ylabel(figure.y_label)
    axes.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _scalable(match: re.Match[str]) -> str:
    return f'<svg role="img" {match[1] or ""}'


def _intervals(series: Series) -> tuple[list[float], list[float]] | None:
    """The lower and upper bounds of all points; None if one is missing."""
    lows = [point.low for point in series.points if point.low is not None]
    highs = [point.high for point in series.points if point.high is not None]
    return (lows, highs) if len(lows) == len(highs) == len(series.points) else None


def _lines(axes: Axes, figure: Figure) -> None:
    xs = sorted({point.x for series in figure.series for point in series.points}, key=float)
    for i, series in enumerate(figure.series):
        x, y = [p.x for p in series.points], [p.y for p in series.points]
        colour, marker, dash = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)]
        axes.plot(x, y, label=series.name, markersize=5, color=colour, marker=marker, linestyle=dash)
        bounds = _intervals(series)
        if bounds is not None:
            axes.fill_between(x, *bounds, color=colour, alpha=0.1)
    if figure.x_scale == "log2":
        axes.set_xscale("log", base=2)
        if len(xs) <= 6:
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
        else:
            from matplotlib.ticker import StrMethodFormatter

            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))


def _bars(axes: Axes, figure: Figure) -> None:
    names = list(dict.fromkeys(str(point.x) for series in figure.series for point in series.points))
    width = 0.84 / len(figure.series)
    hatches = ("", "//", "..", "xx", "\\\\", "--", "++")
    for i, series in enumerate(figure.series):
        places = [names.index(str(p.x)) + (i - (len(figure.series) - 1) / 2) * width for p in series.points]
        y = [p.y for p in series.points]
        bounds = _intervals(series)
        spread = None
        if bounds is not None:
            spread = [[middle - low for middle, low in zip(y, bounds[0], strict=True)]]
            spread += [[high - middle for middle, high in zip(y, bounds[1], strict=True)]]
        axes.bar(
            places,
            y,
            width,
            yerr=spread,
            label=series.name,
            color=_COLOURS[i % len(_COLOURS)],
            hatch=hatches[i % len(hatches)],
            edgecolor="white",
            ecolor="#333",
        )
    axes.set_xticks(range(len(names)), names)
