"""Where two texts part, as readers see characters."""

import pytest

from hf_ewc.compare import diverges_at


@pytest.mark.parametrize(
    ("left", "right", "at"),
    [
        ("same", "same", None),
        ("", "", None),
        ("Vilnius yra miestas", "Vilnius yra sostinė", 12),
        ("abc", "abcd", 3),
        ("", "x", 0),
        ("ab" + "e\u0301", "ab" + "e\u0300", 2),  # e with two different accents
        ("abe", "abe\u0301", 2),
        ("👩‍👩‍👧!", "👩‍👩‍👦!", 0),  # families of the same mothers
        ("a👋🏽", "a👋🏿", 1),  # skin tones
        ("🇱🇹🇱🇻", "🇱🇹🇱🇺", 2),  # flags, two letters each
        ("❤️", "❤", 0),  # with and without the variation selector
        ("a\r\n", "a\rb", 1),
        ("한", "하", 0),
        ("\u1112\u1161\u11ab", "\u1112\u1161", 0),  # the same syllables, spelled out
        ("\ud83d\ude00", "\ud83d\ude01", 0),  # emoji as surrogates
    ],
)
def test_texts_part_between_characters_as_readers_see_them(left, right, at):
    assert diverges_at(left, right) == at
    assert diverges_at(right, left) == at
