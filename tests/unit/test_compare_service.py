"""What stands behind the page: loading, places, stops and limits, with tiny models; what it writes is what `generate` gives."""

from __future__ import annotations

import gc
import inspect
import math
import multiprocessing
import pickle
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch
from test_artifact_fold import save_moved
from test_compare_generation import generated
from test_merge import make_fisher

from hf_ewc.compare import (
    STEPS,
    Between,
    CompareConfig,
    CompareError,
    CompareService,
    Frame,
    Limits,
    ModelPair,
    Sampling,
    score,
    stream,
)

PROMPT = "The keeper of žolė"
GREEDY, DRAWN = Sampling(16), Sampling(16, greedy=False, seed=3)
PATIENT = Limits(per_minute=60_000, burst=1000)


@pytest.fixture(scope="module")
def config(base_folder, tmp_path_factory, tokenizer):
    """Base, adapted, plain and a Fisher of the base, in folders."""
    folder = tmp_path_factory.mktemp("secret-place")
    adapted, plain = (save_moved(base_folder, folder / name, tokenizer, n) for n, name in enumerate(("lt", "lt-plain"), 3))
    fisher = make_fisher(base_folder).save_pretrained(folder / "fisher", codec="float32")
    return CompareConfig(str(base_folder), str(adapted), plain=str(plain), fisher=str(fisher), device="cpu", slots=2)


@pytest.fixture(scope="module")
def shared(config):
    service = CompareService(config, PATIENT)
    service.wait(60)
    return service


@pytest.fixture
def service(shared):
    """The same for all tests: each must leave it as it was."""
    yield shared
    assert at_rest(shared)


def at_rest(service):
    return service.slots.free == service.config.slots and service.running == 0 and not service._running


def single(config, limits=PATIENT, **others):
    """A service with one place, ready."""
    service = CompareService(CompareConfig(**{**vars(config), "plain": None, "slots": 1}), limits, **others)
    service.wait(60)
    return service


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)


def last(frames):
    *_, frame = frames
    return frame


# -- loading ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def held_steps(monkeypatch):
    """Loading stops at each step until it is let go: the steps reached, and how to let it go."""
    reached, go = queue.Queue(), threading.Semaphore(0)
    load, beside = ModelPair.load, ModelPair.beside

    def held(progress):
        def tell(step):
            progress(step)
            reached.put(step)
            assert go.acquire(timeout=30)

        return tell

    monkeypatch.setattr(ModelPair, "load", lambda *given: load(*given[:-1], held(given[-1])))
    monkeypatch.setattr(ModelPair, "beside", lambda self, *given: beside(self, *given[:-1], held(given[-1])))
    return reached, go


def test_while_it_loads_it_says_where_it_is_and_refuses_in_words(config, held_steps):
    reached, go = held_steps
    service = CompareService(config, PATIENT)
    seen = []
    for _ in STEPS[:-1]:  # the Fisher's own step is not held
        seen.append(reached.get(timeout=30))
        assert (service.status.state, service.status.step, service.status.problem) == ("loading", seen[-1], "")
        assert service.no_slider is None
        for asked in (lambda: next(service.write("me", PROMPT)), lambda: service.natural("me", [PROMPT]), service.pair):
            with pytest.raises(CompareError, match="still loading") as caught:
                asked()
            assert (caught.value.code, caught.value.facts) == ("loading", {"step": seen[-1]})
        go.release()
    service.wait(60)
    assert tuple(seen) == STEPS[:-1]
    assert (service.status.state, service.status.step) == ("ready", "fisher")
    assert last(service.write("me", PROMPT, Sampling(2))).finished


def test_facts_are_there_while_models_load_and_are_read_once(config, held_steps):
    reached, go = held_steps
    service = CompareService(config, PATIENT)
    reached.get(timeout=30)
    facts = service.facts
    assert service.status.state == "loading"
    assert facts.layers
    assert service.facts is facts
    for _ in STEPS:
        go.release()
    service.wait(60)
    assert service.facts is facts


def test_waiting_for_models_has_an_end(config, held_steps):
    _, go = held_steps
    service = CompareService(config, PATIENT)
    with pytest.raises(CompareError, match="still loading"):
        service.wait(0.05)
    for _ in STEPS:
        go.release()
    service.wait(60)


def damaged(folder):
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0no json ")


def without_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [damaged, without_weights, None], ids=["damaged", "no weights", "no folder"])
def test_models_that_cannot_be_loaded_are_told_without_where_they_lie(config, tmp_path, tokenizer, spoil):
    broken = tmp_path / "very" / "secret" / "broken"
    if spoil:
        spoil(save_moved(config.base, broken, tokenizer, 1))
    service = CompareService(CompareConfig(config.base, str(broken), device="cpu"), PATIENT)
    with pytest.raises(CompareError) as caught:
        service.wait(60)
    assert service.status.state == "failed"
    assert service.status.problem == str(caught.value)
    assert caught.value.code in ("model", "failed")
    assert "Traceback" not in service.status.problem
    assert "secret" not in service.status.problem
    assert service.no_slider is None
    with pytest.raises(CompareError, match=r"\S") as again:
        next(service.write("me", PROMPT))
    assert str(again.value) == service.status.problem
    assert service.facts.lineage  # the records need no models
    assert at_rest(service)


def test_the_third_model_must_fit_too(config, tmp_path):
    service = CompareService(CompareConfig(**{**vars(config), "plain": str(tmp_path / "nowhere")}), PATIENT)
    with pytest.raises(CompareError, match="nowhere"):
        service.wait(60)
    assert str(tmp_path) not in service.status.problem


# -- what it writes and measures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("model", ["adapted", "plain"])
def test_it_writes_what_stream_and_generate_do(service, tokenizer, model, sampling):
    frames = list(service.write("me", PROMPT, sampling, model))
    pair = service.pair(model)
    assert frames == list(stream(pair, PROMPT, sampling))
    assert [frame.base.tokens for frame in frames] == [frame.adapted.tokens for frame in frames]  # neither ends by itself
    for pane, side in zip((frames[-1].base, frames[-1].adapted), pair.sides, strict=True):
        ids = generated(side.model, tokenizer, PROMPT, sampling)
        assert pane.ids == tuple(ids)
        assert pane.text == tokenizer.decode(ids, skip_special_tokens=True)
    assert frames == list(service.write("another", PROMPT, sampling, model))


def test_the_models_are_those_of_the_settings(service, config):
    assert service.models == ("adapted", "plain")
    assert [service.pair(name).adapted.label for name in service.models] == ["lt", "lt-plain"]
    assert service.pair("adapted").base is service.pair("plain").base
    texts = {last(service.write("me", PROMPT, GREEDY, name)).adapted.text for name in service.models}
    assert len(texts) == 2
    assert CompareService(CompareConfig(config.base, config.adapted, device="cpu")).models == ("adapted",)


def test_it_measures_what_score_does(service):
    texts = ["Žiemą ežeras užšąla.", "The glass is blown at night."]
    for model in service.models:
        assert service.natural("me", texts, model) == [score(service.pair(model), text) for text in texts]


@pytest.mark.parametrize("name", ["nothing", "", "base", "../../etc/passwd"])
def test_a_model_that_is_not_there_is_refused_with_those_that_are(service, name):
    for asked in (lambda: next(service.write("me", PROMPT, model=name)), lambda: service.natural("me", [PROMPT], name)):
        with pytest.raises(CompareError, match="adapted, plain") as caught:
            asked()
        assert caught.value.code == "setting"


@pytest.mark.parametrize(
    ("prompt", "sampling", "code"),
    [
        ("", GREEDY, "empty"),
        ("x" * 20_001, GREEDY, "characters"),
        ("x " * 200, GREEDY, "tokens"),
        ("\ud800", GREEDY, "not_text"),
        (PROMPT, Sampling(0), "setting"),
        (PROMPT, Sampling(513), "setting"),
        (PROMPT, Sampling(4, False, math.nan), "setting"),
        (PROMPT, Sampling(seed=-1), "setting"),
    ],
)
def test_what_is_refused_frees_its_place(service, prompt, sampling, code):
    for _ in range(service.config.slots + 1):
        with pytest.raises(CompareError) as caught:
            next(service.write("me", prompt, sampling))
        assert caught.value.code == code
    assert at_rest(service)


# -- between ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["adapted", "plain"])
@pytest.mark.parametrize("strength", [10.0, math.inf])
def test_a_lambda_gives_the_model_between(service, base_folder, model, strength):
    pair = Between(service.pair(model), make_fisher(base_folder)).pair_at(strength)
    assert list(service.write("me", PROMPT, GREEDY, model, strength)) == list(stream(pair, PROMPT, GREEDY))
    assert service.natural("me", [PROMPT], model, strength) == [score(pair, PROMPT)]
    assert service.natural("me", [PROMPT], model, strength) != service.natural("me", [PROMPT], model)


def test_no_lambda_is_the_model_itself(service):
    assert service.no_slider is None
    assert service.pair("plain", 0) is service.pair("plain")


@pytest.mark.parametrize("strength", [-1, math.nan, "ten", None])
def test_a_lambda_that_is_none_is_refused(service, strength):
    with pytest.raises(CompareError, match="λ is") as caught:
        next(service.write("me", PROMPT, merge_lambda=strength))
    assert caught.value.code == "setting"


def damaged_fisher(folder):
    next(folder.glob("*.safetensors")).write_bytes(b"\0" * 64)


def other_fisher(folder):
    """Of another base, whose hash its manifest names."""
    manifest = (folder / "fisher_config.json").read_text()
    head, _, rest = manifest.partition('"fingerprint": "')
    (folder / "fisher_config.json").write_text(f'{head}"fingerprint": "{"ab" * 32}{rest[64:]}')


@pytest.mark.parametrize("spoil", [None, damaged_fisher, other_fisher], ids=["none", "damaged", "of another base"])
def test_without_a_fisher_that_fits_there_is_no_slider_and_everything_else_is(config, tmp_path, base_folder, spoil):
    given = None
    if spoil:
        given = make_fisher(base_folder).save_pretrained(tmp_path / "secret" / "fisher", codec="float32")
        spoil(given)
    service = single(CompareConfig(**{**vars(config), "fisher": given and str(given)}))
    problem = service.no_slider
    assert service.status.state == "ready"
    assert len(str(problem)) > 20
    assert "secret" not in str(problem)
    assert "Traceback" not in str(problem)
    for asked in (
        lambda: next(service.write("me", PROMPT, merge_lambda=1.0)),
        lambda: service.natural("me", [PROMPT], "adapted", 1.0),
    ):
        with pytest.raises(CompareError) as caught:
            asked()
        assert str(caught.value) == str(problem)
    assert last(service.write("me", PROMPT, Sampling(2))).finished
    assert at_rest(service)


# -- stops ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [1, 5])
def test_a_stop_keeps_the_text_so_far(service, begun):
    whole = list(service.write("me", PROMPT, GREEDY))
    frames = service.write("me", PROMPT, GREEDY)
    assert list(islice(frames, begun)) == whole[:begun]
    service.stop("me")
    (end,) = frames
    assert end == whole[begun - 1].stopped()
    assert {pane.reason for pane in (end.base, end.adapted)} == {"stopped"}
    assert list(service.write("me", PROMPT, GREEDY)) == whole  # the next one is not stopped


def test_a_stop_while_waiting_for_a_place_ends_it_at_once(config):
    service = single(config)
    first = service.write("first", PROMPT, GREEDY)
    next(first)
    with ThreadPoolExecutor(2) as threads:
        written = threads.submit(lambda: list(service.write("second", PROMPT, GREEDY)))
        measured = threads.submit(lambda: service.natural("second", [PROMPT]))
        until(lambda: service.running == 3)
        time.sleep(0.1)
        assert not written.done()
        assert not measured.done()
        since = time.monotonic()
        service.stop("second")
        assert written.result(10) == [Frame.empty().stopped()]
        with pytest.raises(CompareError, match="stopped") as caught:
            measured.result(10)
        assert time.monotonic() - since < 2
    assert caught.value.code == "stopped"
    assert (service.running, service.slots.free) == (1, 0)
    assert last(first).base.reason == "length"
    assert at_rest(service)


def test_a_stop_ends_all_of_one_visitor_and_nothing_of_another(config):
    service = CompareService(CompareConfig(**{**vars(config), "slots": 3}), PATIENT)
    service.wait(60)
    mine, other, also_mine = (service.write(name, PROMPT, GREEDY) for name in ("me", "other", "me"))
    begun = [next(frames) for frames in (mine, other, also_mine)]
    assert (service.running, service.slots.free) == (3, 0)
    service.stop("nobody")
    service.stop("me")
    assert [list(frames) for frames in (mine, also_mine)] == [[begun[0].stopped()]] * 2
    assert [begun[1], *other] == list(stream(service.pair(), PROMPT, GREEDY))
    assert at_rest(service)


# -- places -----------------------------------------------------------------------------------------------------------------


def close(frames):
    frames.close()


def collect(frames):
    del frames
    gc.collect()


def throw(frames):
    with pytest.raises(ConnectionError):
        frames.throw(ConnectionError())


@pytest.mark.parametrize("leave", [close, collect, throw])
def test_a_place_is_free_again_however_a_stream_ends(service, leave):
    streams = [service.write("me", PROMPT, GREEDY) for _ in range(service.config.slots)]
    for frames in streams:
        next(frames)
    del frames
    assert (service.slots.free, service.running) == (0, service.config.slots)
    while streams:
        leave(streams.pop())
    assert at_rest(service)


def test_a_stream_that_never_began_took_nothing(service):
    frames = service.write("me", PROMPT, GREEDY)
    assert at_rest(service)
    frames.close()


def test_whoever_finds_no_place_in_time_is_told(config):
    service = single(config, Limits(per_minute=60_000, burst=1000, wait_seconds=0.1))
    first = service.write("first", PROMPT, GREEDY)
    next(first)
    for asked in (lambda: next(service.write("second", PROMPT)), lambda: service.natural("second", [PROMPT])):
        with pytest.raises(CompareError, match=r"all 1 places are taken, also after 0\.1 s") as caught:
            asked()
        assert caught.value.code == "busy"
    assert service.running == 1
    assert last(first).finished
    assert at_rest(service)


def test_visitors_who_leave_while_they_wait_leave_nothing_behind(config):
    service = single(config)
    first = service.write("first", PROMPT, GREEDY)
    next(first)
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(list, service.write(f"visitor {n}", PROMPT, GREEDY)) for n in range(4)]
        until(lambda: service.running == 5)
        for n in range(4):
            service.stop(f"visitor {n}")
        assert [future.result(10) for future in waiting] == [[Frame.empty().stopped()]] * 4
    first.close()
    assert at_rest(service)


def test_each_of_many_gets_the_text_of_its_own_prompt(service):
    prompts = [f"{n} keepers of žolė" for n in range(12)]
    expected = [last(stream(service.pair(), prompt, GREEDY)) for prompt in prompts]
    assert len({frame.base.text for frame in expected}) > 6
    most, lock = 0, threading.Lock()

    def visit(prompt):
        nonlocal most
        for frame in service.write(prompt, prompt, GREEDY):  # noqa: B007
            with lock:
                most = max(most, service.config.slots - service.slots.free)
        return frame  # the last one

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(visit, prompts)) == expected
    assert 1 <= most <= service.config.slots


def test_a_stream_may_be_advanced_and_closed_by_other_threads(service):
    frames = service.write("me", PROMPT, GREEDY)
    found = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: found.append(next(frames)))
        thread.start()
        thread.join(10)
    assert found == list(islice(stream(service.pair(), PROMPT, GREEDY), 3))
    thread = threading.Thread(target=frames.close)
    thread.start()
    thread.join(10)
    assert at_rest(service)


# -- how often --------------------------------------------------------------------------------------------------------------


def test_one_visitor_in_a_hurry_is_told_when_to_come_again(config):
    service = single(config, Limits(per_minute=1, burst=3))
    service.natural("hasty", [PROMPT] * 4)  # together they are one request
    last(service.write("hasty", PROMPT, Sampling(1)))
    last(service.write("hasty", PROMPT, Sampling(1)))
    for asked in (lambda: next(service.write("hasty", PROMPT)), lambda: service.natural("hasty", [PROMPT])):
        with pytest.raises(CompareError, match="that was fast: 3 requests at once, then 1 a minute") as caught:
            asked()
        assert caught.value.code == "rate"
        assert 1 <= caught.value.facts["seconds"] <= 60
    assert last(service.write("calm", PROMPT, Sampling(1))).finished
    assert at_rest(service)


def test_new_names_from_one_address_do_not_help(config):
    service = single(config, Limits(per_minute=1, burst=2))
    for n in range(16):  # as much as eight visitors
        service.natural(f"name {n}", ["Labas"], address="192.0.2.1")
    with pytest.raises(CompareError, match="that was fast") as caught:
        service.natural("name 16", ["Labas"], address="192.0.2.1")
    assert caught.value.code == "rate"
    service.natural("name 17", ["Labas"], address="192.0.2.2")
    service.natural("name 18", ["Labas"])  # an address that nobody knows


def test_before_the_models_are_there_nothing_is_counted(config, held_steps):
    reached, go = held_steps
    service = CompareService(config, Limits(per_minute=1, burst=1))
    reached.get(timeout=30)
    for _ in range(3):
        with pytest.raises(CompareError) as caught:
            service.natural("me", ["Labas"])
        assert caught.value.code == "loading"
    for _ in STEPS:
        go.release()
    service.wait(60)
    assert service.natural("me", ["Labas"])


# -- a device that is lent per call -----------------------------------------------------------------------------------------


def lend(function):
    """As ZeroGPU does: each call runs in a forked process, and what goes in and out of it is pickled."""
    context = multiprocessing.get_context("fork")

    def work(pipe, given):
        torch.set_num_threads(1)  # a fork has none of its parent's threads
        try:
            given = pickle.loads(given)
            for item in function(*given) if inspect.isgeneratorfunction(function) else [function(*given)]:
                pipe.send(item)
            pipe.send(StopIteration())
        except Exception as error:
            pipe.send(error)

    def results(*given):
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, pickle.dumps(given)), daemon=True)
        process.start()
        LENT.append(process)
        try:
            while True:
                assert here.poll(60)
                item = here.recv()
                if isinstance(item, StopIteration):
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            process.terminate()
            process.join(10)

    if inspect.isgeneratorfunction(inspect.unwrap(function)):
        return results
    return lambda *given: next(results(*given))


LENT: list[multiprocessing.process.BaseProcess] = []


@pytest.fixture
def lent(config):
    LENT.clear()
    service = single(config, on_device=lend)
    yield service
    assert LENT
    assert not any(process.is_alive() for process in LENT)
    assert at_rest(service)


def test_a_lent_device_writes_and_measures_the_same(lent, shared):
    assert list(lent.write("me", PROMPT, DRAWN)) == list(stream(shared.pair(), PROMPT, DRAWN))
    assert list(lent.write("me", PROMPT, GREEDY, merge_lambda=10.0)) == list(
        shared.write("me", PROMPT, GREEDY, "adapted", 10.0)
    )
    assert lent.natural("me", [PROMPT, "Labas"]) == shared.natural("me", [PROMPT, "Labas"])


def test_a_stop_reaches_what_runs_on_a_lent_device(lent):
    whole = list(lent.write("me", PROMPT, GREEDY))
    frames = lent.write("me", PROMPT, GREEDY)
    assert list(islice(frames, 3)) == whole[:3]
    assert LENT[-1].is_alive()
    lent.stop("me")
    assert list(frames) == [whole[2].stopped()]


def test_leaving_gives_a_lent_device_back(lent):
    frames = lent.write("me", PROMPT, GREEDY)
    next(frames)
    frames.close()


def test_errors_on_a_lent_device_keep_their_words(lent):
    """Whether a prompt fits is known once it is tokenised, which happens there."""
    with pytest.raises(CompareError, match=r"[\d,]+ tokens, and [\d,]+ are the most") as caught:
        next(lent.write("me", "labas " * 3000))
    assert caught.value.code == "tokens"
    assert caught.value.facts["found"] > caught.value.facts["limit"]


def test_a_device_that_is_refused_costs_no_place(config):
    """ZeroGPU raises when a visitor's quota is used up."""

    def refuse(function):
        def call(*given):
            raise RuntimeError("You have exceeded your GPU quota (60s requested vs. 3s left).")

        return call

    service = single(config, on_device=refuse)
    for asked in (lambda: next(service.write("me", PROMPT)), lambda: service.natural("me", [PROMPT])):
        with pytest.raises(RuntimeError, match="quota"):
            asked()
    assert at_rest(service)


def test_a_device_that_is_taken_away_ends_the_stream(config):
    def brief(function):
        return (lambda *given: islice(function(*given), 3)) if inspect.isgeneratorfunction(function) else function

    service = single(config, on_device=brief)
    frames = list(islice(service.write("me", PROMPT, GREEDY), 20))
    assert len(frames) in (3, 4)
    assert frames[-1].finished
    assert at_rest(service)
