"""Both models write at the same pace: one generator advances them token by token, and neither is ever ahead."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .divergence import diverges_at
from .limits import Limits
from .pair import ModelPair, Side
from .problems import CompareError, problem_code, public_message
from .prompts import check_prompt
from .sampling import Sampling

logger = logging.getLogger(__name__)

_UNFINISHED_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what `decode` writes for bytes that are no character, or not yet one


@dataclass(frozen=True)
class Pane:
    """
    What one side has written so far.

    Parameters:
        text (`str`): Without the prompt. A character whose last bytes are yet to come is held back until they are there.
        ids (`tuple[int, ...]`): Its tokens, an end-of-text token among them.
        reason (`str`, *optional*):
            Why it ended: `"end"` (the model said so), `"length"` (`max_new_tokens`), `"context"` (the context is full),
            `"stopped"` (by the visitor) or `"error"`; `None` while it goes on.
        error (`str`, *optional*): What went wrong, fit for the page. The text until then stays.
        error_code (`str`, *optional*): Its kind, see [`problem_code`].
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    reason: str | None = None
    error: str | None = None
    error_code: str | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def finished(self) -> bool:
        return self.reason is not None

    def stopped(self) -> Pane:
        """The same, ended by the visitor if it has not ended already."""
        return self if self.finished else replace(self, reason="stopped")


@dataclass(frozen=True)
class Frame:
    """Both panes after the same number of steps; a side that ended earlier stays as it was."""

    base: Pane
    adapted: Pane

    @classmethod
    def empty(cls) -> Frame:
        """Before the first step."""
        return cls(Pane(), Pane())

    @property
    def finished(self) -> bool:
        return self.base.finished and self.adapted.finished

    def stopped(self) -> Frame:
        """The same texts, ended by the visitor."""
        return Frame(self.base.stopped(), self.adapted.stopped())

    @property
    def diverges_at(self) -> int | None:
        """
        Where the two texts part, see [`diverges_at`]. As long as the shorter is the beginning of the longer and still being
        written, they have not parted.
        """
        shorter, longer = sorted((self.base, self.adapted), key=lambda pane: len(pane.text))
        if not shorter.finished and longer.text.startswith(shorter.text):
            return None
        return diverges_at(self.base.text, self.adapted.text)


def stream(
    pair: ModelPair,
    prompt: str,
    sampling: Sampling | None = None,
    stop: threading.Event | None = None,
    limits: Limits | None = None,
) -> Iterator[Frame]:
    """
    Let both models write on from one prompt, in lockstep: each frame has one more token on each side that still writes.

    The same seed and settings give the same texts again, and each side exactly the tokens that `model.generate` gives after
    `torch.manual_seed(seed)`, with the model's own generation config where `sampling` says nothing: each side draws from a
    generator of its own, so that neither they nor other visitors disturb each other, and the global one is left alone.
    The one difference: beams of a model's config are not used, as they cannot be streamed.

    One side's failure is told in its pane and ends that side only. Frames may be asked for from different threads, one after
    the other. Closing the generator ends both sides.

    Args:
        pair ([`ModelPair`]): The models.
        prompt (`str`): Taken as it is, or as a user's turn where `pair.chat`.
        sampling ([`Sampling`], *optional*): Defaults to greedy.
        stop (`threading.Event`, *optional*): Once set, a last frame comes with the texts so far, and that is all.
        limits ([`Limits`], *optional*): Of the prompt and of `max_new_tokens`.

    Yields:
        [`Frame`]: At least one; the last, and only the last, has `finished`.

    Raises:
        CompareError: The prompt or a setting is refused, before anything is written.

    Example:

    ```python
    >>> for frame in stream(pair, "Vilnius yra", Sampling(max_new_tokens=20)):
    ...     print(frame.base.text, "|", frame.adapted.text)
    ```
    """
    sampling = (sampling or Sampling()).checked(limits)
    if problem := check_prompt(pair, prompt, limits).problem:
        raise problem
    writers = [_Writer(pair, side, prompt, sampling) for side in pair.sides]
    try:
        while True:
            stopped = stop is not None and stop.is_set()
            for writer in writers:
                if stopped:
                    writer.stop()
                else:
                    writer.advance()
            frame = Frame(writers[0].pane, writers[1].pane)
            yield frame
            if frame.finished:
                return
    finally:
        for writer in writers:
            writer.close()


class _Writer:
    """One side of a stream."""

    def __init__(self, pair: ModelPair, side: Side, prompt: str, sampling: Sampling):
        self.pane = Pane()
        self.side = side
        self.tokenizer = pair.tokenizer
        self.sampling = sampling
        self.inputs = pair.encode(side, prompt)
        self.cut = False  # whether the context ends before `max_new_tokens`
        if pair.context is not None:
            room = pair.context - self.inputs["input_ids"].shape[1]
            self.cut = room < sampling.max_new_tokens
            self.sampling = replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))
        self.steps: Iterator[tuple[int, bool]] | None = None

    def advance(self) -> None:
        """One token, unless this side has ended."""
        if self.pane.finished:
            return
        try:
            if self.steps is None:
                self.steps = _steps(self.side.model, self.tokenizer, self.inputs, self.sampling)
            token, last = next(self.steps)
            ids = (*self.pane.ids, token)
            text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        except Exception as error:
            logger.exception("The %s model failed after %d tokens.", self.side.role, len(self.pane.ids))
            self.pane = replace(self.pane, reason="error", error=public_message(error), error_code=problem_code(error))
            self.close()
            return
        if last:
            # The whole of it, as `decode` gives it: half a character at the very end stays one.
            self.pane = Pane(text, ids, "end" if token in _end_tokens(self.side.model) else "context" if self.cut else "length")
        else:
            self.pane = Pane(_whole_characters(self.pane.text, text), ids)

    def stop(self) -> None:
        self.pane = self.pane.stopped()

    def close(self) -> None:
        """Free the caches."""
        if self.steps is not None:
            self.steps.close()  # type: ignore[attr-defined]


def _steps(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, torch.Tensor], sampling: Sampling
) -> Iterator[tuple[int, bool]]:
    """
    The tokens that `model.generate` would give, one at a time, each with whether it is the last.

    `generate` itself makes the config, the logits processors, the stopping criteria and the cache ready, and then hands over to
    its `custom_generate`. That one being a generator function, it returns at once, and the steps are ours to take.
    """
    rng = torch.Generator(device=model.device).manual_seed(sampling.seed)
    generate: Any = model.generate
    return generate(**inputs, **sampling.generate_kwargs(), custom_generate=_sample, rng=rng, tokenizer=tokenizer)


@torch.no_grad()  # of a generator function, it holds while a step runs and not between them
def _sample(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    rng: torch.Generator | None = None,
    tokenizer: Any = None,  # named so that `generate` finds it for stop strings
    **model_kwargs: Any,
) -> Iterator[tuple[int, bool]]:
    """`GenerationMixin._sample` for one row, with a `yield` in its loop and random numbers of its own."""
    first, last = True, False
    while not last:
        fed = None if first or not model_kwargs["use_cache"] else 1
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=fed, is_first_iteration=first, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)  # (1, V)
        del outputs  # after a long prompt they are large
        if bool((logits.isnan() | (logits == math.inf)).any()):  # argmax would give some token nevertheless
            raise CompareError(
                "not_finite",
                "the model computed numbers that are not finite (NaN), so nothing it would write means anything. Its weights "
                "are damaged, or its dtype is too narrow.",
            )
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1, generator=rng)  # (1, 1)
        else:
            token = scores.argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, token], dim=-1)
        first, last = False, bool(stopping_criteria(input_ids, None).all())
        yield int(token), last


def _end_tokens(model: PreTrainedModel) -> list[int]:
    ends: Any = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _whole_characters(shown: str, decoded: str) -> str:
    """
    What may be shown of `decoded` while more is to come, given what is shown already.

    Bytes at the end that are no character may become one with the next token. Where a tokenizer falls back to bytes, they make
    `decode` give up the whole characters before them, too, which are then kept as shown.
    """
    if not decoded.endswith(_UNFINISHED_CHARACTER):
        return decoded
    whole = decoded.rstrip(_UNFINISHED_CHARACTER)
    return whole if whole.startswith(shown) else shown
