"""What the page answers: each event of it, and the two endpoints for programs, as HTML or plain data."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import gradio as gr
import records
import render
from texts import Texts, problem_text, texts

from hf_ewc.compare import STOPS, VOTES, BlindRound, CompareService, Frame, Sampling, label_of
from hf_ewc.errors import EWCError

FRAME_SECONDS = 0.04  # a fast model is shown 25 times a second, not at each token

logger = logging.getLogger("hf_ewc.space")


class Blind(NamedTuple):
    """A round, what stands left and right, and the prompt: for the vote, and for another language."""

    round: BlindRound
    frame: Frame
    prompt: str


class Answers:
    """
    Answers to events. Requests stand first in the handlers, as gradio fills them in by their place.

    Parameters:
        service ([`CompareService`]): What stands behind the page.
    """

    def __init__(self, service: CompareService):
        self.service = service

    # compare

    def compare(
        self, request: gr.Request, language: str, model: str, prompt: str, started: float, *sampling: Any
    ) -> Iterator[tuple[Any, Any]]:
        t = texts(language)
        try:
            frame = None
            options = dict(model=model, started=started, address=address(request))
            for frame in _paced(self.service.write(visitor(request), prompt, _sampling(sampling), **options)):
                yield self.show_frame(frame, prompt, model, t), gr.skip()
            yield gr.skip(), (frame, prompt, model)
        except Exception as error:
            yield self.problem(error, t), None

    def again(
        self, request: gr.Request, written: Any, language: str, model: str, prompt: str, started: float, *sampling: Any
    ) -> Iterator[tuple[Any, Any]]:
        """Another model was chosen: it writes what the last one wrote on from, if there was something."""
        if written:
            yield from self.compare(request, language, model, prompt, started, *sampling)

    def show_frame(self, frame: Any, prompt: str, model: str, t: Texts) -> str:
        pair = self.service.pair(model)
        names = tuple(map(render.name_of, pair.sides))
        shown = render.panes(frame, "" if pair.chat else prompt, self.titles(model, t), names, t)
        if model == "adapted" and "plain" in self.service.models and frame.finished and frame.diverges_at is None:
            shown += render.message(t("pane.try_plain"))
        return shown

    def titles(self, model: str, t: Texts) -> tuple[str, str]:
        return t("pane.base"), t(f"pane.{model}")

    def end(self, request: gr.Request, until: float) -> None:
        """The visitor wants no more of what it has started."""
        self.service.stop(visitor(request), until)

    def leave(self, request: gr.Request) -> None:
        self.service.leave(visitor(request))

    # which finds it natural

    def score(self, request: gr.Request, language: str, model: str, view: str, text: str) -> tuple[Any, str]:
        try:
            (scores,) = self.service.natural(visitor(request), [text], model, address=address(request))
        except Exception as error:
            return None, self.problem(error, texts(language))
        return (scores, model), self.look(language, (scores, model), view)

    def look(self, language: str, scores: Any, view: str) -> str:
        t = texts(language)
        measured, model = scores or (None, "adapted")
        return render.natural(measured, view, t(f"model.{model}.short"), t)

    # between

    def go_between(
        self, request: gr.Request, language: str, model: str, stop: float, old: str, new: str, prompt: str, tried: Any
    ) -> Iterator[tuple[Any, Any, Any]]:
        t, strength, key = texts(language), STOPS[int(stop)], (old, new, model)
        try:
            options = dict(model=model, merge_lambda=strength, address=address(request))
            moved = self.service.move(visitor(request), [old, new], prompt, Sampling(max_new_tokens=32), **options)
            kept, learned = next(moved)
            points = tried.points if tried and tried.key == key else {}
            tried = records.Tried(key, {**points, strength: records.Bits.of(kept, learned)}, strength, prompt)
            yield tried, records.front(tried, t), gr.skip()
            for frame in _paced(moved):
                tried = replace(tried, frame=frame)
                yield tried if frame.finished else gr.skip(), gr.skip(), self.show_between(tried, t)
        except Exception as error:
            yield gr.skip(), gr.skip(), self.problem(error, t)

    def show_between(self, tried: Any, t: Texts) -> str:
        if not tried or tried.frame is None:
            return ""
        pair = self.service.pair(tried.key[2])
        titles = (t("pane.base"), t.figures(label_of(tried.strength)))
        prompt = "" if pair.chat else tried.prompt
        return render.panes(tried.frame, prompt, titles, tuple(map(render.name_of, pair.sides)), t)

    # blind votes

    def blind(
        self, request: gr.Request, language: str, prompt: str, started: float, *sampling: Any
    ) -> Iterator[tuple[Any, ...]]:
        t, blind = texts(language), BlindRound()
        closed = [gr.update(interactive=False)] * len(VOTES)
        try:
            options = dict(started=started, address=address(request))
            for frame in _paced(self.service.write(visitor(request), prompt, _sampling(sampling), **options)):
                shown = Blind(blind, Frame(*blind.order(frame.base, frame.adapted)), prompt)
                whole = frame.finished and not frame.base.error and not frame.adapted.error
                votes = [gr.update(interactive=True)] * len(VOTES) if whole else closed
                # before the end there is no round to vote in, whatever a program sends
                yield shown if whole else None, self.show_blind(shown, t), "", *votes
        except Exception as error:
            yield None, self.problem(error, t), "", *closed

    def vote(self, vote: str, language: str, shown: Blind | None) -> tuple[Any, ...]:
        t, closed = texts(language), [gr.update(interactive=False)] * len(VOTES)
        if shown is None:
            return "", *closed
        try:
            pair = self.service.pair()
            self.service.tally.vote(shown.round, vote, base=pair.base.label, adapted=pair.adapted.label)
        except EWCError as error:
            return self.problem(error, t), *closed
        return self.show_reveal(shown, t), *closed

    def show_blind(self, shown: Blind | None, t: Texts) -> str:
        if shown is None:
            return ""
        prompt = "" if self.service.pair().chat else shown.prompt
        return render.panes(shown.frame, prompt, (t("pane.left"), t("pane.right")), ("", ""), t)

    def show_reveal(self, shown: Blind | None, t: Texts) -> str:
        if shown is None or not shown.round.voted:
            return ""
        return render.reveal(shown.round.reveal(), self.service.tally.to_dict(), t)

    def storage(self, t: Texts) -> str:
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
            written = self.service.write(visitor(request), prompt, sampling, model, merge_lambda, address(request))
            for frame in _paced(written):
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

    def problem(self, error: Exception, t: Texts) -> str:
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
    """Where a request comes from. On a Space all come through one proxy, which writes the last of the addresses it tells."""
    told = request.headers.get("x-forwarded-for") if os.environ.get("SPACE_ID") else None
    if told:
        return told.rpartition(",")[2].strip()
    return request.client.host if request.client else None


def _paced(frames: Iterator[Frame]) -> Iterator[Frame]:
    """As many frames as an eye can follow, the last one among them."""
    shown = -math.inf
    for frame in frames:
        if frame.finished or time.monotonic() - shown >= FRAME_SECONDS:
            yield frame
            shown = time.monotonic()


def _sampling(values: tuple[Any, ...]) -> Sampling:
    length, greedy, temperature, top_p, top_k, seed = values
    return Sampling(length, greedy, temperature, top_p, top_k, 0 if seed is None else seed)
