"""The page in a real Chromium, for everybody: with a keyboard or a screen reader, small or dark; and its numbers."""

from __future__ import annotations

import math
import re

import pytest
from browser import TABS, WORDS, slow
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from hf_ewc.compare import STOPS

EN = WORDS["en"]


# -- everybody --------------------------------------------------------------------------------------------------------------


def test_a_keyboard_is_enough(page, browser):
    focus = "const e = document.activeElement; return e.dataset.tabId ?? e.closest('[id]:not([id^=range_id])')?.id"

    def go(to: str) -> None:
        seen = []
        while browser.js(focus) != to:
            assert len(seen) < 60, f"Tab does not come to {to}, only to {seen}"
            browser.press(Keys.TAB)
            seen.append(browser.js(focus))

    browser.open(page.url)
    go("prompt")
    browser.press("Nobody")
    browser.forget()
    with slow(page):
        browser.press(Keys.CONTROL, Keys.ENTER)
        browser.until(lambda: browser.states and browser.states[-1][0]["tokens"] >= 2)
        go("run")
        go("stop")
        browser.press(Keys.ENTER)
        assert all("stopped" in pane["state"] for pane in browser.written())

    browser.js("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    go("natural")
    browser.press(Keys.ENTER)
    go("text")
    browser.press("The keeper")
    browser.press(Keys.CONTROL, Keys.ENTER)
    tokens = browser.until(lambda: browser.all("#natural .token"))
    assert len(tokens) > 3
    go("natural")
    browser.until(lambda: browser.js("return document.activeElement.matches('.token')") or browser.press(Keys.TAB))
    said = []
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.END, Keys.HOME):
        browser.press(key)
        said.append(browser.text("#natural .detail"))
    quoted = [f"“{token.text}”" for token in tokens]
    assert [words.partition("”")[0].strip("“ ") for words in said] == [
        quoted[n].strip("“” ") for n in (1, 2, 1, len(tokens) - 1, 0)
    ]

    browser.js("document.activeElement.blur()")
    go("between")
    browser.press(Keys.ENTER)
    go("lambda")
    browser.until(lambda: browser.js("return document.activeElement.type == 'range'") or browser.press(Keys.TAB))
    slider = browser.driver.switch_to.active_element
    for step in (1, 2):
        browser.press(Keys.ARROW_RIGHT)
        assert browser.text("#lambda-value") == slider.get_attribute("aria-valuetext") == f"λ = {STOPS[step]:g}"
    browser.press(Keys.END)
    assert browser.text("#lambda-value") == slider.get_attribute("aria-valuetext") == "λ = ∞"


@pytest.mark.parametrize("language", ["en", "lt"])
def test_a_screen_reader_has_a_name_for_everything(page, browser, language):
    browser.open(page.url, language=language)
    browser.write("Nobody")
    browser.unfold("sampling")
    roles = {
        "button",
        "textbox",
        "slider",
        "spinbutton",
        "checkbox",
        "radio",
        "tab",
        "combobox",
        "region",
        "toolbar",
        "img",
        "image",
    }
    found = set()
    for tab in TABS:
        browser.tab(tab)
        if tab == "natural":
            browser.fill("#text textarea", "The keeper")
            browser.click("#measure")
            browser.one("#natural .token")
        for node in browser.do("Accessibility.getFullAXTree")["nodes"]:
            if not node["ignored"] and (role := node["role"]["value"]) in roles:
                found.add((tab, role, node.get("name", {}).get("value", "").strip()))
    assert [(tab, role) for tab, role, name in found if not name] == []
    words = WORDS[language]
    assert {("compare", "region", words[f"pane.{side}"]) for side in ("base", "adapted")} <= found
    assert {("compare", "button", words[name]) for name in ("run", "stop")} <= found
    assert {("blind", "button", words[f"vote.{vote}"]) for vote in ("left", "right", "both_good", "both_bad")} <= found


OUTSIDE = """
return [...document.querySelectorAll("button, input, textarea, label, p, h1, h2, h3")].filter((element) => {
  const box = element.getBoundingClientRect(), cut = box.width && (box.left < 0 || box.right > innerWidth + 1);
  return cut && element.checkVisibility() && !element.closest("[aria-hidden=true], .scroll");
}).map((element) => element.outerHTML.slice(0, 200));
"""


@pytest.mark.parametrize("language", ["en", "lt"])
def test_a_narrow_page_has_everything_within_reach(page, browser, language):
    browser.open(page.url, language=language, width=360, height=740)
    browser.write("Nobody")
    browser.unfold("sampling")
    for tab in TABS:
        browser.tab(tab)
        assert browser.js("return document.documentElement.scrollWidth") == 360, tab
        assert browser.js(OUTSIDE) == [], tab
    browser.tab("blind")
    browser.write("Nobody", "blind-prompt", "blind-run")
    for place in ("#blind-panes", "#panes"):
        browser.tab("blind" if place == "#blind-panes" else "compare")
        first, second = (browser.one(f"{place} .pane:nth-child({n})").rect for n in (1, 2))
        assert second["y"] >= first["y"] + first["height"]
        assert first["x"] == second["x"]


# WCAG's contrast of all text in a place with what lies behind it, the least first; a canvas knows every way to write a colour
CONTRAST = """
const context = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
const painted = (...colours) => {
  for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const shown = [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility() && e.textContent.trim());
return shown.map((element) => {
  const behind = [];
  for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
  const back = painted("white", ...behind), front = painted("white", ...behind, getComputedStyle(element).color);
  const [low, high] = [light(back), light(front)].sort((a, b) => a - b);
  return [(high + 0.05) / (low + 0.05), element.className, back, element.textContent.slice(0, 40)];
}).sort((a, b) => a[0] - b[0]);
"""


@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
def test_all_text_can_be_read_on_what_is_behind_it(page, browser, dark):
    browser.open(page.url, dark=dark)
    browser.write("Nobody")
    texts = ".pane h3, .pane .state, .pane span:not(.fork), .verdict, .lead, .note, button, label, h1, h2"
    seen = browser.js(CONTRAST, texts)
    assert {"prompt", "same", "differs", "state"} <= {name for _, name, *_ in seen}
    assert (sum(seen[0][2]) < 384) is dark
    worst = {"compare": seen[0]}
    assert browser.js(CONTRAST, ".fork")[0][0] >= 3  # a sign, not text
    browser.tab("natural")
    browser.fill("#text textarea", "Nobody in the harbour čiuožia nuo vieno kranto; Žiemą the glass, zzQx!?")
    browser.click("#measure")
    for view in ("difference", "base", "adapted"):
        browser.click(f"#view input[value={view}]")
        browser.one(f"#natural .tokens.{view}")
        seen = browser.js(CONTRAST, "#natural .token, #natural .detail, #natural .legend")
        assert any("s4" in name for _, name, *_ in seen), "no text is very surprising, so its colour is not tested"
        worst[view] = seen[0]
    browser.tab("facts")
    worst["facts"] = browser.js(CONTRAST, "#facts td, #facts th, #facts h2, #facts li, #facts .note")[0]
    assert {place: least for place, least in worst.items() if least[0] < 4.5} == {}


# -- numbers ----------------------------------------------------------------------------------------------------------------


def test_a_token_says_its_numbers_and_the_view_switches(page, browser):
    given = "Nobody in the harbour, Žiemą"
    (scores,) = page.service.natural("a test", [given])
    browser.open(page.url)
    browser.tab("natural")
    browser.fill("#text textarea", given)
    browser.click("#measure")
    verdict = EN["natural.base" if scores.difference > 0 else "natural.adapted"]
    short = {"model": EN["model.adapted.short"], "difference": f"{abs(scores.difference):.2f}"}
    assert browser.text("#natural .verdict").lower() == verdict.format(**short).lower()
    for number, piece in enumerate(scores.pieces, 1):
        browser.click(f"#natural .token:nth-child({number})")
        difference = re.sub(r"[+-](?=0\.00)", "", f"{piece.difference:+.2f}").replace("-", "−")
        numbers = [f"{piece.base_nats:.2f}", f"{piece.adapted_nats:.2f}", difference]
        assert re.findall(r"[+−]?\d+\.\d\d", browser.text("#natural .detail").rpartition("”")[2]) == numbers
        assert len(browser.all("#natural .chosen")) == 1
    legends = []
    for view in ("base", "adapted", "difference"):
        browser.click(f"#view input[value={view}]")
        browser.one(f"#natural .tokens.{view}")
        strength = [int(token.get_attribute("class").split(" s")[1][0]) for token in browser.all("#natural .token")]
        values = [abs(getattr(piece, view if view == "difference" else f"{view}_nats")) for piece in scores.pieces]
        ranked = sorted(zip(values, strength, strict=True))
        assert [level for _, level in ranked] == sorted(strength)
        assert len(set(strength)) > 1
        legends.append(browser.text("#natural .legend"))
    assert legends[0] == legends[1] != legends[2]


def test_the_slider_measures_and_draws_and_ends_at_the_base(page, browser):
    browser.open(page.url)
    browser.tab("between")
    browser.unfold("between-texts")
    points = "return [...document.querySelectorAll('#front .chart title')].map((e) => e.textContent)"
    old, new = (browser.one(f"#between-{name} textarea").get_property("value") for name in ("old", "new"))
    slider = browser.one("#lambda input[type=range]")
    drawn = []
    for step, share in ((len(STOPS) - 1, 1.0), (5, 5 / (len(STOPS) - 1))):
        reach = slider.rect["width"] / 2 - 8
        ActionChains(browser.driver).move_to_element_with_offset(slider, round((2 * share - 1) * reach), 0).click().perform()
        name = "∞" if math.isinf(STOPS[step]) else f"{STOPS[step]:g}"
        assert browser.text("#lambda-value") == f"λ = {name}"
        drawn.append(f"λ = {name}")
        browser.until(lambda: set(drawn) <= set(browser.js(points)))
        kept, learned = page.service.natural("a test", [old, new], merge_lambda=STOPS[step])
        said = browser.text("#front .verdict")
        assert [f"{scores.adapted_bits_per_byte:.2f}" in said for scores in (kept, learned)] == [True, True]
        if math.isinf(STOPS[step]):
            assert said.count("(0.00 ") == 2  # the base's own figures
            assert [f"{scores.base_bits_per_byte:.2f}" in said for scores in (kept, learned)] == [True, True]
        browser.until(lambda name=name: name in browser.text("#between-panes .pane:nth-child(2) h3"))
    assert set(browser.js(points)) == {*drawn, EN["headline.base"]}
