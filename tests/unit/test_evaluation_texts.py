"""Bits per byte and token perplexity equal a loop that scores one token at a time."""

from __future__ import annotations

import math
import socket

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ewc.errors import ConfigError, DataError
from hf_ewc.evaluation import BitsPerByte, TokenPerplexity, perplexity, score_texts

TEXTS = [*tiny.TEXTS, "", "ąčęėįšųūž", "a"]
MODEL = tiny.make_model()
TOKENIZER = tiny.make_tokenizer()


def brute_force(model, tokenizer, text: str, window: int) -> float:
    """−Σ ln p, one forward pass per token, on exactly what stands before it in its window; float64 softmax."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total = 0.0
    for i, token in enumerate(ids):
        start = i - i % (window - 1)
        context = torch.tensor([[tokenizer.bos_token_id, *ids[start:i]]])
        with torch.no_grad():
            total -= model(context).logits[0, -1].double().log_softmax(-1)[token].item()
    return total


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [2, 9, 128])
def test_scores_equal_a_loop_over_tokens(window, side):
    tokenizer = tiny.make_tokenizer()
    tokenizer.padding_side = side
    scores = score_texts(MODEL, tokenizer, TEXTS, window, batch_size=3)
    assert scores.nats == pytest.approx([brute_force(MODEL, tokenizer, text, window) for text in TEXTS], rel=1e-5)
    assert scores.bytes == [len(text.encode()) for text in TEXTS]
    assert scores.tokens == [len(tokenizer.tokenize(text)) for text in TEXTS]


def test_metrics_equal_their_definitions():
    nats = sum(brute_force(MODEL, TOKENIZER, text, 9) for text in TEXTS)
    tokens = sum(len(TOKENIZER.tokenize(text)) for text in TEXTS)
    arguments = {"predictions": TEXTS, "model": MODEL, "tokenizer": TOKENIZER, "window": 9}
    size = sum(len(text.encode("utf-8")) for text in TEXTS)
    assert BitsPerByte().compute(**arguments) == {"bits_per_byte": pytest.approx(nats / math.log(2) / size, rel=1e-5)}
    assert TokenPerplexity().compute(**arguments) == {"token_perplexity": pytest.approx(math.exp(nats / tokens), rel=1e-4)}


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=5),
    batch=st.integers(1, 9),
)
def test_batch_size_and_order_never_change_the_scores(texts, batch):
    alone = [score_texts(MODEL, TOKENIZER, [text], window=6).nats[0] for text in texts]
    assert score_texts(MODEL, TOKENIZER, texts, window=6, batch_size=batch).nats == pytest.approx(alone, rel=1e-4, abs=1e-4)


def test_a_small_memory_budget_changes_nothing(monkeypatch):
    whole = score_texts(MODEL, TOKENIZER, TEXTS)
    sizes = []
    hook = MODEL.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.numel()))
    monkeypatch.setattr(perplexity, "LOGITS_BUDGET", 4 * 100 * 320)  # 100 positions
    monkeypatch.setattr(perplexity, "SOFTMAX_ENTRIES", 320 * 7)
    assert score_texts(MODEL, TOKENIZER, TEXTS).nats == pytest.approx(whole.nats, rel=1e-5)
    hook.remove()
    assert max(sizes) <= 100 * 320


def test_bits_per_byte_does_not_depend_on_the_tokenizer_of_a_uniform_model():
    """A model that knows nothing pays log2(V) per token: bits per byte must come from raw bytes, not from tokens."""
    texts = ["šešios žąsys", "six geese"]
    for vocab_size in (320, 280):
        tokenizer = tiny.make_tokenizer(vocab_size)
        model = tiny.make_model(len(tokenizer))
        with torch.no_grad():
            model.model.embed_tokens.weight.zero_()
        tokens = sum(len(tokenizer.tokenize(text)) for text in texts)
        expected = tokens * math.log2(len(tokenizer)) / sum(len(text.encode()) for text in texts)
        assert score_texts(model, tokenizer, texts).bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_without_bos_opens_windows_with_eos():
    tokenizer = tiny.make_tokenizer()
    tokenizer.bos_token = None
    eos_first = tiny.make_tokenizer()
    eos_first.bos_token = "<eos>"
    assert score_texts(MODEL, tokenizer, TEXTS, 9).nats == score_texts(MODEL, eos_first, TEXTS, 9).nats
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="neither a BOS nor an EOS"):
        score_texts(MODEL, tokenizer, TEXTS)


def test_bfloat16_models_are_normalised_in_float32():
    model = tiny.make_model()
    model.bfloat16()
    scores = score_texts(model, TOKENIZER, TEXTS, 9, batch_size=1)
    assert scores.nats == pytest.approx([brute_force(model, TOKENIZER, text, 9) for text in TEXTS], rel=2e-3)


def test_metrics_need_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert BitsPerByte().compute(predictions=["a"], model=MODEL, tokenizer=TOKENIZER)["bits_per_byte"] > 0


def test_impossible_windows_and_empty_texts_are_refused():
    for window in (1, 129):
        with pytest.raises(ConfigError, match="context is 128"):
            score_texts(MODEL, TOKENIZER, TEXTS, window)
    with pytest.raises(DataError, match="all 2 documents are empty"):
        _ = score_texts(MODEL, TOKENIZER, ["", ""]).bits_per_byte


def test_a_diverged_model_scores_nan_or_infinity_without_an_error():
    assert perplexity.TextScores([1e6], [1], [1]).token_perplexity == math.inf
    assert math.isnan(perplexity.TextScores([math.nan], [1], [1]).token_perplexity)
