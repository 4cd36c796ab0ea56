"""Two models that write in lockstep: what each writes is what `generate` gives, and neither disturbs the other."""

import logging
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny
import torch
from test_compare_surprisal import byte_fallback_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_ewc.compare import ModelPair, Sampling, check_prompt, stream

PROMPT = "The keeper of žolė"
DRAWN = Sampling(24, greedy=False)


@pytest.fixture(scope="module")
def pair(tokenizer):
    return ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)


def last(frames):
    *_, frame = frames
    return frame


def generated(model, tokenizer, prompt, sampling):
    """New tokens of `model.generate`, run as anybody would run it."""
    inputs = tokenizer(prompt, return_tensors="pt")
    drawn = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k")}
    with torch.random.fork_rng():
        torch.manual_seed(sampling.seed)
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=sampling.max_new_tokens,
            **({"do_sample": False} if sampling.greedy else {"do_sample": True, **drawn}),
        )
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def dictate(model, ids, at=None, fault=None):
    """Make a model write these tokens, or fail at one of the steps. Takes effect until the handle is removed."""
    step = iter(range(10_000))

    def hook(module, args, logits):
        n = next(step)
        if n == at:
            return fault(logits)
        forced = torch.full_like(logits, -1e4)
        forced[..., ids[min(n, len(ids) - 1)]] = 1e4
        return forced

    return model.lm_head.register_forward_hook(hook)


SETTINGS = [
    Sampling(24),
    *(Sampling(24, greedy=False, seed=seed) for seed in range(4)),
    Sampling(24, greedy=False, temperature=1.7, top_p=1.0, top_k=0, seed=5),
    Sampling(24, greedy=False, temperature=1.0, top_p=0.5, top_k=3, seed=6),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_each_side_writes_exactly_the_tokens_of_generate(pair, sampling):
    frame = last(stream(pair, PROMPT, sampling))
    for pane, side in ((frame.base, pair.base), (frame.adapted, pair.adapted)):
        expected = generated(side.model, pair.tokenizer, PROMPT, sampling)
        assert list(pane.ids) == expected
        assert pane.text == pair.tokenizer.decode(expected, skip_special_tokens=True)
    assert frame.base.ids != frame.adapted.ids  # else the two could be mixed up unseen


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, greedy=False, seed=3)], ids=["greedy", "drawn"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        lambda: LlamaForCausalLM(
            LlamaConfig(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_other_architectures_equal_generate_too(tokenizer, make, sampling):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pair = ModelPair.of(make().eval(), make().eval(), tokenizer)
    for side in pair.sides:
        side.model.generation_config.eos_token_id = 1
    frame = last(stream(pair, PROMPT, sampling))
    assert list(frame.base.ids) == generated(pair.base.model, tokenizer, PROMPT, sampling)
    assert list(frame.adapted.ids) == generated(pair.adapted.model, tokenizer, PROMPT, sampling)


@pytest.mark.parametrize("sampling", [Sampling(24), DRAWN], ids=["greedy", "drawn"])
def test_the_models_own_generation_config_counts_as_in_generate(tokenizer, sampling):
    pair = ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)
    config = pair.base.model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.min_p, config.do_sample = 1.3, 2, 0.001, True
    frame = last(stream(pair, PROMPT, sampling))
    assert list(frame.base.ids) == generated(pair.base.model, tokenizer, PROMPT, sampling)
    assert (
        frame.base.ids != last(stream(ModelPair.of(tiny.make_model(), tiny.make_model(), tokenizer), PROMPT, sampling)).base.ids
    )


def test_any_of_the_models_end_tokens_ends_a_side_and_its_pane_does_not_show_special_ones(tokenizer):
    pair = ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)
    varied = Sampling(20, greedy=False, temperature=2.0)
    free = last(stream(pair, PROMPT, varied))
    token = next(token for token in free.adapted.ids[3:] if token not in free.adapted.ids[:3])
    pair.adapted.model.generation_config.eos_token_id = [1, token]
    frame = last(stream(pair, PROMPT, varied))
    assert frame.adapted.reason == "end"
    assert frame.adapted.ids == free.adapted.ids[: free.adapted.ids.index(token) + 1]
    assert list(frame.adapted.ids) == generated(pair.adapted.model, tokenizer, PROMPT, varied)
    assert (frame.base.reason, frame.base.ids) == ("length", free.base.ids)  # the other goes on

    handle = dictate(pair.base.model, [tokenizer.convert_tokens_to_ids("<eos>")])
    frame = last(stream(pair, PROMPT, Sampling(20)))
    handle.remove()
    assert (frame.base.text, frame.base.tokens, frame.base.reason) == ("", 1, "end")


def test_neither_side_is_ahead_and_each_frame_has_one_more_token(pair):
    frames = list(stream(pair, PROMPT, Sampling(10)))
    assert [(frame.base.tokens, frame.adapted.tokens) for frame in frames] == [(n, n) for n in range(1, 11)]
    assert [frame.finished for frame in frames] == [False] * 9 + [True]


def test_same_seed_same_text_another_seed_another_text_whatever_else_draws_random_numbers(pair):
    texts = []
    for seed in (7, 7, 8):
        frames = stream(pair, PROMPT, Sampling(16, greedy=False, seed=seed))
        while not (frame := next(frames)).finished:
            torch.rand(3)  # somebody else uses the global generator between the steps
        texts.append((frame.base.text, frame.adapted.text))
    assert texts[0] == texts[1] != texts[2]


def test_the_global_random_numbers_are_left_alone(pair):
    before = torch.get_rng_state()
    last(stream(pair, PROMPT, DRAWN))
    assert torch.equal(torch.get_rng_state(), before)


def test_stop_keeps_what_both_sides_have_written(pair):
    stop = threading.Event()
    frames = []
    for frame in stream(pair, PROMPT, Sampling(40), stop):
        frames.append(frame)
        if len(frames) == 5:
            stop.set()
    assert len(frames) == 6
    for name in ("base", "adapted"):
        before, after = getattr(frames[4], name), getattr(frames[5], name)
        assert (after.text, after.ids, after.reason) == (before.text, before.ids, "stopped")


def test_stopped_before_it_began_a_stream_still_ends_with_a_frame(pair):
    stop = threading.Event()
    stop.set()
    (frame,) = stream(pair, PROMPT, Sampling(40), stop)
    assert (frame.finished, frame.base.tokens, frame.base.text) == (True, 0, "")


def broken(logits):
    raise RuntimeError("no kernel in /home/ona/secret/kernels.so for hf_abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (broken, "failed", "RuntimeError"),
        (lambda logits: logits * float("nan"), "not_finite", "NaN"),
        (lambda logits: logits + float("inf"), "not_finite", "NaN"),
    ],
    ids=["exception", "nan", "infinite"],
)
@pytest.mark.parametrize("side", [0, 1], ids=["base", "adapted"])
def test_a_side_that_fails_keeps_its_text_and_the_other_goes_on(tokenizer, caplog, side, fault, code, words):
    models = [tiny.make_model(seed=seed, final_logit_softcapping=None) for seed in (0, 1)]  # tanh would hide an infinity
    pair = ModelPair.of(*models, tokenizer)
    ids = tokenizer("gates before dawn", add_special_tokens=False)["input_ids"]
    handle = dictate(pair.sides[side].model, ids, at=4, fault=fault)
    with caplog.at_level(logging.ERROR):
        frame = last(stream(pair, PROMPT, Sampling(12)))
    handle.remove()
    panes = (frame.base, frame.adapted)
    failed, other = panes[side], panes[1 - side]
    assert (failed.reason, failed.error_code) == ("error", code)
    assert failed.text == tokenizer.decode(ids[:4]) != ""
    assert words in failed.error
    assert "/home" not in failed.error
    assert "hf_abc" not in failed.error
    assert (other.reason, other.tokens, other.error) == ("length", 12, None)
    assert "model failed after 4 tokens" in caplog.text  # the owner learns all of it from the log


def test_both_sides_failing_ends_the_stream(tokenizer, caplog):
    pair = ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)
    with torch.no_grad():
        for side in pair.sides:
            side.model.model.norm.weight.fill_(float("nan"))
    (frame,) = stream(pair, PROMPT, Sampling(12))
    assert frame.base.error_code == frame.adapted.error_code == "not_finite"


def test_a_character_of_several_tokens_is_shown_when_it_is_complete(tokenizer):
    text = "žolė 😀 ąž 日本"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert any("�" in tokenizer.decode(ids[:n]) for n in range(len(ids)))  # otherwise there is nothing to hold back
    pair = ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)
    handle = dictate(pair.base.model, [*ids, 1])
    shown = [frame.base.text for frame in stream(pair, PROMPT, Sampling(len(ids) + 1))]
    handle.remove()
    assert shown[-1] == text
    assert not any("�" in one for one in shown)
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


def test_a_run_of_byte_tokens_takes_no_character_back_that_was_shown():
    tokenizer = byte_fallback_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "日日".encode()]
    assert tokenizer.decode(ids[:4]) == "����"  # with the fourth byte, `decode` gives up the first character
    pair = ModelPair.of(*(tiny.make_model(len(tokenizer), seed) for seed in (0, 1)), tokenizer)
    handle = dictate(pair.base.model, [*ids, 1])
    shown = [frame.base.text for frame in stream(pair, "ab", Sampling(10))]
    handle.remove()
    assert shown[:7] == ["", "", "日", "日", "日", "日日", "日日"]


def test_stopped_in_the_middle_of_a_character_no_half_of_it_is_shown(tokenizer):
    ids = tokenizer("a😀", add_special_tokens=False)["input_ids"]
    pair = ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)
    handle = dictate(pair.base.model, ids)
    stop = threading.Event()
    for frame in stream(pair, PROMPT, Sampling(20), stop):
        if frame.base.tokens == 3:
            stop.set()
    handle.remove()
    assert (frame.base.text, frame.base.tokens) == ("a", 3)


def test_writing_ends_where_the_context_ends_and_says_so(pair):
    prompt = "x" * 120
    frame = last(stream(pair, prompt, Sampling(64)))
    assert pair.context == 128
    assert (frame.base.tokens, frame.base.reason) == (128 - 121, "context")  # with BOS the prompt has 121
    assert list(frame.base.ids) == generated(pair.base.model, pair.tokenizer, prompt, Sampling(128 - 121))


@pytest.mark.parametrize(
    "text", ["\x00\x07\x1b[31m", "‏שלום עולם", "👩‍👩‍👧 🇱🇹", "<script>alert(1)</script>&amp;", "\r\n\t "[:2] + "x"]
)
def test_any_text_is_a_prompt_as_it_is(pair, text):
    frame = last(stream(pair, text, Sampling(4)))
    assert list(frame.base.ids) == generated(pair.base.model, pair.tokenizer, text, Sampling(4))


def test_what_a_model_writes_is_not_touched_markup_or_not(tokenizer):
    text = "<script>alert('&amp;')</script>\x07 שלום"
    pair = ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    handle = dictate(pair.adapted.model, ids)
    frame = last(stream(pair, PROMPT, Sampling(len(ids))))
    handle.remove()
    assert frame.adapted.text == text


def test_chat_templates_are_used_only_if_both_models_have_one(tokenizer):
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
    )
    pair = ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)
    with_one = type(pair.base)("base", "base", pair.base.model, template)
    assert not pair.chat
    assert not ModelPair(with_one, pair.adapted, tokenizer).chat
    chat = ModelPair(with_one, type(pair.base)("adapted", "adapted", pair.adapted.model, template), tokenizer)
    assert chat.chat
    written = chat.encode(chat.base, "Labas")["input_ids"]
    assert tokenizer.decode(written[0]) == "<user>Labas<model>"
    ids = chat.adapted.model.generate(input_ids=written, max_new_tokens=8, do_sample=False)[0, written.shape[1] :].tolist()
    assert list(last(stream(chat, "Labas", Sampling(8))).adapted.ids) == ids


def test_models_with_different_chat_templates_each_get_their_own_and_the_longer_prompt_is_counted(pair):
    short, long = ("{% for m in messages %}" + mark + "{{ m.content }}{% endfor %}" for mark in ("<u>", "<the user says>"))
    sides = (replace(pair.base, chat_template=short), replace(pair.adapted, chat_template=long))
    chat = ModelPair(*sides, pair.tokenizer)
    ids = [chat.encode(side, "Labas")["input_ids"][0] for side in sides]
    assert [pair.tokenizer.decode(one) for one in ids] == ["<u>Labas", "<the user says>Labas"]
    assert check_prompt(chat, "Labas").tokens == len(ids[1]) > len(ids[0])


def test_while_one_side_holds_back_a_character_the_texts_have_not_parted(tokenizer):
    ids = tokenizer("labas 日", add_special_tokens=False)["input_ids"]
    other = tokenizer("labas z", add_special_tokens=False)["input_ids"]
    pair = ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)
    handles = dictate(pair.base.model, [*ids, 1]), dictate(pair.adapted.model, [*other, 1])
    frames = list(stream(pair, PROMPT, Sampling(20)))
    for handle in handles:
        handle.remove()
    whole = next(n for n, frame in enumerate(frames) if "日" in frame.base.text)
    assert frames[whole - 1].adapted.text == "labas z"  # ahead by what is held back
    assert [frame.diverges_at for frame in frames[:whole]] == [None] * whole
    assert frames[whole].diverges_at == 6
