"""The split-half figures of an estimate, as a table for the terminal and as a picture: have enough examples been seen?"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from ..artifact import StabilityRecord
from ..errors import DataError
from ..files import write_atomically
from .stability import whole_estimate

# Okabe and Ito's colours: told apart by all common kinds of colour vision.
CORRELATION, OVERLAP = ("#000000", "o"), ("#D55E00", "s")
KINDS = {  # of the groups, the last word of their names
    "attention": "#0072B2",
    "mlp": "#E69F00",
    "embedding": "#009E73",
    "head": "#CC79A7",
    "norm": "#56B4E9",
    "other": "#999999",
}
THRESHOLD_COLOUR = "#555555"
DASHES = (0, (4, 4))
FONT_SIZE = 11
DPI = 150


def stability_figure(records: Sequence[StabilityRecord], path: str | Path, threshold: float | None = None) -> Path:
    """
    Draw how the two halves come to agree, over the number of examples, into a PNG; one panel for each probe of a mixture.

    Args:
        records (`Sequence[StabilityRecord]`): `manifest.estimator.stability` of a Fisher.
        path (`str` or `Path`): where the PNG goes, written whole or not at all.
        threshold (`float`, *optional*): `until_stable`, as a dashed line.

    Returns:
        `Path`: `path`.

    Raises:
        [`DataError`]: there are no records.
    """
    buffer = io.BytesIO()
    draw(records, threshold).savefig(buffer, format="png")
    return write_atomically(path, buffer.getvalue())


def draw(records: Sequence[StabilityRecord], threshold: float | None = None) -> Figure:
    """The figure behind [`stability_figure`]. Made without pyplot: no window, no global state."""
    probes = _by_probe(records)
    columns = min(3, len(probes))
    rows = math.ceil(len(probes) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(4 + 5.5 * columns, 5.5 * rows), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for axes in panels[len(probes) :]:
        axes.remove()
    for axes, (probe, line) in zip(panels, probes.items(), strict=False):
        _draw_probe(axes, line, threshold)
        if probe is not None:
            axes.set_title(f"Probe “{probe}”", fontsize=FONT_SIZE, loc="left", pad=10)
    figure.suptitle("Have enough examples been seen?", fontsize=FONT_SIZE + 2)
    for axes in panels[::columns]:
        axes.set_ylabel("agreement of two halves   (1 = perfect)", fontsize=FONT_SIZE)
    lowest = min(min(record.correlation, record.overlap, *record.groups.values()) for record in records)
    panels[0].set_ylim(min(0.9, math.floor(10 * lowest) / 10), 1.01)
    figure.legend(handles=_legend(records, threshold), loc="outside right upper", frameon=False, fontsize=FONT_SIZE)
    return figure


def _draw_probe(axes: Axes, line: Sequence[StabilityRecord], threshold: float | None) -> None:
    counts = [record.examples for record in line]
    for name in dict.fromkeys(name for record in line for name in record.groups):
        drawn = [(record.examples, record.groups[name]) for record in line if name in record.groups]
        axes.plot(*zip(*drawn, strict=True), color=KINDS[_kind(name)], lw=0.9, marker=".", ms=3, alpha=0.8, zorder=2)
    for (colour, marker), values in (
        (OVERLAP, [record.overlap for record in line]),
        (CORRELATION, [record.correlation for record in line]),
    ):
        axes.plot(counts, values, color=colour, marker=marker, ms=7, lw=2.2, zorder=3)
    if threshold is not None:
        axes.axhline(threshold, color=THRESHOLD_COLOUR, lw=1.2, ls=DASHES, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("examples", fontsize=FONT_SIZE)
    axes.set_xlim(min(counts) / 2**0.25, max(counts) * 2**0.25)
    # all examples together are seldom a doubling; a label that would touch theirs gives way
    ticks = [count for count in counts if count == counts[-1] or count * 2**0.6 < counts[-1]]
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=FONT_SIZE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)


def _legend(records: Sequence[StabilityRecord], threshold: float | None) -> list[Line2D]:
    present = {_kind(name) for record in records for name in record.groups}
    whole, top = (Line2D([], [], color=colour, marker=marker, ms=7, lw=2.2) for colour, marker in (CORRELATION, OVERLAP))
    whole.set_label("correlation of log F")
    top.set_label("overlap of the top 1 %")
    thin = [
        Line2D([], [], color=colour, lw=0.9, marker=".", ms=3, label=f"… within {kind}")
        for kind, colour in KINDS.items()
        if kind in present
    ]
    handles = [whole, *thin, top]
    if threshold is not None:
        handles.append(Line2D([], [], color=THRESHOLD_COLOUR, lw=1.2, ls=DASHES, label=f"until_stable {threshold:g}"))
    return handles


def _kind(group: str) -> str:
    """`"mlp"` of `"layer 3 mlp"`."""
    kind = group.rpartition(" ")[2]
    return kind if kind in KINDS else "other"


def stability_table(records: Sequence[StabilityRecord]) -> str:
    """
    The records as aligned text, for a terminal. "whole estimate" is [`whole_estimate`]: how well an estimate from as many other
    examples would agree with this one.

    Raises:
        [`DataError`]: there are no records.
    """
    several = None not in (probes := _by_probe(records))
    cells = [
        ["probe", "examples", "halves agree", "whole estimate", "top 1 %", "least agreeing group"],
        ["", "", "correlation", "expected", "overlap", "correlation"],
    ]
    for record in (record for line in probes.values() for record in line):
        group = min(record.groups, key=lambda name, record=record: record.groups[name], default=None)  # type: ignore[misc]
        cells.append(
            [
                record.probe or "",
                f"{record.examples:,}",
                f"{record.correlation:.3f}",
                f"{whole_estimate(record.correlation):.3f}",
                f"{record.overlap:.3f}",
                "–" if group is None else f"{record.groups[group]:.3f}  {group}",
            ]
        )
    cells = cells if several else [line[1:] for line in cells]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    texts = {0, len(widths) - 1} if several else {len(widths) - 1}  # to the left; figures to the right
    lines = [
        "   ".join(cell.ljust(w) if i in texts else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    lines.insert(2, "─" * (sum(widths) + 3 * (len(widths) - 1)))
    return "\n".join(line.rstrip() for line in lines)


def _by_probe(records: Sequence[StabilityRecord]) -> dict[str | None, list[StabilityRecord]]:
    if not records:
        raise DataError(
            "this Fisher holds no split-half figures: it was estimated by a version that took none, or from other Fishers. "
            "Estimate it again (`hf-ewc fisher …`) to get them."
        )
    probes: dict[str | None, list[StabilityRecord]] = {}
    for record in sorted(records, key=lambda record: record.examples):
        probes.setdefault(record.probe, []).append(record)
    return probes
