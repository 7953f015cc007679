"""What is kept of earlier prompts and answers: their pages, for later prompts that begin alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ._abi import PAGE_TOKENS
from .errors import PyruntimeError
from .session import Session

MIN_TOKENS = 16  # shorter texts are not worth a page
_ROOT = 0


@dataclass(slots=True, eq=False)
class _Text:
    """A sequence that nobody generates on. tokens: those in it.  used: when it was last of use."""

    seq: int
    tokens: list[int]
    used: int


class PrefixCache:
    """Sequences by their tokens, the least recently used given up first, the last page of a text before its first.

    The texts that begin with the same whole pages are found by a chained hash of these pages' tokens; among them, the one that shares most
    of the next page is taken. Pages that texts share are held once: they are forks of each other.

    max_pages: as long as more of the session's pages than that are in use, by whomever, texts are given up. 0: nothing is kept.
    whole: give up texts as a whole, because sparse attention would have to put the rows of what is left in order.
    """

    def __init__(self, session: Session, *, n_page: int, max_pages: int) -> None:
        self.session, self.max_pages = session, max_pages
        self.whole = False
        self._n_page = n_page
        self._clock = itertools.count(1)
        self._texts: list[_Text] = []  # the least recently used first
        self._after: dict[int, list[_Text]] = {_ROOT: []}  # by the hash of the whole pages that they begin with

    def __len__(self) -> int:
        return len(self._texts)

    def match(self, tokens: Sequence[int]) -> int:
        """How many first tokens are kept; what holds them is among the last to be given up."""
        text, n = self._find(tokens)
        if text is None or n < MIN_TOKENS:
            return 0
        self._touch(text)
        return n

    def fork(self, tokens: Sequence[int]) -> tuple[int, int]:
        """(a new sequence, how many first tokens are in it)."""
        text, n = self._find(tokens)
        if text is None or n < MIN_TOKENS:
            return self.session.create_sequence(), 0
        self._touch(text)
        seq = self.session.fork(text.seq)
        try:
            self.session.truncate(seq, n)
        except PyruntimeError:  # to cut a text that sparse attention has put in another order takes pages, and there are none
            self.session.free_sequence(seq)
            return self.session.create_sequence(), 0
        return seq, n

    def put(self, seq: int, tokens: list[int]) -> None:
        """Takes over a sequence with its tokens. A text that it begins with is no longer needed; nor is it, if another begins with it."""
        if not self.max_pages or len(tokens) < MIN_TOKENS or not self.session.handle:
            self.session.free_sequence(seq)
            return
        found, n = self._find(tokens)
        if found and n == len(tokens):
            self._touch(found)
            self.session.free_sequence(seq)
            return
        if found and n == len(found.tokens):
            self._drop(found)
        text = _Text(seq, tokens, next(self._clock))
        self._texts.append(text)
        for key in _keys(tokens):
            self._after.setdefault(key, []).append(text)
        self.make_room(self._n_page - self.max_pages)

    def make_room(self, n_page: int) -> bool:
        """Gives texts up until that many pages are free; whether there was anything to give."""
        before = len(self._texts), sum(len(t.tokens) for t in self._texts[:1])
        while self._texts and (missing := n_page - self._free_pages()) > 0:
            self._shorten(missing)
        return before != (len(self._texts), sum(len(t.tokens) for t in self._texts[:1]))

    def clear(self) -> None:
        """Gives everything up."""
        for text in list(self._texts):
            self._drop(text)

    def _find(self, tokens: Sequence[int]) -> tuple[_Text | None, int]:
        """The text that shares most first tokens, and how many."""
        n_page, texts = -1, self._after[_ROOT]
        for n_page, key in enumerate(_keys(tokens)):
            known = self._after.get(key)
            if not known:
                n_page -= 1
                break
            texts = known
        n = n_page * PAGE_TOKENS
        best: tuple[_Text | None, int] = (None, 0)
        for text in reversed(texts):
            shared = n + common_prefix(text.tokens[n : n + PAGE_TOKENS], tokens[n : n + PAGE_TOKENS])
            if shared > best[1] and text.tokens[:n] == tokens[:n]:  # else two hashes are equal by chance
                best = text, shared
        return best

    def _touch(self, text: _Text) -> None:
        self._texts.remove(text)
        self._texts.append(text)

    def _shorten(self, n_page: int) -> None:
        """Takes up to n_page pages off the end of the least recently used text."""
        text = self._texts[0]
        n = max(0, -(-len(text.tokens) // PAGE_TOKENS) - n_page) * PAGE_TOKENS
        if self.whole or n < MIN_TOKENS:
            self._drop(text)
            return
        for key in list(_keys(text.tokens))[n // PAGE_TOKENS + 1 :]:
            self._forget(key, text)
        text.tokens = text.tokens[:n]
        try:
            self.session.truncate(text.seq, n)
        except PyruntimeError:
            self._drop(text)

    def _drop(self, text: _Text) -> None:
        self._texts.remove(text)
        for key in _keys(text.tokens):
            self._forget(key, text)
        self.session.free_sequence(text.seq)

    def _forget(self, key: int, text: _Text) -> None:
        self._after[key].remove(text)
        if not self._after[key] and key != _ROOT:
            del self._after[key]

    def _free_pages(self) -> int:
        return int(self.session.stats()["n_page_free"])


def _keys(tokens: Sequence[int]) -> Iterator[int]:
    """The root, then a hash for each whole page, of its tokens and all before them."""
    key = _ROOT
    yield key
    for end in range(PAGE_TOKENS, len(tokens) + 1, PAGE_TOKENS):
        key = hash((key, *tokens[end - PAGE_TOKENS : end]))
        yield key


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two lists share."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
