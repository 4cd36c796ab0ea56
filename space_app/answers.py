"""What the page answers: each event of it, and the two endpoints for programs, as HTML or plain data."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import records
import render
from texts import Texts, problem_text, texts

from hf_ewc.compare import STOPS, VOTES, BlindRound, CompareService, Frame, Sampling, label_of
from hf_ewc.errors import EWCError

FRAME_SECONDS = 0.04  # a fast model is shown 25 times a second, not at each token

logger = logging.getLogger("hf_ewc.space")


class Answers:
    """
    Answers to events. Requests stand first in the handlers, as gradio fills them in by their place.

    Parameters:
        service ([`CompareService`]): What stands behind the page.
    """

    def __init__(self, service: CompareService):
        self.service = service

    # compare

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

    def show_frame(self, frame: Any, prompt: str, model: str, t: Texts) -> str:
        pair = self.service.pair(model)
        names = tuple(map(render.name_of, pair.sides))
        return render.panes(frame, "" if pair.chat else prompt, self.titles(model, t), names, t)

    def titles(self, model: str, t: Texts) -> tuple[str, str]:
        return t("pane.base"), t(f"pane.{model}")

    def end(self, request: gr.Request) -> None:
        """Stop what the visitor has running: its own wish, or it left."""
        self.service.stop(visitor(request))

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

    def show_front(self, tried: Any, t: Texts) -> str:
        return records.tried(tried, t) if tried else render.message(t("between.empty"), "nothing")

    # blind votes

    def blind(self, request: gr.Request, language: str, prompt: str, *sampling: Any) -> Iterator[tuple[Any, ...]]:
        t, blind = texts(language), BlindRound()
        closed = [gr.update(interactive=False)] * len(VOTES)
        titles = (t("pane.left"), t("pane.right"))
        try:
            for frame in self.frames(request, prompt, _sampling(sampling)):
                left, right = blind.order(frame.base, frame.adapted)
                shown = render.panes(Frame(left, right), "" if self.service.pair().chat else prompt, titles, ("", ""), t)
                whole = frame.finished and not left.error and not right.error
                votes = [gr.update(interactive=True)] * len(VOTES) if whole else closed
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
    return request.client.host if request.client else None


def _sampling(values: tuple[Any, ...]) -> Sampling:
    length, greedy, temperature, top_p, top_k, seed = values
    return Sampling(length, greedy, temperature, top_p, top_k, 0 if seed is None else seed)
