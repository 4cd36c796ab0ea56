"""The page in a real Chromium, when something goes wrong: told in words, in the page's language, and nothing of ours shows."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from browser import WORDS, Browser, after, hooked, slow, text

EN, LT = WORDS["en"], WORDS["lt"]
NASTY = (
    "<img src=x onerror='window.__pwned=1'><script>window.__pwned=1</script><b id=injected>&amp;\"'</b> 👩‍🚀 שלום "
    "\u202egnp.exe\u202c \x07\x1b[31m {0} %s"
)
NASTY_SHOWN = NASTY.replace("\u202e", "⟦202E⟧").replace("\u202c", "⟦202C⟧").replace("\x07", "␇").replace("\x1b", "␛")


def alert(browser: Browser, place: str) -> str:
    """What is read out at once in this place."""
    return browser.text(f"{place} .problem[role=alert]")


@contextmanager
def loading_held() -> Iterator[threading.Event]:
    """Models whose weights take long to come: the first parameter of any new model waits for the event."""
    go = threading.Event()
    hook = torch.nn.modules.module.register_module_parameter_registration_hook(lambda *_: go.wait(30) and None)
    try:
        yield go
    finally:
        go.set()
        hook.remove()


def test_a_prompt_that_cannot_be_read_is_told_why(page, browser):
    browser.open(page.url, language="lt")
    prompt = "ąčęė" * 150
    tokens = len(page.service.pair().tokenizer(prompt).input_ids)
    assert tokens > 512
    for given, said in (
        ("", LT["problem.empty"]),
        (" \n ", LT["problem.empty"]),
        ("a" * 100_000, LT["problem.characters"].format(found="100\u00a0000", limit="20\u00a0000")),
        (prompt, LT["problem.tokens"].format(found=tokens, limit="511")),
    ):
        browser.fill("#prompt textarea", given)
        browser.click("#run")
        browser.until(lambda said=said: alert(browser, "#panes") == said)
    browser.tab("natural")
    browser.click("#measure")
    assert alert(browser, "#natural") == LT["problem.empty"]
    browser.tab("blind")
    browser.click("#blind-run")
    assert alert(browser, "#blind-panes") == LT["problem.empty"]
    assert len(browser.all("#votes button:disabled")) == 4
    assert all(pane["tokens"] == 48 for pane in browser.write("Nobody", "blind-prompt", "blind-run"))  # all is well again


def test_one_side_fails_and_the_other_writes_on(page, browser):
    def fail(output):
        raise RuntimeError("Traceback (most recent call last): /home/ona/secret/model hf_abcdefghijklmnopqrstuvwxyz")

    browser.open(page.url, language="lt")
    with slow(page, 0.01), hooked(page, after(5, fail), "adapted"):
        base, adapted = browser.write("Nobody")
    assert base["state"] == "gabalėlių: 48 · pasiektas ilgis"
    assert (adapted["problem"], text(adapted)) == (LT["problem.failed"], text(base)[: len(text(adapted))])
    assert len(text(adapted)) > 3
    assert alert(browser, "#panes .pane:nth-child(2)") == LT["problem.failed"]
    assert "secret" not in browser.sent


def test_a_page_is_there_before_its_models(serve, browser):
    with loading_held() as go:
        page = serve()
        browser.open(page.url)
        assert browser.text("#status .loading") == EN["status.loading"].format(step=EN["step.load_base"])
        browser.fill("#prompt textarea", "Nobody")
        browser.click("#run")
        assert alert(browser, "#panes") == EN["problem.loading"]
        browser.tab("facts")
        assert browser.all("#facts table")
        go.set()
        browser.until(lambda: not browser.all("#status p"))
    browser.tab("compare")
    assert all(pane["tokens"] == 48 for pane in browser.write())


def test_models_that_cannot_be_loaded_are_told_of_without_where_they_lie(serve, models, browser):
    page = serve(adapted=str(models / "gone"))
    browser.open(page.url, language="lt")
    status = browser.until(lambda: browser.all("#status .problem") and alert(browser, "#status"))
    assert status.startswith(LT["status.failed"].format(problem=""))
    browser.fill("#prompt textarea", "Nobody")
    browser.click("#run")
    assert "gone" in alert(browser, "#panes")


def test_a_full_page_and_a_hasty_visitor(serve, browser):
    page = serve(slots=1, wait_seconds=0.2, burst=1, per_minute=2)
    page.service.wait()
    browser.open(page.url)
    somebody = page.service.write("somebody else", "Nobody")
    next(somebody)
    browser.fill("#prompt textarea", "Nobody")
    browser.click("#run")
    assert alert(browser, "#panes") == EN["problem.busy"].format(seconds=0.2)
    somebody.close()
    browser.click("#run")
    browser.until(lambda: re.fullmatch(EN["problem.rate"].format(seconds=r"(29|30)"), alert(browser, "#panes")))


def test_any_text_is_shown_as_text(page, browser):
    browser.open(page.url)
    browser.write(NASTY)
    assert [browser.text(f"#panes .pane:nth-child({n}) .prompt") for n in (1, 2)] == [NASTY_SHOWN] * 2
    browser.tab("natural")
    browser.fill("#text textarea", NASTY)
    browser.click("#measure")
    assert browser.text("#natural .tokens") == NASTY_SHOWN
    for token in browser.all("#natural .token"):
        browser.js("arguments[0].click()", token)
    browser.tab("between")
    browser.unfold("between-texts")
    browser.fill("#between-prompt textarea", NASTY)
    browser.fill("#between-old textarea", NASTY)
    browser.click("#between-run")
    assert browser.text("#between-panes .pane .prompt") == NASTY_SHOWN
    browser.tab("blind")
    browser.write(NASTY, "blind-prompt", "blind-run")
    assert browser.text("#blind-panes .pane .prompt") == NASTY_SHOWN
    assert browser.js("return [typeof window.__pwned, document.querySelectorAll('#injected, img[src=x]').length]") == [
        "undefined",
        0,
    ]
