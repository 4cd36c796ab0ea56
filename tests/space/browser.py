"""A headless Chromium as a test uses it: Debian's own, one per process, forgetful between tests, watched for errors."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from filelock import FileLock
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement

from hf_ewc.compare import app_folder

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--lang=en"),
    *("--no-first-run", "--disable-sync", "--disable-background-networking", "--disable-component-update", "--disable-quic"),
)

# What each page keeps for the test: what the server sent, and all that its panes ever showed, one entry per change of the page.
WATCH = """
window.sent = []; window.states = []; let last = "[]";
const fetched = window.fetch;
window.fetch = async (...given) => {
  const answer = await fetched(...given);
  const reader = answer.clone().body?.getReader(), decoder = new TextDecoder();
  const read = async () => {
    for (let part; reader && !(part = await reader.read()).done;) window.sent.push(decoder.decode(part.value));
  };
  read().catch(() => {});
  return answer;
};
new MutationObserver(() => {
  const text = (pane, selector) => pane.querySelector(selector)?.textContent ?? "";
  const panes = [...document.querySelectorAll("#panes .pane, #blind-panes .pane")].filter((pane) => pane.checkVisibility());
  const state = JSON.stringify(panes.map((pane) => ({
    tokens: Number(/\\d+/.exec(text(pane, ".state"))?.[0] ?? 0), state: text(pane, ".state"), problem: text(pane, ".problem"),
    same: text(pane, ".same"), differs: text(pane, ".differs"), mark: text(pane, ".fork"), writing: pane.matches(".writing"),
  })));
  if (state !== last) window.states.push(last = state);
}).observe(document, { childList: true, subtree: true, characterData: true });
"""

WORDS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (app_folder() / "strings").glob("*.json")}
TABS = ("compare", "natural", "between", "facts", "blind")


def install(lock: Path) -> None:
    """Chromium and its driver from Debian, where they are absent and this may be done; else their tests are skipped."""

    def missing() -> list[str]:
        return [path for path in (CHROMIUM, DRIVER) if not Path(path).exists()]

    with FileLock(lock):
        problem = f"{' and '.join(missing())} is not here: apt-get install chromium chromium-driver"
        if missing() and os.geteuid() == 0 and shutil.which("apt-get"):
            get = "apt-get --option Acquire::Retries=3 --option DPkg::Lock::Timeout=120"
            install = f"{get} install --yes --no-install-recommends chromium chromium-driver fonts-dejavu-core"
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(
                f"{get} update && {install}", shell=True, env=environment, capture_output=True, text=True, timeout=900
            )
            problem += f"\n{done.stderr[-2000:]}"
    if missing():
        pytest.fail(problem) if os.environ.get("CI") else pytest.skip(problem)


def launch(folder: Path) -> webdriver.Chrome:
    """A browser of its own, which downloads neither itself nor a driver."""
    os.environ |= {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true"}
    options = Options()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={folder}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_experimental_option("perfLoggingPrefs", {"enableNetwork": True, "enablePage": False})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(20)  # a page that hangs fails its test, not the run
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    return driver


class Browser:
    """
    One visitor: nothing is left of the one before. Everything waits until it is there.

    Parameters:
        driver (`webdriver.Chrome`): See [`launch`].
    """

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver
        self.driver.get("about:blank")
        self.do("Network.clearBrowserCookies")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # of the test before

    def do(self, command: str, **given: Any) -> dict:
        return self.driver.execute_cdp_cmd(command, given)

    def js(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

    def open(self, url: str, language: str = "en", width: int = 1280, height: int = 1400, dark: bool = False) -> None:
        """The page, as a browser of this language, size and taste gets it; it is there once its words are."""
        agent = self.js("return navigator.userAgent")
        self.do("Network.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.do("Emulation.setEmulatedMedia", features=[scheme])
        self.do("Storage.clearDataForOrigin", origin=url.rstrip("/"), storageTypes="all")
        self.driver.get(url)
        self.one("#headline .card, #headline .problem, #status .problem")  # the last of what comes unasked

    # looking

    def until(self, condition: Callable[[], Any], seconds: float = 15) -> Any:
        """What `condition` gives, once it is true; the assertion of nearly every test."""
        __tracebackhide__ = True
        ends = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > ends:
                pytest.fail(f"not so within {seconds} s; the page shows:\n{self.js('return document.body.innerText')[:3000]}")
            time.sleep(0.03)
        return found

    def all(self, selector: str) -> list[WebElement]:
        """Those that can be seen now."""
        return self.js("return [...document.querySelectorAll(arguments[0])].filter((e) => e.checkVisibility())", selector)

    def one(self, selector: str) -> WebElement:
        __tracebackhide__ = True
        return self.until(lambda: self.all(selector))[0]

    def text(self, selector: str) -> str:
        """All of its text, line breaks and spaces as they are."""
        return self.js("return arguments[0].textContent", self.one(selector))

    @property
    def states(self) -> list[list[dict]]:
        """Both panes after each change of the page."""
        return [state for state in map(json.loads, self.js("return window.states")) if state]

    @property
    def sent(self) -> str:
        """What the server sent since the page came, or since [`Browser.forget`]."""
        return "".join(self.js("return window.sent"))

    def forget(self) -> None:
        self.js("window.sent = []; window.states = []")

    # doing

    def click(self, selector: str) -> None:
        element = self.one(selector)
        self.js("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def fill(self, selector: str, text: str) -> None:
        """
        Text into a box as if it was pasted: keys of a driver cannot be any character. A box that has just come into sight may
        be made again by Gradio with what it held before, and a busy page takes its time to take the text up: no hand is so
        quick that this matters, so it is pasted until it stays.
        """
        put = """
        const [box, text, done] = arguments;
        box.focus();
        Object.getOwnPropertyDescriptor(Object.getPrototypeOf(box), "value").set.call(box, text);
        const held = box.value;  // lines end differently in a box
        box.dispatchEvent(new Event("input", {bubbles: true}));
        const later = () => setTimeout(() => done(box.isConnected && box.value === held), 100);
        requestAnimationFrame(() => requestAnimationFrame(later));"""
        self.until(lambda: self.driver.execute_async_script(put, self.one(selector), text))

    def press(self, *keys: str) -> None:
        """Keys to what has the focus; the last while those before are held."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def tab(self, name: str) -> None:
        """To a tab, also where a narrow page keeps it in a menu."""
        label = WORDS[self.language][f"tab.{name}"]
        if not self.all(f"[role=tab][data-tab-id={name}]"):
            self.click(".overflow-menu > button")
        found = "[role=tab], .overflow-dropdown:not(.hide) button"
        self.until(lambda: [button for button in self.all(found) if button.text == label])[0].click()
        self.one(f"#tab-{name}")

    def unfold(self, section: str) -> None:
        """What a closed section holds."""
        self.click(f"#{section} > button:not(.open)")
        self.one(f"#{section} > button.open")

    def write(self, prompt: str | None = None, box: str = "prompt", button: str = "run") -> list[dict]:
        """Both panes once both texts have ended."""
        if prompt is not None:
            self.fill(f"#{box} textarea", prompt)
        self.forget()
        self.click(f"#{button}")
        return self.written()

    def written(self) -> list[dict]:
        def ended(panes: list[dict]) -> bool:
            return all((pane["state"] or pane["problem"]) and not pane["writing"] for pane in panes)

        return self.until(lambda: (states := self.states) and ended(states[-1]) and states[-1])

    @property
    def language(self) -> str:
        return self.js("return document.documentElement.lang")

    # judging

    def photograph(self, path: Path) -> None:
        """The whole page, as far as it has been scrolled to."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def check(self, home: str) -> None:
        """Nothing is red in the console, nobody but this machine was asked, and nothing is shown that is nobody's business."""
        severe = [line["message"] for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        assert severe == []
        events = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        hosts = {urlsplit(url).hostname for url in asked if not url.startswith(("data:", "blob:", "about:", "chrome:"))}
        assert hosts <= {"127.0.0.1"}
        assert asked, "the log of the network is empty, so it says nothing"
        shown = self.js("return document.documentElement.outerHTML") + self.sent
        found = re.findall(rf"{re.escape(home)}|/site-packages/|Traceback \(most recent|hf_[a-zA-Z0-9]{{20,}}", shown)
        assert found == []


# what the page's models do, which is nothing of our code's


@contextmanager
def hooked(page: Any, hook: Callable[..., Any], *roles: str) -> Iterator[None]:
    """A forward hook on the page's models of these roles."""
    with ExitStack() as stack:
        for side in page.service.pair().sides:
            if side.role in roles:
                stack.callback(side.model.register_forward_hook(hook).remove)
        yield


def slow(page: Any, seconds: float = 0.03):
    """Models that take their time, as large ones do."""
    return hooked(page, lambda *_: time.sleep(seconds), "base", "adapted")


def after(steps: int, act: Callable[[Any], Any]) -> Callable[..., Any]:
    """A hook that does something with the output of one step, and of all later ones."""
    count = itertools.count()
    return lambda model, given, output: act(output) if next(count) >= steps else None


def text(pane: dict) -> str:
    """Of one of [`Browser.states`]."""
    return pane["same"] + pane["differs"]
