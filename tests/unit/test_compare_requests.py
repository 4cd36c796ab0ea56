"""What a request costs, moves of the λ slider, stops that come before what they stop, and records that take their time."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import pytest
from test_compare_service import GREEDY, PATIENT, PROMPT, at_rest, config, last, single, until  # noqa: F401  (a fixture)

from hf_ewc.compare import (
    STOPS,
    BlindRound,
    CompareError,
    CompareService,
    Facts,
    Frame,
    Limits,
    Sampling,
    Tally,
    app_folder,
    score,
    stream,
)
from hf_ewc.compare import service as service_module


def test_a_move_is_one_request_of_scores_and_then_frames(config):  # noqa: F811
    service = single(config, Limits(per_minute=1, burst=1))
    moved = service.move("me", [PROMPT, "žolė"], PROMPT, GREEDY, merge_lambda=10.0)
    pair = service.pair(merge_lambda=10.0)
    assert next(moved) == [score(pair, PROMPT), score(pair, "žolė")]
    assert service.slots.free == 0
    assert list(moved) == list(stream(pair, PROMPT, GREEDY))
    assert at_rest(service)
    with pytest.raises(CompareError, match="that was fast"):
        next(service.move("me", [PROMPT], PROMPT, GREEDY))


def test_what_a_stop_left_behind_it_is_not_started_and_what_came_after_it_is(config):  # noqa: F811
    """A queue may hold a request while its visitor stops it."""
    service = single(config)
    service.stop("me", until=1000.0)
    assert list(service.write("me", PROMPT, GREEDY, started=999.0)) == [Frame.empty().stopped()]
    assert list(service.write("me", PROMPT, GREEDY, started=1000.0)) == [Frame.empty().stopped()]
    assert last(service.write("me", PROMPT, GREEDY, started=1001.0)).base.reason == "length"
    assert last(service.write("other", PROMPT, GREEDY, started=999.0)).base.reason == "length"
    assert last(service.write("me", PROMPT, GREEDY)).base.reason == "length"  # a program has no clock
    service.leave("me")
    assert not service._stopped
    assert at_rest(service)


def test_who_leaves_is_stopped_and_forgotten(config):  # noqa: F811
    service = single(config)
    frames = service.write("me", PROMPT, Sampling(64))
    next(frames)
    service.leave("me")
    assert list(frames)[-1].base.reason == "stopped"
    assert at_rest(service)


def test_long_texts_count_as_several_requests(config):  # noqa: F811
    service = single(config, Limits(per_minute=1, burst=3))
    last(service.write("me", PROMPT, Sampling(1)))  # 1 of 3
    frames = service.write("me", PROMPT, Sampling(128))  # 2 more
    next(frames)
    frames.close()
    with pytest.raises(CompareError, match="that was fast"):
        next(service.write("me", PROMPT, Sampling(1)))
    frames = service.write("other", PROMPT, Sampling(256))  # more than all: as much as there is
    next(frames)
    frames.close()
    assert at_rest(service)


@pytest.mark.parametrize("prompt", ["", "x" * 30_000])
def test_what_is_refused_for_nothing_costs_nothing(config, prompt):  # noqa: F811
    service = single(config, Limits(per_minute=1, burst=1))
    for asked in (
        lambda: next(service.write("me", prompt)),
        lambda: next(service.write("me", PROMPT, Sampling(0))),
        lambda: service.natural("me", [prompt]),
        lambda: next(service.move("me", [prompt], PROMPT)),
    ):
        with pytest.raises(CompareError) as caught:
            asked()
        assert caught.value.code != "rate"
    assert service.natural("me", [PROMPT])


def test_records_that_take_long_are_waited_for_by_nobody_who_looks_first(config, monkeypatch):  # noqa: F811
    go = threading.Event()
    monkeypatch.setattr(service_module, "load_facts", lambda config: Facts() if go.wait(30) else None)
    service = CompareService(config, PATIENT)
    service.wait(60)
    assert not service.facts_read
    assert last(service.write("me", PROMPT, GREEDY)).finished
    go.set()
    until(lambda: service.facts_read)
    assert service.facts == Facts()


def test_no_more_models_are_kept_than_the_slider_has_stops(config):  # noqa: F811
    service = single(config)
    between = service._loader.get().between["adapted"]
    for n in range(1, 30):
        service.natural("me", ["žolė"], merge_lambda=n / 7)
    assert len(between._kept) == len(STOPS) == 12


@pytest.mark.parametrize(
    ("space", "told", "found"),
    [
        (None, "203.0.113.9", "10.0.0.1"),  # anybody can write this header
        ("me/space", None, "10.0.0.1"),
        ("me/space", "203.0.113.9", "203.0.113.9"),
        ("me/space", "198.51.100.1, 203.0.113.9", "203.0.113.9"),  # what a visitor wrote comes first
    ],
)
def test_on_a_space_the_proxy_says_where_a_request_comes_from(monkeypatch, space, told, found):
    monkeypatch.syspath_prepend(str(app_folder()))
    answers = sys.modules.get("answers") or __import__("answers")
    monkeypatch.delenv("SPACE_ID", raising=False)
    if space:
        monkeypatch.setenv("SPACE_ID", space)
    headers = {"x-forwarded-for": told} if told else {}
    assert answers.address(SimpleNamespace(headers=headers, client=SimpleNamespace(host="10.0.0.1"))) == found


def test_a_tally_may_begin_to_store_later():
    tally, stored = Tally(), []
    tally.vote(BlindRound(), "left")
    assert not tally.stores
    tally.store(stored.append)
    tally.vote(BlindRound(), "both_bad")
    assert tally.stores
    assert [vote["vote"] for vote in stored] == ["both_bad"]


def test_a_move_that_is_stopped_while_it_waits_is_told_so(config):  # noqa: F811
    service = single(config)
    frames = service.write("other", PROMPT, Sampling(64))
    next(frames)  # holds the only place
    threading.Timer(0.2, lambda: service.stop("me")).start()
    with pytest.raises(CompareError) as caught:
        next(service.move("me", [PROMPT], PROMPT))
    assert caught.value.code == "stopped"
    frames.close()
    assert at_rest(service)
