"""The test Hub for the cases; `tests/conftest.py` (tiny model, tokenizer, Fisher) is loaded as well."""

from __future__ import annotations

import itertools
import os

import pytest

_numbers = itertools.count(1)


def pytest_sessionstart(session):
    if not hasattr(session.config, "hub"):
        raise pytest.UsageError(
            "the cases need the test Hub and its environment; start them with: python tests/hub/leg.py [--xet]"
        )


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """No test waits for a Hub that is meant to fail."""
    monkeypatch.setattr("hf_ewc.hub.patience.WAITS", (0.01,) * 4)


@pytest.fixture
def hub(request):
    """The running test Hub, its log, faults and `bytes_served` empty. The environment's token is alice's."""
    request.config.hub.reset()
    yield request.config.hub
    request.config.hub.reset()


@pytest.fixture
def name(request):
    """A repository's name that no other test uses, such as "alice/test_range_reads-7"."""
    return f"alice/{request.node.originalname[:40]}-{next(_numbers)}"


@pytest.fixture
def bob(tmp_path):
    """Environment for a subprocess of another user with an empty cache."""
    return {**os.environ, "HF_TOKEN": "hf_other", "HF_HOME": str(tmp_path / "bob")}
