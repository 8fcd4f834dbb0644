"""Figures as SVG text that takes the colour of the page around it, so that light and dark both work.

Words in Persian do not belong into a figure: matplotlib neither joins the letters nor turns the line
around. They stand in the page's own text and tables, where the browser does both.
"""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

# Drawn in this colour, then replaced by the page's text colour.
INK = "#010203"
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#64748b")


def curve_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], across: str, up: str, log_up: bool = False
) -> str:
    """Lines by name, each the positions and values of its points; few points are marked. Returns SVG."""
    canvas, axes = _canvas()
    for colour, (name, (xs, ys)) in zip(_colours(len(curves)), curves.items(), strict=True):
        axes.plot(xs, ys, label=name, color=colour, linewidth=1.6, marker="o" if len(xs) <= 20 else "", markersize=4)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    if log_up:
        axes.set_yscale("log")
    if len(curves) > 1:
        axes.legend(frameon=False, labelcolor=INK)
    return _svg(canvas)


def histogram_figure(values: Sequence[float], across: str, up: str = "count", bins: int = 40) -> str:
    """How often each range of `values` occurs. Returns SVG."""
    canvas, axes = _canvas()
    axes.hist(values, bins=bins, color=COLOURS[0])
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    return _svg(canvas)


def bar_figure(values: Mapping[str, Mapping[str, float]], across: str, limit: float | None = None) -> str:
    """Horizontal bars: one group per key of `values`, one bar per key of the inner mappings. Returns SVG."""
    canvas, axes = _canvas(height=0.8 + 0.32 * max(4, len(values)))
    names = list(next(iter(values.values())))
    height = 0.8 / len(names)
    for place, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        offsets = [row + (place - (len(names) - 1) / 2) * height for row in range(len(values))]
        axes.barh(offsets, [bars[name] for bars in values.values()], height, label=name, color=colour)
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlabel(across)
    if limit is not None:
        axes.set_xlim(0, limit)
    if len(names) > 1:
        axes.legend(frameon=False, labelcolor=INK, loc="lower right")
    return _svg(canvas)


def _canvas(height: float = 3.2) -> tuple[Canvas, "mpl.axes.Axes"]:
    canvas = Canvas(figsize=(7, height), layout="constrained")
    canvas.patch.set_alpha(0)
    axes = canvas.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK)
    axes.grid(alpha=0.15, color=INK)
    for name, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(name in ("left", "bottom"))
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return canvas, axes


def _colours(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def _svg(canvas: Canvas) -> str:
    stream = io.StringIO()
    # The salt keeps the ids, and so the file, the same from run to run; text stays text.
    with mpl.rc_context({"svg.hashsalt": "labs", "svg.fonttype": "none", "font.family": "sans-serif"}):
        canvas.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%" role="img"', svg, count=1)
