"""How the page is laid out, which words stand where in which language, and which event calls which answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import records
import render
from answers import Answers
from texts import DEFAULT, STRINGS, Texts, choose_language, domain, load_examples, texts

from hf_ewc.compare import STOPS, VOTES, CompareService, Facts, label_of

FOLDER = Path(__file__).resolve().parent
QUIET: dict[str, Any] = dict(queue=False, show_progress="hidden", api_visibility="private")  # events that cost nothing

NOW = "(...given) => { given[given.length - %d] = Date.now(); return given; }"  # the browser's clock, in the place of a number
SAY = "(language) => { document.documentElement.lang = language; const to = new URL(location); \
to.searchParams.set('lang', language); history.replaceState(history.state, '', to); }"

Words = str | Callable[[Texts], Any]  # a key of `strings/`, or what is made of several: a label, the choices of a radio


class Page:
    """
    The page.

    Parameters:
        service ([`CompareService`]): What stands behind it.
    """

    def __init__(self, service: CompareService):
        self.service = service
        self.answers = Answers(service)
        self.examples = load_examples(service.config.examples or FOLDER / "examples.json")
        self.wording: list[tuple[Any, dict[str, Words]]] = []  # component, {property: its words}

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="EWC: base and adapted, side by side", analytics_enabled=False, fill_width=True) as blocks:
            with gr.Row(elem_id="top"):
                self.heading = gr.HTML(elem_id="heading", scale=4)
                languages = [(words["name"], name) for name, words in STRINGS.items()]
                self.language = self.worded(gr.Radio(languages, value=DEFAULT, elem_id="language", scale=1), label="language")
            self.status = gr.HTML(elem_id="status")
            self.headline = gr.HTML(elem_id="headline")
            models = self.service.models
            self.model = self.worded(
                gr.Radio(value="adapted", elem_id="model", visible=len(models) > 1),
                label="model",
                choices=lambda t: [(t(f"model.{name}"), name) for name in models],
            )
            with gr.Tabs(elem_id="tabs"):
                self.compare_tab()
                self.natural_tab()
                self.between_tab()
                self.facts_tab()
                self.blind_tab()
            self.footer = gr.HTML(elem_id="footer")
            self.clock = gr.Number(0, visible=False)  # when the visitor clicked
            self.timer = gr.Timer(0.5)
            self.connect(blocks)
        return blocks

    def worded(self, component: Texts, **words: Words) -> Any:
        """A component whose words follow the language; until the browser has said which, they are English."""
        self.wording.append((component, words))
        t = texts(DEFAULT)
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
            self.view = self.worded(
                gr.Radio(value="difference", elem_id="view"),
                label="view",
                choices=lambda t: [(t(f"view.{name}"), name) for name in ("difference", "base", "adapted")],
            )
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
        words: dict[str, Words] = {"label": key}
        if key in ("prompt", "text"):
            words |= {"placeholder": f"{key}.placeholder", "info": self.prompt_info if key == "prompt" else "text.info"}
        return self.worded(gr.Textbox(value, elem_id=elem_id, lines=lines, max_lines=12, elem_classes="starts"), **words)

    def prompt_info(self, t: Texts) -> str:
        """What the models do with a prompt; once they are loaded, whether they chat is known."""
        chat = self.service.status.state == "ready" and self.service.pair().chat
        return t("prompt.info.chat" if chat else "prompt.info")

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
        answers, slots = self.answers, self.service.config.slots
        served: dict[str, Any] = dict(concurrency_id="models", concurrency_limit=slots)  # one queue for all that compute
        # first, so that no event of the page takes these names, which programs rely on
        gr.api(answers.api_compare, api_name="compare", **served)
        gr.api(answers.api_score, api_name="score", **served)
        self.connect_words(blocks)

        served["api_visibility"] = "private"
        chosen, votes = [self.language, self.model], list(self.votes.values())
        asked = [self.clock, *self.sampling]
        clicked = dict(js=NOW % len(asked), **served)
        self.run.click(answers.compare, [*chosen, self.prompt, *asked], [self.panes, self.written], **clicked)
        self.model.input(answers.again, [self.written, *chosen, self.prompt, *asked], [self.panes, self.written], **clicked)
        self.measure.click(answers.score, [*chosen, self.view, self.text], [self.scores, self.natural], **served)
        self.view.input(answers.look, [self.language, self.scores, self.view], self.natural, **QUIET)
        gr.on(
            [self.between_run.click, self.stops.release],
            answers.go_between,
            [*chosen, self.stops, self.old, self.new, self.between_prompt, self.tried],
            [self.tried, self.front, self.between_panes],
            trigger_mode="always_last",
            **served,
        )
        shown = [self.round, self.blind_panes, self.reveal, *votes]
        self.blind_run.click(answers.blind, [self.language, self.blind_prompt, *asked], shown, **clicked)
        for vote, button in self.votes.items():
            button.click(partial(answers.vote, vote), [self.language, self.round], [self.reveal, *votes], **QUIET)
        for stop in (self.stop, self.blind_stop):
            stop.click(answers.end, self.clock, None, js=NOW % 1, **QUIET)
        blocks.unload(answers.leave)  # whoever leaves gives the place back

    def connect_words(self, blocks: gr.Blocks) -> None:
        """When the page opens, in another language, and while the models load."""
        worded = [component for component, _ in self.wording]
        shown = [self.footer, self.blind_lead, self.panes, self.natural, self.front, self.between_panes, self.blind_panes]
        shown += [self.reveal]
        remembered = [self.language, self.written, self.scores, self.view, self.tried, self.round]
        words: dict[str, Any] = dict(fn=self.words, inputs=remembered, outputs=[*worded, *shown], **QUIET)
        waited = [self.status, self.timer, self.between_note, self.ends, self.between_live, self.prompt, self.blind_prompt]
        progress: dict[str, Any] = dict(fn=self.progress, inputs=self.language, outputs=waited, **QUIET)
        told: dict[str, Any] = dict(
            fn=self.told, inputs=self.language, outputs=[self.headline, self.facts, self.heading], **QUIET
        )
        greeted = blocks.load(self.greet, None, self.language, **QUIET)
        greeted.then(None, self.language, None, js=SAY)  # English is what it was before, so no change is told
        greeted.then(**words).then(**progress).then(**told)
        self.language.input(**words).then(**progress).then(**told)
        self.language.change(None, self.language, None, js=SAY)
        self.timer.tick(**progress).then(**told)

    # words and records

    def greet(self, request: gr.Request) -> str:
        return choose_language(request.query_params, request.headers)

    def words(self, language: str, written: Any, scores: Any, view: str, tried: Any, played: Any) -> list[Any]:
        """Everything that has words, in another language."""
        t, answers = texts(language), self.answers
        return [
            *(gr.update(**{name: _said(value, t) for name, value in words.items()}) for _, words in self.wording),
            render.message(t("footer")),
            render.message(t("blind.lead")) + render.message(answers.storage(t)),
            answers.show_frame(*written, t) if written else render.panes(None, "", answers.titles("adapted", t), ("", ""), t),
            answers.look(language, scores, view),
            records.front(tried, t),
            answers.show_between(tried, t),
            answers.show_blind(played, t),
            answers.show_reveal(played, t),
        ]

    def progress(self, language: str) -> tuple[Any, ...]:
        """How far the models are; the clock stops when there is nothing to wait for."""
        t, status = texts(language), self.service.status
        problem = self.service.no_slider
        known = self.service.facts if self.service.facts_read else Facts()
        note = records.no_slider(problem, known, t) if problem else render.message(t("between.lead"))
        ends = records.ends(t)
        if status.state == "loading":
            said = render.message(t("status.loading", step=t(f"step.{status.step}")), "loading")
        elif status.state == "failed":
            said = render.message(t("status.failed", problem=status.problem), "problem")
        else:
            said = render.message(t("status.ready"), "ready")
        info = gr.update(info=self.prompt_info(t))
        waiting = status.state == "loading" or not self.service.facts_read
        return said, gr.Timer(active=waiting), note, ends, gr.update(visible=not problem), info, info

    def told(self, language: str) -> tuple[str, str, str]:
        """What the records say, once they are read."""
        t = texts(language)
        facts = self.service.facts if self.service.facts_read else Facts()
        results = facts.results
        lead = t("lead", old=domain(t, results.old), new=domain(t, results.new)) if results else t("lead.plain")
        note = self.examples.get("note", {}).get(language, "")
        heading = f"<h1>{t('title')}</h1>{render.message(lead, 'lead')}{render.message(note)}"
        shown = records.page(facts, t) if self.service.facts_read else render.message(t("facts.loading"), "nothing")
        return records.headline(facts, t), shown, heading


def _said(words: Words, t: Texts) -> str:
    return t(words) if isinstance(words, str) else words(t)


def _offer(kind: str, text: str, t: Texts) -> str:
    """An example's button: its kind, and how it begins."""
    start = text.partition("\n")[0].strip()
    return f"{t(f'example.{kind}')} · {start if len(start) <= 28 else start[:27].rstrip() + '…'}"
