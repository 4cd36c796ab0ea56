"""The page in a real Chromium: both texts as they are written, blind votes, and the words of the page in two languages."""

from __future__ import annotations

import itertools
import re
import time
from typing import Any

import pytest
import torch
from browser import TABS, WORDS, Browser, after, hooked, slow, text

EN, LT = WORDS["en"], WORDS["lt"]
PROMPT = "Nobody"  # the two models go on in the same way at first


def generated(page: Any, prompt: str, seed: int | None = None) -> list[str]:
    """What `model.generate` itself writes, without any of our code: greedy, or drawn as the page's sliders stand."""
    pair = page.service.pair()
    how = dict(do_sample=False) if seed is None else dict(do_sample=True, temperature=0.8, top_p=0.95, top_k=50)
    inputs = pair.tokenizer(prompt, return_tensors="pt")
    texts = []
    for side in pair.sides:
        with torch.random.fork_rng():
            torch.manual_seed(seed or 0)
            ids = side.model.generate(**inputs, max_new_tokens=48, **how)[0, inputs["input_ids"].shape[1] :]
        texts.append(pair.tokenizer.decode(ids, skip_special_tokens=True))
    return texts


# -- writing ----------------------------------------------------------------------------------------------------------------


def test_both_sides_write_in_lockstep_and_a_mark_stands_where_they_part(page, browser):
    browser.open(page.url)
    with slow(page):
        last = browser.write(PROMPT)
    states = [state for state in browser.states if state[0]["tokens"]]
    assert len(states) > 20  # of 48 tokens: it is written before one's eyes
    for before, now in itertools.pairwise(states):
        assert now[0]["tokens"] == now[1]["tokens"] >= before[0]["tokens"]
        assert all(text(new).startswith(text(old)) for old, new in zip(before, now, strict=True))
    for state in states:
        left, right = map(text, state)
        common = "".join(a for a, b in itertools.takewhile(lambda two: two[0] == two[1], zip(left, right, strict=False)))
        parted = common not in (left, right)
        assert [pane["mark"] for pane in state] == ["◆" * parted] * 2
        assert not parted or [pane["same"] for pane in state] == [common] * 2
    assert not states[0][0]["mark"]
    assert last[0]["mark"]
    assert [text(pane) for pane in last] == generated(page, PROMPT)
    assert all(pane["state"] == "48 tokens · length reached" for pane in last)


def test_a_side_that_ends_by_itself_waits_while_the_other_goes_on(page, browser):
    def end(output):
        output.logits[..., 1] = 1e4  # <eos>

    browser.open(page.url)
    with slow(page), hooked(page, after(9, end), "adapted"):
        left, right = browser.write(PROMPT)
    assert (left["state"], right["state"]) == ("48 tokens · length reached", "10 tokens · ended by itself")
    for base, adapted in browser.states:
        assert adapted["tokens"] == min(base["tokens"], 10)
        assert adapted["writing"] == (base["tokens"] < 10) or not base["tokens"]
    assert generated(page, PROMPT)[1].startswith(text(right))


def test_stop_keeps_what_is_written_and_gives_the_place_back(page, browser):
    slots = page.service.slots
    browser.open(page.url)
    with slow(page, 0.1):
        browser.fill("#prompt textarea", PROMPT)
        browser.click("#run")
        browser.until(lambda: browser.states and browser.states[-1][0]["tokens"] >= 3)
        assert slots.free == slots.n - 1
        browser.click("#stop")
        panes = browser.written()
    for pane, whole in zip(panes, generated(page, PROMPT), strict=True):
        assert pane["state"] == f"{pane['tokens']} tokens · stopped"
        assert 3 <= pane["tokens"] < 20
        assert text(pane)
        assert whole.startswith(text(pane))
    browser.until(lambda: slots.free == slots.n and not page.service.running)
    states = browser.states
    time.sleep(0.4)
    assert browser.states == states


def test_the_same_seed_gives_the_same_texts_as_generate_and_another_seed_others(page, browser):
    browser.open(page.url)
    browser.unfold("sampling")
    browser.click("#greedy input")
    found = []
    with slow(page, 0.005):
        for seed in (7, 7, 8):
            browser.fill("#seed input", str(seed))
            found.append([text(pane) for pane in browser.write(PROMPT)])
    assert found[0] == found[1] == generated(page, PROMPT, seed=7)
    assert found[2] == generated(page, PROMPT, seed=8)
    assert found[0] != found[2]
    assert found[0] != generated(page, PROMPT)  # it was drawn


# -- blind votes ------------------------------------------------------------------------------------------------------------


def test_a_blind_vote_tells_nothing_before_and_the_truth_after(page, browser):
    texts = dict(zip(("base", "adapted"), generated(page, PROMPT), strict=True))
    browser.open(page.url)
    browser.tab("blind")
    orders, counts = set(), page.service.tally.to_dict()
    for vote in itertools.islice(itertools.cycle(("left", "right", "both_good", "both_bad")), 24):  # until both orders came
        with slow(page, 0.01):
            browser.fill("#blind-prompt textarea", PROMPT)
            browser.forget()
            browser.click("#blind-run")
            browser.until(lambda: browser.states and browser.states[-1][0]["writing"])
            assert len(browser.all("#votes button:disabled")) == 4
            panes = browser.written()
        browser.until(lambda: len(browser.all("#votes button:enabled")) == 4)
        assert "process_generating" in browser.sent
        hidden = browser.sent + browser.js("return document.querySelector('#blind-panes').outerHTML + arguments[0]", "")
        assert re.findall("base|adapted|plain", hidden, re.IGNORECASE) == []

        browser.click(f"#vote-{vote}")
        sides = [next(name for name in texts if texts[name] == text(pane)) for pane in panes]
        orders.add(tuple(sides))
        outcome = dict(zip(("left", "right"), sides, strict=True)).get(vote, vote)
        counts[outcome] += 1
        left, right = (EN[f"blind.side.{side}"] for side in sides)
        said = f"{EN[f'blind.outcome.{outcome}']} {EN['blind.reveal'].format(left=left, right=right)}"
        browser.until(lambda said=said: browser.all("#reveal .verdict") and browser.text("#reveal .verdict") == said)
        assert browser.text("#tally") == EN["blind.tally"].format(**counts)
        assert len(browser.all("#votes button:disabled")) == 4
        if len(orders) == 2:
            break
    assert len(orders) == 2

    # a second vote, by somebody who knows the browser's tools
    browser.js("const button = document.querySelector('#vote-left'); button.disabled = false; button.click()")
    time.sleep(0.3)
    assert page.service.tally.to_dict() == counts


# -- words ------------------------------------------------------------------------------------------------------------------

# All but texts, names, and what records say in their own words.
SAID = """
const not = "table, svg, .keys, .records li, .tokens, .text, .model, .examples, #language, [aria-hidden=true]", said = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const parent = walk.currentNode.parentElement;
  if (parent.checkVisibility() && !parent.closest(not) && parent.localName !== "script") said.push(walk.currentNode.data);
}
const attributes = ["aria-label", "placeholder", "title"];
for (const one of document.querySelectorAll(attributes.map((name) => `[${name}]`)))
  if (one.checkVisibility() && !one.closest(not)) said.push(...attributes.map((name) => one.getAttribute(name)));
return said.map((words) => words?.trim()).filter(Boolean);
"""


def foreign(browser: Browser) -> set[str]:
    """Words of the other language that can be seen or heard now."""
    ours, theirs = (LT, EN) if browser.language == "lt" else (EN, LT)
    said, found = browser.js(SAID), set()
    assert len(said) > 10
    for key in theirs:
        fixed = re.sub(r"\{\w*\}", "", theirs[key])
        if theirs[key] == ours[key] or not re.search(r"[^\W\d_]{3}", fixed):
            continue
        pattern = re.sub(r"\\\{\w*\\\}", ".+?", re.escape(theirs[key]))
        search = re.search if " " in fixed.strip() else re.fullmatch  # "text" may be part of a sentence
        found |= {
            f"{key}: {words}" for words in said for part in words.split(" · ") if search(rf"(?<!\w){pattern}(?!\w)", part)
        }
    return found


def leftovers(browser: Browser) -> list[str]:
    """The same in all tabs."""
    found = []
    for tab in TABS:
        browser.tab(tab)
        found += [f"{tab}: {words}" for words in sorted(foreign(browser))]
    return found


def test_the_language_is_the_browsers_and_a_switch_changes_every_word_but_those_of_the_models(page, browser):
    browser.open(page.url, language="lt-LT,lt;q=0.9,en;q=0.5")
    assert (browser.language, browser.text("h1")) == ("lt", LT["title"])
    written = browser.write(PROMPT)
    assert all(pane["state"] == "gabalėlių: 48 · pasiektas ilgis" for pane in written)
    browser.tab("natural")
    browser.fill("#text textarea", "Žiemą")
    browser.click("#measure")
    tokens = browser.until(lambda: [token.text for token in browser.all("#natural .token")])
    browser.tab("between")
    browser.click("#between-run")
    browser.until(lambda: LT["reason.length"] in browser.text("#between-panes"))
    browser.tab("blind")
    browser.write(PROMPT, "blind-prompt", "blind-run")
    browser.until(lambda: browser.all("#vote-left:enabled"))
    browser.click("#vote-left")
    browser.one("#tally")
    assert leftovers(browser) == []

    for language, words in (("en", EN), ("lt", LT)):
        browser.click(f"#language input[value={language}]")
        kept = words["headline.kept"].format(old=words["domain.english"])
        browser.until(lambda kept=kept: browser.text("#headline h2") == kept)
        assert browser.language == language
        assert leftovers(browser) == []
        browser.tab("compare")
        browser.forget()
        assert [browser.text(f"#panes .pane:nth-child({n}) .differs") for n in (1, 2)] == [pane["differs"] for pane in written]
        browser.tab("natural")
        assert [token.text for token in browser.all("#natural .token")] == tokens


@pytest.mark.parametrize(("query", "asked", "found"), [("?lang=lt", "en", "lt"), ("?lang=en", "lt", "en"), ("", "pl", "en")])
def test_the_address_chooses_the_language_and_who_reads_neither_gets_english(page, browser, query, asked, found):
    browser.open(page.url + query, language=asked)
    assert (browser.language, browser.text("h1")) == (found, WORDS[found]["title"])
