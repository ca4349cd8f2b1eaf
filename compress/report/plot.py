"""Plot quality against size as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.report.compare import Comparison
from compress.report.scorecard import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-in colours, which CSS replaces so that the plot follows the page into dark mode.
INK, FAINT, ACCENT, PAPER = "#010101", "#020202", "#030303", "#040404"
CSS_COLOURS = {INK: "var(--ink)", FAINT: "var(--faint)", ACCENT: "var(--accent)", PAPER: "var(--paper)"}

LABEL_POINTS = 11
"""Height of a label in points. Labels keep this distance from each other."""


def quality_against_size(comparison: Comparison) -> str:
    """Perplexity (with its interval) over megabytes of weights, as one ``<svg>`` element.

    The line joins the models for which no other model is both smaller and better. If there is nothing to
    plot, or no matplotlib, a paragraph says so instead.
    """
    points = [
        _Point(card.model.name, card.is_dense, card.cost.weight_bytes / 1e6, card.fidelity.perplexity)
        for card in (row.scorecard for row in comparison.rows)
        if card.fidelity
    ]
    if not points:
        return "<p>No model was scored on text, so there is no quality to plot against size.</p>"
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure as Drawing
    except ImportError:
        return "<p>The plot needs matplotlib: <code>pip install 'compress-model[plot]'</code>.</p>"

    style: Any = {
        "svg.fonttype": "none",  # text stays text: searchable, in the font of the page
        "svg.hashsalt": "compress-model",  # the same comparison gives the same bytes
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.parse_math": False,
    }
    with mpl.rc_context(style):
        drawing = Drawing(figsize=(8.4, 4.4), layout="constrained")
        canvas = FigureCanvasSVG(drawing)
        drawing.patch.set_alpha(0)
        axes = drawing.add_subplot(facecolor="none")
        _draw(axes, points)
        file = io.StringIO()
        canvas.print_svg(file, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Metadata and namespaces contain only addresses, which a page that fetches nothing does not need.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    for stand_in, colour in CSS_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return svg.replace("<svg ", '<svg role="img" aria-label="Perplexity against size of the models" ', 1)


class _Point(NamedTuple):
    """One model in the plot."""

    name: str
    is_dense: bool
    size: float  # of the weights, in MB
    perplexity: Figure


def _draw(axes: Axes, points: list[_Point]) -> None:
    sizes = [point.size for point in points]
    values = [point.perplexity.value for point in points]
    if max(values) > 4 * min(values):
        _scale_logarithmically(axes)
    front = _front(sizes, values)
    if len(front) > 1:
        axes.plot([sizes[i] for i in front], [values[i] for i in front], color=FAINT, linewidth=1.2, zorder=1)
    for point in points:
        size, figure = point.size, point.perplexity
        if figure.low is not None and figure.high is not None:
            axes.plot([size, size], [figure.low, figure.high], color=ACCENT, linewidth=1.5, zorder=2)
        fill = PAPER if point.is_dense else ACCENT
        axes.plot(
            size, figure.value, "o", markersize=7, markerfacecolor=fill, markeredgecolor=ACCENT, zorder=3
        )
    axes.set_xlim(0, max(sizes) * 1.08)
    axes.margins(y=0.15)
    axes.set_xlabel("size of the weights (MB = 10^6 bytes)")
    axes.set_ylabel("perplexity (lower is better)")
    axes.grid(axis="y", color=FAINT, linewidth=0.5, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=FAINT)
    _label(axes, points)


def _scale_logarithmically(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2, 5, 10, ... instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _front(sizes: list[float], values: list[float]) -> list[int]:
    """Indices, ordered by size, of the models for which no other model is both smaller and better."""
    front: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (sizes[i], values[i])):
        if not front or values[index] < values[front[-1]]:
            front.append(index)
    return front


def _label(axes: Axes, points: list[_Point]) -> None:
    """Write names beside the points, towards the middle, and higher where two would overlap."""
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    drawing.draw_without_rendering()
    places = axes.transData.transform([(point.size, point.perplexity.value) for point in points])
    scale = drawing.dpi / 72
    middle = axes.transAxes.transform((0.5, 0.5))[0]
    taken: list[tuple[float, float, float]] = []  # left, right, height of each label so far
    for index in sorted(range(len(points)), key=lambda i: places[i][1]):
        x, y = places[index] / scale
        name = points[index].name
        name = name if len(name) <= 40 else f"{name[:39]}…"
        width = 5.5 * len(name)
        rightwards = places[index][0] < middle
        left, right = (x + 8, x + 8 + width) if rightwards else (x - 8 - width, x - 8)
        height = y
        for other_left, other_right, other in sorted(taken, key=lambda label: label[2]):
            if left < other_right and other_left < right and abs(height - other) < LABEL_POINTS:
                height = other + LABEL_POINTS
        taken.append((left, right, height))
        axes.annotate(
            name,
            (points[index].size, points[index].perplexity.value),
            xytext=(8 if rightwards else -8, height - y),
            textcoords="offset points",
            ha="left" if rightwards else "right",
            va="center",
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1, "alpha": 0.8},  # over the front's line
        )
