"""Blind votes in a dataset repository: private, one file per process, nothing in it but votes; and no vote is lost."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, get_token, hf_hub_download
from server import Fault

from hf_ewc.compare import BlindRound, Tally, VoteStore
from hf_ewc.errors import HubError, HubUnavailableError

LEGS = ("lfs",)  # a file of votes is small enough for neither

COMMIT = "POST .*/commit/"


@pytest.fixture
def store(name):
    """A store that commits when it is asked to."""
    found = VoteStore(name, minutes=600)
    yield found
    found._scheduler.stop()  # or it would commit once more when all tests are done


def records(name):
    """Votes of the repository, by file."""
    files = [path for path in HfApi().list_repo_files(name, repo_type="dataset") if path.startswith("data/")]
    texts = {path: Path(hf_hub_download(name, path, repo_type="dataset")).read_text(encoding="utf-8") for path in files}
    assert all(text.endswith("\n") for text in texts.values())
    return {path: [json.loads(line) for line in text.splitlines()] for path, text in texts.items()}


def test_the_repository_is_made_and_private(hub, name, store):
    repo = hub.repos["dataset", name]
    assert (repo.private, repo.owner) == (True, "alice")
    store.push()  # nothing to push
    assert records(name) == {}
    assert hub.count(COMMIT) == 0


def test_a_repository_that_is_there_keeps_its_visibility_and_its_files(hub, name):
    HfApi().create_repo(name, repo_type="dataset", private=False)
    HfApi().upload_file(
        path_or_fileobj=b"{}\n", path_in_repo="data/votes-of-last-week.jsonl", repo_id=name, repo_type="dataset"
    )
    store = VoteStore(name, minutes=600)
    store.add({"vote": "left"})
    store.push()
    store._scheduler.stop()
    assert not hub.repos["dataset", name].private
    assert len(records(name)) == 2


def test_votes_are_json_lines_with_what_was_voted_and_nothing_that_was_written(hub, name, store):
    tally = Tally(sink=store.add)
    rounds = [BlindRound() for _ in range(4)]
    for blind, vote in zip(rounds, ("left", "right", "both_good", "both_bad"), strict=True):
        tally.vote(blind, vote, base="ona/base@4f1c2d0", adapted="„lietuviškas“")
    store.push()
    ((path, found),) = records(name).items()
    assert re.fullmatch(r"data/votes-[0-9a-f]{32}\.jsonl", path)
    assert [record["vote"] for record in found] == ["left", "right", "both_good", "both_bad"]
    for record, blind in zip(found, rounds, strict=True):
        assert set(record) == {"vote", "left", "right", "outcome", "base", "adapted", "time"}
        assert (record["left"], record["right"]) == blind.order("base", "adapted")
        assert record["adapted"] == "„lietuviškas“"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["time"])
    text = store._file.read_text(encoding="utf-8")
    assert get_token() not in text
    assert "hf_" not in text


def test_later_votes_are_added_to_the_same_file_and_a_second_push_is_none(hub, name, store):
    store.add({"vote": "left"})
    store.push()
    store.push()
    assert hub.count(COMMIT) == 1
    time.sleep(0.02)  # it tells changes by the file's time
    store.add({"vote": "right"})
    store.push()
    (found,) = records(name).values()
    assert [record["vote"] for record in found] == ["left", "right"]


def test_it_commits_by_itself(hub, name):
    store = VoteStore(name, minutes=0.3 / 60)
    store.add({"vote": "left"})
    deadline = time.monotonic() + 20
    while not records(name):
        assert time.monotonic() < deadline, "nothing was committed"
        time.sleep(0.1)
    store._scheduler.stop()


def test_two_processes_never_overwrite_each_other_and_push_what_they_have_when_they_end(hub, name):
    code = (
        "import sys; from hf_ewc.compare import VoteStore\n"
        "store = VoteStore(sys.argv[1])\n"
        "for n in range(20): store.add({'vote': 'left', 'n': n, 'who': sys.argv[2]})\n"
        "print('voted', flush=True); sys.stdin.readline()\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, name, who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for who in ("one", "other")
    ]
    for process in started:
        assert process.stdout.readline() == "voted\n", process.stderr.read()
    for process in started:  # both at the same moment
        process.stdin.write("\n")
        process.stdin.flush()
    for process in started:
        assert process.communicate(timeout=120)[1].count("Traceback") == 0
        assert process.returncode == 0
    found = records(name)
    assert len(found) == 2
    assert sorted({record["who"] for votes in found.values() for record in votes}) == ["one", "other"]
    for votes in found.values():
        assert [record["n"] for record in votes] == list(range(20))


def test_a_hub_that_is_down_costs_nobody_the_vote(hub, name, store, caplog):
    tally = Tally(sink=store.add)
    hub.faults = [Fault(COMMIT, status=503, times=1000)]
    tally.vote(BlindRound(), "both_good", base="a", adapted="b")
    with caplog.at_level(logging.ERROR), pytest.raises(Exception, match="503"):
        store.push()
    assert tally.to_dict()["both_good"] == 1
    tally.vote(BlindRound(), "both_bad", base="a", adapted="b")
    hub.faults = []
    store.push()  # the next one has all of them
    (found,) = records(name).values()
    assert [record["vote"] for record in found] == ["both_good", "both_bad"]


def test_a_file_that_cannot_be_written_costs_nobody_the_vote(hub, name, store, caplog):
    tally = Tally(sink=store.add)
    store._file.mkdir()
    reveal = tally.vote(BlindRound(), "both_good", base="a", adapted="b")
    assert reveal.outcome == "both_good"
    assert tally.to_dict()["both_good"] == 1
    assert "could not be stored" in caplog.text


@pytest.mark.parametrize("token", ["hf_wrong", False], ids=["wrong", "none"])
def test_a_token_that_does_not_do_is_told_when_the_page_starts(hub, name, token):
    with pytest.raises(HubError, match=rf"(?i)cannot store votes .*'{name}': .*token") as caught:
        VoteStore(name, token=token)
    assert "hf_wrong" not in str(caught.value)
    assert ("dataset", name) not in hub.repos


def test_the_error_is_a_sentence(hub, name):
    with pytest.raises(HubError, match=rf"^cannot store votes in the dataset '{name}': "):
        VoteStore(name, token="hf_wrong")


def test_somebody_elses_repository_is_told_when_the_page_starts(hub, name):
    with pytest.raises(HubError, match="rights"):
        VoteStore(name, token="hf_other")
    assert ("dataset", name) not in hub.repos


def test_a_hub_that_is_down_at_the_start_is_told(hub, name):
    hub.faults = [Fault("POST .*/repos/create", status=503, times=1000)]
    with pytest.raises(HubUnavailableError, match=r"votes"):
        VoteStore(name)
