"""Stop strings against a search of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyruntime.errors import InvalidArgumentError
from pyruntime.stop import StopMatcher

LETTERS = st.text("ab\n", max_size=30)


def search(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the first prefix of the text that ends with a stop string, and the longest one it ends with."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@given(st.lists(LETTERS, max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4))
def test_equals_search_of_whole_text(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, matched = "", None
    for piece in pieces:
        text, matched = matcher.push(piece)
        shown += text
        expected_prefix, _ = search("".join(pieces), stops)
        assert expected_prefix.startswith(shown)  # nothing was shown that has to be taken back
        if matched is not None:
            break
    shown += matcher.finish()
    assert (shown, matched) == search("".join(pieces), stops)


@given(LETTERS, st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4))
def test_holds_back_no_more_than_needed(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, matched = matcher.push(text)
    if matched is None:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_examples() -> None:
    matcher = StopMatcher(["</s>", "User:"])
    assert matcher.push("Hello <") == ("Hello ", None)
    assert matcher.push("b> Use") == ("<b> ", None)
    assert matcher.push("r: hi") == ("", "User:")
    assert matcher.push("more") == ("", "User:")
    assert matcher.finish() == ""


def test_first_to_end_wins() -> None:
    assert StopMatcher(["abcd", "bc"]).push("abcd") == ("a", "bc")
    assert StopMatcher(["bc", "abc"]).push("abc") == ("", "abc")


def test_no_stops_hold_nothing() -> None:
    assert StopMatcher([]).push("abc") == ("abc", None)


@pytest.mark.parametrize("stops", ["abc", [""], ["a", 3]])
def test_bad_arguments(stops: object) -> None:
    with pytest.raises(InvalidArgumentError, match="stop"):
        StopMatcher(stops)  # type: ignore[arg-type]
