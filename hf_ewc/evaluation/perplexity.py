"""How surprised a model is by running text: bits per byte, and perplexity per token.

Perplexity per *token* cannot be compared between tokenizers, nor between languages under one tokenizer: the more pieces a
language is cut into, the easier each piece is to guess. Bits per *byte* divides by the UTF-8 bytes of the raw text instead,
which no tokenizer can change. It is the main figure of this project.

The scorer replaces `evaluate`'s perplexity (wrong for tokenizers that pad on the left, and `evaluate.load` needs the
network) and lm-evaluation-harness' rolling one (it scores the BOS token of Gemma as if it were text).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError, DataError

LOGITS_BUDGET = 2 * 2**30  # bytes of one forward pass's logits [B, T, V], counted in float32; one row always passes
SOFTMAX_ENTRIES = 2**24  # float32 logits that are normalised at once: 64 MiB
LONGEST_DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class TextScores:
    """
    Scores of some documents, one entry each.

    Parameters:
        nats (`list[float]`): Negative log-likelihood −Σ ln p of the document's tokens.
        tokens (`list[int]`): Number of scored tokens (the BOS is not one).
        bytes (`list[int]`): Length of the raw text in UTF-8.
    """

    nats: list[float]
    tokens: list[int]
    bytes: list[int]

    def _per(self, count: int) -> float:
        if not count:
            raise DataError(
                f"there is nothing to score: all {len(self.tokens)} documents are empty. Give texts with some characters."
            )
        return math.fsum(self.nats) / count

    @property
    def nats_per_token(self) -> float:
        return self._per(sum(self.tokens))

    @property
    def token_perplexity(self) -> float:
        nats = self.nats_per_token
        return math.exp(nats) if nats < 700 else nats * math.inf  # `math.exp` raises beyond; nan stays nan

    @property
    def bits_per_byte(self) -> float:
        return self._per(sum(self.bytes)) / math.log(2)


def context_length(model: PreTrainedModel) -> int | None:
    """Longest input the model was built for, in tokens, or `None` if its configuration does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def choose_window(model: PreTrainedModel, window: int | None = None) -> int:
    """The given window, checked against the model's context ([`ConfigError`]); by default the context, at most 2048."""
    context = context_length(model)
    if window is None:
        return min(context or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
    if window < 2 or (context and window > context):
        raise ConfigError(
            f"`window: {window}` does not fit: the model's context is {context} tokens, and a window holds the leading BOS and "
            f"at least one token. Set `window` between 2 and {context}, or leave it out."
        )
    return window


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Put the model in eval mode, and every module back in the mode it had. (lm-evaluation-harness leaves it in eval mode.)"""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that opens each window: BOS, or EOS for tokenizers without one (GPT-2 and Qwen saw it between documents)."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise DataError(
        f"the tokenizer ({type(tokenizer).__name__}) has neither a BOS nor an EOS token, so nothing can stand before the first "
        "token of a document. Set `tokenizer.bos_token`."
    )


def _token_nats(model: PreTrainedModel, rows: list[list[int]]) -> list[float]:
    """Σ −ln p(token | what stands before it) over each row's tokens but the first."""
    longest = max(map(len, rows))
    # Rows are padded on the right whatever the tokenizer prefers: behind the text, under a causal mask, padding changes
    # nothing, and position ids stay 0, 1, 2, …  So any id does as padding.
    ids = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows], device=model.device)  # (B, T)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)  # (B,)
    real = torch.arange(longest, device=model.device) < lengths[:, None]  # (B, T)
    logits = model(input_ids=ids[:, :-1], attention_mask=real[:, :-1].long(), use_cache=False).logits  # (B, T-1, V)

    nats = torch.zeros(len(rows), dtype=torch.float64)
    step = max(1, SOFTMAX_ENTRIES // (len(rows) * logits.shape[-1]))
    for t in range(0, longest - 1, step):
        chunk = logits[:, t : t + step].float()  # (B, t, V)
        target = ids[:, t + 1 : t + 1 + step]
        surprisal = chunk.logsumexp(-1) - chunk.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        # `where`, not a product: a padded position may hold NaN, and NaN · 0 is NaN.
        nats += torch.where(real[:, t + 1 : t + 1 + step], surprisal, 0.0).double().sum(-1).cpu()
    return nats.tolist()


def _rows_per_pass(longest: int, vocab_size: int, batch_size: int) -> int:
    """At most `batch_size` rows, fewer where their logits would exceed the budget, never none."""
    return max(1, min(batch_size, LOGITS_BUDGET // (4 * longest * vocab_size)))


@torch.no_grad()  # not `inference_mode`: tensors that a model caches (rotary tables) must stay usable in later training
def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window: int | None = None,
    batch_size: int = 8,
    *,
    progress: bool = False,
) -> TextScores:
    """
    Score every token of every document exactly once.

    A document is tokenised without special tokens and cut into pieces of `window − 1` tokens. Each piece is scored on its own
    behind a fresh BOS (EOS for tokenizers that have none), which is context and never scored. The softmax is taken in float32
    whatever the model's dtype, sums are float64. The model's modes and settings are as before afterwards.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model; it stays where it is.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer. The padding side does not matter.
        texts (`Sequence[str]`): Documents. An empty one counts with 0 tokens and 0 bytes.
        window (`int`, *optional*): Tokens per piece, the BOS included. Defaults to the model's context, at most 2048.
        batch_size (`int`, *optional*, defaults to 8): Pieces per forward pass. Changes the result by rounding only.
        progress (`bool`, *optional*, defaults to `False`): Show a progress bar.

    Returns:
        [`TextScores`]: nats, tokens and bytes of each document, in order.

    Raises:
        DataError: If the tokenizer has no token that could stand before a document's first.
        ConfigError: If the window exceeds the model's context.

    Example:

    ```python
    >>> scores = score_texts(model, tokenizer, ["Labas rytas!", "Good morning!"])
    >>> scores.bits_per_byte
    2.31
    ```
    """
    window = choose_window(model, window)
    start = _start_token(tokenizer)
    token_ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    pieces = [
        (document, [start, *ids[at : at + window - 1]])
        for document, ids in enumerate(token_ids)
        for at in range(0, len(ids), window - 1)
    ]
    pieces.sort(key=lambda piece: -len(piece[1]))  # equal lengths together: little padding, and memory peaks first

    nats = [0.0] * len(texts)
    vocab_size = model.config.get_text_config().vocab_size
    done = 0
    with (
        evaluation_mode(model),
        tqdm(total=len(pieces), desc="Scoring texts", unit="window", disable=not progress) as bar,
    ):
        while done < len(pieces):
            batch = pieces[done : done + _rows_per_pass(len(pieces[done][1]), vocab_size, batch_size)]
            for (document, _), value in zip(batch, _token_nats(model, [row for _, row in batch]), strict=True):
                nats[document] += value
            done += len(batch)
            bar.update(len(batch))
    return TextScores(nats, [len(ids) for ids in token_ids], [len(text.encode()) for text in texts])


class _TextMetric(evaluate.Metric):
    """An `evaluate` metric over texts that lives in this package: `evaluate.load` would ask the network for a script."""

    value: str  # the property of [`TextScores`] that is reported
    description: str

    def __init__(self, **kwargs: Any):
        super().__init__(**{"keep_in_memory": True, **kwargs})  # no lock files: several evaluations may run side by side

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="predictions (`list[str]`): texts; model, tokenizer; window, batch_size as in `score_texts`.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        window: int | None = None,
        batch_size: int = 8,
    ) -> dict[str, float]:
        scores = score_texts(model, tokenizer, list(predictions), window, batch_size)
        return {self.value: getattr(scores, self.value)}


class BitsPerByte(_TextMetric):
    """
    Nats over ln 2 over UTF-8 bytes: comparable between tokenizers and languages. Less is better.

    Example:

    ```python
    >>> BitsPerByte().compute(predictions=texts, model=model, tokenizer=tokenizer)
    {'bits_per_byte': 1.07}
    ```
    """

    value = "bits_per_byte"
    description = "Negative log-likelihood in bits, per UTF-8 byte of the raw text."


class TokenPerplexity(_TextMetric):
    """exp(nats per token). Comparable only between models that share a tokenizer, on the same texts. Less is better."""

    value = "token_perplexity"
    description = "Exponential of the negative log-likelihood per token."
