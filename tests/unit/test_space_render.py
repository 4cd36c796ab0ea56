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
    Heading,
    LineageLink,
    Pane,
    RateLimit,
    ResultFacts,
    Reveal,
    Scores,
    Side,
    Slots,
    TokenScore,
    app_folder,
    public_message,
)
from hf_ewc.compare.blind import OUTCOMES
from hf_ewc.compare.facts import Headline, Point
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
from texts import STRINGS, choose_language, domain, load_examples, problem_text, texts

PACKAGE = Path(__file__).parents[2] / "hf_ewc"
EVIL = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"'>&lt;b&gt;&#60; {0} {model} %s"
CONTROLS = "\0\x07\x08\x0b\x0c\r\x1b\x7f\x85\x9f"
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
HALVES = "\ud800\udfff"  # of characters; they cannot be sent
LANGUAGES = sorted(STRINGS)
EN, LT = texts("en"), texts("lt")


@pytest.fixture(params=LANGUAGES)
def t(request):
    return texts(request.param)


def written(figures: str, t) -> str:
    """English figures as the page's language writes them."""
    return figures if t("name") == "English" else figures.translate(str.maketrans({".": ",", ",": "\xa0"}))


# -- reading HTML -----------------------------------------------------------------------------------------------------------
TAGS = "div section p span h1 h2 h3 ul li a strong small br table thead tbody tr th td details summary dl dt dd"
KNOWN = {*TAGS.split(), "svg", "line", "polyline", "circle", "rect", "path", "text", "title"}
BLOCKS = {"p", "div", "section", "table", "ul", "dl", "details"}


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
        assert "p" not in self.open or tag not in BLOCKS, f"<{tag}> in a <p>"
        for name, value in attributes:
            if name in ("href", "src"):
                assert value.startswith(("https://", "http://")), value
            assert name != "style" or re.fullmatch(r"(width:-?[\d.]+%|stroke:#\w+|fill:#\w+)", value), value
        self.elements.append((tag, dict(attributes)))
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def read(html: str) -> Strict:
    """A fragment as a browser reads it; it can be sent as UTF-8, and no control or bidi character stands in it."""
    html.encode()
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]", html)
    reader = Strict()
    reader.feed(html)
    reader.close()
    assert not reader.open
    return reader


def words(html: str) -> str:
    return read(html).words


def attributes(html: str, name: str) -> list[str]:
    return [found[name] for _, found in read(html).elements if name in found]


def named(text: str) -> str:
    """Text as `shown` shows it, control characters by their signs."""
    return "".join(
        chr(0x2400 + ord(c)) if ord(c) < 0x20 and c not in "\t\n" else f"⟦{ord(c):X}⟧" if c in CONTROLS + BIDI + HALVES else c
        for c in text
    )


def test_the_reader_would_find_what_is_wrong():
    for html in ("<script>x</script>", "<p><b>x</p>", "<p>x", "</p>", '<a href="javascript:x">y</a>', '<p onclick="x">y</p>'):
        with pytest.raises(AssertionError):
            read(html)


# -- text -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("character", CONTROLS + BIDI + HALVES, ids=ascii)
def test_control_characters_and_what_turns_text_around_are_named(character):
    found = read(render.shown(f"evil{character}gpj.exe"))
    assert found.elements == [("span", {"class": "control", "title": f"U+{ord(character):04X}"})]
    assert found.words == named(f"evil{character}gpj.exe")
    assert character not in found.words


@pytest.mark.parametrize("text", [EVIL, "a\tb\nc", "שלום עולם", "žolė ą", "👩‍👩‍👧 🏴‍☠️", "a\u0301\u200b", "𝔸"], ids=ascii)
def test_everything_else_is_left_as_it_is_and_not_interpreted(text):
    found = read(render.shown(text))
    assert (found.words, found.elements) == (text, [])


@pytest.mark.parametrize("kind", ["note", "problem"])
def test_messages(kind):
    found = read(render.message(EVIL + CONTROLS, kind))
    assert found.words == named(EVIL + CONTROLS)
    assert (found.elements[0][1].get("role") == "alert") is (kind == "problem")
    assert render.message("") == ""


def test_links_go_to_the_web_or_are_none_and_keep_to_themselves():
    for url in ("javascript:alert(1)", "JavaScript:alert(1)", " javascript:x", "data:text/html,x", "//x.y", ""):
        found = read(render.link(EVIL, url, EVIL))
        assert (found.elements, found.words) == ([], EVIL)
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


# -- numbers ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "options", "said"),
    [
        *((value, {"signed": True}, "0.00") for value in (0, -0.0, 0.004, -0.004)),
        (-0.004, {}, "0.00"),
        (-0.4, {"digits": 0}, "0"),
        (-0.006, {"signed": True}, "−0.01"),
        (2, {"signed": True}, "+2.00"),
        (-2, {}, "−2.00"),
        (1234567, {"digits": 0}, "1,234,567"),
        (-12345.678, {"signed": True}, "−12,345.68"),
    ],
)
def test_numbers_have_the_signs_of_the_language_and_zero_has_none(t, value, options, said):
    assert t.number(value, **options) == written(said, t)


def parts():
    """All that shows numbers, each with some that are written differently."""
    layers = (LayerShare("0", 0, "mlp", 0.123, 0.456),)
    cells = (("base", "1,234.56", "50.5 %"), ("proximal", "2.50", "–"))
    return {
        "panes": lambda t: panes(Frame(Pane("a", (0,) * 1500), Pane()), t),
        "natural": lambda t: render.natural(scores_of((1.0, 3.5)), "difference", "x", t),
        "headline": lambda t: records.headline(facts(), t),
        "page": lambda t: records.page(facts(cells=cells, layers=layers), t),
        "slider": lambda t: records.front(TRIED, t),
        "chart": lambda t: drawn((0.0, 0.0), (0.5, -1.5), t=t),
        "problem": lambda t: render.message(problem_text(t, PROBLEMS["characters"])),
    }


@pytest.mark.parametrize("part", ["panes", "natural", "headline", "page", "slider", "chart", "problem"])
def test_every_number_on_the_page_is_written_in_its_language(part):
    """Also where it is read out or waits for a click; only what a browser reads (styles, places) is English."""
    show = parts()[part]
    for t, found, strange in ((EN, r"\d[.,]\d", r"\d\xa0\d"), (LT, r"\d[,\xa0]\d", r"\d\.\d|\d,\d{3},")):
        html = show(t)
        said = "\n".join([re.sub("<[^>]*>", "\n", html), *attributes(html, "aria-label"), *attributes(html, "data-say")])
        assert re.findall(found, said)
        assert not re.findall(rf".*(?:{strange}|(?<!\w)-\d).*", said)  # nor a hyphen for a minus


# -- panes ------------------------------------------------------------------------------------------------------------------
WRITTEN = Frame(Pane("same then this", (1, 2, 3)), Pane("same then that", (1, 2, 4)))


def panes(frame, t, prompt=""):
    return render.panes(frame, prompt, ("L", "R"), ("", ""), t)


def test_panes_show_prompt_texts_and_names_as_text(t):
    frame = Frame(Pane(EVIL + "x", (1,), "length"), Pane(EVIL + CONTROLS, (1, 2), "end"))
    html = render.panes(frame, EVIL, (EVIL, "Right"), (render.shown(EVIL), ""), t)
    assert words(html).count(EVIL) == 6  # prompt and text twice, a title and a name
    assert named(CONTROLS) in words(html)
    assert EVIL in attributes(html, "aria-label")


def test_where_texts_part_is_marked_by_more_than_colour(t):
    html = panes(WRITTEN, t)
    assert words(html).count("◆") == 3  # on both sides, and what it means
    assert attributes(html, "aria-label").count(t("pane.parts")) == 2
    assert attributes(html, "class").count("differs") == 2
    for said in (t("pane.parts"), "same then th◆is", "same then th◆at"):
        assert said in words(html)


def test_panes_say_whether_they_still_write_and_why_they_ended(t):
    assert panes(WRITTEN, t).count("pane writing") == 2
    for reason in ("end", "length", "context", "stopped"):
        html = panes(Frame(Pane("a", (1,), reason), Pane("b", (0,) * 1500)), t)
        assert html.count("pane writing") == 1
        assert f"{t('tokens.one')} · {t(f'reason.{reason}')}" in words(html)
        assert f"{t('tokens', count=written('1,500', t))} · {t('reason.none')}" in words(html)


def test_no_text_and_the_same_texts_are_called_so(t):
    html = panes(None, t, "a prompt")
    assert words(html).count(t("pane.empty")) == 2
    assert "a prompt" not in words(html)
    assert "writing" not in " ".join(attributes(html, "class"))
    same, none = Pane("a", (1,), "end"), Pane("", (1,), "end")
    assert t("pane.same.end") in words(panes(Frame(same, same), t))
    assert words(panes(Frame(none, none), t, "p")).count(t("pane.none")) == 2


@pytest.mark.parametrize(
    ("code", "key"), [("failed", "problem.failed"), ("memory", "problem.memory"), *((x, None) for x in ("model", "busy", None))]
)
def test_a_side_that_failed_says_so_in_the_pages_words_and_keeps_its_text(t, code, key):
    """A problem without words on the page, or whose words need facts that a pane has not, is told in the package's."""
    html = panes(Frame(Pane("so far", (1,), "error", EVIL, code), Pane("all of it", (1, 2), "length")), t)
    for said in ("so far", "all of it", t(key) if key else EVIL):
        assert said in words(html)
    assert (EVIL in words(html)) is (key is None)
    assert attributes(html, "role").count("alert") == 1
    assert t("pane.parts") not in words(html)


# -- which finds it natural -------------------------------------------------------------------------------------------------
def scores_of(*nats, base=2.0, adapted=1.0, text="ab\n"):
    pieces = tuple(TokenScore(text, *pair, 1) for pair in nats)
    return Scores(base, adapted, pieces, len(pieces), 1234567, 128)


def looks(nats, view, t):
    html = render.natural(scores_of(nats), view, "the model", t)
    return [look for look in attributes(html, "class") if look.startswith("token ")]


STEPS_OF_DIFFERENCES = {0: "0", 0.2499: "0", -0.2499: "0", 0.25: "1 higher", -0.25: "1 lower", -1.0: "2 lower"}
STEPS_OF_DIFFERENCES |= {3.9: "3 higher", -4.0: "4 lower", 500.0: "4 higher"}


@pytest.mark.parametrize(("difference", "look"), STEPS_OF_DIFFERENCES.items())
def test_a_difference_has_a_step_and_a_direction(t, difference, look):
    assert looks((10.0, 10.0 + difference), "difference", t) == [f"token s{look}"]


@pytest.mark.parametrize(("nats", "step"), [(0.0, 0), (0.99, 0), (1.0, 1), (3.0, 2), (6.0, 3), (10.0, 4), (1e6, 4)])
def test_surprise_has_a_step_and_no_direction(t, nats, step):
    assert looks((nats, 99.0), "base", t) == looks((99.0, nats), "adapted", t) == [f"token s{step}"]


@pytest.mark.parametrize(
    ("base", "adapted", "key", "difference"),
    [
        (2.0, 1.0, "adapted", "1.00"),
        (1.0, 2.5, "base", "1.50"),
        *((base, adapted, "equal", "") for base, adapted in ((1.0, 1.0), (1.0, 1.004), (1.004, 1.0))),
    ],
)
def test_the_verdict_is_that_of_the_figures(t, base, adapted, key, difference):
    found = words(render.natural(scores_of((1.0, 1.0), base=base, adapted=adapted), "difference", "the model", t))
    said = t(f"natural.{key}", model="the model", difference=written(difference, t))
    assert found.startswith(said[:1].upper() + said[1:])
    assert written("1,234,567", t) in found
    assert written(f"{base:.2f}", t) in found.removeprefix(said)


@pytest.mark.parametrize("view", ["difference", "base", "adapted"])
def test_tokens_are_text_and_their_numbers_can_be_asked_for(t, view):
    html = render.natural(scores_of((1.0, 3.5), text=EVIL + CONTROLS + BIDI + "\n"), view, EVIL, t)
    (said,) = attributes(html, "data-say")
    for part in (EVIL, "↵", *(written(figure, t) for figure in ("1.00", "3.50", "+2.50"))):
        assert part in said
    assert named(EVIL + CONTROLS + BIDI) in words(html)
    assert f"tokens {view}" in attributes(html, "class")
    assert words(render.natural(None, view, "x", t)) == t("natural.empty")


# -- blind votes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sides", [("base", "adapted"), ("adapted", "base")])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_after_the_vote_both_sides_are_named_and_all_votes_counted(t, outcome, sides):
    counts = {"base": 11, "adapted": 22, "both_good": 33, "both_bad": 44}
    html = render.reveal(Reveal("left", *sides, outcome), counts, t)
    left, right = (t(f"blind.side.{name}") for name in sides)
    said = f"{t(f'blind.outcome.{outcome}')} {t('blind.reveal', left=left, right=right)}"
    assert words(html) == said + t("blind.tally", **counts)
    assert (attributes(html, "role"), attributes(html, "id")) == (["status"], ["tally"])


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
    Point("proximal", 0.5, "λ = 0.5", 1.5, 0.5, 2.5, 3.5, True, False),
)
COLUMNS = (
    Heading("mode", "mode", "", "where"),
    Heading("old", "english", "bits/byte", "loss"),
    Heading("questions", "facts", "accuracy", "share"),
)
CELLS = (("base", "2.00", "50 %"), ("proximal", "2.50", "40 %"))


def facts(headline=None, points=POINTS, layers=(), lineage=(), notes=(), old="english", new="lithuanian", cells=CELLS, own=1):
    results = ResultFacts(old, new, COLUMNS, cells, own, points, headline or Headline(BASE, OWN, PLAIN, 0.75, 0.75))
    return Facts(results, layers, lineage, notes)


NOTHING = Facts(None, (), (), ())


def test_the_headline_shows_three_models(t):
    html = records.headline(facts(), t)
    for name in ("base", "own", "plain"):
        assert words(html).count(t(f"headline.{name}")) >= 3  # kept, questions, learned
    assert t("headline.avoided", percent="75 %", learned="75 %") in words(html)
    assert all(written(figure, t) in words(html) for figure in ("2.50", "40 %", "3.50"))
    widths = [float(found["style"][6:-1]) for _, found in read(html).elements if found.get("class") == "fill"]
    assert widths == [50, 62.5, 100, 50, 40, 25, 100, 70, 60]


@pytest.mark.parametrize(
    ("headline", "models"),
    [
        (Headline(BASE), set()),
        (Headline(BASE, None, PLAIN), set()),  # not of this page's model
        (Headline(BASE, OWN), {"base", "own"}),
        (Headline(BASE, PLAIN, PLAIN), {"base", "plain"}),
        (Headline(BASE, OWN, PLAIN), {"base", "own", "plain"}),
        (Headline(BASE, OWN, PLAIN, 0.5, None), {"base", "own", "plain"}),
        (Headline(BASE, OWN, PLAIN, None, 0.5), {"base", "own", "plain"}),
    ],
)
def test_a_headline_with_missing_parts_says_what_is_there_and_none_without_the_own_model(t, headline, models):
    html = records.headline(facts(headline), t)
    assert {each.split()[1] for each in attributes(html, "class") if each.startswith("bar ")} == models
    assert (html == "") is (not models)
    assert "verdict" not in html
    assert records.headline(NOTHING, t) == ""
    assert words(records.page(NOTHING, t)).count(t("facts.none")) == 3


def test_figures_that_are_not_there_are_a_dash(t):
    lost, zero = row("proximal", 9.0, None, None), row("base", None, 0.0, 0.0, facts=0.0)
    assert words(records.headline(facts(Headline(BASE, lost)), t)).count("–") == 3
    assert words(records.headline(facts(Headline(zero, zero)), t)).count("–") == 0
    unknown = row("base", None, 2.0, 5.0, facts=None)
    assert words(records.headline(facts(Headline(unknown, OWN)), t)).count("–") == 1


@pytest.mark.parametrize(
    ("base", "adapted", "warning"),
    [
        (dict(sha256="a"), dict(sha256="a"), "same"),
        (dict(sha256="a", verified=False), dict(sha256="a"), "same"),  # the plainer of the two
        (dict(sha256="a", verified=False), dict(sha256="b"), "base"),
        (dict(verified=False), {}, "base"),
        (dict(sha256="a", verified=True), dict(sha256="b", verified=False), None),
        ({}, {}, None),  # hashes that are not known are not the same
        (dict(sha256="a", verified=False), None, None),
    ],
)
@pytest.mark.parametrize("headline", [Headline(BASE), Headline(BASE, OWN, PLAIN)], ids=["unmeasured", "measured"])
def test_a_pair_that_is_none_is_said_first(t, headline, base, adapted, warning):
    given = {"base model": base, "adapted model": adapted}
    lineage = tuple(LineageLink(what, "x", **options) for what, options in given.items() if options is not None)
    html = records.headline(facts(headline, lineage=lineage), t)
    assert words(html).startswith(t(f"warning.{warning}") if warning else words(records.headline(facts(headline), t)))
    assert attributes(html, "role").count("alert") == (warning is not None)
    alone = records.headline(Facts(None, (), lineage, ()), t)
    assert words(alone) == (t(f"warning.{warning}") if warning else "")


@pytest.mark.parametrize("own", [0, 1, None])
def test_the_pages_own_row_is_marked(t, own):
    found = read(records.page(facts(own=own), t))
    marked = [given.get("class") for tag, given in found.elements if tag == "tr"][1:3]
    assert marked == ["own" if number == own else None for number in range(2)]


def test_every_column_says_what_it_means_once(t):
    keys = re.findall(r"`(\w+)`", Heading.__doc__.partition("translation:")[2])
    assert len(keys) == 7
    headings = tuple(Heading(key, EVIL, "accuracy", "") for key in (*keys, "questions"))
    known = facts(cells=())
    html = records.page(replace(known, results=replace(known.results, columns=headings)), t)
    said = words(html).partition(t("facts.columns"))[2]
    assert [tag for tag, _ in read(html).elements if tag in ("dt", "dd")] == ["dt", "dd"] * 7
    for key in keys:
        title = EVIL if key in ("old", "new", "questions") else t(f"column.{key}")
        assert said.count(title + t(f"meaning.{key}")) == 1


@pytest.mark.parametrize("bad", [EVIL, "x\x1b\u202e\ud800"], ids=["elements", "controls"])
def test_records_are_text_in_all_their_parts(t, bad):
    layers = (LayerShare(bad, None, "attention", 0.4, 0.5), LayerShare("0", 0, "mlp", 0.6, 0.5))
    lineage = (
        LineageLink("base model", bad, bad, bad, "javascript:alert(1)", False, bad),
        LineageLink("probe", bad, None, None, "https://x.y/" + EVIL, True, "note"),
        LineageLink("Fisher", None),
    )
    notes = tuple(Note(part, "x", bad) for part in ("results", "layers", "lineage", "headline"))
    points = tuple(replace(p, mode=bad, label=bad) for p in POINTS)
    found = facts(None, points, layers, lineage, notes, bad, bad, ((bad,) * 3,))
    html = records.page(found, t)
    assert words(html).count(named(bad)) > 12
    assert attributes(html, "href") == ["https://x.y/" + EVIL]
    assert re.findall("[✗✓]", words(html)) == ["✗", "✓"]
    assert named(bad) in words(records.headline(found, t))


def test_layers_are_bars_of_their_share(t):
    layers = (
        LayerShare("0", 0, "attention", 0.2, 0.25),
        LayerShare("0", 0, "mlp", 0.1, 0.25),
        LayerShare("1", 1, "mlp", 0.7, 0.5),
    )
    html = records.page(Facts(None, layers, (), ()), t)
    assert [each for each in attributes(html, "style") if each.startswith("width")] == ["width:42.9%", "width:100.0%"]
    for figure in ("030.0 %", "170.0 %", "50.0 %"):  # behind the names of the layers
        assert written(figure, t) in words(html)
    read(records.page(Facts(None, (LayerShare("0", 0, "mlp", 0.0, 1.0),), (), ()), t))


def test_what_is_outside_the_layers_has_a_name_or_is_called_as_it_was_recorded(t):
    for where in ("embedding", "final norm", "head", "rotary", "{0}"):
        html = records.page(Facts(None, (LayerShare(where, None, "other", 1.0, 1.0),), (), ()), t)
        assert f"{t.words.get(f'layer.{where}', where)}{written('100.0', t)} %" in words(html)
    assert LT("layer.final norm") != EN("layer.final norm") == "final norm"


def test_all_that_lineage_may_name_has_words(t):
    kinds = re.findall(r'`"([^"`]+)"`', LineageLink.__doc__.partition("name (")[0])
    assert len(kinds) == 5
    assert {"base model", "adapted model"} < set(kinds)  # of which the headline warns
    for kind in kinds:
        assert t(f"link.{kind}") in words(records.page(Facts(None, (), (LineageLink(kind, "x"),), ()), t))


# -- the slider -------------------------------------------------------------------------------------------------------------
TRIED = records.Tried(
    ("a", "b", "adapted"),
    {
        math.inf: records.Bits(1.0, 3.0, 0.0, 0.0),
        0.0: records.Bits(2.0, 1.0, 1.0, 2.0),
        0.3: records.Bits.of(scores_of(base=1.0, adapted=1.5), scores_of(base=3.0, adapted=2.25)),
    },
    0.3,
    "",
)


def test_without_a_slider_its_reason_or_the_points_that_were_computed(t):
    none, memory = CompareError("no_fisher", EVIL), CompareError("memory", "a model needs 5.2 GB")
    merged = facts(points=(*POINTS, Point("sft", 3.0, "λ = 3", 1.0, 0.2, 2.2, 4.0, False, True)))
    for problem, known, said in ((none, NOTHING, EVIL), (none, merged, EVIL), (memory, facts(), "5.2 GB")):
        assert words(records.no_slider(problem, known, t)) == t("between.none", problem=f"{problem}")
        assert said in str(problem)
    html = records.no_slider(memory, merged, t)
    assert words(html).startswith(t("between.points"))
    assert "λ = 3" in words(html)
    assert written("0.5", t) in "".join(ticks(html)[1])


def test_what_was_tried_is_a_line_from_the_trained_model_to_the_base(t):
    html = records.front(TRIED, t)
    figures = dict(old="1.50", new="2.25", forgotten="+0.50", learned="−0.75")
    place = written("λ = 0.3", t)
    said = t("between.figures", place=place, **{name: written(figure, t) for name, figure in figures.items()})
    assert words(html).startswith(said)
    drawn = words(html).removeprefix(said)
    assert drawn.index("λ = 0") < drawn.rindex(place) < drawn.rindex("λ = ∞")
    line, base = attributes(html, "points")
    assert [base] == [place for place in line.split() if place == base]  # λ = ∞ lies on the base
    assert html.count('class="ring"') == 1  # the last one
    assert words(records.front(None, t)) == t("between.empty")


# -- the chart --------------------------------------------------------------------------------------------------------------
def drawn(*points, t=EN):
    html = chart.chart([chart.Line("line", [chart.Point(x, y, "") for x, y in points])], "x", "y", "summary", t)
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
        [(-1e6, 1e6), (0.0, 1e-9)],
        [(5.0, -3.0), (-5.0, 3.0)],
        [(-3.0, 0.0), (3.0, 0.0)],
        [(1.0, 1.0)],
        [(0.0, 0.0)] * 3,
        [(0.0, 0.0), (0.01, 0.02)],
    ],
    ids=str,
)
def test_points_lie_within_the_axes_whose_ticks_are_some_round_numbers_all_different(points):
    html = drawn(*points)
    assert ticks(drawn(*points, t=LT)) == tuple([written(tick, LT) for tick in axis] for axis in ticks(html))
    for shown, values in zip(ticks(html), zip(*points, strict=True), strict=True):
        numbers = [float(number.replace("−", "-")) for number in shown]
        assert 2 <= len(numbers) <= 7
        assert "−0" not in shown
        assert numbers == sorted(set(numbers))
        room = max(max(values) - min(values), 0.05)
        assert min(values) - room <= numbers[0] <= numbers[-1] <= max(values) + room
    (line,) = attributes(html, "points")
    places = [tuple(map(float, pair.split(","))) for pair in line.split()]
    for (x, y), (learned, forgotten) in zip(places, points, strict=True):
        assert chart.LEFT <= x <= chart.WIDTH - chart.RIGHT
        assert chart.TOP <= y <= chart.HEIGHT - chart.BOTTOM
        first, point = places[0], points[0]  # more learned is further right, and more forgotten further up
        assert (x > first[0], y < first[1]) == (learned > point[0], forgotten > point[1])


def test_points_of_several_lines_that_coincide_are_named_once():
    lines = [chart.Line(name, [chart.Point(0, 0, "λ = 0"), chart.Point(1, n, "λ = 1")]) for n, name in enumerate("ab")]
    html = chart.chart(lines, "x", "y", "s", EN)
    assert len(re.findall(r"<text[^>]*>λ = 0</text>", html)) == 1
    assert len(re.findall(r"<text[^>]*>λ = 1</text>", html)) == 2


def test_six_lines_are_told_apart_by_shape_and_by_colour_and_more_can_be_drawn():
    lines = [chart.Line(f"line {n}", [chart.Point(0, 0, "", own=n == 3)]) for n in range(14)]
    html = chart.chart(lines, "x", "y", "s", EN)
    marks = [(tag, dict(given)) for tag, given in read(html).elements if given.get("style", "").startswith("fill")]
    colours = [given.pop("style") for _, given in marks]
    shapes = [repr(mark) for mark in marks]
    for start in (0, 14):  # in the picture, all at one place, and in the key
        assert len(set(shapes[start : start + 6])) == len(set(colours[start : start + 6])) == 6
        assert shapes[start : start + 6] == shapes[start + 6 : start + 12]
    assert colours[:14] == colours[14:]
    assert [tag for tag, _ in marks[:14]] == [tag for tag, _ in marks[14:]]
    assert html.count('class="ring"') == 1
    assert all(line.name in words(html) for line in lines)


def test_a_picture_without_points_is_none_and_its_words_are_escaped():
    assert chart.chart([], "x", "y", "s", EN) == ""
    assert chart.chart([chart.Line("a", [])], "x", "y", "s", EN) == ""
    html = chart.chart([chart.Line(EVIL, [chart.Point(1, 1, EVIL)])], EVIL, EVIL, EVIL, EN)
    assert words(html).count(EVIL) >= 4
    assert EVIL in attributes(html, "aria-label")


# -- words ------------------------------------------------------------------------------------------------------------------
def placeholders(text):
    return sorted(name for _, name, _, _ in string.Formatter().parse(text) if name is not None)


def test_both_languages_have_the_same_keys_and_placeholders():
    assert LANGUAGES == ["en", "lt"]
    assert STRINGS["lt"].keys() == STRINGS["en"].keys()
    for key, english in STRINGS["en"].items():
        lithuanian = STRINGS["lt"][key]
        assert placeholders(lithuanian) == placeholders(english), key
        assert key.startswith("number.") or lithuanian.strip() == lithuanian != "", key
    for language in LANGUAGES:  # and none twice
        text = (app_folder() / "strings" / f"{language}.json").read_text(encoding="utf-8")
        assert len(json.loads(text, object_pairs_hook=list)) == len(STRINGS[language])


def calls():
    """Every call in the page's code: the file, its node and the name that is called."""
    for path in sorted(app_folder().glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path, node, getattr(node.func, "id", getattr(node.func, "attr", ""))


def literals():
    """Words in the page's code that may be keys: whole ones, and patterns of those that are put together."""
    whole, patterns = set(), set()
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
    return whole, {pattern for pattern in patterns if not pattern.startswith("[^ ]+")}


def test_every_key_that_the_code_asks_for_is_there():
    called = set()
    for _, node, name in calls():
        if name == "t" and isinstance(node.args[0], ast.Constant):
            called.add(node.args[0].value)
        elif name == "worded":
            called |= {each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)}
    assert len(called) > 40
    assert called <= STRINGS["en"].keys()
    asked = {
        "step": STEPS,
        "vote": VOTES,
        "blind.outcome": OUTCOMES,
        "reason": ("end", "length", "context", "stopped", "error", "none"),
        "pane": ("adapted", "plain"),
        "model": ("adapted", "plain", "adapted.short", "plain.short"),
        "view": ("difference", "base", "adapted"),
        "warning": ("same", "base"),
    }
    missing = {f"{start}.{end}" for start, all_ends in asked.items() for end in all_ends} - STRINGS["en"].keys()
    assert not missing


def test_every_key_is_used():
    whole, patterns = literals()
    unused = {key for key in STRINGS["en"] if key not in whole and not any(re.fullmatch(each, key) for each in patterns)}
    assert [key for key in unused if not re.fullmatch(r"(prompt|text)\.(placeholder|info)", key)] == []


def test_every_word_is_used_with_all_its_placeholders():
    """`t("key", a=…)` names what the words have in braces, wherever the key is written out."""
    for path, node, name in calls():
        given = {each.arg for each in node.keywords}
        if name == "t" and isinstance(node.args[0], ast.Constant) and None not in given:  # not for `**facts`
            assert set(placeholders(STRINGS["en"][node.args[0].value])) <= given, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("name", ["examples.json", "examples_demo.json"])
def test_examples_are_short_lithuanian_english_and_mixed(name):
    file = load_examples(app_folder() / name)  # all of kinds that have words
    assert {example["kind"] for example in file["compare"]} >= {"continuation", "knowledge", "retention"}
    assert set(file["between"]) == {"old", "new", "prompt"}
    for example in (*file["compare"], *file["natural"]):
        assert set(example) == {"kind", "text"}
        assert 0 < len(example["text"]) < 300


LITHUANIAN = ("lt", "lt-LT", "LT-lt,en;q=0.5", "en;q=0.3,lt;q=0.8", "de, fr;q=0.9, lt;q=0.1", "lt;level=1;q=0.9,en;q=0.8")
ENGLISH = ("", "de,fr", "*", "name", "en-US,en;q=0.9,lt;q=0.8", "lt ; q=0.4 , en ; q=0.7", "lt;q=0", "lt;q=0,en;q=0.1")
ODD = ("lt;q=,en", "lt;q=high,en;q=0.1", "\0\ud800;;;q=q=q,,,;q=1,=", "x" * 10_000)


@pytest.mark.parametrize("asked", LITHUANIAN)
def test_the_language_is_the_browsers(asked):
    assert choose_language({}, {"accept-language": asked}) == "lt"
    assert choose_language({"lang": "en"}, {"accept-language": asked}) == "en"  # the address goes before it
    for unknown in ("xx", "../../etc/passwd"):
        assert choose_language({"lang": unknown}, {"accept-language": asked}) == "lt"


@pytest.mark.parametrize("asked", ENGLISH + ODD, ids=range(12))
def test_the_language_is_english_for_what_has_no_words(asked):
    assert choose_language({}, {"accept-language": asked}) == choose_language({"lang": asked}, {}) == "en"
    assert choose_language({"lang": "lt"}, {"accept-language": asked}) == "lt"
    assert choose_language({}, {}) == "en"
    for language in (None, asked, "EN", "../lt"):
        assert texts(language)("stop") == STRINGS["en"]["stop"]
        assert texts(language).number(1234.5) == "1,234.50"


def test_names_of_texts_are_words_where_there_are_some():
    assert domain(LT, "English") == domain(LT, "english") == STRINGS["lt"]["domain.english"]
    assert domain(LT, EVIL) == EVIL
    assert domain(LT, "{0}") == "{0}"


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
    codes = {code for _, code, _ in found} | {"memory", "failed", "model"}
    assert {key.partition(".")[2] for key in STRINGS["en"] if key.startswith("problem.")} <= codes  # no words for others
    for where, code, given in found:
        for language in LANGUAGES:
            assert set(placeholders(STRINGS[language].get(f"problem.{code}", ""))) <= given, where


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
        assert words(render.message(text, "problem")) == text


def test_the_figures_of_problems(t):
    assert written("1,234", t) in problem_text(t, PROBLEMS["characters"])
    assert written("1,000", t) in problem_text(t, PROBLEMS["characters"])
    assert re.search(r"\b3\b", problem_text(t, PROBLEMS["not_text"]))  # counted from 1
    assert "60" in problem_text(t, PROBLEMS["rate"])
    for seconds, said in ((30.0, "30"), (2.5, "2.5")):  # whole where they are
        found = problem_text(t, CompareError("busy", "all places are taken", slots=2, seconds=seconds))
        assert f" {written(said, t)} s" in found


@pytest.mark.parametrize(
    "error",
    [
        CompareError("no_fisher", "stopped while waiting for a place."),
        CompareError("tokenizer", "'a' and 'b' do not share a tokenizer."),
        DataError("'/home/ona/secret/lt' holds no model.safetensors"),
        ConfigError("`dtype: x` is none"),
        CompareError("setting", "max_new_tokens is -1, and it must be a number from 1 to 512.", name="x"),
        CompareError("setting", "λ is -1, and it must be a number from 0.", name="x"),
    ],
    ids=str,
)
def test_other_problems_are_told_in_the_packages_own_words(t, error):
    said, own = problem_text(t, error), public_message(error)
    assert said == (own if getattr(error, "code", "") == "setting" else own[:1].upper() + own[1:])  # the name of a setting
    assert "secret" not in said


def test_a_label_of_an_example_is_short_and_says_what_it_is(t):
    pytest.importorskip("gradio")
    import layout

    assert layout._offer("mixed", "Labas", t) == f"{t('example.mixed')} · Labas"
    long = layout._offer("mixed", EVIL, t)
    assert long.endswith("…")
    assert len(long) < 60
    assert "\n" not in layout._offer("mixed", "one\ntwo", t)
