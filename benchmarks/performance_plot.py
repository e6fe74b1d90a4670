"""The plot of docs/performance.md: time against N and against the prompt's length, bonnx's and other tools'.

The file follows the reader's colour scheme: text and axes are dark on a light page and light on a dark one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# For each table that has a panel, its title, what its sizes are, and the ways that are shown, with their labels.
_SHOWN: dict[tuple[str, str], tuple[str, str, dict[str, str]]] = {
    ("generate", "n"): (
        "Seconds to generate N answers",
        "N",
        {
            "bonnx float32": "bonnx float32",
            "bonnx int8": "bonnx int8",
            "transformers float32": "transformers float32",
            "llama.cpp q8_0": "llama.cpp q8_0",
            "OpenVINO GenAI int8": "OpenVINO GenAI int8",
            "ONNX Runtime GenAI int8": "ONNX Runtime\nGenAI int8",
        },
    ),
    ("long", "prompt"): (
        "Seconds to rank 4 answers after a long prompt",
        "tokens of the prompt",
        {
            "bonnx fp32": "bonnx float32",
            "bonnx int8": "bonnx int8",
            "transformers float32": "transformers float32",
        },
    ),
}
_OURS = {"bonnx float32": "#2f81f7", "bonnx int8": "#d9480f"}
_OTHERS = "#8b949e"
# Drawn in this colour, and then replaced by the reader's.
_INK = "#010203"
_STYLE = "<style>svg{color:#24292f}@media(prefers-color-scheme:dark){svg{color:#d0d7de}}</style>"


@dataclass(frozen=True)
class Panel:
    """One plot: for each label seconds by size."""

    title: str
    sizes: str
    seconds: dict[str, dict[int, float]]


def panel_of(benchmark: str, column: str, figures: list[dict[str, Any]]) -> Panel | None:
    """Return the panel of a table's figures; None for a table that is not drawn."""
    if (benchmark, column) not in _SHOWN:
        return None
    title, sizes, labels = _SHOWN[benchmark, column]
    seconds: dict[str, dict[int, float]] = {}
    for figure in figures:
        if figure["way"] in labels:
            seconds.setdefault(labels[figure["way"]], {})[figure[column]] = figure["seconds"]
    return Panel(title, sizes, seconds)


def described(panels: list[Panel]) -> str:
    """Return the values that a plot shows, as its file says them."""
    return json.dumps([asdict(panel) for panel in panels])


def draw(panels: list[Panel], path: Path) -> None:
    """Write the plot as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "bonnx", "font.family": "sans-serif", "font.size": 10}
    settings |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    with matplotlib.rc_context(settings):
        canvas = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
        for axes, panel in zip(canvas.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
            _draw_panel(axes, panel)
        metadata = {"Date": None, "Creator": "python -m benchmarks.performance", "Description": described(panels)}
        canvas.savefig(path, transparent=True, metadata=metadata)
    text = path.read_text(encoding="utf-8").replace(_INK, "currentColor")
    head, tag, rest = text.partition(" <metadata>")
    # Lines without the spaces that matplotlib leaves at their ends.
    text = "\n".join(line.rstrip() for line in f"{head} {_STYLE}\n{tag}{rest}".splitlines())
    path.write_text(text + "\n", encoding="utf-8")


def _draw_panel(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    for label, seconds in panel.seconds.items():
        colour, width = (_OURS[label], 2.8) if label in _OURS else (_OTHERS, 1.2)
        line = dict(sorted(seconds.items()))
        style = {"marker": "o", "markersize": 2 * width, "lw": width, "color": colour, "zorder": 1 + width}
        axes.plot(list(line), list(line.values()), **style)
    sizes = sorted({size for seconds in panel.seconds.values() for size in seconds})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_title(panel.title, loc="left", fontweight="bold")
    axes.set_xlabel(panel.sizes)
    axes.grid(axis="y", color=_OTHERS, alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    _label_lines(axes, panel, sizes[-1])


def _label_lines(axes: Any, panel: Panel, last: int) -> None:
    """Write each label to the right of its line, in the lines' order and clear of each other."""
    low, high = axes.get_ylim()
    gap = (high / low) ** 0.05
    free = 0.0
    for label, seconds in sorted(panel.seconds.items(), key=lambda item: item[1][max(item[1])]):
        size = max(seconds)
        style = {"weight": "bold", "color": _OURS[label]} if label in _OURS else {"color": _INK}
        if size < last:  # a line that ends before the others: above its end
            axes.annotate(label, (size, seconds[size]), (-14, 5), textcoords="offset points", fontsize=9, **style)
            continue
        height = max(seconds[size], free)
        free = height * gap
        axes.annotate(
            label, (size, height), (8, 0), textcoords="offset points", va="center", fontsize=9, **style
        ).set_annotation_clip(False)
