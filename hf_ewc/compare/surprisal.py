"""Which model finds a text natural: bits per byte as the evaluation measures them, and how surprising each piece is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .limits import Limits
from .pair import ModelPair, Side
from .problems import CompareError
from .prompts import text_problem

LONGEST_WINDOW = 2048  # as of `evaluation.score_texts`
SOFTMAX_ENTRIES = 2**24  # float32 logits that are normalised at once: 64 MiB


@dataclass(frozen=True)
class TokenScore:
    """
    A piece of the text and how much it surprised each model, in nats (−ln p; times 1/ln 2 for bits).

    Parameters:
        text (`str`): Mostly one token; several where they share a character (`"ą"` may be two tokens of one byte each).
        base_nats (`float`), adapted_nats (`float`): Summed over its tokens.
        tokens (`int`): How many they are.
    """

    text: str
    base_nats: float
    adapted_nats: float
    tokens: int

    @property
    def difference(self) -> float:
        """`adapted_nats − base_nats`: below 0, the adapted model expected this piece more than the base did."""
        return self.adapted_nats - self.base_nats


@dataclass(frozen=True)
class Scores:
    """
    A text under both models.

    Parameters:
        base_bits_per_byte (`float`), adapted_bits_per_byte (`float`): As [`evaluation.score_texts`] with the same window.
        pieces (`tuple[TokenScore, ...]`): In order; their texts make up the text exactly.
        tokens (`int`), bytes (`int`): Length of the text.
        window (`int`): Tokens that are scored together, the BOS included; a longer text is scored in several such windows.
    """

    base_bits_per_byte: float
    adapted_bits_per_byte: float
    pieces: tuple[TokenScore, ...]
    tokens: int
    bytes: int
    window: int

    @property
    def difference(self) -> float:
        """`adapted − base` in bits per byte: below 0, the adapted model finds the text more natural."""
        return self.adapted_bits_per_byte - self.base_bits_per_byte


def score(pair: ModelPair, text: str, limits: Limits | None = None) -> Scores:
    """
    How surprising a text is to both models, as a whole and piece by piece.

    Conventions are those of the evaluation: no special tokens in the text, windows of the context (at most 2048 tokens) that
    each begin with a fresh BOS (EOS for a tokenizer without one). So also the first token has a score: given that BOS only.

    Args:
        pair ([`ModelPair`]): The models.
        text (`str`): Taken as it is; never through a chat template.
        limits ([`Limits`], *optional*): `score_characters` and `score_tokens`.

    Raises:
        CompareError: The text is empty or too long, or a model's numbers are not finite.

    Example:

    ```python
    >>> scores = score(pair, "Vilnius yra Lietuvos sostinė.")
    >>> scores.base_bits_per_byte, scores.adapted_bits_per_byte
    (2.31, 1.07)
    >>> scores.pieces[1].text, scores.pieces[1].difference
    (' yra', -3.2)
    ```
    """
    limits = limits or Limits()
    if problem := text_problem(text, limits.score_characters, "text"):
        raise problem
    ids, spans = _tokens(pair.tokenizer, text)
    if not ids:
        raise CompareError("empty", "the text holds nothing that the tokenizer knows. Write something.")
    if len(ids) > limits.score_tokens:
        raise CompareError(
            "tokens",
            f"the text has {len(ids):,} tokens, and {limits.score_tokens:,} are the most. Shorten it.",
            found=len(ids),
            limit=limits.score_tokens,
        )
    window = min(pair.context or LONGEST_WINDOW, LONGEST_WINDOW)
    start = _start_token(pair.tokenizer)
    base, adapted = (_nats(side, ids, start, window) for side in pair.sides)
    to_bits_per_byte = 1 / (math.log(2) * len(text.encode()))
    pieces = tuple(
        TokenScore(text[slice(*span)], math.fsum(base[part]), math.fsum(adapted[part]), part.stop - part.start)
        for part, span in _pieces(spans, len(text))
    )
    return Scores(
        base_bits_per_byte=math.fsum(base) * to_bits_per_byte,
        adapted_bits_per_byte=math.fsum(adapted) * to_bits_per_byte,
        pieces=pieces,
        tokens=len(ids),
        bytes=len(text.encode()),
        window=window,
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of the text, and which characters each stems from."""
    if not tokenizer.is_fast:
        raise CompareError(
            "tokenizer", f"the tokenizer ({type(tokenizer).__name__}) does not say which characters its tokens stem from."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before the first token of a window: BOS, or EOS for a tokenizer without one."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise CompareError("tokenizer", "the tokenizer has neither a BOS nor an EOS token, so nothing can stand before the text.")


@torch.no_grad()
def _nats(side: Side, ids: list[int], start: int, window: int) -> list[float]:
    """−ln p of each token, given those before it in its window."""
    nats: list[float] = []
    for at in range(0, len(ids), window - 1):
        row = torch.tensor([[start, *ids[at : at + window - 1]]], device=side.model.device)  # (1, T)
        context = row[:, :-1]
        logits = side.model(input_ids=context, attention_mask=torch.ones_like(context), use_cache=False).logits[0]  # (T-1, V)
        step = max(1, SOFTMAX_ENTRIES // logits.shape[-1])
        for t in range(0, len(logits), step):
            chunk = logits[t : t + step].float()
            target = row[0, t + 1 : t + 1 + step, None]
            nats += (chunk.logsumexp(-1) - chunk.gather(-1, target)[:, 0]).double().tolist()
    if not all(map(math.isfinite, nats)):
        raise CompareError(
            "not_finite",
            f"the {side.role} model computed numbers that are not finite (NaN) on this text, so they mean nothing. Its weights "
            "are damaged, or its dtype is too narrow.",
            side=side.role,
        )
    return nats


def _pieces(spans: list[tuple[int, int]], length: int) -> list[tuple[slice, tuple[int, int]]]:
    """
    Tokens that belong together, and the characters they make up: a partition of both.

    A token joins the piece before it if it stems from characters that are taken already (the later bytes of a character), or
    from none. Characters that no token claims (spaces that a tokenizer trims) go to the piece that follows them, at the end to
    the last.
    """
    starts: list[int] = []  # first token of each piece
    ends: list[int] = []  # end of its characters
    for token, (begin, end) in enumerate(spans):
        if not starts:
            starts.append(token)
            ends.append(end)
        elif begin < ends[-1] or begin == end:
            ends[-1] = max(ends[-1], end)
        elif not ends[-1]:  # only tokens without characters so far
            ends[-1] = end
        else:
            starts.append(token)
            ends.append(end)
    ends[-1] = length
    parts = zip(starts, [*starts[1:], len(spans)], strict=True)
    return [(slice(*part), span) for part, span in zip(parts, zip([0, *ends[:-1]], ends, strict=True), strict=True)]
