"""Line charts as inline SVG, in colours that the page around them decides.

Matplotlib draws with placeholder colours; each is then replaced by a custom property of CSS (``--ink``, ``--series-1``
and so on), so that one drawing serves light and dark pages. Drawings depend on their data alone, to the byte.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

COLOURS = 6
"""Series colours the page must define: ``--series-1`` to ``--series-6``. Later series repeat them with new markers."""

_MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"))
_MARKED = 12

# Colours no chart uses otherwise, each standing for a property of the page.
_INK, _FAINT = "#0a0b0c", "#0a0b0d"
_PLACEHOLDERS = {_INK: "ink-soft", _FAINT: "line"} | {f"#0a0c0{i}": f"series-{i}" for i in range(1, COLOURS + 1)}
_STYLE: tuple[tuple[Any, Any], ...] = (
    ("svg.fonttype", "none"),
    ("font.size", 10.0),
    ("axes.facecolor", "none"),
    ("figure.facecolor", "none"),
    ("axes.edgecolor", _FAINT),
    ("axes.labelcolor", _INK),
    ("xtick.color", _FAINT),
    ("ytick.color", _FAINT),
    ("xtick.labelcolor", _INK),
    ("ytick.labelcolor", _INK),
    ("axes.grid", True),
    ("grid.color", _FAINT),
    ("grid.linewidth", 0.6),
    ("axes.spines.top", False),
    ("axes.spines.right", False),
    ("axes.spines.left", False),
    ("axes.unicode_minus", True),
    ("lines.solid_capstyle", "round"),
)

Scale = Literal["linear", "log", "counts"]
"""Of an axis; ``"counts"`` is logarithmic and has room for zero."""


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        series: the number of what it belongs to, which decides colour and marker.
        x: abscissae.
        y: ordinates; points that are not finite are left out.
        dashed: drawn as dashes without markers.
    """

    series: int
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def colour(series: int) -> int:
    """Which of the page's series colours, from 1, the series takes."""
    return series % COLOURS + 1


def marker(series: int) -> str:
    """The series' marker as a character, for legends."""
    return _MARKERS[series % len(_MARKERS)][1]


def line_chart(
    lines: Sequence[Line],
    *,
    name: str,
    x_label: str,
    y_label: str,
    x_scale: Scale = "linear",
    y_scale: Scale = "linear",
    y_range: tuple[float, float] | None = None,
) -> str:
    """An ``<svg>`` element.

    Args:
        lines: the curves, later ones above.
        name: said by screen readers; also keeps the element's ids apart from those of other charts of a page.
        x_label: under the abscissa.
        y_label: above the ordinate.
        x_scale: of the abscissa.
        y_scale: of the ordinate; ``"log"`` is linear where a value is not positive.
        y_range: values outside are cut off; the axis is no longer than the values need.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for key, value in _STYLE:
            matplotlib.rcParams[key] = value
        matplotlib.rcParams["svg.hashsalt"] = name
        figure = Figure(figsize=(5.6, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        if y_scale == "log" and any(y <= 0 for line in lines for y in line.y):
            y_scale = "linear"
        _scale(axes, "x", x_scale)
        _scale(axes, "y", y_scale)
        axes.tick_params(length=0)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(x_label)
        axes.set_title(y_label, loc="left", fontsize=10.0, color=_INK, pad=9.0)
        if y_range is not None:
            low, high = max(axes.get_ylim()[0], y_range[0]), min(axes.get_ylim()[1], y_range[1])
            if low < high:
                axes.set_ylim(low, high)
        return _svg(figure, name)


def _draw(axes: Axes, line: Line) -> None:
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=f"#0a0c0{colour(line.series)}",
        linestyle=(0, (3.0, 2.0)) if line.dashed else "solid",
        linewidth=1.3 if line.dashed else 1.9,
        marker=None if line.dashed else _MARKERS[line.series % len(_MARKERS)][0],
        markersize=4.5,
        markevery=max(1, math.ceil(len(points) / _MARKED)),
    )


def _scale(axes: Axes, which: Literal["x", "y"], scale: Scale) -> None:
    set_scale = axes.set_xscale if which == "x" else axes.set_yscale
    axis = axes.xaxis if which == "x" else axes.yaxis
    if scale == "counts":
        set_scale("symlog", linthresh=1.0, linscale=0.3)
        axes.set_xlim(left=0.0) if which == "x" else axes.set_ylim(bottom=0.0)
    elif scale == "log":
        set_scale("log")
    if scale != "linear":
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e5 else f"{value:.0e}"))


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for unwanted in (
        r"<metadata>.*?</metadata>",
        r"<style.*?</style>",
        r' id="[a-z]+[a-z0-9.]*_\d+"',
        r' transform="rotate\(-0 [^"]*"',
        r" font-family: [^;]*;",
        r"(?<=>)\s+(?=<)",
        r"<g/>",
    ):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    for placeholder, role in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, f"var(--{role})")
    # Without width and height the page decides the size, and the view box the shape.
    opening = rf'<svg role="img" aria-label="{html.escape(name)}" viewBox="\1">'
    return re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', opening, svg, count=1)
