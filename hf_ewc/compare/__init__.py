"""Base against adapted, side by side: what stands behind the page, without the page.

[`ModelPair`] loads both models, [`stream`] lets them write in lockstep, [`score`] says which finds a text natural,
[`BlindRound`] and [`Tally`] count votes, [`Slots`], [`RateLimit`] and [`Limits`] keep the page up for many. Messages of
[`CompareError`] are fit for the page as they are; every other error goes through [`public_message`].
"""

from __future__ import annotations

from ..config import SPACE_FILE, CompareConfig, app_folder
from .between import STOPS, Between, label_of
from .blind import VOTES, BlindRound, Reveal, Tally
from .divergence import diverges_at
from .facts import Facts, Heading, ResultFacts, fisher_of, load_facts
from .generation import Frame, Pane, stream
from .limits import Limits, RateLimit, Slots
from .lineage import LineageLink
from .loading import STEPS, Loader
from .pair import ModelPair, Side
from .problems import CompareError, problem_code, public_message
from .prompts import PromptCheck, check_prompt
from .sampling import Sampling
from .service import CompareService
from .surprisal import Scores, TokenScore, score
from .votes import VoteStore

__all__ = [
    "SPACE_FILE",
    "STEPS",
    "STOPS",
    "VOTES",
    "Between",
    "BlindRound",
    "CompareConfig",
    "CompareError",
    "CompareService",
    "Facts",
    "Frame",
    "Heading",
    "Limits",
    "LineageLink",
    "Loader",
    "ModelPair",
    "Pane",
    "PromptCheck",
    "RateLimit",
    "ResultFacts",
    "Reveal",
    "Sampling",
    "Scores",
    "Side",
    "Slots",
    "Tally",
    "TokenScore",
    "VoteStore",
    "app_folder",
    "check_prompt",
    "diverges_at",
    "fisher_of",
    "label_of",
    "load_facts",
    "problem_code",
    "public_message",
    "score",
    "stream",
]
