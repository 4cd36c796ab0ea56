"""Kept against learned, as a picture in the page: it takes the page's colours, and shapes tell its lines apart, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from render import attribute, shown
from texts import Texts

from hf_ewc.evaluation import place_labels

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 16, 56  # margins: numbers and titles of the axes
CHARACTER, LINE = 7.4, 16.0  # size of a label's letters, about
COLOURS = ("#2563eb", "#d97706", "#059669", "#c026d3", "#64748b", "#dc2626")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "bar")


class Point(NamedTuple):
    """`x` and `y` in bits per byte, the words beside it, and whether it is the page's own model."""

    x: float
    y: float
    label: str
    own: bool = False


class Line(NamedTuple):
    name: str
    points: Sequence[Point]


def chart(lines: Sequence[Line], x_title: str, y_title: str, summary: str, t: Texts) -> str:
    """An SVG. `summary` is read out instead of the picture, whose figures should also stand in a table or in words."""
    lines = [Line(name, [p._replace(label=t.figures(p.label)) for p in points]) for name, points in lines if points]
    if not lines:
        return ""
    points = [point for line in lines for point in line.points]
    x, x_ticks = _scale([point.x for point in points], LEFT, WIDTH - RIGHT)
    y, y_ticks = _scale([point.y for point in points], HEIGHT - BOTTOM, TOP)
    drawn = [_axes(x, y, x_ticks, y_ticks, x_title, y_title, t)]
    for number, line in enumerate(lines):
        colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
        path = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in line.points)
        drawn.append(f'<polyline class="line" points="{path}" style="stroke:{colour}"/>')
        drawn += [_marker(shape, x(point.x), y(point.y), colour, point) for point in line.points]
    drawn += _labels(
        [(x(point.x), y(point.y), point) for point in points], [[(x(p.x), y(p.y)) for p in line.points] for line in lines]
    )
    legend = "".join(_key(number, line.name) for number, line in enumerate(lines))
    picture = (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{attribute(summary)}">{"".join(drawn)}</svg>'
    )
    return f'<div class="scroll" tabindex="0">{picture}</div><p class="keys">{legend}</p>'


def _scale(values: Sequence[float], start: float, end: float):
    """From bits per byte to pixels, with round ticks; a range of nothing is widened."""
    low, high = min(values), max(values)
    room = max(high - low, 0.05) * 0.1
    low, high = low - room, high + room
    raw = (high - low) / 5
    power = 10.0 ** len(str(int(1 / raw))) if raw < 1 else 1.0
    step = next((s / power for s in (1, 2, 5, 10, 20, 50) if s / power >= raw), raw)
    first = -(-low // step) * step
    ticks = [first + i * step for i in range(int((high - first) / step) + 1)]
    return (lambda value: start + (value - low) / (high - low) * (end - start)), ticks


def _axes(x, y, x_ticks: list[float], y_ticks: list[float], x_title: str, y_title: str, t: Texts) -> str:
    bottom = HEIGHT - BOTTOM
    found = [f'<line class="grid" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="{TOP}" y2="{bottom}"/>' for v in x_ticks]
    found += [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>' for v in y_ticks]
    found += [f'<text x="{x(v):.1f}" y="{bottom + 18}" text-anchor="middle">{_number(v, t)}</text>' for v in x_ticks]
    found += [f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{_number(v, t)}</text>' for v in y_ticks]
    found.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    found.append(f'<line class="axis" x1="{LEFT}" x2="{LEFT}" y1="{TOP}" y2="{bottom}"/>')
    found.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{attribute(x_title)}</text>')
    middle = (TOP + bottom) / 2
    found.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{attribute(y_title)}</text>')
    return "".join(found)


def _marker(shape: str, x: float, y: float, colour: str, point: Point) -> str:
    figures = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"',
        "square": f'<rect x="{x - 5.5:.1f}" y="{y - 5.5:.1f}" width="11" height="11"',
        "triangle": f'<path d="M{x:.1f} {y - 7:.1f}l7 12h-14z"',
        "diamond": f'<path d="M{x:.1f} {y - 7.5:.1f}l7.5 7.5l-7.5 7.5l-7.5 -7.5z"',
        "bar": f'<rect x="{x - 7:.1f}" y="{y - 3:.1f}" width="14" height="6"',
        "cross": f'<path d="M{x - 6:.1f} {y - 2:.1f}h4v-4h4v4h4v4h-4v4h-4v-4h-4z"',
    }
    told = f"<title>{attribute(point.label)}</title>"
    own = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="11"/>' if point.own else ""
    name = figures[shape].partition(" ")[0][1:]
    return f'{figures[shape]} style="fill:{colour}">{told}</{name}>{own}'


def _labels(points: list[tuple[float, float, Point]], lines: list[list[tuple[float, float]]]) -> list[str]:
    """The words beside the points, clear of lines, points and each other."""
    wanted: dict[tuple[float, float, str], Point] = {}
    for x, y, point in points:
        if point.label:
            wanted.setdefault((round(x), round(y), point.label), point)  # a point that lines share is named once
    if not wanted:
        return []
    sizes = [(len(label) * CHARACTER, LINE) for _, _, label in wanted]
    bounds = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    centres = place_labels([(x, y) for x, y, _ in wanted], sizes, lines, bounds, gap=10)
    return [
        f'<text{" class=own" if own else ""} x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{attribute(label)}</text>'
        for (x, y), (_, _, label, own) in zip(centres, wanted.values(), strict=True)
    ]


def _key(number: int, name: str) -> str:
    colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
    mark = f'<svg width="16" height="16" aria-hidden="true">{_marker(shape, 8, 8, colour, Point(0, 0, ""))}</svg>'
    return f'<span class="key">{mark} {shown(name)}</span> '


def _number(value: float, t: Texts) -> str:
    """Of a tick: no more digits than it needs."""
    text = f"{value:.3f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else t.figures(text)
