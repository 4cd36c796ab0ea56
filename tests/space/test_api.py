"""What programs get: the two endpoints through `gradio_client`, and what whoever speaks plain HTTP sees of the page."""

from __future__ import annotations

import json
import math
import re
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError

from hf_ewc.compare import Sampling, stream
from hf_ewc.evaluation import score_texts

COMPARE, SCORE = "/compare", "/score"
PROMPT = "The keeper of žolė"
ALL = [48, True, 0.8, 0.95, 50, 0, "adapted", 0.0]  # what `/compare` takes besides the prompt, and its defaults
NAMES = ["max_new_tokens", "greedy", "temperature", "top_p", "top_k", "seed", "model", "merge_lambda"]
HERE = str(Path(__file__).parents[2])
ODD = {
    "emoji": "🏴‍☠️ labas 👩‍👩‍👧",
    "right-to-left": "\u202eשלום עולם",
    "controls": "a\0b\x07\x1b[31mc\x7f\u2028",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "braces": "{0} {prompt} %s ${x} \\u0041 \\",
    "only marks": "\u0301\u0301",
}


@pytest.fixture(scope="module")
def client(page):
    return Client(page.url, token=None, verbose=False)


@pytest.fixture(autouse=True)
def nothing_is_left(page):
    yield
    until(lambda: at_rest(page.service))


def at_rest(service):
    return service.running == 0 and service.slots.free == service.slots.n


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def direct(page, prompt, sampling, model="adapted", merge_lambda=0.0):
    """The frame that both models end with when they are asked without a page, as `/compare` shows it."""
    *_, frame = stream(page.service.pair(model, merge_lambda), prompt, sampling)
    return as_told(frame)


def as_told(frame):
    sides = {
        role: {"text": pane.text, "tokens": pane.tokens, "reason": pane.reason, "error": None}
        for role, pane in (("base", frame.base), ("adapted", frame.adapted))
    }
    return {**sides, "diverges_at": frame.diverges_at, "finished": True}


@contextmanager
def slowed(page, seconds=0.02):
    """Each step of the base model takes so long at least."""
    hook = page.service.pair().base.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


def refused(client, *given, api_name=COMPARE, **named):
    """The words of the error that a client gets."""
    with pytest.raises(AppError) as caught:
        client.predict(*given, api_name=api_name, **named)
    return clean(str(caught.value))


def clean(text):
    """No path of this machine, no token, no traceback."""
    for mark in ("Traceback", 'File "', "site-packages", "/tmp", HERE, "hf_ewc/", "space_app", "Error(", "hf_"):
        assert mark not in text
    return text


# -- without the client: what a browser sends ------------------------------------------------------------------------------


def url_of(page, path):
    return f"{page.url.rstrip('/')}/gradio_api/{path}"


@cache
def number_of(url, name):
    """Of an endpoint, as a browser names it."""
    settings = httpx.get(f"{url.rstrip('/')}/config", timeout=60).json()
    return next(each["id"] for each in settings["dependencies"] if each["api_name"] == name)


@contextmanager
def joined(page, data: list[Any] | str, name="compare") -> Iterator[Iterator[dict]]:
    """The messages of one request, until the connection is closed; `data` as a `str` is JSON that no `json.dumps` writes."""
    session = uuid.uuid4().hex
    given = data if isinstance(data, str) else json.dumps(data)
    body = f'{{"data": {given}, "fn_index": {number_of(page.url, name)}, "session_hash": "{session}"}}'
    with httpx.Client(timeout=120, verify=False) as http:  # reading certificates takes long, and there are none here
        answer = http.post(url_of(page, "queue/join"), content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 200, answer.text
        with http.stream("GET", url_of(page, f"queue/data?session_hash={session}")) as answer:
            assert answer.status_code == 200
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            yield (message for line in lines if (message := json.loads(line))["msg"] != "close_stream")


def heard(page, data, name="compare"):
    """All messages of one request."""
    with joined(page, data, name) as messages:
        return list(messages)


def said(messages):
    assert messages[-1]["msg"] == "process_completed"
    assert not messages[-1]["success"]
    return clean(str(messages[-1]["output"].get("error")))


# -- what is there ----------------------------------------------------------------------------------------------------------


def test_names_and_defaults_of_what_programs_may_call_are_stable(client):
    found = client.view_api(return_format="dict", print_info=False)
    assert found["unnamed_endpoints"] == {}
    assert {
        name: [
            (each["parameter_name"], each["type"]["type"], each["parameter_default"] if each["parameter_has_default"] else ...)
            for each in endpoint["parameters"]
        ]
        for name, endpoint in found["named_endpoints"].items()
    } == {
        "/compare": [
            ("prompt", "string", ...),
            ("max_new_tokens", "integer", 48),
            ("greedy", "boolean", True),
            ("temperature", "number", 0.8),
            ("top_p", "number", 0.95),
            ("top_k", "integer", 50),
            ("seed", "integer", 0),
            ("model", "string", "adapted"),
            ("merge_lambda", "number", 0.0),
        ],
        "/score": [("text", "string", ...), ("model", "string", "adapted"), ("merge_lambda", "number", 0.0)],
    }
    assert all(endpoint["description"] for endpoint in found["named_endpoints"].values())


def test_what_the_page_calls_is_not_for_clients(client, page):
    settings = httpx.get(page.url.rstrip("/") + "/config").json()
    private = [each for each in settings["dependencies"] if f"/{each['api_name']}" not in (COMPARE, SCORE)]
    assert len(private) > 10
    for each in private:
        assert each["api_visibility"] == "private"
        with pytest.raises(ValueError, match="Cannot find a function"):
            client.predict(api_name=f"/{each['api_name']}")


def test_the_page_and_what_it_tells_programs_hold_nothing_of_this_machine(page, models):
    for path in ("", "/config", "/gradio_api/info", "/gradio_api/startup-events"):
        answer = httpx.get(page.url.rstrip("/") + path)
        assert answer.status_code == 200, path
        assert str(models) not in answer.text
        assert str(models.parent) not in answer.text
        assert "Traceback" not in answer.text


@pytest.mark.parametrize("path", ["file=/etc/passwd", "file=/proc/self/environ", "file=../../setup.cfg"])
def test_files_of_this_machine_are_not_served(page, path, models):
    for each in (path, f"file={models / 'results.json'}"):
        assert httpx.get(url_of(page, each)).status_code in (403, 404)


def test_nothing_can_be_uploaded(page):
    answer = httpx.post(url_of(page, "upload"), files={"files": ("x.bin", b"x" * 100_000)})
    assert answer.status_code == 413


# -- compare ----------------------------------------------------------------------------------------------------------------


def test_both_sides_stream_in_lockstep_and_end_as_generate_does(client, page, tokenizer):
    with slowed(page):
        frames = list(client.submit(PROMPT, 24, api_name=COMPARE))
    assert len(frames) > 4
    assert [frame["finished"] for frame in frames] == [False] * (len(frames) - 1) + [True]
    for before, after in pairwise(frames):
        for side in ("base", "adapted"):
            assert after[side]["text"].startswith(before[side]["text"])
            assert after[side]["tokens"] > before[side]["tokens"] or before[side]["reason"]
    for frame in frames:
        ended = {frame[side]["reason"] for side in ("base", "adapted")} & {"end"}
        assert frame["base"]["tokens"] == frame["adapted"]["tokens"] or ended
    for side in page.service.pair().sides:
        assert frames[-1][side.role]["text"] == generated(side.model, tokenizer, PROMPT, max_new_tokens=24, do_sample=False)


def generated(model, tokenizer, prompt, seed=0, **settings):
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **settings)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("seed", [0, 7])
def test_drawn_texts_are_those_of_generate_with_the_same_seed(client, page, tokenizer, seed):
    drawn = dict(temperature=1.2, top_p=0.9, top_k=40)
    given = dict(max_new_tokens=16, greedy=False, seed=seed, **drawn)
    found = client.predict(PROMPT, **given, api_name=COMPARE)
    for side in page.service.pair().sides:
        expected = generated(side.model, tokenizer, PROMPT, seed, max_new_tokens=16, do_sample=True, **drawn)
        assert found[side.role]["text"] == expected
    assert client.predict(PROMPT, **given, api_name=COMPARE) == found
    assert client.predict(PROMPT, **{**given, "seed": seed + 1}, api_name=COMPARE) != found


def test_defaults_are_the_greedy_preset(client, page):
    assert client.predict(PROMPT, api_name=COMPARE) == direct(page, PROMPT, Sampling(48))


@pytest.mark.parametrize(("model", "merge_lambda"), [("plain", 0.0), ("adapted", 10.0), ("plain", 3.0)])
def test_other_models_stand_beside_the_base_by_name_and_lambda(client, page, model, merge_lambda):
    expected = direct(page, PROMPT, Sampling(12), model, merge_lambda)
    assert client.predict(PROMPT, 12, model=model, merge_lambda=merge_lambda, api_name=COMPARE) == expected


def test_where_the_texts_part_is_told(client, page):
    found = client.predict(PROMPT, 24, api_name=COMPARE)
    base, adapted, at = found["base"]["text"], found["adapted"]["text"], found["diverges_at"]
    assert base != adapted
    assert base[:at] == adapted[:at]
    assert base[at : at + 1] != adapted[at : at + 1]


@pytest.mark.parametrize("prompt", ODD.values(), ids=ODD)
def test_odd_prompts_are_taken_as_text(client, page, prompt):
    assert client.predict(prompt, 8, api_name=COMPARE) == direct(page, prompt, Sampling(8))
    assert client.predict(prompt, api_name=SCORE)["bytes"] == len(prompt.encode())


def test_a_side_that_fails_leaves_the_other_its_text(client, page):
    expected = direct(page, PROMPT, Sampling(8))
    head = page.service.pair().adapted.model.lm_head.register_forward_hook(lambda module, args, out: out * math.nan)
    try:
        found = client.predict(PROMPT, 8, api_name=COMPARE)
    finally:
        head.remove()
    assert found["base"] == expected["base"]
    assert (found["adapted"]["reason"], found["adapted"]["text"]) == ("error", "")
    assert "not finite" in clean(found["adapted"]["error"])


# -- score ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*tiny.TEXTS[:3], "ė", " ".join(tiny.TEXTS * 3)], ids=lambda text: text[:8])
@pytest.mark.parametrize("model", ["adapted", "plain"])
def test_figures_are_those_of_the_evaluation(client, page, tokenizer, text, model):
    found = client.predict(text, model, api_name=SCORE)
    for side in page.service.pair(model).sides:
        expected = score_texts(side.model, tokenizer, [text], window=512)
        assert found[f"{side.role}_bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-5)
        assert sum(piece[f"{side.role}_nats"] for piece in found["pieces"]) == pytest.approx(sum(expected.nats), rel=1e-5)
    assert "".join(piece["text"] for piece in found["pieces"]) == text
    assert found["difference"] == found["adapted_bits_per_byte"] - found["base_bits_per_byte"]
    assert (found["tokens"], found["bytes"]) == (
        len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        len(text.encode()),
    )


def test_a_lambda_lies_between(client):
    scores = [client.predict(PROMPT, "plain", strength, api_name=SCORE) for strength in (0.0, 30.0)]
    assert scores[0]["base_bits_per_byte"] == scores[1]["base_bits_per_byte"]
    assert scores[0]["adapted_bits_per_byte"] != scores[1]["adapted_bits_per_byte"]


# -- what is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "nothing to read"),
        (" \n\t", "nothing to read"),
        ("x" * 100_000, "100,000 characters, and 20,000 are the most"),
        ("žolė " * 600, r"tokens, and 511 are the most"),
    ],
    ids=["empty", "blank", "100,000 characters", "beyond the context"],
)
def test_prompts_that_cannot_be_used_are_refused_in_words(client, prompt, words):
    assert re.search(words, refused(client, prompt))


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "nothing to read"), ("x" * 100_000, "100,000 characters, and 10,000 are the most")],
    ids=["empty", "100,000 characters"],
)
def test_texts_that_cannot_be_measured_are_refused_in_words(client, text, words):
    assert words in refused(client, text, api_name=SCORE)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_new_tokens", 0, "from 1 to 256"),
        ("max_new_tokens", 257, "from 1 to 256"),
        ("max_new_tokens", 2.5, "whole number"),
        ("max_new_tokens", "many", "from 1 to 256"),
        ("max_new_tokens", None, "from 1 to 256"),
        ("temperature", -1, "from 0.01 to 100"),
        ("temperature", True, "from 0.01 to 100"),
        ("top_p", 1.5, "from 0.01 to 1"),
        ("top_k", -1, "from 0 to"),
        ("seed", -1, "from 0 to"),
        ("seed", 10**30, "from 0 to"),
        ("model", "gpt-5", "adapted, plain"),
        ("model", "../../etc/passwd", "adapted, plain"),
        ("merge_lambda", -0.5, "from 0 (the adapted model) to infinity"),
        ("merge_lambda", "ten", "from 0 (the adapted model) to infinity"),
    ],
)
def test_settings_that_cannot_be_are_named(client, name, value, words):
    said = refused(client, PROMPT, **{name: value})
    assert words in said
    assert {"merge_lambda": "λ"}.get(name, name) in said.casefold()


@pytest.mark.parametrize(("name", "value"), [("prompt", ["a"]), ("prompt", {"a": 1}), ("prompt", None), ("model", ["adapted"])])
def test_wrong_types_are_told_as_the_visitors_mistake(client, name, value):
    assert "on the server" not in refused(client, **{"prompt": PROMPT, name: value})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ('["\\ud800 half", 4, true, 0.8, 0.95, 50, 0, "adapted", 0]', "half of a character"),
        ('["Labas", NaN, true, 0.8, 0.95, 50, 0, "adapted", 0]', "max_new_tokens"),
        ('["Labas", 4, false, NaN, 0.95, 50, 0, "adapted", 0]', "temperature"),
        ('["Labas", 4, false, 0.8, Infinity, 50, 0, "adapted", 0]', "top_p"),
        ('["Labas", 4, true, 0.8, 0.95, 50, 1e400, "adapted", 0]', "seed"),
        ('["Labas", 4, true, 0.8, 0.95, 50, 0, "adapted", NaN]', "λ"),
    ],
    ids=["lone surrogate", "NaN tokens", "NaN temperature", "infinite top_p", "infinite seed", "NaN λ"],
)
def test_what_only_plain_http_can_send_is_refused_in_words(page, given, words):
    assert words in said(heard(page, given)).casefold()


@pytest.mark.parametrize("given", ["[]", "[1]", "[null, null, null, null, null, null, null, null, null, null]", "[[[]]]"])
@pytest.mark.parametrize("name", ["compare", "score"])
def test_requests_that_make_no_sense_end_and_tell_nothing(page, given, name):
    said(heard(page, given, name))


@pytest.mark.parametrize("body", ["", "x", "{}", '{"data": 1}', '{"data": [], "fn_index": "x"}'])
def test_bodies_that_are_no_request_are_the_senders_fault(page, body):
    answer = httpx.post(url_of(page, "queue/join"), content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    clean(answer.text)


# -- many at once -----------------------------------------------------------------------------------------------------------


def test_fifty_at_once_get_each_its_own_text_and_hear_where_they_stand(page):
    prompts = [f"{n} keepers of {'žolė' if n % 2 else 'the light'}" for n in range(50)]
    drawn = [Sampling(8, greedy=False, temperature=2.0, top_p=1.0, top_k=0, seed=n) for n in range(50)]
    expected = list(map(partial(direct, page), prompts, drawn))
    assert len({each[role]["text"] for each in expected for role in ("base", "adapted")}) == 100
    together = threading.Barrier(50)
    number_of(page.url, "compare")

    def visit(prompt, sampling):
        given = [prompt, *(getattr(sampling, name) for name in NAMES[:6]), "adapted", 0.0]
        together.wait(30)
        return heard(page, given)

    with ThreadPoolExecutor(50) as threads:
        found = list(threads.map(visit, prompts, drawn))
    assert [messages[-1]["output"]["data"][0] for messages in found] == expected
    for messages, own in zip(found, expected, strict=True):
        first = next(message for message in messages if message["msg"] == "process_generating")  # later ones are differences
        for role in ("base", "adapted"):
            assert own[role]["text"].startswith(first["output"]["data"][0][role]["text"])
    ranks = [message["rank"] for messages in found for message in messages if message["msg"] == "estimation"]
    assert min(ranks) == 0
    assert max(ranks) > 10
    assert page.service.running == 0


def test_a_client_is_told_its_place_in_the_queue(page):
    clients = [Client(page.url, token=None, verbose=False) for _ in range(4)]
    with slowed(page):
        jobs = [each.submit(PROMPT, 16, api_name=COMPARE) for each in clients]
        seen = set()
        while not all(job.done() for job in jobs):
            seen |= {job.status().rank for job in jobs}
            time.sleep(0.02)
    assert [job.result() for job in jobs] == [direct(page, PROMPT, Sampling(16))] * 4
    assert 1 in seen


# -- whoever leaves ---------------------------------------------------------------------------------------------------------


def test_a_client_that_cancels_gives_its_place_back(client, page):
    with slowed(page, 0.05):
        job = client.submit(PROMPT, 250, api_name=COMPARE)
        until(lambda: page.service.running == 1 and job.outputs())
        job.cancel()
        until(lambda: at_rest(page.service))
    assert client.predict(PROMPT, 4, api_name=COMPARE)["finished"]


def test_connections_that_break_give_their_places_back(page):
    with slowed(page, 0.05):
        for _ in range(2):
            with joined(page, [PROMPT, 250, *ALL[1:]]) as one, joined(page, [PROMPT, 250, *ALL[1:]]) as other:
                for messages in (one, other):
                    assert any(message["msg"] == "process_generating" for message in messages)
                assert page.service.slots.free == 0
            until(lambda: at_rest(page.service))
    assert heard(page, [PROMPT, 4, *ALL[1:]])[-1]["success"]


def test_whoever_leaves_the_queue_is_not_served(page):
    with slowed(page, 0.05), joined(page, [PROMPT, 100, *ALL[1:]]) as one, joined(page, [PROMPT, 100, *ALL[1:]]) as other:
        for messages in (one, other):
            assert any(message["msg"] == "process_generating" for message in messages)
        with joined(page, [PROMPT, 250, *ALL[1:]]) as third:
            assert next(third)["msg"] == "estimation"
        assert page.service.running == 2
    until(lambda: at_rest(page.service))
    time.sleep(0.3)
    assert page.service.running == 0


# -- how often --------------------------------------------------------------------------------------------------------------


def test_a_client_in_a_hurry_is_told_when_to_come_again(serve):
    started = serve(per_minute=1.0, burst=2)
    started.service.wait(60)
    one, other = (Client(started.url, token=None, verbose=False) for _ in range(2))
    for _ in range(2):
        one.predict(PROMPT, 1, api_name=COMPARE)
    assert "Try again in" in refused(one, PROMPT, 1)
    assert "Try again in" in refused(one, PROMPT, api_name=SCORE)
    assert other.predict(PROMPT, 1, api_name=COMPARE)["finished"]


def test_each_plain_call_is_a_visitor_and_all_share_their_address(serve):
    """`curl` has no session: Gradio gives each call one of its own."""
    started = serve(per_minute=1.0, burst=1)
    started.service.wait(60)

    def call():
        event = httpx.post(url_of(started, "call/compare"), json={"data": [PROMPT, 1, *ALL[1:]]}, timeout=60).json()["event_id"]
        return clean(httpx.get(url_of(started, f"call/compare/{event}"), timeout=60).text)

    for _ in range(8):
        assert "event: complete" in call()
    said = call()
    assert "event: error" in said
    assert "Try again in" in said


# -- models that are not there ----------------------------------------------------------------------------------------------


def test_models_that_cannot_be_loaded_are_told_to_programs_too(serve, tmp_path):
    started = serve(adapted=str(tmp_path / "secret" / "nowhere"))
    until(lambda: started.service.status.state == "failed", 60)
    for name in (COMPARE, SCORE):
        words = refused(Client(started.url, token=None, verbose=False), PROMPT, api_name=name)
        assert "nowhere" in words
        assert "secret" not in words
