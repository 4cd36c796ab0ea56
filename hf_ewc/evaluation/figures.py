"""The picture of a sweep: what was kept against what was learned, and the questions that are still answered."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from ..files import write_atomically
from .labels import place_labels
from .results import Row, domain_titles, fronts, rows

# Okabe and Ito's colours: told apart by all common kinds of colour vision; the markers tell them apart in print.
STYLES = {"proximal": ("#0072B2", "o"), "loss": ("#D55E00", "s"), "decoupled": ("#009E73", "^")}
STYLES |= {"merge": ("#AA4499", "D"), "interpolate": ("#000000", "X")}  # Tol's purple: dark enough for the labels
SPARE_STYLES = [("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X")]
BASE_COLOUR = "#555555"
# λ = 0, in any mode
PLAIN: dict[str, Any] = {"ls": "", "marker": "o", "color": "black", "mfc": "white", "mew": 1.8, "ms": 10}
DASHES = (0, (4, 4))
AFTER_TRAINING = (0, (3, 1.2))  # the lines of models that were merged, not trained
FONT_SIZE = 11
DPI = 150  # 1800 pixels wide, so that the text is sharp where the picture is shown at 1200


def retention_figure(results: dict, path: str | Path) -> Path:
    """
    Draw `results` (see `evaluation/results.py`) into a PNG.

    The left panel has one line per mode over λ: to the left is *learned more* (bits per byte of the new texts), down is
    *kept more* (bits per byte of the old ones). A mode whose line lies further to the lower left is better. The right
    panels, one per question set, show accuracy ± one standard error over λ, with the base and the level of guessing. Lines of
    models that were made after training are dashed; shares of the way back, which are no λ, stand beside the λ.

    Args:
        results (`dict`): Results of a sweep; runs that are not finite are named above the picture instead of drawn.
        path (`str` or `Path`): Where the PNG goes, written whole or not at all.

    Returns:
        `Path`: `path`.
    """
    buffer = io.BytesIO()
    draw(results).savefig(buffer, format="png")
    return write_atomically(path, buffer.getvalue())


def draw(results: dict) -> Figure:
    """The figure behind [`retention_figure`]. Made without pyplot: no window, no global state."""
    table = rows(results)
    old, new = domain_titles(results)
    lines = fronts(table)
    spare = iter(SPARE_STYLES * 9)
    styles = {mode: (*(STYLES.get(mode) or next(spare)), _dashes(line)) for mode, line in lines.items()}
    question_sets = list(table[0].questions)

    figure = Figure(figsize=(12, 6), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(max(1, len(question_sets)), 7)
    retention = figure.add_subplot(grid[:, :4] if question_sets else grid[:, :])
    _draw_retention(retention, table[0], lines, styles, old, new)
    for i, name in enumerate(question_sets):
        _draw_questions(figure.add_subplot(grid[i, 4:]), name, table[0], lines, styles)

    handles = _legend(styles, table, question_sets)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=6 if len(handles) <= 6 else (len(handles) + 1) // 2,
        frameon=False,
        fontsize=FONT_SIZE,
    )
    diverged = [_name(row) for row in table[1:] if row.old is None or row.new is None]
    if diverged:
        figure.suptitle(f"not drawn, loss not finite: {', '.join(diverged)}", fontsize=FONT_SIZE, color=BASE_COLOUR)
    figure.canvas.draw()  # settles the layout; labels are placed in pixels
    figure.set_layout_engine("none")
    _label_points(retention, table[0], lines, styles)
    return figure


def _draw_retention(axes: Axes, base: Row, lines: dict[str, list[Row]], styles: dict, old: str, new: str) -> None:
    for mode, line in lines.items():
        colour, marker, dashes = styles[mode]
        axes.plot(*_xy(line), marker=marker, color=colour, ms=8, lw=1.8, ls=dashes, zorder=2)
        axes.plot(*_xy([row for row in line if row.strength == 0]), **PLAIN, zorder=3)
    for x, y, _ in _base_point(base, lines):
        axes.axhline(y, color=BASE_COLOUR, lw=0.8, ls=DASHES, zorder=1)
        axes.plot(x, y, "*", ms=15, color=BASE_COLOUR, zorder=3)
    axes.margins(0.12)
    _dress(axes, f"What is kept of {old}, what is learned of {new}")
    axes.set_xlabel(f"{new}: bits per byte   (← learned more)", fontsize=FONT_SIZE)
    axes.set_ylabel(f"{old}: bits per byte   (forgot more →)", fontsize=FONT_SIZE)


def _draw_questions(axes: Axes, name: str, base: Row, lines: dict[str, list[Row]], styles: dict) -> None:
    drawn = [row for line in lines.values() for row in line]
    strengths = sorted({row.strength for row in drawn if row.interpolate is None})  # type: ignore[type-var]
    shares = sorted({row.interpolate for row in drawn if row.interpolate is not None})
    ticks = [*range(len(strengths) + 1), *(len(strengths) + 1.5 + i for i in range(len(shares)))]
    one_plain = len({id(line[0]) for line in lines.values()}) == 1  # all modes start from the same λ = 0
    over_lambda = [mode for mode, line in lines.items() if line[-1].interpolate is None]
    before = base.questions[name]
    if before.value is not None:
        axes.axhline(before.value, color=BASE_COLOUR, lw=0.8, ls=DASHES, zorder=1)
        axes.errorbar([0], [before.value], [before.stderr or 0], fmt="*", color=BASE_COLOUR, ms=13, elinewidth=1.5, capsize=3)
    for mode, line in lines.items():
        colour, marker, dashes = styles[mode]
        # side by side, so that error bars do not hide each other
        shift = 0.16 * (over_lambda.index(mode) - (len(over_lambda) - 1) / 2) if mode in over_lambda else 0
        points = []
        for row in line:
            score = row.questions.get(name)
            if score and score.value is not None:
                if row.interpolate is not None:
                    place = ticks[len(strengths) + 1 + shares.index(row.interpolate)]
                else:
                    place = 1 + strengths.index(row.strength) + (0 if one_plain and row.strength == 0 else shift)
                points.append((place, score.value, score.stderr or 0))
        # between λ = 0 and the shares lie the λ of other modes: no line leads through those
        for part in [points] if mode in over_lambda else [points[:1], points[1:]]:
            x, y, error = np.array(part).reshape(-1, 3).T
            style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 7, "lw": 1.2, "ls": dashes, "zorder": 2}
            axes.errorbar(x, y, error, elinewidth=1.5, capsize=3, **style)
        if line[0].strength == 0 and len(points) == len(line):
            axes.plot(*points[0][:2], **PLAIN, zorder=3)
    if before.chance is not None:
        axes.axhline(before.chance, color=BASE_COLOUR, lw=1.2, ls=":", zorder=1)
    names = ["base", *(_power(f"{value:g}") for value in strengths), *(f"{100 * value:g}%" for value in shares)]
    axes.set_xticks(ticks, names)
    axes.set_xlim(-0.6, ticks[-1] + 0.6)
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _dress(axes, f"Questions answered right: {name}")
    axes.set_xlabel("λ   (kept more →)" + ("  ·  way back" if shares else ""), fontsize=FONT_SIZE)


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=FONT_SIZE + 2, loc="left", pad=10)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)


def _legend(styles: dict, table: list[Row], question_sets: list[str]) -> list[Line2D]:
    handles = [
        Line2D([], [], color=colour, marker=marker, ls=dashes, ms=8, label=mode if dashes == "-" else f"{mode}, after training")
        for mode, (colour, marker, dashes) in styles.items()
    ]
    if any(row.strength == 0 for row in table):
        handles.append(Line2D([], [], **PLAIN, label="λ = 0: plain fine-tuning"))
    handles.append(Line2D([], [], color=BASE_COLOUR, ls=DASHES, lw=0.8, marker="*", ms=12, label="base, before training"))
    if any(table[0].questions[name].chance is not None for name in question_sets):
        handles.append(Line2D([], [], color=BASE_COLOUR, ls=":", label="guessing"))
    return handles


def _dashes(line: list[Row]) -> Any:
    return AFTER_TRAINING if line[-1].merged else "-"


def _power(number: str) -> str:
    """A large round number in less space: 10⁵ for 100000."""
    zeros = len(number) - 1
    return f"$10^{zeros}$" if zeros >= 4 and number == "1" + zeros * "0" else number


def _name(row: Row) -> str:
    return f"{row.mode} {row.label}" if row.interpolate is not None else f"{row.mode} λ = {row.label}"


def _points(line: list[Row]) -> list[Row]:
    return [row for row in line if row.old is not None and row.new is not None]


def _xy(line: list[Row]) -> NDArray[np.float64]:
    """(2, N) coordinates in the retention panel of the rows that are finite."""
    return np.array([(row.new, row.old) for row in _points(line)], dtype=np.float64).reshape(-1, 2).T


def _base_point(base: Row, lines: dict[str, list[Row]]) -> list[tuple[float, float, str]]:
    """
    (x, y, label) of the base, if it is finite. A base that never saw the new domain lies so far to the right that the runs
    would shrink to a dash; it is then drawn nearer, and its label says where it is.
    """
    if not _points([base]):
        return []
    x, y = _xy([base])[:, 0]
    drawn = np.concatenate([_xy(line)[0] for line in lines.values()]) if lines else np.array([])
    if len(drawn) and x > drawn.max() + (span := max(np.ptp(drawn), 0.05)):
        return [(drawn.max() + span / 3, y, f"base, at {x:.2f} →")]
    return [(x, y, "base")]


def _label_points(axes: Axes, base: Row, lines: dict[str, list[Row]], styles: dict) -> None:
    """Write λ beside each point (and "base"), clear of the lines, the points and each other."""
    wanted: dict[tuple[float, float, str], str] = {}  # (x, y, text) → colour; a λ = 0 that all modes share is written once
    for mode, line in lines.items():
        for row, (x, y) in zip(_points(line), _xy(line).T, strict=True):
            text, colour = (_power(row.label), styles[mode][0]) if row.strength else ("λ = 0", "black")
            wanted.setdefault((x, y, text), colour)
    wanted |= dict.fromkeys(_base_point(base, lines), BASE_COLOUR)
    if not wanted:
        return

    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [
        axes.text(x, y, text, color=colour, fontsize=FONT_SIZE, ha="center", va="center", zorder=4)
        for (x, y, text), colour in wanted.items()
    ]
    anchors = axes.transData.transform([text.get_position() for text in texts])
    sizes = np.array([(box.width, box.height) for box in (text.get_window_extent(renderer) for text in texts)])
    obstacles = [axes.transData.transform(_xy(line).T) for line in lines.values() if _points(line)]
    for x, y, _ in _base_point(base, lines):  # the dashed line through the base
        height = axes.transData.transform((x, y))[1]
        obstacles.append(np.array([(axes.bbox.x0, height), (axes.bbox.x1, height)]))
    scale = axes.figure.dpi / 72
    centres = place_labels(anchors, sizes, obstacles, axes.bbox.extents, gap=8 * scale)
    for label, anchor, size, centre in zip(texts, anchors, sizes, centres, strict=True):
        x, y = axes.transData.inverted().transform(centre)
        label.set_position((x, y))
        nearest = np.clip(anchor, centre - size / 2, centre + size / 2)
        if np.linalg.norm(nearest - anchor) > 14 * scale:  # too far to be read as belonging together: a thin line joins them
            ends = axes.transData.inverted().transform([anchor, nearest])
            axes.plot(ends[:, 0], ends[:, 1], color=label.get_color(), lw=0.6, zorder=1.5, scalex=False, scaley=False)
