"""Bits per byte and surprisal by piece: the evaluation's numbers, laid over the user's own text."""

import math

import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_ewc.compare import CompareError, Limits, ModelPair, score
from hf_ewc.evaluation import score_texts

LONG = " ".join(tiny.TEXTS)
ODD = "\x00 żółw 😀🏽 👩‍👩‍👧 שלום\r\n <b>bold</b> 日本 "


@pytest.fixture(scope="module")
def pair(tokenizer):
    return ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)


def byte_fallback_tokenizer():
    """Like Gemma's and Llama's: pieces of words behind a visible space, bytes where it has none."""
    words = ["<unk>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "▁ab"]
    core = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [("▁", "a"), ("a", "b"), ("▁a", "b")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")


def trimming_tokenizer():
    """Byte-level with trimmed offsets, like RoBERTa's, behind a normaliser that drops accents: characters without a token."""
    tokenizer = tiny.make_tokenizer()
    core = tokenizer.backend_tokenizer
    core.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.add_special_tokens([AddedToken("<eos>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.mark.parametrize("text", [tiny.TEXTS[2], ODD, LONG, "a"], ids=["Lithuanian", "odd", "several windows", "one token"])
def test_bits_per_byte_are_the_evaluations(pair, text):
    scores = score(pair, text)
    for side, figure in ((pair.base, scores.base_bits_per_byte), (pair.adapted, scores.adapted_bits_per_byte)):
        expected = score_texts(side.model, pair.tokenizer, [text])
        assert figure == pytest.approx(expected.bits_per_byte, rel=1e-9)
        assert (scores.tokens, scores.bytes) == (expected.tokens[0], expected.bytes[0])
    assert scores.difference == scores.adapted_bits_per_byte - scores.base_bits_per_byte != 0


def test_a_long_text_really_takes_several_windows(pair):
    scores = score(pair, LONG)
    assert scores.window == 128
    assert scores.tokens > 2 * 127


def test_the_evaluation_agrees_in_bfloat16_and_without_bos(tokenizer):
    plain = tiny.make_tokenizer()
    plain.bos_token = None
    pair = ModelPair.of(tiny.make_model(seed=0).bfloat16(), tiny.make_model(seed=1).bfloat16(), plain)
    expected = score_texts(pair.base.model, plain, [tiny.TEXTS[0]], batch_size=1).bits_per_byte
    assert score(pair, tiny.TEXTS[0]).base_bits_per_byte == pytest.approx(expected, rel=1e-9)
    with_bos = ModelPair.of(pair.base.model, pair.adapted.model, tokenizer)
    assert score(with_bos, tiny.TEXTS[0]).base_bits_per_byte != pytest.approx(expected, rel=1e-4)  # EOS stood there instead


def test_the_surprisal_of_each_token_is_minus_log_p_given_what_stands_before_it(pair, tokenizer):
    text = tiny.TEXTS[0]
    ids = tokenizer(text)["input_ids"]  # BOS in front
    with torch.no_grad():
        log_p = pair.adapted.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    expected = [-float(log_p[t, token]) for t, token in enumerate(ids[1:])]
    scores = score(pair, text)
    assert all(piece.tokens == 1 for piece in scores.pieces)
    assert [piece.adapted_nats for piece in scores.pieces] == pytest.approx(expected, rel=1e-5)


def test_pieces_sum_up_to_the_whole(pair):
    scores = score(pair, ODD)
    bits = math.fsum(piece.base_nats for piece in scores.pieces) / math.log(2)
    assert bits / scores.bytes == pytest.approx(scores.base_bits_per_byte, rel=1e-12)
    assert sum(piece.tokens for piece in scores.pieces) == scores.tokens
    assert all(piece.difference == piece.adapted_nats - piece.base_nats for piece in scores.pieces)


@pytest.mark.parametrize("make", [tiny.make_tokenizer, byte_fallback_tokenizer], ids=["byte-level", "byte fallback"])
def test_the_tokens_of_one_character_are_one_piece(make):
    tokenizer = make()
    pair = ModelPair.of(tiny.make_model(len(tokenizer)), tiny.make_model(len(tokenizer), 1), tokenizer)
    pieces = score(pair, "ab 日a").pieces
    (character,) = (piece for piece in pieces if "日" in piece.text)
    assert character.tokens >= 3
    assert character.text.strip() == "日"


class TestPieces:
    """Whatever the tokenizer does to a text, its pieces are the text."""

    TOKENIZERS = (tiny.make_tokenizer(), byte_fallback_tokenizer(), trimming_tokenizer())
    PAIRS = tuple(
        ModelPair.of(*(tiny.make_model(len(one), seed, num_hidden_layers=1) for seed in (0, 1)), one) for one in TOKENIZERS
    )

    @settings(max_examples=60, deadline=None)
    @given(
        text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("ab  \u0301ž日😀"), min_size=1, max_size=30),
        which=st.sampled_from([0, 1, 2]),
    )
    @example(text="ab e\u0301\u0301", which=2)  # the last characters belong to no token
    @example(text="\u0301\u0301 ab", which=2)
    def test_concatenated_they_are_the_text(self, text, which):
        pair = self.PAIRS[which]
        if not text.strip() or not pair.tokenizer(text, add_special_tokens=False)["input_ids"]:
            with pytest.raises(CompareError, match=r"empty|nothing"):
                score(pair, text)
            return
        scores = score(pair, text)
        assert "".join(piece.text for piece in scores.pieces) == text
        assert sum(piece.tokens for piece in scores.pieces) == scores.tokens
        assert all(piece.text for piece in scores.pieces)


@pytest.mark.parametrize(
    ("text", "limits", "code"),
    [
        ("", Limits(), "empty"),
        ("  \n", Limits(), "empty"),
        ("x" * 100_000, Limits(), "characters"),
        ("日" * 100, Limits(score_tokens=50), "tokens"),
        ("\ud800", Limits(), "not_text"),
    ],
    ids=["empty", "blank", "characters", "tokens", "surrogate"],
)
def test_texts_that_cannot_be_scored_are_refused_with_the_limit(pair, text, limits, code):
    with pytest.raises(CompareError) as caught:
        score(pair, text, limits)
    assert caught.value.code == code
    if "limit" in caught.value.facts:
        assert f"{caught.value.facts['limit']:,}" in str(caught.value)


def test_numbers_that_are_not_finite_are_told_and_whose_they_are(tokenizer):
    pair = ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)
    with torch.no_grad():
        pair.adapted.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CompareError, match="the adapted model") as caught:
        score(pair, "Labas")
    assert caught.value.code == "not_finite"
