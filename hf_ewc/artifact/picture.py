"""Where the trace of a Fisher lies: as a picture, layer by layer, and as a small table."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's colours, told apart by all common kinds of colour vision; the order is that of the stack and of the legend
COLOURS = {
    "attention": "#0072B2",
    "mlp": "#E69F00",
    "norm": "#CC79A7",
    "embedding": "#009E73",
    "head": "#D55E00",
    "other": "#999999",
}
FONT_SIZE = 11
DPI = 150
LABELLED = 14  # more bars than this have no room for a figure above each


def trace_picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """
    A PNG of each layer's share of the trace, stacked by kind of tensor. The same rows give the same bytes, so that a push of
    what is there already stays a push of nothing. On white, as pages are light for some readers and dark for others.

    Args:
        rows (sequence of `dict`): rows of `summary/params.parquet`, see [`describe`].
    """
    bars = trace_bars(rows)
    figure = Figure(figsize=(min(14, max(7, 3 + 0.4 * len(bars))), 4.4), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    heights = [0.0] * len(bars)
    for group, colour in COLOURS.items():
        shares = [bar.get(group, 0.0) for bar in bars.values()]
        if any(shares):
            axes.bar(range(len(bars)), shares, bottom=heights, color=colour, edgecolor="white", lw=0.6, width=0.8, label=group)
        heights = [low + share for low, share in zip(heights, shares, strict=True)]
    if len(bars) <= LABELLED:
        for place, height in enumerate(heights):
            axes.text(place, height, f"{height:.1%}", ha="center", va="bottom", fontsize=FONT_SIZE - 1)
    axes.set_xticks(range(len(bars)), list(bars))
    for label in axes.get_xticklabels() if len(bars) > LABELLED else ():
        label.set_rotation(0 if label.get_text().isdigit() else 90)
    axes.set_ylim(0, 1.12 * max([*heights, 1e-9]))
    axes.set_xlim(-0.6, len(bars) - 0.4)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if max([*heights, 0]) > 0.05 else 1))
    axes.set_title("Share of the trace of the Fisher information", fontsize=FONT_SIZE + 2, loc="left", pad=10)
    axes.set_xlabel("numbers are layers, from the input on", fontsize=FONT_SIZE)
    axes.tick_params(labelsize=FONT_SIZE)
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    if any(heights):
        figure.legend(loc="outside right upper", frameon=False, fontsize=FONT_SIZE, reverse=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def trace_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same in Markdown: each kind of tensor, then each third of the layers."""
    groups = sorted({row["group"] for row in rows}, key=lambda group: -_trace(row for row in rows if row["group"] == group))
    parts = {group: [row for row in rows if row["group"] == group] for group in groups}
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    size = max(1, math.ceil(len(layers) / 3))
    for start in range(0, len(layers), size):
        third = layers[start : start + size]
        name = f"layer {third[0]}" if len(third) == 1 else f"layers {third[0]} to {third[-1]}"
        parts[name] = [row for row in rows if row["layer"] in third]
    if outside := [row for row in rows if row["layer"] is None]:
        parts["outside the layers"] = outside
    total = _trace(rows) or 1.0
    lines = ["| where | parameters | share of the trace | mean F |", "|:--|--:|--:|--:|"]
    for name, members in parts.items():
        numel = sum(row["numel"] for row in members)
        lines.append(f"| {name} | {numel:,} | {_trace(members) / total:.1%} | {_trace(members) / max(1, numel):.3g} |")
    return "\n".join(lines)


def _trace(rows: Iterable[Mapping[str, Any]]) -> float:
    return math.fsum(row["trace"] for row in rows)


def trace_bars(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Bar → group → share of the trace: what stands before the layers, the layers, what stands behind them."""
    total = _trace(rows) or 1.0
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    outside = {row["group"] for row in rows if row["layer"] is None}
    order = [g for g in ("embedding", "other") if g in outside], layers, [g for g in COLOURS if g in outside]
    # the legend's "norm" is of all norms, and the bar is of those that are in no layer: with most models the last one alone
    norms = {row.get("module") for row in rows if row["layer"] is None and row["group"] == "norm"}
    names = {"norm": "final norm" if len(norms) == 1 else "other norms"}
    bars: dict[str, dict[str, float]] = {names.get(str(key), str(key)): {} for part in order for key in part}
    for row in rows:
        bar = bars[names.get(row["group"], row["group"]) if row["layer"] is None else str(row["layer"])]
        bar[row["group"]] = bar.get(row["group"], 0.0) + row["trace"] / total
    return bars
