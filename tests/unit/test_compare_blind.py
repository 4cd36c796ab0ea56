"""Blind rounds: nothing is given away before the vote, a vote counts once, nothing is stored by default."""

import copy
import json
import pickle
import random
import threading

import pytest

from hf_ewc.compare import VOTES, BlindRound, CompareError, Tally


def rounds(n, seed=0):
    rng = random.Random(seed)
    return [BlindRound(rng) for _ in range(n)]


def test_sides_are_random_and_about_as_often_one_way_as_the_other():
    assert 400 < sum(blind.order("base", "adapted") == ("base", "adapted") for blind in rounds(1000)) < 600
    assert {BlindRound().order(0, 1) for _ in range(64)} == {(0, 1), (1, 0)}  # without a generator of ours, too


@pytest.mark.parametrize("seed", range(4))
def test_the_order_stays_the_same_through_a_round(seed):
    blind = BlindRound(random.Random(seed))
    orders = {blind.order("base", "adapted") for _ in range(5)}
    reveal = blind.vote("left")
    assert orders == {(reveal.left, reveal.right)}


def test_nothing_is_given_away_before_the_vote():
    one, other = (next(b for b in rounds(20) if b.order(0, 1)[0] == first) for first in (0, 1))
    assert repr(one) == repr(other)
    with pytest.raises(CompareError, match="after the vote"):
        one.reveal()
    one.vote("both_bad")
    assert one.reveal().left == "base"


@pytest.mark.parametrize("vote", VOTES)
def test_votes_for_a_side_become_votes_for_its_model(vote):
    for blind in rounds(6):
        reveal = blind.vote(vote)
        assert reveal.vote == vote
        assert reveal.outcome == (getattr(reveal, vote) if vote in ("left", "right") else vote)
        assert {reveal.left, reveal.right} == {"base", "adapted"}


def test_a_vote_counts_once():
    tally, (blind,) = Tally(), rounds(1)
    tally.vote(blind, "both_good")
    with pytest.raises(CompareError, match="already"):
        tally.vote(blind, "both_bad")
    assert tally.to_dict() == {"base": 0, "adapted": 0, "both_good": 1, "both_bad": 0}


def test_an_unknown_vote_is_refused_and_leaves_the_round_open():
    tally, (blind,) = Tally(), rounds(1)
    with pytest.raises(CompareError, match="neither"):
        tally.vote(blind, "neither")
    assert not blind.voted
    tally.vote(blind, "left")


def test_many_clicks_at_once_are_one_vote_and_many_rounds_lose_none():
    tally, shared, refused = Tally(), rounds(1)[0], []
    start = threading.Barrier(50)

    def visitor(own):
        start.wait()
        tally.vote(own, "both_good")
        try:
            tally.vote(shared, "both_bad")
        except CompareError:
            refused.append(1)

    threads = [threading.Thread(target=visitor, args=(blind,)) for blind in rounds(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.to_dict() == {"base": 0, "adapted": 0, "both_good": 50, "both_bad": 1}
    assert len(refused) == 49


def test_counts_go_through_json_and_on_from_there():
    tally = Tally()
    for blind in rounds(10):
        tally.vote(blind, "left")
    again = Tally(json.loads(json.dumps(tally.to_dict())))
    assert sum(again.to_dict().values()) == 10
    assert again.to_dict() == tally.to_dict()


def test_only_a_sink_that_the_owner_gave_sees_records():
    stored = []
    quiet, storing = Tally(), Tally(sink=stored.append)
    quiet.vote(rounds(1)[0], "left")
    assert (quiet.stores, storing.stores, stored) == (False, True, [])
    reveal = storing.vote(rounds(1)[0], "left", prompt="Labas")
    assert stored == [
        {"prompt": "Labas", "vote": "left", "left": reveal.left, "right": reveal.right, "outcome": reveal.outcome},
    ]


def test_a_sink_that_fails_costs_nobody_the_vote(caplog):
    def full(record):
        raise OSError("disk full")

    tally = Tally(sink=full)
    assert tally.vote(rounds(1)[0], "both_good").outcome == "both_good"
    assert tally.to_dict()["both_good"] == 1
    assert "disk full" in caplog.text


def test_a_round_can_be_copied_as_pages_copy_a_sessions_state():
    blind = rounds(1)[0]
    for again in (copy.deepcopy(blind), pickle.loads(pickle.dumps(blind))):
        assert again.order(0, 1) == blind.order(0, 1)
