"""The page's HTML and words: nothing that a model, a visitor or a record says is interpreted, and no word is missing."""

from __future__ import annotations

import ast
import json
import math
import re
import string
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hf_ewc.compare import (
    STEPS,
    VOTES,
    CompareError,
    Facts,
    Frame,
    LineageLink,
    Pane,
    RateLimit,
    ResultFacts,
    Scores,
    Side,
    Slots,
    TokenScore,
    app_folder,
    public_message,
)
from hf_ewc.compare.blind import OUTCOMES
from hf_ewc.compare.facts import Heading, Headline, Point
from hf_ewc.compare.lineage import LayerShare
from hf_ewc.compare.prompts import text_problem
from hf_ewc.compare.sources import Note
from hf_ewc.errors import ConfigError, DataError
from hf_ewc.evaluation.results import Accuracy, Row

if str(app_folder()) not in sys.path:
    sys.path.insert(0, str(app_folder()))

import chart
import records
import render
from texts import STRINGS, choose_language, domain, problem_text, texts

PACKAGE = Path(__file__).parents[2] / "hf_ewc"
EVIL = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"'>&lt;b&gt;&#60; {0} {model} %s"
CONTROLS = "\0\x07\x08\x0b\x0c\r\x1b\x7f\x85\x9f"
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
LANGUAGES = sorted(STRINGS)


@pytest.fixture(params=LANGUAGES)
def t(request):
    return texts(request.param)


# -- reading HTML -----------------------------------------------------------------------------------------------------------

VOID = {"br", "img", "hr", "input", "meta", "link"}
TAGS = "div section p span h1 h2 h3 ul li a strong small br table thead tbody tr th td"
KNOWN = {*TAGS.split(), "svg", "line", "polyline", "circle", "rect", "path", "text", "title"}


class Strict(HTMLParser):
    """Every tag is one that the page uses and closed in order; no attribute twice, none that runs; `words` are what is read."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.elements = [], "", []

    def handle_starttag(self, tag, attributes):
        assert tag in KNOWN, f"<{tag}>"
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        assert not [name for name in names if name.startswith("on") or name in ("srcdoc", "formaction")]
        assert "p" not in self.open or tag not in ("p", "div", "section", "table", "ul"), f"<{tag}> in a <p>"
        for name, value in attributes:
            if name in ("href", "src"):
                assert value.startswith(("https://", "http://")), value
            assert name != "style" or re.fullmatch(r"(width:-?[\d.]+%|stroke:#\w+|fill:#\w+)", value), value
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def read(html: str) -> Strict:
    """A fragment as a browser reads it; it can be sent as UTF-8, and no control or bidi character stands in it."""
    html.encode()
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", html)
    reader = Strict()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader


def attributes(html: str, name: str) -> list[str]:
    return [found[name] for _, found in read(html).elements if name in found]


def named(text: str) -> str:
    """Text as `shown` shows it, control characters by their signs."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 0x20 and c not in "\t\n" else f"⟦{ord(c):X}⟧" if c in CONTROLS + BIDI else c
        for c in text
    )


def test_the_reader_would_find_what_is_wrong():
    for html in ("<script>x</script>", "<p><b>x</p>", "<p>x", "</p>", '<a href="javascript:x">y</a>', '<p onclick="x">y</p>'):
        with pytest.raises(AssertionError):
            read(html)


# -- text -------------------------------------------------------------------------------------------------------------------


def test_nothing_in_a_text_is_interpreted():
    found = read(render.shown(EVIL))
    assert found.elements == []
    assert found.words == EVIL


@pytest.mark.parametrize("character", CONTROLS, ids=ascii)
def test_control_characters_are_named(character):
    found = read(render.shown(f"a{character}b"))
    assert found.elements == [("span", {"class": "control", "title": f"U+{ord(character):04X}"})]
    assert found.words == named(f"a{character}b")
    assert character not in found.words


@pytest.mark.parametrize(
    "character",
    [*BIDI],
    ids=ascii,
)
def test_what_turns_the_direction_of_text_is_named_and_not_obeyed(character):
    found = read(render.shown(f"evil{character}gpj.exe"))
    assert found.words == named(f"evil{character}gpj.exe")
    assert character not in found.words


def test_half_characters_can_be_sent():
    assert read(render.shown("a\ud800\udfffb")).words == "a⟦D800⟧⟦DFFF⟧b"


@pytest.mark.parametrize("text", ["a\tb\nc", "שלום עולם", "žolė ą", "👩‍👩‍👧 🏴‍☠️", "a\u0301\u200b", "𝔸"], ids=ascii)
def test_everything_else_is_left_as_it_is(text):
    found = read(render.shown(text))
    assert (found.words, found.elements) == (text, [])


@pytest.mark.parametrize("kind", ["note", "problem"])
def test_messages(kind):
    found = read(render.message(EVIL + CONTROLS, kind))
    assert found.words == named(EVIL + CONTROLS)
    assert (found.elements[0][1].get("role") == "alert") is (kind == "problem")
    assert render.message("") == ""


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "JavaScript:alert(1)", " javascript:x", "data:text/html,x", "//x.y", ""]
)
def test_links_go_to_the_web_or_are_none(url):
    found = read(render.link(EVIL, url, EVIL))
    assert (found.elements, found.words) == ([], EVIL)


def test_links_keep_to_themselves():
    ((tag, given),) = read(render.link(EVIL, f"https://x.y/?a=1&b={EVIL}", EVIL)).elements
    assert (tag, given["href"], given["title"]) == ("a", f"https://x.y/?a=1&b={EVIL}", EVIL)
    assert "noopener" in given["rel"]


def test_a_models_name_links_to_its_commit_on_the_hub():
    commit = "4f1c2d0" + "0" * 33
    found = read(render.name_of(Side("adapted", "ona/lt@4f1c2d0", None, commit=commit)))
    assert found.words == "ona/lt@4f1c2d0"
    assert found.elements[0][1]["href"].endswith(f"/ona/lt/tree/{commit}")
    local = read(render.name_of(Side("base", EVIL, None)))
    assert (local.words, local.elements) == (EVIL, [])


# -- panes ------------------------------------------------------------------------------------------------------------------

WRITTEN = Frame(Pane("same then this", (1, 2, 3)), Pane("same then that", (1, 2, 4)))


def test_panes_show_prompt_texts_and_names_as_text(t):
    frame = Frame(Pane(EVIL + "x", (1,), "length"), Pane(EVIL + CONTROLS, (1, 2), "end"))
    html = render.panes(frame, EVIL, (EVIL, "Right"), (render.shown(EVIL), ""), t)
    words = read(html).words
    assert words.count(EVIL) == 6  # prompt and text twice, a title and a name
    assert named(CONTROLS) in words
    assert EVIL in attributes(html, "aria-label")


def test_panes_before_anything_is_written(t):
    found = read(render.panes(None, "a prompt", ("L", "R"), ("", ""), t))
    assert found.words.count(t("pane.empty")) == 2
    assert "a prompt" not in found.words
    assert not [each for _, each in found.elements if "writing" in each.get("class", "")]


def test_where_texts_part_is_marked_by_more_than_colour(t):
    html = render.panes(WRITTEN, "", ("L", "R"), ("", ""), t)
    found = read(html)
    assert found.words.count("◆") == 3  # on both sides, and what it means
    assert attributes(html, "aria-label").count(t("pane.parts")) == 2
    assert t("pane.parts") in found.words
    assert [each["class"] for _, each in found.elements if each.get("class") == "differs"] == ["differs"] * 2
    assert "same then th◆is" in found.words
    assert "same then th◆at" in found.words


def test_panes_say_whether_they_still_write_and_why_they_ended(t):
    html = render.panes(WRITTEN, "", ("L", "R"), ("", ""), t)
    assert html.count("pane writing") == 2
    for reason in ("end", "length", "context", "stopped"):
        frame = Frame(Pane("a", (1,), reason), Pane("b", (1, 2)))
        html = render.panes(frame, "", ("L", "R"), ("", ""), t)
        assert html.count("pane writing") == 1
        assert f"{t('tokens.one')} · {t(f'reason.{reason}')}" in read(html).words


def test_the_same_texts_are_called_so_and_no_text_at_all_as_well(t):
    same = Frame(Pane("a", (1,), "end"), Pane("a", (1,), "end"))
    assert t("pane.same.end") in read(render.panes(same, "", ("L", "R"), ("", ""), t)).words
    none = Frame(Pane("", (1,), "end"), Pane("", (1,), "end"))
    assert read(render.panes(none, "p", ("L", "R"), ("", ""), t)).words.count(t("pane.none")) == 2


def test_a_side_that_failed_says_so_and_keeps_its_text(t):
    frame = Frame(Pane("so far", (1,), "error", EVIL, "failed"), Pane("all of it", (1, 2), "length"))
    html = render.panes(frame, "", ("L", "R"), ("", ""), t)
    found = read(html)
    assert {"so far", "all of it", EVIL} == {text for text in ("so far", "all of it", EVIL) if text in found.words}
    assert attributes(html, "role").count("alert") == 1
    assert t("pane.parts") not in found.words


# -- which finds it natural -------------------------------------------------------------------------------------------------


def scores_of(*nats, base=2.0, adapted=1.0, text="ab\n"):
    pieces = tuple(TokenScore(text, *pair, 1) for pair in nats)
    return Scores(base, adapted, pieces, len(pieces), 1234567, 128)


def looks(scores, view, t):
    html = render.natural(scores, view, "the model", t)
    return [found["class"] for _, found in read(html).elements if found.get("class", "").startswith("token ")]


@pytest.mark.parametrize(
    ("difference", "look"),
    [
        (0.0, "token s0"),
        (0.2499, "token s0"),
        (-0.2499, "token s0"),
        (0.25, "token s1 higher"),
        (-0.25, "token s1 lower"),
        (-1.0, "token s2 lower"),
        (3.9, "token s3 higher"),
        (-4.0, "token s4 lower"),
        (500.0, "token s4 higher"),
    ],
)
def test_a_difference_has_a_step_and_a_direction(t, difference, look):
    assert looks(scores_of((10.0, 10.0 + difference)), "difference", t) == [look]


@pytest.mark.parametrize(("nats", "step"), [(0.0, 0), (0.99, 0), (1.0, 1), (3.0, 2), (6.0, 3), (10.0, 4), (1e6, 4)])
def test_surprise_has_a_step_and_no_direction(t, nats, step):
    assert looks(scores_of((nats, 99.0)), "base", t) == [f"token s{step}"]
    assert looks(scores_of((99.0, nats)), "adapted", t) == [f"token s{step}"]


@pytest.mark.parametrize(
    ("base", "adapted", "key"),
    [(2.0, 1.0, "adapted"), (1.0, 2.5, "base"), (1.0, 1.0, "equal"), (1.0, 1.004, "equal"), (1.004, 1.0, "equal")],
)
def test_the_verdict_is_that_of_the_figures(t, base, adapted, key):
    words = read(render.natural(scores_of((1.0, 1.0), base=base, adapted=adapted), "difference", "the model", t)).words
    said = t(f"natural.{key}", model="the model", difference=f"{abs(base - adapted):.2f}")
    assert words.startswith(said[:1].upper() + said[1:])
    assert "1,234,567" in words


@pytest.mark.parametrize("view", ["difference", "base", "adapted"])
def test_tokens_are_text_and_their_numbers_can_be_asked_for(t, view):
    html = render.natural(scores_of((1.0, 3.5), text=EVIL + CONTROLS + BIDI[1:] + "\n"), view, EVIL, t)
    (said,) = attributes(html, "data-say")
    assert EVIL in said
    assert "↵" in said
    assert "+2.50" in said
    assert named(EVIL + CONTROLS + BIDI[1:]) in read(html).words
    assert f"tokens {view}" in attributes(html, "class")


def test_before_a_text_is_measured(t):
    assert read(render.natural(None, "difference", "x", t)).words == t("natural.empty")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0.00"),
        (-0.0, "0.00"),
        (0.004, "0.00"),
        (-0.004, "0.00"),
        (-0.006, "−0.01"),
        (2, "+2.00"),
        (-12345.678, "−12345.68"),
    ],
)
def test_signed_numbers(value, said):
    assert render.signed(value) == said


# -- records ----------------------------------------------------------------------------------------------------------------


def row(mode, strength, old, new, **questions):
    found = {name: Accuracy(value, 0.1, 0.25) for name, value in questions.items()}
    return Row(mode, strength, old, new, old and old - 2.0, new and 5.0 - new, found)


BASE, PLAIN, OWN = (
    row("base", None, 2.0, 5.0, facts=0.5),
    row("sft", 0.0, 4.0, 3.0, facts=0.25),
    row("proximal", 9.0, 2.5, 3.5, facts=0.4),
)
POINTS = (
    Point("base", None, "base", 0, 0, 2, 5, False, False),
    Point("sft", 0.0, "λ = 0", 2, 2, 4, 3, False, False),
    Point("proximal", 9.0, "λ = 9", 1.5, 0.5, 2.5, 3.5, True, False),
)
COLUMNS = (
    Heading("mode", "mode", "", "where"),
    Heading("old", "english", "bits/byte", "loss"),
    Heading("questions", "facts", "accuracy", "share"),
)


def facts(headline=None, points=POINTS, layers=(), lineage=(), notes=(), old="english", new="lithuanian", cells=None, own=1):
    cells = cells or (("base", "2.00", "50 %"), ("proximal", "2.50", "40 %"))
    results = ResultFacts(old, new, COLUMNS, cells, own, points, headline or Headline(BASE, OWN, PLAIN, 0.75, 0.75))
    return Facts(results, layers, lineage, notes)


NOTHING = Facts(None, (), (), ())


def test_the_headline_shows_three_models(t):
    html = records.headline(facts(), t)
    words = read(html).words
    for name in ("base", "own", "plain"):
        assert words.count(t(f"headline.{name}")) >= 3  # kept, questions, learned
    assert t("headline.avoided", percent="75 %", learned="75 %") in words
    widths = [float(found["style"][6:-1]) for _, found in read(html).elements if found.get("class") == "fill"]
    assert widths == [50, 62.5, 100, 50, 40, 25, 100, 70, 60]


@pytest.mark.parametrize(
    ("headline", "models"),
    [
        (Headline(BASE), {"base"}),
        (Headline(BASE, OWN), {"base", "own"}),
        (Headline(BASE, None, PLAIN), {"base", "plain"}),
        (Headline(BASE, PLAIN, PLAIN), {"base", "plain"}),
        (Headline(BASE, OWN, PLAIN), {"base", "own", "plain"}),
        (Headline(BASE, OWN, PLAIN, 0.5, None), {"base", "own", "plain"}),
        (Headline(BASE, OWN, PLAIN, None, 0.5), {"base", "own", "plain"}),
    ],
)
def test_a_headline_with_missing_parts_says_what_is_there(t, headline, models):
    html = records.headline(facts(headline), t)
    assert {each.split()[1] for each in attributes(html, "class") if each.startswith("bar ")} == models
    assert "%" not in t("headline.avoided", percent="", learned="")
    assert "verdict" not in html


def test_figures_that_are_not_there_are_a_dash(t):
    lost = row("sft", 0.0, None, None)
    html = records.headline(facts(Headline(BASE, None, lost)), t)
    assert read(html).words.count("–") == 3
    zero = row("base", None, 0.0, 0.0, facts=0.0)
    read(records.headline(facts(Headline(zero)), t))
    unknown = row("base", None, 2.0, 5.0, facts=None)
    assert read(records.headline(facts(Headline(unknown)), t)).words.count("–") == 1


def test_nothing_measured_is_no_headline_and_a_page_that_says_so(t):
    assert records.headline(NOTHING, t) == ""
    assert read(records.page(NOTHING, t)).words.count(t("facts.none")) == 3


@pytest.mark.parametrize("own", [0, 1, None])
def test_the_pages_own_row_is_marked(t, own):
    found = read(records.page(facts(own=own), t))
    marked = [given.get("class") for tag, given in found.elements if tag == "tr"][1:3]
    assert marked == ["own" if number == own else None for number in range(2)]


def test_records_are_text_in_all_their_parts(t):
    layers = (LayerShare(EVIL, None, "attention", 0.4, 0.5), LayerShare("0", 0, "mlp", 0.6, 0.5))
    lineage = (
        LineageLink("base model", EVIL, EVIL, EVIL, "javascript:alert(1)", False, EVIL),
        LineageLink("probe", EVIL, None, None, "https://x.y/" + EVIL, True, "note"),
        LineageLink("Fisher", None),
    )
    notes = (Note("results", "x", EVIL), Note("layers", "x", EVIL), Note("lineage", "x", EVIL), Note("headline", "x", EVIL))
    points = tuple(replace(p, mode=EVIL, label=EVIL) for p in POINTS)
    found = facts(None, points, layers, lineage, notes, EVIL, EVIL, ((EVIL, EVIL, EVIL),))
    html = records.page(found, t)
    words = read(html).words
    assert words.count(EVIL) > 12
    assert EVIL.lower() not in [url.lower() for url in attributes(html, "href")]
    assert "✗" in words
    assert "✓" in words
    assert EVIL in read(records.headline(found, t)).words


def test_control_characters_in_records_are_named_everywhere(t):
    bad = "x\x1b\u202e\ud800"
    points = tuple(replace(p, mode=bad, label=bad) for p in POINTS)
    read(records.page(facts(None, points, old=bad, new=bad), t))


def test_layers_are_bars_of_their_share(t):
    layers = (
        LayerShare("0", 0, "attention", 0.2, 0.25),
        LayerShare("0", 0, "mlp", 0.1, 0.25),
        LayerShare("1", 1, "mlp", 0.7, 0.5),
    )
    html = records.page(Facts(None, layers, (), ()), t)
    assert [each for each in attributes(html, "style") if each.startswith("width")] == ["width:42.9%", "width:100.0%"]
    for figure in ("30.0 %", "70.0 %", "50.0 %"):
        assert figure in read(html).words
    read(records.page(Facts(None, (LayerShare("0", 0, "mlp", 0.0, 1.0),), (), ()), t))


def test_all_that_lineage_may_name_has_words(t):
    kinds = re.findall(r'`"([^"`]+)"`', LineageLink.__doc__.partition("name (")[0])
    assert len(kinds) == 5
    for kind in kinds:
        assert t(f"link.{kind}") in read(records.page(Facts(None, (), (LineageLink(kind, "x"),), ()), t)).words


def test_without_a_slider_its_reason_or_the_points_that_were_computed(t):
    none = CompareError("no_fisher", EVIL)
    assert EVIL in read(records.no_slider(none, NOTHING, t)).words
    memory = CompareError("memory", "a model needs 5.2 GB")
    assert "5.2 GB" in read(records.no_slider(memory, facts(), t)).words
    merged = (*POINTS, Point("sft", 3.0, "λ = 3", 1.0, 0.2, 2.2, 4.0, False, True))
    html = records.no_slider(memory, facts(points=merged), t)
    assert t("between.points") in read(html).words
    assert "λ = 3" in read(html).words
    assert EVIL in read(records.no_slider(none, facts(points=merged), t)).words


def test_what_was_tried_is_a_line_from_the_trained_model_to_the_base(t):
    measured = {
        0.0: (scores_of(), scores_of()),
        10.0: (scores_of(base=2, adapted=1.5), scores_of()),
        math.inf: (scores_of(base=1), scores_of()),
    }
    html = records.tried((("a", "b", "adapted"), measured, 10.0), t)
    words = read(html).words
    assert "1.50" in words
    assert "−0.50" in words
    assert words.index("λ = 0") < words.rindex("λ = 10")
    assert "λ = ∞" in words
    assert html.count('class="ring"') == 1


# -- the chart --------------------------------------------------------------------------------------------------------------


def drawn(*points, name="line"):
    html = chart.chart([chart.Line(name, [chart.Point(x, y, f"{x:g}|{y:g}") for x, y in points])], "x", "y", "summary")
    read(html)
    assert "nan" not in html
    assert "inf" not in html
    return html


def ticks(html):
    """Numbers along both axes, as they are shown."""
    x = re.findall(r'<text x="[\d.-]+" y="402" text-anchor="middle">([^<]*)</text>', html)
    y = re.findall(r'<text x="56" y="[\d.-]+" text-anchor="end">([^<]*)</text>', html)
    return x, y


@pytest.mark.parametrize(
    "points",
    [
        [(0.0, 0.0), (2.0, 1.0)],
        [(-1.5, -0.2), (-0.5, 0.1)],
        [(0.31, 0.32), (0.33, 0.35), (0.4, 0.5)],
        [(0.0, 0.0), (123456.0, 1e9)],
        [(-3.0, 0.0), (3.0, 0.0)],
        [(1.0, 1.0)],
        [(0.0, 0.0)] * 3,
        [(0.0, 0.0), (0.01, 0.02)],
    ],
    ids=str,
)
def test_ticks_are_some_round_numbers_all_different(points):
    html = drawn(*points)
    for shown, values in zip(ticks(html), zip(*points, strict=True), strict=True):
        numbers = [float(number.replace("−", "-")) for number in shown]
        assert 2 <= len(numbers) <= 7
        assert "−0" not in shown
        assert numbers == sorted(set(numbers))
        room = max(max(values) - min(values), 0.05)
        assert min(values) - room <= numbers[0] <= numbers[-1] <= max(values) + room


@pytest.mark.parametrize(
    "points", [[(0.0, 0.0)], [(1.0, 1.0)] * 4, [(-1e6, 1e6), (0.0, 1e-9)], [(5.0, -3.0), (-5.0, 3.0)]], ids=str
)
def test_every_point_lies_within_the_axes(points):
    html = drawn(*points)
    (line,) = attributes(html, "points")
    places = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert len(places) == len(points)
    for x, y in places:
        assert chart.LEFT <= x <= chart.WIDTH - chart.RIGHT
        assert chart.TOP <= y <= chart.HEIGHT - chart.BOTTOM


def test_more_learned_is_further_right_and_more_forgotten_further_up():
    (line,) = attributes(drawn((0.0, 0.0), (2.0, 1.0)), "points")
    (x0, y0), (x1, y1) = (tuple(map(float, pair.split(","))) for pair in line.split())
    assert x1 > x0
    assert y1 < y0


def test_points_of_several_lines_that_coincide_are_named_once():
    lines = [chart.Line(name, [chart.Point(0, 0, "λ = 0"), chart.Point(1, n, "λ = 1")]) for n, name in enumerate("ab")]
    html = chart.chart(lines, "x", "y", "s")
    assert len(re.findall(r"<text[^>]*>λ = 0</text>", html)) == 1
    assert len(re.findall(r"<text[^>]*>λ = 1</text>", html)) == 2


def test_more_lines_than_colours_and_shapes_can_be_drawn():
    lines = [chart.Line(f"line {n}", [chart.Point(n, n, str(n), own=n == 3)]) for n in range(14)]
    html = chart.chart(lines, "x", "y", "s")
    assert html.count('class="ring"') == 1
    assert len(read(html).words) > 14


def test_a_picture_without_points_is_none_and_its_words_are_escaped():
    assert chart.chart([], "x", "y", "s") == ""
    assert chart.chart([chart.Line("a", [])], "x", "y", "s") == ""
    html = chart.chart([chart.Line(EVIL, [chart.Point(1, 1, EVIL)])], EVIL, EVIL, EVIL)
    assert read(html).words.count(EVIL) >= 4
    assert EVIL in attributes(html, "aria-label")


# -- words ------------------------------------------------------------------------------------------------------------------


def placeholders(text):
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


def test_both_languages_have_the_same_keys_and_placeholders():
    assert LANGUAGES == ["en", "lt"]
    assert STRINGS["lt"].keys() == STRINGS["en"].keys()
    for key, english in STRINGS["en"].items():
        assert placeholders(STRINGS["lt"][key]) == placeholders(english), key
        assert STRINGS["lt"][key].strip() == STRINGS["lt"][key] != ""


def test_no_key_is_written_twice():
    for language in LANGUAGES:
        text = (app_folder() / "strings" / f"{language}.json").read_text(encoding="utf-8")
        pairs = json.loads(text, object_pairs_hook=list)
        assert len(pairs) == len({key for key, _ in pairs})


def literals():
    """Words in the page's code that may be keys: whole ones, and patterns of those that are put together."""
    whole, patterns, called = set(), set(), set()
    for path in sorted(app_folder().glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                whole.add(node.value)
                if node.value.endswith("."):
                    patterns.add(re.escape(node.value) + ".+")
            elif isinstance(node, ast.JoinedStr):
                parts = [re.escape(str(part.value)) if isinstance(part, ast.Constant) else "[^ ]+" for part in node.values]
                if re.search(r"\w\\\.|\\\.\w", "".join(parts)):
                    patterns.add("".join(parts))
            elif isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name == "t" and isinstance(node.args[0], ast.Constant):
                    called.add(node.args[0].value)
                elif name == "worded":
                    called |= {each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)}
    return whole, patterns, called


def test_every_key_that_the_code_asks_for_is_there():
    *_, called = literals()
    assert len(called) > 40
    assert called <= STRINGS["en"].keys()
    asked = [f"step.{step}" for step in STEPS] + [f"vote.{vote}" for vote in VOTES]
    asked += [f"blind.outcome.{outcome}" for outcome in OUTCOMES]
    asked += [f"reason.{reason}" for reason in ("end", "length", "context", "stopped", "error", "none")]
    asked += [f"{start}.{model}" for model in ("adapted", "plain") for start in ("pane", "model")]
    asked += [f"example.{kind}" for kind in kinds_of_examples()]
    assert not [key for key in asked if key not in STRINGS["en"]]


def kinds_of_examples():
    files = [json.loads(path.read_text(encoding="utf-8")) for path in app_folder().glob("examples*.json")]
    return {example["kind"] for file in files for tab in ("compare", "natural") for example in file[tab]}


def test_every_key_is_used():
    whole, patterns, _ = literals()
    unused = [
        key
        for key in STRINGS["en"]
        if key not in whole and not any(re.fullmatch(pattern, key) for pattern in patterns if not pattern.startswith("[^ ]+"))
    ]
    assert [key for key in unused if not re.fullmatch(r"(prompt|text)\.(placeholder|info)", key)] == []


def test_every_word_is_used_with_all_its_placeholders():
    """`t("key", a=…)` names exactly what the words have in braces, wherever the key is written out."""
    for path in sorted(app_folder().glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                not isinstance(node, ast.Call)
                or getattr(node.func, "id", "") != "t"
                or not isinstance(node.args[0], ast.Constant)
            ):
                continue
            given = {each.arg for each in node.keywords}
            if None not in given:  # not for `**facts`
                assert set(placeholders(STRINGS["en"][node.args[0].value])) <= given, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("name", ["examples.json", "examples_demo.json"])
def test_examples_are_short_lithuanian_english_and_mixed(name):
    file = json.loads((app_folder() / name).read_text(encoding="utf-8"))
    assert {example["kind"] for example in file["compare"]} >= {"continuation", "knowledge", "retention"}
    assert set(file["between"]) == {"old", "new", "prompt"}
    for example in (*file["compare"], *file["natural"]):
        assert set(example) == {"kind", "text"}
        assert 0 < len(example["text"]) < 300


@pytest.mark.parametrize(
    ("asked", "language"),
    [
        ("", "en"),
        ("lt", "lt"),
        ("lt-LT", "lt"),
        ("LT-lt,en;q=0.5", "lt"),
        ("en-US,en;q=0.9,lt;q=0.8", "en"),
        ("en;q=0.3,lt;q=0.8", "lt"),
        ("de, fr;q=0.9, lt;q=0.1", "lt"),
        ("de,fr", "en"),
        ("lt;q=0", "en"),
        ("lt;q=0,en;q=0.1", "en"),
        ("lt ; q=0.4 , en ; q=0.7", "en"),
        ("lt;level=1;q=0.9,en;q=0.8", "lt"),
        ("*", "en"),
        ("lt;q=,en", "en"),
        ("lt;q=high,en;q=0.1", "en"),
        ("\0\ud800;;;q=q=q,,,;q=1,=", "en"),
        ("x" * 10_000, "en"),
        ("name", "en"),
    ],
)
def test_the_language_is_the_browsers(asked, language):
    assert choose_language({}, {"accept-language": asked}) == language


def test_the_address_goes_before_the_browser():
    assert choose_language({"lang": "lt"}, {"accept-language": "en"}) == "lt"
    assert choose_language({"lang": "en"}, {"accept-language": "lt"}) == "en"
    assert choose_language({"lang": "xx"}, {"accept-language": "lt"}) == "lt"
    assert choose_language({"lang": "../../etc/passwd"}, {}) == "en"
    assert choose_language({}, {}) == "en"


@pytest.mark.parametrize("language", [None, "", "xx", "EN", "../lt"])
def test_a_language_without_words_is_english(language):
    assert texts(language)("stop") == STRINGS["en"]["stop"]


def test_names_of_texts_are_words_where_there_are_some():
    t = texts("lt")
    assert domain(t, "English") == domain(t, "english") == STRINGS["lt"]["domain.english"]
    assert domain(t, EVIL) == EVIL
    assert domain(t, "{0}") == "{0}"


# -- problems ---------------------------------------------------------------------------------------------------------------


def raised():
    """Each `CompareError("code", …, fact=…)` of the package: where, its code and the names of its facts."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CompareError" and node.args:
                code = getattr(node.args[0], "value", None)
                if isinstance(code, str):
                    yield f"{path.name}:{node.lineno}", code, {each.arg for each in node.keywords}


def test_every_problem_brings_what_its_words_need():
    found = list(raised())
    assert len(found) > 20
    for where, code, given in found:
        words = STRINGS["en"].get(f"problem.{code}", "")
        assert set(placeholders(words)) <= given, where


def test_words_for_problems_are_of_problems_that_there_are():
    codes = {code for _, code, _ in raised()} | {"memory", "failed", "model"}
    assert {key.partition(".")[2] for key in STRINGS["en"] if key.startswith("problem.")} <= codes


def problems():
    slots, rate = Slots(1, 0.01), RateLimit(1, 1)
    rate.spend("me")
    with slots.take():
        for code, ask in (("busy", slots.take().__enter__), ("rate", lambda: rate.spend("me"))):
            with pytest.raises(CompareError) as caught:
                ask()
            yield code, caught.value
    yield "empty", text_problem(" ", 10, "prompt")
    yield "characters", text_problem("x" * 1234, 1000, "prompt")
    yield "not_text", text_problem("ab\ud800", 10, "prompt")
    yield "tokens", CompareError("tokens", "the prompt has 4,097 tokens", found=4097, limit=4096)
    yield "memory", MemoryError()
    yield "failed", KeyError("/etc/passwd")


PROBLEMS = dict(problems())


@pytest.mark.parametrize("code", PROBLEMS)
def test_problems_are_told_in_the_pages_language(code):
    said = {language: problem_text(texts(language), PROBLEMS[code]) for language in LANGUAGES}
    assert said["en"] != said["lt"]
    for text in said.values():
        assert not re.search(r"[{}]|passwd|None", text)
        assert read(render.message(text, "problem")).words == text


def test_the_figures_of_problems(t):
    assert "1,234" in problem_text(t, PROBLEMS["characters"])
    assert "1,000" in problem_text(t, PROBLEMS["characters"])
    assert re.search(r"\b3\b", problem_text(t, PROBLEMS["not_text"]))  # counted from 1
    assert "60" in problem_text(t, PROBLEMS["rate"])


def test_seconds_are_whole_where_they_are(t):
    assert "30.0" not in problem_text(t, CompareError("busy", "all places are taken", slots=2, seconds=30.0))


@pytest.mark.parametrize(
    "error",
    [
        CompareError("no_fisher", "stopped while waiting for a place."),
        CompareError("no_fisher", "no Fisher was named."),
        CompareError("tokenizer", "'a' and 'b' do not share a tokenizer."),
        DataError("'/home/ona/secret/lt' holds no model.safetensors"),
        ConfigError("`dtype: x` is none"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_problems_are_told_in_the_packages_own_words(t, error):
    said, own = problem_text(t, error), public_message(error)
    assert said == own[:1].upper() + own[1:]
    assert "secret" not in said


@pytest.mark.parametrize(
    "message", ["max_new_tokens is -1, and it must be a number from 1 to 512.", "λ is -1, and it must be a number from 0."]
)
def test_names_of_settings_keep_their_letters(t, message):
    assert problem_text(t, CompareError("setting", message, name="x")) == message


def test_a_label_of_an_example_is_short_and_says_what_it_is(t):
    pytest.importorskip("gradio")
    import layout

    assert layout._offer("mixed", "Labas", t) == f"{t('example.mixed')} · Labas"
    long = layout._offer("mixed", EVIL, t)
    assert long.endswith("…")
    assert len(long) < 60
    assert "\n" not in layout._offer("mixed", "one\ntwo", t)
