"""Stop strings in a stream of text: found across pieces, and never shown, not even in part."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import InvalidArgumentError


class StopMatcher:
    """Finds the first stop string to be completed in a text that arrives in pieces.

    The match is the one whose last character comes first; of several that end there, the longest. The answer therefore
    does not depend on how the text was cut, and generation can end with the very token that completed a stop string.
    Text that could still turn out to be the start of a stop string is held back until that is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: any number of non-empty strings; none means that all text passes straight through.

        Raises InvalidArgumentError for an empty or non-string entry.
        """
        if isinstance(stops, str):
            raise InvalidArgumentError(f"stop must be a list of strings, got the string {stops!r}; write [{stops!r}]")
        for i, stop in enumerate(stops):
            if not isinstance(stop, str) or not stop:
                raise InvalidArgumentError(f"stop[{i}] must be a non-empty string, got {stop!r}")
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece; returns (text that may be shown now, the stop string that was completed or None).

        After a match the rest of the text is swallowed: later calls return ("", the same stop string).
        """
        if self._matched is not None:
            return "", self._matched
        if not self._stops:
            return text, None
        text = self._held + text
        best: tuple[int, int, str] | None = None  # (end, start, stop); the smallest wins
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        if best is not None:
            self._held, self._matched = "", best[2]
            return text[: best[1]], best[2]
        n_held = max(_overlap(text, stop) for stop in self._stops)
        cut = len(text) - n_held
        self._held = text[cut:]
        return text[:cut], None

    def finish(self) -> str:
        """The text ends here: returns what was held back ("" after a match)."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
