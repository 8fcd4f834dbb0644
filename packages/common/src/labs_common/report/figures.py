"""Figures as SVG text that takes the colour of the page around it, so that light and dark both work.

Words in Persian do not belong into a figure: matplotlib neither joins the letters nor turns the line
around. They stand in the page's own text and tables, where the browser does both.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogFormatter
from PIL import Image

# Names are text, not formulas: one with two dollar signs would be typeset, or refused.
mpl.rcParams.update({"text.parse_math": False, "text.usetex": False})
INK = "#010203"  # a colour that nothing else has: `_svg` replaces it by the page's text colour
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#64748b", "#eab308", "#06b6d4", "#ec4899")
MOST_INSIDE = 6  # curves whose legend stands among them: a longer one would hide some
MOST_LETTERS = 60  # of a name: longer ones would leave no room for the figure
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\ud800-\udfff]")
MOST_NAMED = 16  # classes in a legend: more do not fit beside a figure
FROZEN, TRAINED = "#94a3b8", "#f97316"
BESIDE = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 8}  # places of a legend
ABOVE = {"loc": "lower left", "bbox_to_anchor": (0, 1)}


@dataclass(frozen=True)
class Cell:
    """A part of a network, and how many of its parameters train and are frozen."""

    name: str
    trained: int
    fixed: int


@dataclass(frozen=True)
class Row:
    """Parts of a network that stand side by side, as they do in `times` equal layers."""

    name: str
    cells: list[Cell]
    times: int = 1


def curve_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], across: str, up: str, log_up: bool = False
) -> str:
    """Draws lines by name, each the positions and values of its points; few points are marked. Returns SVG."""
    canvas, axes = _canvas(across, up)
    for colour, (name, (xs, ys)) in zip(_colours(len(curves)), curves.items(), strict=True):
        _plot(axes, name, xs, ys, colour)
    if log_up:
        axes.set_yscale("log")
        _plain_powers(axes.yaxis)
    if len(curves) > MOST_INSIDE:
        _legend(axes, **BESIDE)
    elif len(curves) > 1:
        _legend(axes)
    return _svg(canvas)


def _plot(axes: Axes, name: str, xs: Sequence[float], ys: Sequence[float], colour: Any) -> None:
    marker = "o" if len(xs) <= 20 else ""
    axes.plot(xs, ys, label=printable(name), color=colour, linewidth=1.6, marker=marker, markersize=4)


def loss_figure(
    training: tuple[Sequence[float], Sequence[float]],
    evaluations: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> str:
    """Draws the loss by optimizer step: of training as the median of a 25th of the run, every step faint behind it.

    The lowest evaluation of a curve has a ring. The axis fits what comes after the first twentieth of the steps;
    what was before, and single peaks, may lie above it. Returns SVG.
    """
    canvas, axes = _canvas("optimizer step", "loss")
    (steps, values), colours = training, _colours(1 + len(evaluations))
    settled, wing = values[len(values) // 20 :], len(values) // 50
    places = [int(at) for at in np.unique(np.linspace(0, len(values) - 1, 400).astype(int))] if values else []
    smooth = [float(np.median(values[max(0, place - wing) : place + wing + 1])) for place in places]
    if wing:
        axes.plot(steps, values, color=colours[0], linewidth=0.8, alpha=0.3)
    name = "training, smoothed" if wing else "training"
    axes.plot([steps[place] for place in places], smooth, label=name, color=colours[0], linewidth=1.8)
    seen = [*np.quantile(settled, [0.01, 0.98]), *smooth[len(smooth) // 20 :]] if values else []
    first = steps[len(steps) // 20] if steps else 0
    for colour, (name, (xs, ys)) in zip(colours[1:], evaluations.items(), strict=True):
        _plot(axes, name, xs, ys, colour)
        if len(ys) > 1 and np.isfinite(ys).all():
            lowest = int(np.argmin(ys))
            axes.plot(xs[lowest], ys[lowest], "o", color=colour, markersize=10, fillstyle="none", markeredgewidth=1.6)
        seen += [y for x, y in zip(xs, ys, strict=True) if x >= first]
    fit = np.asarray(seen)[np.isfinite(seen)]
    if len(fit) and (room := float(np.ptp(fit)) / 20):
        axes.set_ylim(fit.min() - room, fit.max() + room)
    if evaluations:
        _legend(axes)
    return _svg(canvas)


def histogram_figure(values: Sequence[float], across: str, up: str = "count", bins: int = 40) -> str:
    """Draws how often each range of `values` occurs. Returns SVG."""
    canvas, axes = _canvas(across, up)
    axes.hist(values, bins=bins, color=COLOURS[0])
    return _svg(canvas)


def count_scatter_figure(counts: Mapping[int, int], across: str, up: str, limit: int) -> str:
    """Draws how often each whole number occurs, as points, with a line after `limit`. Returns SVG."""
    canvas, axes = _canvas(across, up)
    axes.scatter(list(counts), list(counts.values()), s=22, color=COLOURS[0])
    axes.axvline(limit + 0.5, color=TRAINED, linewidth=1.2)
    return _svg(canvas)


def bar_figure(values: Mapping[str, Mapping[str, float]], across: str, limit: float | None = None) -> str:
    """Draws horizontal bars: a group per key of `values`, a bar per key of the inner mappings. Returns SVG."""
    canvas, axes = _canvas(across, height=0.8 + 0.32 * max(4, len(values)))
    names = list(next(iter(values.values())))
    height = 0.8 / len(names)
    for place, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        offsets = [row + (place - (len(names) - 1) / 2) * height for row in range(len(values))]
        axes.barh(offsets, [bars[name] for bars in values.values()], height, label=printable(name), color=colour)
    axes.set_yticks(range(len(values)), [printable(name) for name in values])
    axes.invert_yaxis()
    if limit is not None:
        axes.set_xlim(0, limit)
    if len(names) > 1:  # long bars would lie under one inside
        _legend(axes, ncols=min(4, len(names)), **ABOVE)
    return _svg(canvas)


def matrix_figure(values: Sequence[Sequence[float]], names: Sequence[str], across: str, up: str) -> str:
    """Draws a square of counts, the same names on both sides, each row shaded by its shares. Returns SVG."""
    count, names = len(names), [printable(name) for name in names]
    canvas, axes = _canvas(across, up, height=min(7.0, 1.6 + 0.42 * count))
    for row, counts in enumerate(values):
        total = max(1, sum(counts))
        for column, value in enumerate(counts):
            colour = COLOURS[0] if row == column else TRAINED
            axes.add_patch(Rectangle((column, row), 1, 1, color=colour, alpha=0.85 * value / total, linewidth=0))
            if value and count <= 20:
                axes.text(column + 0.5, row + 0.5, f"{value:g}", ha="center", va="center", color=INK, fontsize=7)
    axes.set_xlim(0, count)
    axes.set_ylim(count, 0)
    places = [place + 0.5 for place in range(count)]
    axes.set_xticks(places, names, rotation=45 if max(map(len, names)) > 4 else 0, fontsize=8 if count <= 30 else 4)
    axes.set_yticks(places, names, fontsize=8 if count <= 30 else 4)
    axes.grid(False)
    return _svg(canvas)


def heat_figure(values: Sequence[Sequence[float]], across: str, up: str) -> str:
    """Draws values (rows, columns) as colours, with a bar that says which is which. Returns SVG."""
    canvas, axes = _canvas(across, up, height=5.2)
    axes.grid(False)
    shown = axes.imshow(values, cmap="viridis", interpolation="nearest", aspect="auto")
    bar = canvas.colorbar(shown, ax=axes)
    bar.ax.tick_params(colors=INK)
    return _svg(canvas)


def under_map(image: Image.Image, heat: np.ndarray, side: int) -> Image.Image:
    """Blends a picture with a map of it (rows, columns) at `side` × `side` pixels, dark where the map is least."""
    low, high = float(heat.min()), float(heat.max())
    levels = ((heat - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
    grown = Image.fromarray(levels).resize((side, side), Image.Resampling.BICUBIC)
    colours = Image.fromarray((255 * mpl.colormaps["inferno"](np.asarray(grown))[..., :3]).astype(np.uint8))
    return Image.blend(image.resize((side, side), Image.Resampling.BILINEAR), colours, 0.6)


def scatter_figure(
    points: Mapping[str, tuple[float, float]], across: str, up: str, log_across: bool = False, best: Sequence[str] = ()
) -> str:
    """Draws named points (x, y); those in `best` are joined by a line, such as a Pareto front. Returns SVG."""
    canvas, axes = _canvas(across, up, height=3.6)
    for name, (x, y) in points.items():
        axes.plot(x, y, "o", color=TRAINED if name in best else FROZEN, markersize=7)
    line = sorted(points[name] for name in best)
    axes.plot([x for x, _ in line], [y for _, y in line], color=TRAINED, linewidth=1, alpha=0.6)
    if log_across:
        axes.set_xscale("log")
        _plain_powers(axes.xaxis)
    axes.margins(0.16)
    _name_points(canvas, axes, points)
    return _svg(canvas)


def map_figure(points: Sequence[tuple[float, float]], labels: Sequence[int], names: Sequence[str]) -> str:
    """Draws points (x, y), coloured by class; few classes are named beside them. Returns SVG."""
    canvas, axes = _canvas(height=5.2)
    shades = mpl.colormaps["turbo"]
    for label, name in enumerate(names):
        own = [point for point, of in zip(points, labels, strict=True) if of == label]
        colour = COLOURS[label] if len(names) <= len(COLOURS) else shades((label + 0.5) / len(names))
        axes.scatter(
            [x for x, _ in own], [y for _, y in own], s=9, color=colour, label=printable(name), linewidths=0, alpha=0.8
        )
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    if 1 < len(names) <= MOST_NAMED:
        _legend(axes, **BESIDE)
    return _svg(canvas)


def architecture_figure(rows: Sequence[Row]) -> str:
    """Draws a network from its input (below) up: grey is frozen, orange trains, a strip is a part. Returns SVG."""
    canvas, axes = _canvas(height=0.8 + 0.5 * len(rows))
    for height, row in enumerate(rows):
        width = 1 / len(row.cells)
        for place, cell in enumerate(row.cells):
            left, inner = place * width + 0.004, width - 0.008
            whole = cell.trained and not cell.fixed
            axes.add_patch(Rectangle((left, height + 0.1), inner, 0.8, color=TRAINED if whole else FROZEN, alpha=0.75))
            if cell.trained and cell.fixed:
                axes.add_patch(Rectangle((left, height + 0.1), inner, 0.14, color=TRAINED))
            name = cell.name.replace("_proj", "").replace("_", " ")
            axes.text(left + inner / 2, height + 0.54, name, ha="center", va="center", color=INK, fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, len(rows))
    axes.set_xticks([])
    axes.set_yticks([place + 0.5 for place in range(len(rows))], [row.name for row in rows])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    patches = [Patch(color=TRAINED, label="trains"), Patch(color=FROZEN, label="frozen")]
    _legend(axes, handles=patches, ncols=2, **ABOVE)
    return _svg(canvas)


def _canvas(across: str = "", up: str = "", height: float = 3.2) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(7, height), layout="constrained")
    canvas.patch.set_alpha(0)
    axes = canvas.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK)
    axes.grid(alpha=0.15, color=INK)
    for name, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(name in ("left", "bottom"))
    axes.set_xlabel(across, color=INK)
    axes.set_ylabel(up, color=INK)
    return canvas, axes


def printable(name: str, most: int = MOST_LETTERS) -> str:
    """Shortens a name to what a figure has room for, in characters that SVG and fonts take."""
    short = name if len(name) <= most else f"{name[: most - 1]}…"
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], short)


def _plain_powers(axis: Axis) -> None:
    """Writes 1e-03 beside a logarithmic axis: 10 with a small -3 is a formula."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter())


def _legend(axes: Axes, **more: Any) -> None:
    axes.legend(frameon=False, labelcolor=INK, **more)


def _name_points(canvas: Canvas, axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Writes each name beside its point, inside the figure, lifted as little as keeps it clear of those below."""
    canvas.draw_without_rendering()
    to_points, end = 72 / canvas.dpi, canvas.get_figwidth() * 72  # a point is a 72nd of an inch
    taken: list[tuple[float, float, float]] = []  # left, bottom and width of the names so far, in points
    for name, place in sorted(
        ((printable(name), place) for name, place in points.items()), key=lambda item: item[1][1]
    ):
        left, bottom = axes.transData.transform(place) * to_points
        lift, width, side = 4.0, 4.6 * len(name), 6.0  # a letter of 8 points is about 4.6 wide
        if left + side + width > end:
            left, side = left - 2 * side - width, -side
        while any(
            abs(bottom + lift - other) < 9 and left < start + wide and start < left + width
            for start, other, wide in taken
        ):
            lift += 3
        taken.append((left, bottom + lift, width))
        align = "left" if side > 0 else "right"
        axes.annotate(name, place, xytext=(side, lift), textcoords="offset points", ha=align, color=INK, fontsize=8)


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
