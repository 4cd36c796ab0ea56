"""Where to write a label beside a point so that it covers no line, no point and no other label."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

ANGLES = np.deg2rad(np.arange(45, 405, 15))  # tried from the upper right on
STEPS = 12  # distances tried per angle, each half a label's height further out
SAMPLE = 3.0  # pixels between the points that stand for a line
SWEEPS = 6


def place_labels(
    anchors: ArrayLike,
    sizes: ArrayLike,
    lines: Sequence[ArrayLike],
    bounds: ArrayLike,
    gap: float,
) -> NDArray[np.float64]:
    """
    Choose a place for each label, near its point.

    Every label tries rings of places around its point and takes the cheapest: covering another label or a point is worst,
    then a line, then distance. A few sweeps over all labels let earlier ones make way for later ones.

    Args:
        anchors: (N, 2) points in pixels.
        sizes: (N, 2) widths and heights of the labels in pixels.
        lines: polylines (M, 2) in pixels that should stay visible.
        bounds: x0, y0, x1, y1 that labels must not leave.
        gap: least distance in pixels between a point's centre and its label, about the radius of its marker.

    Returns:
        (N, 2) centres of the labels in pixels.
    """
    anchors, sizes, bounds = (np.asarray(value, dtype=np.float64) for value in (anchors, sizes, bounds))
    ink = np.concatenate([_sampled(np.asarray(line, dtype=np.float64)) for line in lines] or [np.empty((0, 2))])
    candidates = [_candidates(anchor, size, gap) for anchor, size in zip(anchors, sizes, strict=True)]
    fixed = [_fixed_cost(c, size, anchors, ink, bounds, gap) for c, size in zip(candidates, sizes, strict=True)]
    chosen = np.array([options[cost.argmin()] for options, cost in zip(candidates, fixed, strict=True)])
    for _ in range(SWEEPS):
        before = chosen.copy()
        for i, options in enumerate(candidates):
            others = np.delete(np.arange(len(anchors)), i)
            reach = (sizes[i] + sizes[others]) / 2 + gap / 2
            covered = (np.abs(options[:, None] - chosen[others]) < reach).all(-1).sum(-1)
            # What joins a label to its point must not run through a neighbour, nor under this label.
            own = _leaders(anchors[i], options)[:, :, None]  # (K, S, 1, 2)
            crossing = (np.abs(own - chosen[others]) < sizes[others] / 2).all(-1).sum((1, 2))
            theirs = _leaders(anchors[others], chosen[others]).reshape(-1, 2)
            crossing += (np.abs(options[:, None] - theirs) < sizes[i] / 2).all(-1).sum(-1)
            chosen[i] = options[(fixed[i] + 1e4 * covered + 300.0 * crossing).argmin()]
        if (chosen == before).all():
            break
    return chosen


def _candidates(anchor: NDArray, size: NDArray, gap: float) -> NDArray:
    """(K, 2) centres on growing rings: the label's *edge*, not its centre, keeps the ring's distance from the point."""
    directions = np.stack([np.cos(ANGLES), np.sin(ANGLES)], -1)  # (A, 2)
    edge = 1 / np.maximum(np.abs(directions[:, 0]) / size[0], np.abs(directions[:, 1]) / size[1]) / 2  # centre to edge
    rings = gap + size[1] / 2 * np.arange(STEPS)  # (S,)
    return (anchor + directions * (edge + rings[:, None])[..., None]).reshape(-1, 2)


def _fixed_cost(options: NDArray, size: NDArray, anchors: NDArray, ink: NDArray, bounds: NDArray, gap: float) -> NDArray:
    """(K,) cost of each place without the other labels. Options come in rings, so their order is their distance."""
    half = size / 2
    outside = ((options - half < bounds[:2]) | (options + half > bounds[2:])).any(-1)
    points = (np.abs(options[:, None] - anchors) < half + gap).all(-1).sum(-1)
    on_line = (np.abs(options[:, None] - ink) < half + gap / 2).all(-1).sum(-1)
    distance = np.arange(len(options)) // len(ANGLES)
    return 1e5 * outside + 1e4 * points + 200.0 * (on_line > 0) + 10.0 * on_line + 10.0 * distance


def _leaders(anchors: NDArray, centres: NDArray) -> NDArray:
    """(K, S, 2) points on the straight ways from points to their labels, the points themselves left out."""
    share = (np.arange(1, 9) / 8)[:, None]
    return anchors[..., None, :] * (1 - share) + centres[:, None] * share


def _sampled(line: NDArray) -> NDArray:
    """Points along a polyline, close enough that no label slips between them."""
    parts = [line[:1]]
    for start, end in pairwise(line):
        count = max(1, int(np.linalg.norm(end - start) / SAMPLE))
        parts.append(start + (end - start) * (np.arange(1, count + 1) / count)[:, None])
    return np.concatenate(parts)
