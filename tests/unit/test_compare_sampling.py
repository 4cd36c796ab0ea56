"""Settings that come from a page or from its API, whoever calls it."""

import pytest
import tiny

from hf_ewc.compare import CompareError, Limits, ModelPair, Sampling, stream

PROMPT = "The keeper of žolė"


@pytest.fixture(scope="module")
def pair(tokenizer):
    return ModelPair.of(tiny.make_model(seed=0), tiny.make_model(seed=1), tokenizer)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10_000}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": "abc"}, "seed"),
        ({"seed": -1}, "seed"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(pair, settings, name):
    with pytest.raises(CompareError, match=name) as caught:
        next(stream(pair, PROMPT, Sampling(**{"greedy": False, **settings})))
    assert caught.value.code == "setting"


def test_a_slider_may_send_whole_numbers_as_floats(pair):
    assert list(stream(pair, PROMPT, Sampling(5.0, seed=3.0))) == list(stream(pair, PROMPT, Sampling(5, seed=3)))


def test_the_limit_of_new_tokens_is_the_owners(pair):
    with pytest.raises(CompareError, match="from 1 to 8"):
        next(stream(pair, PROMPT, Sampling(9), limits=Limits(new_tokens=8)))
