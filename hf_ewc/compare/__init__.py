"""Base against adapted, side by side: what stands behind the page, without the page.

[`ModelPair`] loads both models, [`stream`] lets them write in lockstep, [`score`] says which finds a text natural,
[`BlindRound`] and [`Tally`] count votes, [`Slots`], [`RateLimit`] and [`Limits`] keep the page up for many. Messages of
[`CompareError`] are fit for the page as they are; every other error goes through [`public_message`].
"""

from __future__ import annotations

from .blind import VOTES, BlindRound, Reveal, Tally
from .divergence import diverges_at
from .generation import Frame, Pane, stream
from .limits import Limits, RateLimit, Slots
from .pair import STEPS, ModelPair, PairLoader, Side
from .problems import CompareError, problem_code, public_message
from .prompts import PromptCheck, check_prompt
from .sampling import Sampling
from .surprisal import Scores, TokenScore, score

__all__ = [
    "STEPS",
    "VOTES",
    "BlindRound",
    "CompareError",
    "Frame",
    "Limits",
    "ModelPair",
    "PairLoader",
    "Pane",
    "PromptCheck",
    "RateLimit",
    "Reveal",
    "Sampling",
    "Scores",
    "Side",
    "Slots",
    "Tally",
    "TokenScore",
    "check_prompt",
    "diverges_at",
    "problem_code",
    "public_message",
    "score",
    "stream",
]
