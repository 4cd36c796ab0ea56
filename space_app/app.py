"""The page: base against adapted model, side by side. A face: what it shows is computed in `hf_ewc.compare`.

On a Space this file is the program, and `space.yaml` beside it (or variables `HF_EWC_BASE`, `HF_EWC_ADAPTED`, …) says what to
compare. Elsewhere `hf-ewc compare` starts it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import records
import render
from texts import STRINGS, Texts, choose_language, domain, problem_text, texts

from hf_ewc.compare import (
    STOPS,
    VOTES,
    BlindRound,
    CompareConfig,
    CompareService,
    Sampling,
    Tally,
    VoteStore,
    label_of,
)
from hf_ewc.config import SPACE_FILE, raise_problems
from hf_ewc.errors import ConfigError, EWCError

FOLDER = Path(__file__).resolve().parent
FRAME_SECONDS = 0.04  # a fast model is shown 25 times a second, not at each token
QUIET: dict[str, Any] = dict(queue=False, show_progress="hidden", api_visibility="private")  # events that cost nothing
QUEUE = 64  # requests that wait; more are told that the page is busy

logger = logging.getLogger("hf_ewc.space")

Words = str | Callable[[Texts], str]  # a key of `strings/`, or words that are made of several


class Page:
    """
    Builds the blocks, and answers their events.

    Parameters:
        service ([`CompareService`]): What stands behind the page.
    """

    def __init__(self, service: CompareService):
        self.service = service
        config = service.config
        self.examples = json.loads(Path(config.examples or FOLDER / "examples.json").read_text(encoding="utf-8"))
        self.wording: list[tuple[Any, dict[str, Words]]] = []  # component, {property: its words}

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="EWC: base and adapted, side by side", analytics_enabled=False, fill_width=True) as blocks:
            with gr.Row(elem_id="top"):
                self.heading = gr.HTML(elem_id="heading", scale=4)
                choices = [(words["name"], name) for name, words in STRINGS.items()]
                self.language = self.worded(
                    gr.Radio(choices, value="en", elem_id="language", scale=1, min_width=180), label="language"
                )
            self.status = gr.HTML(elem_id="status")
            self.headline = gr.HTML(elem_id="headline")
            several = len(self.service.models) > 1
            self.model = self.worded(
                gr.Radio([(name, name) for name in self.service.models], value="adapted", elem_id="model", visible=several),
                label="model",
            )
            with gr.Tabs(elem_id="tabs"):
                self.compare_tab()
                self.natural_tab()
                self.between_tab()
                self.facts_tab()
                self.blind_tab()
            self.footer = gr.HTML(elem_id="footer")
            self.timer = gr.Timer(0.5)
            self.connect(blocks)
        return blocks

    def worded(self, component: Any, **words: Words) -> Any:
        """A component whose words follow the language; until the browser has said which, they are English."""
        self.wording.append((component, words))
        t = texts("en")
        for name, value in words.items():
            setattr(component, name, _said(value, t))
        return component

    # the tabs

    def compare_tab(self) -> None:
        with self.worded(gr.Tab(id="compare", elem_id="tab-compare"), label="tab.compare"):
            self.prompt = self.box("prompt", "prompt", lines=3)
            self.offer(self.prompt, self.examples["compare"])
            with gr.Row():
                self.run = self.worded(gr.Button(variant="primary", elem_id="run"), value="run")
                self.stop = self.worded(gr.Button(elem_id="stop"), value="stop")
            self.sampling = self.sampling_section()
            self.written = gr.State()  # the last frame, its prompt and its model, for another language
            self.panes = gr.HTML(elem_id="panes")

    def natural_tab(self) -> None:
        with self.worded(gr.Tab(id="natural", elem_id="tab-natural"), label="tab.natural"):
            self.text = self.box("text", "text", lines=3)
            self.offer(self.text, self.examples["natural"])
            self.measure = self.worded(gr.Button(variant="primary", elem_id="measure"), value="measure")
            views = [(name, name) for name in ("difference", "base", "adapted")]
            self.view = self.worded(gr.Radio(views, value="difference", elem_id="view"), label="view")
            self.scores = gr.State()  # and the model that they are of
            self.natural = gr.HTML(elem_id="natural")

    def between_tab(self) -> None:
        with self.worded(gr.Tab(id="between", elem_id="tab-between"), label="tab.between"):
            self.between_note = gr.HTML(elem_id="between-note")
            with gr.Column(elem_id="between-live") as self.between_live:
                self.stops = self.worded(
                    gr.Slider(0, len(STOPS) - 1, value=0, step=1, elem_id="lambda", buttons=[]),
                    label="between.slider",
                )
                self.ends = gr.HTML(elem_id="lambda-ends")
                gr.HTML(f'<output id="lambda-value" data-stops="{"|".join(map(label_of, STOPS))}">λ = 0</output>')
                self.between_run = self.worded(gr.Button(variant="primary", elem_id="between-run"), value="between.run")
            self.tried = gr.State()  # texts, model and what was measured at each λ
            self.front = gr.HTML(elem_id="front")
            self.between_panes = gr.HTML(elem_id="between-panes")
            with self.worded(gr.Accordion(open=False, elem_id="between-texts"), label="between.texts"):
                with gr.Row():
                    self.old = self.box("between-old", "between.old", lines=3, value=self.examples["between"]["old"])
                    self.new = self.box("between-new", "between.new", lines=3, value=self.examples["between"]["new"])
                self.between_prompt = self.box("between-prompt", "prompt", lines=3, value=self.examples["between"]["prompt"])

    def facts_tab(self) -> None:
        with self.worded(gr.Tab(id="facts", elem_id="tab-facts"), label="tab.facts"):
            self.facts = gr.HTML(elem_id="facts")

    def blind_tab(self) -> None:
        with self.worded(gr.Tab(id="blind", elem_id="tab-blind"), label="tab.blind"):
            self.blind_lead = gr.HTML(elem_id="blind-lead")
            self.blind_prompt = self.box("blind-prompt", "prompt", lines=3)
            self.offer(self.blind_prompt, self.examples["compare"])
            with gr.Row():
                self.blind_run = self.worded(gr.Button(variant="primary", elem_id="blind-run"), value="blind.run")
                self.blind_stop = self.worded(gr.Button(elem_id="blind-stop"), value="stop")
            self.round = gr.State()
            self.blind_panes = gr.HTML(elem_id="blind-panes")
            with gr.Row(elem_id="votes"):
                self.votes = {
                    vote: self.worded(gr.Button(interactive=False, elem_id=f"vote-{vote}", min_width=120), value=f"vote.{vote}")
                    for vote in VOTES
                }
            self.reveal = gr.HTML(elem_id="reveal")

    # their parts

    def box(self, elem_id: str, key: str, lines: int, value: str = "") -> gr.Textbox:
        words = {"label": key}
        words |= {"placeholder": f"{key}.placeholder", "info": f"{key}.info"} if key in ("prompt", "text") else {}
        return self.worded(gr.Textbox(value, elem_id=elem_id, lines=lines, max_lines=12, elem_classes="starts"), **words)

    def offer(self, box: gr.Textbox, examples: list[dict[str, str]]) -> None:
        """A row of buttons, each of which fills the box."""
        with gr.Row(elem_classes="examples"):
            for example in examples:
                kind, text = example["kind"], example["text"]
                button = self.worded(gr.Button(size="sm", min_width=60), value=partial(_offer, kind, text))
                button.click(lambda text=text: text, None, box, **QUIET)

    def sampling_section(self) -> list[Any]:
        limits = self.service.limits
        with self.worded(gr.Accordion(open=False, elem_id="sampling"), label="settings"):
            with gr.Row():
                greedy = self.worded(gr.Checkbox(True, elem_id="greedy"), label="greedy", info="greedy.info")
                seed = self.worded(gr.Number(0, precision=0, minimum=0, elem_id="seed"), label="seed", info="seed.info")
                length = gr.Slider(1, min(limits.new_tokens, 256), value=48, step=1, elem_id="length", buttons=[])
                self.worded(length, label="length")
            with gr.Row():
                temperature = gr.Slider(0.1, 2, value=0.8, step=0.05, elem_id="temperature", buttons=[])
                self.worded(temperature, label="temperature", info="temperature.info")
                top_p = gr.Slider(0.05, 1, value=0.95, step=0.05, elem_id="top-p", buttons=[])
                self.worded(top_p, label="top_p", info="top_p.info")
                top_k = gr.Slider(0, 200, value=50, step=1, elem_id="top-k", buttons=[])
                self.worded(top_k, label="top_k", info="top_k.info")
        return [length, greedy, temperature, top_p, top_k, seed]

    def connect(self, blocks: gr.Blocks) -> None:
        # first, so that no event of the page takes these names, which programs rely on
        served = dict(concurrency_id="models", concurrency_limit=self.service.config.slots)
        gr.api(self.api_compare, api_name="compare", **served)
        gr.api(self.api_score, api_name="score", **served)
        places = dict(**served, api_visibility="private")

        chosen = [self.language, self.model]

        shown = [self.heading, self.footer, self.blind_lead, self.panes, self.natural, self.front]
        worded = [component for component, _ in self.wording]
        state = [self.language, self.written, self.scores, self.view, self.tried]
        words = dict(fn=self.words, inputs=state, outputs=[*worded, *shown], js=None, **QUIET)
        progress = dict(
            fn=self.progress,
            inputs=[self.language],
            outputs=[self.status, self.timer, self.between_note, self.ends, self.between_live],
            **QUIET,
        )
        told = dict(fn=self.records, inputs=[self.language], outputs=[self.headline, self.facts, self.heading], **QUIET)
        greeted = blocks.load(self.greet, None, self.language, **QUIET)
        greeted.then(**words).then(**progress).then(**told)
        self.language.input(**words).then(**progress).then(**told)
        self.language.change(None, self.language, None, js="(language) => { document.documentElement.lang = language; }")
        self.timer.tick(**progress)
        blocks.unload(self.leave)

        self.run.click(self.compare, [*chosen, self.prompt, *self.sampling], [self.panes, self.written], **places)
        self.stop.click(self.end, None, None, **QUIET)
        self.measure.click(self.score, [*chosen, self.text], [self.scores, self.natural], **places)
        self.view.input(self.look, [self.language, self.scores, self.view], self.natural, **QUIET)
        between = [*chosen, self.stops, self.old, self.new, self.between_prompt, self.tried]
        gr.on(
            [self.between_run.click, self.stops.release],
            self.go_between,
            between,
            [self.tried, self.front, self.between_panes],
            trigger_mode="always_last",
            **places,
        )
        votes = list(self.votes.values())
        blind = [self.round, self.blind_panes, self.reveal, *votes]
        self.blind_run.click(self.blind, [self.language, self.blind_prompt, *self.sampling], blind, **places)
        self.blind_stop.click(self.end, None, None, **QUIET)
        for vote, button in self.votes.items():
            button.click(
                lambda *given, vote=vote: self.vote(vote, *given), [self.language, self.round], [self.reveal, *votes], **QUIET
            )

    # events: words and records

    def greet(self, request: gr.Request) -> str:
        return choose_language(request.query_params, request.headers)

    def words(self, language: str, written: Any, scores: Any, view: str, tried: Any) -> list[Any]:
        """Everything that has words, in another language."""
        t = texts(language)
        updates = [
            gr.update(**{name: _said(value, t) for name, value in words.items()}, **self.choices(c, t))
            for c, words in self.wording
        ]
        panes = self.show_frame(*written, t) if written else render.panes(None, "", self.titles("adapted", t), ("", ""), t)
        footer = render.message(t("footer"))
        blind = render.message(t("blind.lead")) + render.message(self.storage(t))
        heading = self.show_heading(t, known=False)
        front = self.show_front(tried, t)
        return [*updates, heading, footer, blind, panes, self.look(language, scores, view), front]

    def choices(self, component: Any, t: Any) -> dict[str, Any]:
        """Words of a component's choices."""
        if component is self.model:
            return {"choices": [(t(f"model.{name}"), name) for name in self.service.models]}
        if component is self.view:
            return {"choices": [(t(f"view.{name}"), name) for name in ("difference", "base", "adapted")]}
        return {}

    def progress(self, language: str) -> tuple[Any, ...]:
        """How far the models are; the clock stops when there is nothing to wait for."""
        t, status = texts(language), self.service.status
        problem = self.service.no_slider
        note = records.no_slider(problem, self.service.facts, t) if problem else render.message(t("between.lead"))
        ends = records.ends(t)
        if status.state == "loading":
            said = render.message(t("status.loading", step=t(f"step.{status.step}")), "loading")
        elif status.state == "failed":
            said = render.message(t("status.failed", problem=status.problem), "problem")
        else:
            said = render.message(t("status.ready"), "ready")
        return said, gr.Timer(active=status.state == "loading"), note, ends, gr.update(visible=not problem)

    def records(self, language: str) -> tuple[str, str, str]:
        t, facts = texts(language), self.service.facts
        return records.headline(facts, t), records.page(facts, t), self.show_heading(t, known=True)

    def show_heading(self, t: Any, known: bool) -> str:
        results = self.service.facts.results if known else None
        lead = t("lead", old=domain(t, results.old), new=domain(t, results.new)) if results else t("lead.plain")
        return f"<h1>{t('title')}</h1>{render.message(lead, 'lead')}"

    # events: compare

    def compare(self, request: gr.Request, language: str, model: str, prompt: str, *sampling: Any) -> Iterator[tuple[Any, Any]]:
        t = texts(language)
        try:
            frame = None
            for frame in self.frames(request, prompt, _sampling(sampling), model):
                yield self.show_frame(frame, prompt, model, t), gr.skip()
            yield gr.skip(), (frame, prompt, model)
        except Exception as error:
            yield self.problem(error, t), None

    def frames(self, request: gr.Request, *given: Any, **options: Any) -> Iterator[Any]:
        """What the service writes, as often as an eye can follow."""
        shown = -math.inf
        for frame in self.service.write(visitor(request), *given, address=address(request), **options):
            if frame.finished or time.monotonic() - shown >= FRAME_SECONDS:
                yield frame
                shown = time.monotonic()

    def show_frame(self, frame: Any, prompt: str, model: str, t: Any) -> str:
        pair = self.service.pair(model)
        names = tuple(map(render.name_of, pair.sides))
        return render.panes(frame, "" if pair.chat else prompt, self.titles(model, t), names, t)

    def titles(self, model: str, t: Any) -> tuple[str, str]:
        return t("pane.base"), t(f"pane.{model}")

    def end(self, request: gr.Request) -> None:
        self.service.stop(visitor(request))

    def leave(self, request: gr.Request) -> None:
        self.service.stop(visitor(request))

    # events: which finds it natural

    def score(self, request: gr.Request, language: str, model: str, text: str) -> tuple[Any, str]:
        try:
            (scores,) = self.service.natural(visitor(request), [text], model, address=address(request))
        except Exception as error:
            return None, self.problem(error, texts(language))
        return (scores, model), self.look(language, (scores, model), "difference")

    def look(self, language: str, scores: Any, view: str) -> str:
        t = texts(language)
        measured, model = scores or (None, "adapted")
        return render.natural(measured, view, t(f"model.{model}.short"), t)

    # events: between

    def go_between(
        self, language: str, model: str, stop: float, old: str, new: str, prompt: str, tried: Any, request: gr.Request
    ) -> Iterator[tuple[Any, Any, Any]]:
        t, strength = texts(language), STOPS[int(stop)]
        try:
            scores = self.service.natural(visitor(request), [old, new], model, strength, address(request))
            key = (old, new, model)
            points = dict(tried[1]) if tried and tried[0] == key else {}
            points[strength] = scores
            tried = (key, points, strength)
            yield tried, self.show_front(tried, t), gr.skip()
            pair = self.service.pair(model)
            titles = (t("pane.base"), label_of(strength))
            names = (render.name_of(pair.base), "")
            for frame in self.frames(request, prompt, Sampling(max_new_tokens=32), model, strength):
                yield gr.skip(), gr.skip(), render.panes(frame, "" if pair.chat else prompt, titles, names, t)
        except Exception as error:
            yield gr.skip(), self.problem(error, t), gr.skip()

    def show_front(self, tried: Any, t: Any) -> str:
        return records.tried(tried, t) if tried else render.message(t("between.empty"), "nothing")

    # events: blind votes

    def blind(self, request: gr.Request, language: str, prompt: str, *sampling: Any) -> Iterator[tuple[Any, ...]]:
        t, blind = texts(language), BlindRound()
        closed = [gr.update(interactive=False)] * len(VOTES)
        titles = (t("pane.left"), t("pane.right"))
        try:
            for frame in self.frames(request, prompt, _sampling(sampling)):
                left, right = blind.order(frame.base, frame.adapted)
                shown = render.panes(type(frame)(left, right), "" if self.service.pair().chat else prompt, titles, ("", ""), t)
                votes = [gr.update(interactive=True)] * len(VOTES) if frame.finished else closed
                yield blind, shown, "", *votes
        except Exception as error:
            yield None, self.problem(error, t), "", *closed

    def vote(self, vote: str, language: str, blind: BlindRound | None) -> tuple[Any, ...]:
        t, closed = texts(language), [gr.update(interactive=False)] * len(VOTES)
        if blind is None:
            return "", *closed
        try:
            pair = self.service.pair()
            reveal = self.service.tally.vote(blind, vote, base=pair.base.label, adapted=pair.adapted.label)
        except EWCError as error:
            return self.problem(error, t), *closed
        names = {name: t(f"blind.side.{name}") for name in ("base", "adapted")}
        said = t("blind.reveal", left=names[reveal.left], right=names[reveal.right])
        outcome = render.message(f"{t(f'blind.outcome.{reveal.outcome}')} {said}", "verdict strong")
        return f'<div role="status">{outcome}{render.tally(self.service.tally.to_dict(), t)}</div>', *closed

    def storage(self, t: Any) -> str:
        repo = self.service.config.votes_repo
        return t("blind.stored", repo=repo) if repo and self.service.tally.stores else t("blind.counted")

    # for programs

    def api_compare(
        self,
        prompt: str,
        max_new_tokens: int = 48,
        greedy: bool = True,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int = 50,
        seed: int = 0,
        model: str = "adapted",
        merge_lambda: float = 0.0,
        request: gr.Request = None,  # type: ignore[assignment]
    ) -> Iterator[dict]:
        """Both models write on from a prompt: texts so far, tokens, why each side ended, where the texts part."""
        try:
            sampling = Sampling(max_new_tokens, greedy, temperature, top_p, top_k, seed)
            for frame in self.frames(request, prompt, sampling, model, merge_lambda):
                sides = {
                    role: {"text": pane.text, "tokens": pane.tokens, "reason": pane.reason, "error": pane.error}
                    for role, pane in (("base", frame.base), ("adapted", frame.adapted))
                }
                yield {**sides, "diverges_at": frame.diverges_at, "finished": frame.finished}
        except Exception as error:
            raise gr.Error(self.said(error), print_exception=False) from None

    def api_score(self, text: str, model: str = "adapted", merge_lambda: float = 0.0, request: gr.Request = None) -> dict:  # type: ignore[assignment]
        """How surprising a text is to both models: bits per byte, and nats for each piece."""
        try:
            (scores,) = self.service.natural(visitor(request), [text], model, merge_lambda, address(request))
        except Exception as error:
            raise gr.Error(self.said(error), print_exception=False) from None
        pieces = [{"text": p.text, "base_nats": p.base_nats, "adapted_nats": p.adapted_nats} for p in scores.pieces]
        return {
            "base_bits_per_byte": scores.base_bits_per_byte,
            "adapted_bits_per_byte": scores.adapted_bits_per_byte,
            "difference": scores.difference,
            "tokens": scores.tokens,
            "bytes": scores.bytes,
            "pieces": pieces,
        }

    # what goes wrong

    def problem(self, error: Exception, t: Any) -> str:
        self.log(error)
        return render.message(problem_text(t, error), "problem")

    def said(self, error: Exception) -> str:
        self.log(error)
        return problem_text(texts("en"), error)

    def log(self, error: Exception) -> None:
        if not isinstance(error, EWCError):
            logger.error("A request failed.", exc_info=error)


def visitor(request: gr.Request) -> str:
    return request.session_hash or "nobody"


def address(request: gr.Request) -> str | None:
    return request.client.host if request.client else None


def _said(words: Words, t: Texts) -> str:
    return t(words) if isinstance(words, str) else words(t)


def _offer(kind: str, text: str, t: Texts) -> str:
    """An example's button: its kind, and how it begins."""
    start = text.partition("\n")[0]
    return (
        f"{t(f'example.{kind}')} · {start[:27].rstrip()}…"
        if len(start) > 28 or start != text
        else f"{t(f'example.{kind}')} · {start}"
    )


def _sampling(values: tuple[Any, ...]) -> Sampling:
    length, greedy, temperature, top_p, top_k, seed = values
    return Sampling(length, greedy, temperature, top_p, top_k, 0 if seed is None else seed)


def serve(service: CompareService, **options: Any) -> gr.Blocks:
    """Build the page and launch it; `options` are those of [`gradio.Blocks.launch`]."""
    blocks = Page(service).build().queue(max_size=QUEUE, default_concurrency_limit=None)
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]  # of the visitor: nothing to fetch
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    settings = dict(
        theme=gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]),
        css_paths=FOLDER / "style.css",
        head=f"<script>{script}</script>",
        footer_links=["api"],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size="1kb",  # nothing is uploaded
        quiet=True,
        share=False,
    )
    blocks.launch(**{**settings, **options})
    return blocks


def main() -> None:
    """On a Space."""
    logging.basicConfig(level=logging.INFO)
    config = CompareConfig.of_space(FOLDER)
    if not config.base and not config.adapted:
        raise ConfigError(
            f"this Space does not say what to compare: set `base` and `adapted` in {SPACE_FILE}, or the variables HF_EWC_BASE "
            "and HF_EWC_ADAPTED in its settings. `hf-ewc push space` does so."
        )
    raise_problems("The Space cannot start", config.problems())
    if config.results:
        config.results = str(FOLDER / config.results)  # it was committed beside this file
    try:
        import spaces  # of ZeroGPU: a device that is lent for each call

        on_device = spaces.GPU(duration=60)
    except ImportError:
        on_device = _as_it_is
    tally = Tally(sink=VoteStore(config.votes_repo).add) if config.votes_repo else Tally()
    service = CompareService(config, tally=tally, on_device=on_device)
    if os.environ.get("SPACES_ZERO_GPU"):
        service.wait()  # it takes only the tensors that are on the device when the page starts
    serve(service)


def _as_it_is(function: Any) -> Any:
    return function


if __name__ == "__main__":
    main()
