"""Loading a pair, prompts that are refused, and what a page may say of errors."""

import shutil
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch

from hf_ewc import DataError, HubError
from hf_ewc.compare import STEPS, CompareError, Limits, Loader, ModelPair, check_prompt, problem_code, public_message
from hf_ewc.errors import ConfigError

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def adapted_folder(tmp_path_factory, tokenizer):
    return tiny.save_base(tmp_path_factory.mktemp("runs") / "adapted-lt", tokenizer, seed=1)


@pytest.fixture(scope="module")
def pair(base_folder, adapted_folder):
    return ModelPair.load(base_folder, adapted_folder, device="cpu")


def test_a_pair_loads_and_is_named_without_where_it_lies(pair, base_folder):
    assert pair.adapted.label == "adapted-lt"
    assert pair.base.label == base_folder.name
    assert (pair.context, pair.chat, pair.base.model.training) == (128, False, False)
    assert torch.equal(pair.adapted.model.model.norm.weight, tiny.make_model(seed=1).model.norm.weight)
    assert pair.adapted.model.dtype == torch.float32


def test_the_dtype_in_memory_is_the_one_asked_for(base_folder, adapted_folder):
    assert ModelPair.load(base_folder, adapted_folder, device="cpu", dtype="bfloat16").base.model.dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"dtype": "nn"}, {"device": "toaster"}], ids=str)
def test_unknown_dtypes_and_devices_are_refused_by_name(base_folder, adapted_folder, settings):
    with pytest.raises(ConfigError, match=next(iter(settings.values()))):
        ModelPair.load(base_folder, adapted_folder, **settings)


def test_chat_needs_a_template_in_both_folders(base_folder, adapted_folder, tmp_path, tokenizer):
    folders = [Path(shutil.copytree(folder, tmp_path / name)) for folder, name in ((base_folder, "b"), (adapted_folder, "a"))]
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (folders[0] / "chat_template.jinja").write_text(template)
    assert not ModelPair.load(*folders, device="cpu").chat
    (folders[1] / "chat_template.jinja").write_text(template)
    pair = ModelPair.load(*folders, device="cpu")
    assert pair.chat
    assert tokenizer.decode(pair.encode(pair.base, "Labas")["input_ids"][0]) == "[Labas]"


def test_another_tokenizer_is_refused_naming_both_models_before_weights_are_read(base_folder, tmp_path):
    other = tiny.save_base(tmp_path / "other-words", tiny.make_tokenizer(300))
    steps = []
    with pytest.raises(CompareError) as caught:
        ModelPair.load(base_folder, other, progress=steps.append)
    assert base_folder.name in str(caught.value)
    assert "other-words" in str(caught.value)
    assert caught.value.code == "tokenizer"
    assert steps == ["find_base", "find_adapted"]


def test_an_adapted_model_saved_without_tokenizer_has_its_bases(base_folder, tmp_path, tokenizer):
    tiny.make_model(len(tokenizer), 1).save_pretrained(tmp_path / "bare")
    pair = ModelPair.load(base_folder, tmp_path / "bare", device="cpu")
    assert pair.tokenizer("Labas")["input_ids"] == tokenizer("Labas")["input_ids"]
    tiny.make_model(300, 1).save_pretrained(tmp_path / "small")
    with pytest.raises(CompareError, match="300"):
        ModelPair.load(base_folder, tmp_path / "small")
    with pytest.raises(DataError, match="neither"):
        ModelPair.load(tmp_path / "bare", tmp_path / "bare")


def test_a_missing_model_is_told_by_its_role_and_on_the_page_without_its_path(base_folder, tmp_path):
    with pytest.raises(DataError, match="the adapted model") as caught:
        ModelPair.load(base_folder, tmp_path / "nowhere")
    said = public_message(caught.value)
    assert "'nowhere'" in said
    assert str(tmp_path.parent) not in said


def test_damaged_weights_are_told_on_the_page_without_their_path(base_folder, tmp_path):
    shutil.copytree(base_folder, tmp_path / "torn")
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError) as caught:
        ModelPair.load(base_folder, tmp_path / "torn")
    said = public_message(caught.value)
    assert "the adapted model 'torn'" in said
    assert "/" not in said.replace("and/or", "")


def test_while_a_pair_loads_the_page_is_told_how_far_it_is_and_gets_it_in_the_end(base_folder, adapted_folder):
    go, steps = threading.Event(), []

    def load(progress):
        assert go.wait(30)
        return ModelPair.load(
            base_folder, adapted_folder, device="cpu", progress=lambda step: (progress(step), steps.append(step))
        )

    loader = Loader(load)
    assert loader.state == "loading"
    with pytest.raises(CompareError, match="still loading") as caught:
        loader.get()
    assert caught.value.code == "loading"
    go.set()
    assert loader.get(timeout=60).adapted.label == "adapted-lt"
    assert (loader.state, loader.step, tuple(steps)) == ("ready", STEPS[3], STEPS[:4])


def test_a_pair_that_cannot_be_loaded_says_why_without_path(base_folder, tmp_path, caplog):
    loader = Loader(lambda progress: ModelPair.load(base_folder, tmp_path / "nowhere", progress=progress))
    with pytest.raises(CompareError, match="'nowhere'") as caught:
        loader.get(timeout=60)
    assert (loader.state, caught.value.code) == ("failed", "model")
    assert str(tmp_path) not in loader.problem
    assert str(tmp_path) in caplog.text  # the owner sees where it was looked for


def test_a_prompt_is_counted_with_what_the_tokenizer_adds(pair, tokenizer):
    check = check_prompt(pair, "Labas rytas")
    assert (check.tokens, check.problem) == (len(tokenizer("Labas rytas")["input_ids"]), None)
    assert check.limit == 127  # a context of 128 with room for one new token


def test_a_prompt_beyond_the_context_is_counted_and_told(pair):
    fits, beyond = check_prompt(pair, "x" * 126), check_prompt(pair, "x" * 127)  # BOS is one more
    assert (fits.tokens, fits.problem) == (127, None)
    assert (beyond.tokens, beyond.problem.code) == (128, "tokens")
    assert "128" in str(beyond.problem)
    assert "127" in str(beyond.problem)
    assert check_prompt(pair, "x" * 20, Limits(prompt_tokens=10)).problem.facts == {"found": 21, "limit": 10}


@pytest.mark.parametrize("text", ["", " ", "\n\t "], ids=repr)
def test_an_empty_prompt_is_refused_in_words(pair, text):
    check = check_prompt(pair, text)
    assert (str(check.problem), check.problem.code) == ("the prompt is empty. Write something.", "empty")


def test_a_hundred_thousand_characters_are_refused_before_they_are_tokenised(pair):
    class Untouchable:
        def __call__(self, *args, **kwargs):
            raise AssertionError("tokenised")

    untouchable = ModelPair(pair.base, pair.adapted, Untouchable())
    start = time.perf_counter()
    check = check_prompt(untouchable, "Ž" * 100_000)
    assert time.perf_counter() - start < 0.1
    assert check.problem.facts == {"found": 100_000, "limit": Limits().prompt_characters}
    assert "100,000" in str(check.problem)


def test_half_a_character_is_refused_in_words(pair):
    assert check_prompt(pair, "ab\ud800").problem.facts == {"position": 2}


@pytest.mark.parametrize("text", ["\x00\x07", "שלום", "👩‍👩‍👧", "<script>alert(1)</script>", "a\u0301\u0301\u0301"], ids=ascii)
def test_any_other_text_is_accepted(pair, text):
    assert check_prompt(pair, text).problem is None


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("'/home/ona/models/adapted' holds no weights", "'adapted' holds no weights"),
        ("'/home/ona jo/my models/a b' is no folder", "'a b' is no folder"),
        ("see /srv/data/x/y.json, line 3", "see y.json, line 3"),
        ("see file:///srv/data/y.json", "see y.json"),
        ("in ~/models/adapted/ and ../up/there", "in adapted and there"),
        ("see https://huggingface.co/google/gemma-2-2b and google/gemma-2-2b", None),
        ("3/4 of it, and/or more", None),
        (f"the token {TOKEN} was refused", "the token hf_*** was refused"),
        ("no such thing\nTraceback (most recent call last):\n  File x", "no such thing"),
    ],
)
def test_messages_lose_paths_tokens_and_tracebacks_and_nothing_else(text, public):
    assert public_message(DataError(text)) == (public or text)


def test_errors_that_are_not_ours_are_named_by_their_type_only():
    said = public_message(KeyError(f"/etc/passwd {TOKEN}"))
    assert "KeyError" in said
    assert "passwd" not in said
    assert TOKEN not in said


def test_a_message_of_pages_is_cut():
    assert len(public_message(DataError("x" * 5000))) == 600


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory"),
        (HubError("gated"), "model"),
        (CompareError("busy", "all taken"), "busy"),
        (ZeroDivisionError(), "failed"),
    ],
    ids=repr,
)
def test_each_kind_of_problem_has_a_code_to_translate_by(error, code):
    assert problem_code(error) == code
    assert ("memory" in public_message(error)) == (code == "memory")
