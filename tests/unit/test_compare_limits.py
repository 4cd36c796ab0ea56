"""Many visitors at once: places, rates, and nobody's text in another's pane."""

import gc
import threading
import time

import pytest
import tiny

from hf_ewc.compare import CompareError, ModelPair, RateLimit, Sampling, Slots, stream


@pytest.fixture(scope="module")
def pair(tokenizer):
    return ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)


def counting(log=None):
    try:
        yield from range(1000)
    finally:
        if log is not None:
            log.append("closed")


def test_a_place_is_held_from_the_first_item_to_the_last():
    slots = Slots(2)
    items = slots.guard(lambda: iter("ab"))
    assert slots.free == 2  # made, not begun
    assert (next(items), slots.free) == ("a", 1)
    assert (list(items), slots.free) == (["b"], 2)


def test_a_stream_that_is_closed_fails_or_is_forgotten_gives_its_place_back():
    slots, log = Slots(3), []
    closed, failed, forgotten = (slots.guard(lambda: counting(log)) for _ in range(3))
    for items in (closed, failed, forgotten):
        next(items)
    assert slots.free == 0
    closed.close()
    assert slots.free == 1
    with pytest.raises(RuntimeError, match="gone"):
        failed.throw(RuntimeError("gone"))
    assert slots.free == 2
    del items, forgotten
    gc.collect()
    assert slots.free == 3
    assert log == ["closed"] * 3


def test_a_stream_that_cannot_be_made_gives_its_place_back():
    slots = Slots(1)
    with pytest.raises(ZeroDivisionError):
        next(slots.guard(lambda: 1 / 0))
    assert slots.free == 1


def test_without_a_place_the_page_is_busy_after_the_wait_and_says_so():
    slots = Slots(1, wait_seconds=0.2)
    with slots.take():
        start = time.monotonic()
        with pytest.raises(CompareError, match="all 1 places are taken") as caught, slots.take():
            pass
        assert 0.2 <= time.monotonic() - start < 5
        assert (caught.value.code, slots.free) == ("busy", 0)
    with slots.take() as held:
        assert held
    assert slots.free == 1


def test_whoever_waits_gets_the_place_that_becomes_free():
    slots, got = Slots(1, wait_seconds=30), []
    first = slots.guard(counting)
    next(first)
    waiting = threading.Thread(target=lambda: got.extend(slots.guard(lambda: iter("xyz"))))
    waiting.start()
    time.sleep(0.1)
    assert got == []
    first.close()
    waiting.join(10)
    assert (got, slots.free) == (list("xyz"), 1)


def test_whoever_stops_while_waiting_is_let_go_with_an_empty_frame(pair):
    slots, stop = Slots(1, wait_seconds=30), threading.Event()
    with slots.take():
        threading.Timer(0.2, stop.set).start()
        start = time.monotonic()
        (frame,) = slots.guard(lambda: stream(pair, "Labas", Sampling(8), stop), stop)
        assert time.monotonic() - start < 10
        assert (frame.base.reason, frame.base.tokens, slots.free) == ("stopped", 0, 0)
    assert slots.free == 1


def test_no_more_run_at_once_than_there_are_places():
    slots, running, most, lock = Slots(3), [0], [0], threading.Lock()

    def visitor():
        with slots.take():
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            time.sleep(0.01)
            with lock:
                running[0] -= 1

    threads = [threading.Thread(target=visitor) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], slots.free) == (3, 3)


def test_fifty_visitors_at_once_get_their_own_texts_and_leave_all_places_free(pair):
    prompts = [f"{n} {tiny.TEXTS[n % len(tiny.TEXTS)][: 20 + n]}" for n in range(50)]

    def wanted(n):
        return Sampling(8, greedy=n % 2 == 0, temperature=1.5, seed=n)

    alone = {}
    for n, prompt in enumerate(prompts):
        *_, alone[n] = stream(pair, prompt, wanted(n))
    assert len({(frame.base.text, frame.adapted.text) for frame in alone.values()}) > 25  # mixing them up would be seen

    slots, together, failed = Slots(4, wait_seconds=120), {}, []
    start = threading.Barrier(50)

    def visitor(n):
        try:
            stop = threading.Event()
            start.wait()
            frames = slots.guard(lambda: stream(pair, prompts[n] if n % 10 != 3 else "", wanted(n), stop), stop)
            for count, frame in enumerate(frames, 1):
                together[n] = frame
                if n % 10 == 1 and count == 3:
                    frames.close()  # the visitor left
                elif n % 10 == 2 and count == 3:
                    stop.set()
        except Exception as error:
            failed.append((n, error))

    threads = [threading.Thread(target=visitor, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(n for n, _ in failed) == [3, 13, 23, 33, 43]  # the empty prompts
    assert {error.code for _, error in failed} == {"empty"}
    assert (slots.free, len(together)) == (4, 45)
    for n, frame in together.items():
        for name in ("base", "adapted"):
            mine, expected = getattr(frame, name), getattr(alone[n], name)
            if n % 10 in (1, 2):
                assert mine.ids == expected.ids[:3]
            else:
                assert mine == expected


def test_frames_may_be_asked_for_by_another_thread_each_time(pair):
    *_, expected = stream(pair, "Labas", Sampling(6))
    slots, seen = Slots(1), []
    frames = slots.guard(lambda: stream(pair, "Labas", Sampling(6)))
    for _ in range(6):
        thread = threading.Thread(target=lambda: seen.append(next(frames)))
        thread.start()
        thread.join()
    frames.close()
    assert (seen[-1], slots.free) == (expected, 1)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_session_has_a_burst_and_then_its_rate():
    clock = Clock()
    rate = RateLimit(per_minute=6, burst=3, clock=clock)
    for _ in range(3):
        rate.spend("ona")
    with pytest.raises(CompareError, match="Try again in 10 s") as caught:
        rate.spend("ona")
    assert (caught.value.code, caught.value.facts["seconds"]) == ("rate", 10)
    rate.spend("jonas")  # another session is not concerned
    clock.now += 10
    rate.spend("ona")
    with pytest.raises(CompareError):
        rate.spend("ona")


def test_waiting_as_long_as_one_is_told_suffices():
    clock = Clock()
    rate = RateLimit(per_minute=20, burst=1, clock=clock)
    rate.spend("ona")
    clock.now += 0.6
    with pytest.raises(CompareError) as caught:
        rate.spend("ona")
    clock.now += caught.value.facts["seconds"]
    rate.spend("ona")


def test_sessions_are_forgotten_when_their_buckets_are_full_again():
    clock = Clock()
    rate = RateLimit(per_minute=60, burst=5, clock=clock)
    for n in range(10_000):
        rate.spend(f"session {n}")
    clock.now += 6
    rate.spend("one more")
    assert len(rate) == 1


def test_clicks_in_many_threads_get_no_more_than_the_burst():
    rate, let_in, start = RateLimit(per_minute=1, burst=5), [], threading.Barrier(50)

    def click():
        start.wait()
        try:
            rate.spend("ona")
        except CompareError:
            return
        let_in.append(1)

    threads = [threading.Thread(target=click) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(let_in) == 5


@pytest.mark.parametrize("make", [lambda: Slots(0), lambda: RateLimit(0), lambda: RateLimit(5, 0)])
def test_limits_that_let_nobody_in_are_refused(make):
    with pytest.raises(ValueError, match="nobody"):
        make()
