"""What was kept and learned, and where it comes from, as HTML: headline, table, front, layers, lineage, slider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from chart import Line, Point, chart
from render import attribute, link, message, shown
from texts import Texts, domain

from hf_ewc.compare import Facts, Frame, Heading, LineageLink, ResultFacts, Scores, label_of

# at the top: three models in a few bars


def headline(facts: Facts, t: Texts) -> str:
    """What EWC did, before anything is typed: nothing if this model was not measured. First, what is wrong with the pair."""
    wrong = "".join(message(t(f"warning.{code}"), "problem") for code in _warnings(facts))
    if facts.results is None or facts.results.headline.own is None:
        return wrong
    results, head = facts.results, facts.results.headline
    models = [(name, row) for name, row in (("base", head.base), ("own", head.own), ("plain", head.plain)) if row is not None]
    if head.own == head.plain:  # the page's own model is the one without EWC
        models = [(name, row) for name, row in models if name != "own"]
    old, new = (domain(t, name) for name in (results.old, results.new))
    cards = [_card(t("headline.kept", old=old), t("headline.kept.note"), [(name, row.old) for name, row in models], t)]
    for name in head.base.questions:
        accuracies = [(model, row.questions[name].value if name in row.questions else None) for model, row in models]
        named = domain(t, name)
        cards.append(
            _card(t("headline.questions", name=named), t("headline.questions.note"), accuracies, t, _percent, whole=1.0)
        )
    cards.append(_card(t("headline.learned", new=new), t("headline.learned.note"), [(n, row.new) for n, row in models], t))
    said = ""
    if head.forgetting_avoided is not None and head.learning_kept is not None:
        shares = dict(percent=_percent(head.forgetting_avoided, t), learned=_percent(head.learning_kept, t))
        said = message(t("headline.avoided", **shares), "verdict strong")
    return f'{wrong}<div class="cards" role="group" aria-label="{attribute(t("headline.label"))}">{"".join(cards)}</div>{said}'


def _warnings(facts: Facts) -> list[str]:
    found = {link.what: link for link in facts.lineage}
    base, adapted = found.get("base model"), found.get("adapted model")
    if base is None or adapted is None:
        return []
    if base.sha256 is not None and base.sha256 == adapted.sha256:
        return ["same"]
    return ["base"] if base.verified is False else []


def _card(
    title: str,
    note: str,
    values: list[tuple[str, float | None]],
    t: Texts,
    show: Callable[[float, Texts], str] = lambda value, t: t.number(value),
    whole: float | None = None,
) -> str:
    most = whole or max((value for _, value in values if value is not None), default=1.0) or 1.0
    bars = "".join(
        f'<div class="bar {name}"><span>{t(f"headline.{name}")}</span><span class="track"><span class="fill" '
        f'style="width:{0 if value is None else 100 * value / most:.1f}%"></span></span>'
        f'<span class="value">{"–" if value is None else show(value, t)}</span></div>'
        for name, value in values
    )
    return f'<div class="card"><h2>{shown(title)}</h2><p class="note">{shown(note)}</p>{bars}</div>'


def _percent(value: float, t: Texts) -> str:
    return f"{t.number(100 * value, 0)} %"


# the tab


def page(facts: Facts, t: Texts) -> str:
    notes = {
        part: [note.text for note in facts.notes if note.part == part] for part in ("results", "headline", "layers", "lineage")
    }
    front = _front(facts.results, t) if facts.results else ""
    parts = [
        (t("facts.table"), _table(facts.results, t) if facts.results else "", notes["results"] + notes["headline"]),
        (t("facts.front"), front, []),
        (t("facts.layers"), _layers(facts, t), notes["layers"]),
        (t("facts.lineage"), _lineage(facts.lineage, t), notes["lineage"]),
    ]
    sections = []
    for title, content, problems in parts:
        said = "".join(message(t("facts.not_here", problem=problem)) for problem in problems)
        if content or said or title != t("facts.front"):
            nothing = "" if content or said else message(t("facts.none"), "nothing")
            sections.append(f"<section><h2>{title}</h2>{content}{said}{nothing}</section>")
    return f'<div class="records">{"".join(sections)}</div>'


def _table(results: ResultFacts, t: Texts) -> str:
    heads = "".join(_head(heading, t) for heading in results.columns)
    rows = ""
    for number, row in enumerate(results.rows):
        cells = "".join(f"<td>{shown(t.figures(cell))}</td>" for cell in row)
        rows += f"<tr{' class=own' if number == results.own_row else ''}>{cells}</tr>"
    keys = list(dict.fromkeys(heading.key for heading in results.columns))
    titles = {heading.key: _title(heading, t) for heading in results.columns}
    meanings = "".join(f"<dt>{shown(titles[key])}</dt><dd>{t(f'meaning.{key}')}</dd>" for key in keys)
    return f"{_scrolled(heads, rows)}<details><summary>{t('facts.columns')}</summary><dl>{meanings}</dl></details>"


def _title(heading: Heading, t: Texts) -> str:
    return domain(t, heading.title) if heading.key in ("old", "new", "questions") else t(f"column.{heading.key}")


def _head(heading: Heading, t: Texts) -> str:
    unit = f"<small>{shown(t(f'unit.{heading.unit}'))}</small>" if heading.unit else ""
    return f'<th scope="col">{shown(_title(heading, t))}{unit}</th>'


def _scrolled(heads: str, rows: str) -> str:
    """A table that a narrow screen moves sideways, also by keys."""
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _front(results: ResultFacts, t: Texts) -> str:
    old, new = domain(t, results.old), domain(t, results.new)
    modes = dict.fromkeys(point.mode for point in results.points)
    plain = [point for point in results.points if point.strength == 0]
    lines = []
    for mode in modes:
        points = [point for point in results.points if point.mode == mode]
        if mode not in ("base", "interpolate") and not any(point.strength == 0 for point in points):
            points = plain[:1] + points  # λ = 0 is where every mode begins
        lines.append(Line(mode, [Point(p.learning, p.forgetting, p.label, p.own) for p in points]))
    if len(lines) > 2:  # a line of λ = 0 alone says nothing: the others begin with it
        lines = [line for line in lines if line.name == "base" or any(p.label != "λ = 0" for p in line.points)]
    figures = ((p, t.number(p.learning, signed=True), t.number(p.forgetting, signed=True)) for p in results.points)
    summary = "; ".join(f"{p.mode} {t.figures(p.label)}: {learned}, {forgotten}" for p, learned, forgotten in figures)
    return chart(lines, t("facts.front.x", new=new), t("facts.front.y", old=old), f"{t('facts.front')}. {summary}", t)


def _layers(facts: Facts, t: Texts) -> str:
    if not facts.layers:
        return ""
    places: dict[str, tuple[float, float]] = {}
    for share in facts.layers:
        trace, weights = places.get(share.where, (0.0, 0.0))
        places[share.where] = trace + share.trace, weights + share.parameters
    most = max(trace for trace, _ in places.values()) or 1.0
    rows = "".join(
        f'<tr><td>{shown(_layer(where, t))}</td><td class="wide"><span class="track">'
        f'<span class="fill" style="width:{100 * trace / most:.1f}%"></span></span></td>'
        f"<td>{t.number(100 * trace, 1)} %</td><td>{t.number(100 * weights, 1)} %</td></tr>"
        for where, (trace, weights) in places.items()
    )
    heads = "".join(
        f'<th scope="col">{title}</th>'
        for title in (t("facts.layers.layer"), "", t("facts.layers.share"), t("facts.layers.weights"))
    )
    return message(t("facts.layers.note")) + _scrolled(heads, rows)


def _layer(where: str, t: Texts) -> str:
    """A layer's number, or the name of what is outside the layers."""
    try:
        return t(f"layer.{where}")
    except KeyError:
        return where


def _lineage(links: tuple[LineageLink, ...], t: Texts) -> str:
    items = "".join(f"<li>{_link(each, t)}</li>" for each in links)
    return f"<ul>{items}</ul>" if items else ""


def _link(each: LineageLink, t: Texts) -> str:
    name = each.name or "–"
    named = link(name, each.url, each.commit or "") if each.url else shown(name)
    marks = {True: " ✓", False: " ✗", None: ""}[each.verified]
    shas = [f"commit {each.commit}"] * bool(each.commit) + [f"sha256 {each.sha256}"] * bool(each.sha256)
    below = "".join(f'<br><span class="sha">{shown(line)}</span>' for line in shas)
    note = f'<br><span class="note">{shown(each.note)}{marks}</span>' if each.note else ""
    return f"<strong>{shown(t(f'link.{each.what}'))}</strong>: {named}{below}{note}"


# the λ slider


def no_slider(problem: Any, facts: Facts, t: Texts) -> str:
    """Why it is not there, and the points that were computed before, if there are some."""
    points = facts.results.points if facts.results else ()
    merged = [point for point in points if point.merged or point.strength == 0 or point.mode == "base"]
    if problem.code != "memory" or not any(point.merged for point in merged):
        return message(t("between.none", problem=str(problem)))
    assert facts.results is not None
    old, new = domain(t, facts.results.old), domain(t, facts.results.new)
    lines = [
        Line(mode, [Point(p.learning, p.forgetting, p.label) for p in merged if p.mode == mode])
        for mode in {p.mode: 0 for p in merged}
    ]
    return message(t("between.points")) + chart(
        lines, t("facts.front.x", new=new), t("facts.front.y", old=old), t("between.label"), t
    )


def ends(t: Texts) -> str:
    """What the two ends of the slider are."""
    return f'<p class="ends"><span>{t("between.left")}</span><span>{t("between.right")}</span></p>'


class Bits(NamedTuple):
    """Bits per byte at one λ of the text to keep and of the text to learn, and how they differ from the base's."""

    old: float
    new: float
    forgotten: float
    learned: float

    @classmethod
    def of(cls, old: Scores, new: Scores) -> Bits:
        return cls(old.adapted_bits_per_byte, new.adapted_bits_per_byte, old.difference, -new.difference)


@dataclass(frozen=True)
class Tried:
    """
    Which λ a visitor has tried.

    Parameters:
        key (`tuple[str, str, str]`): Both texts and the model: the points are of these only.
        points (`dict[float, Bits]`): What was measured at each λ.
        strength (`float`): The last λ.
        prompt (`str`), frame (`Frame`, *optional*): What was written there.
    """

    key: tuple[str, str, str]
    points: dict[float, Bits]
    strength: float
    prompt: str
    frame: Frame | None = None


def front(tried: Tried | None, t: Texts) -> str:
    """The λ that was tried last in words, and all that were tried as a line from the trained model to the base."""
    if tried is None:
        return message(t("between.empty"), "nothing")
    last = tried.points[tried.strength]
    said = t(
        "between.figures",
        place=t.figures(label_of(tried.strength)),
        old=t.number(last.old),
        new=t.number(last.new),
        forgotten=t.number(last.forgotten, signed=True),
        learned=t.number(-last.learned, signed=True),
    )
    points = [
        Point(bits.learned, bits.forgotten, label_of(value), value == tried.strength)
        for value, bits in sorted(tried.points.items())
    ]
    lines = [Line(t("tab.between"), points), Line(t("headline.base"), [Point(0.0, 0.0, t("headline.base"))])]
    return message(said, "verdict strong") + chart(lines, t("between.x"), t("between.y"), t("between.label"), t)
