"""A sequence that stays in the KV cache between prompts, so that the next one re-reads only what it does not share with the last."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from ._abi import PAGE_TOKENS
from .errors import InvalidArgumentError

if TYPE_CHECKING:
    from .generate import PageBudget
    from .session import Session


class KeptSequence:
    """The KV of one conversation. From Model.keep(); generate and chat take it as `kept`.

    Its pages are taken from the pool until close(), also while nobody generates. For one caller at a time.
    tokens: the ids whose KV it holds.  pages: how many pages of the budget are spoken for by it.
    """

    def __init__(self, session: Session, budget: PageBudget) -> None:
        self.session, self._budget = session, budget
        self._seq = 0
        self.tokens: list[int] = []

    @property
    def pages(self) -> int:
        return -(-len(self.tokens) // PAGE_TOKENS)

    def take(self, prompt: Sequence[int]) -> tuple[int, int]:
        """(a sequence, how many first tokens of the prompt are in it); the caller owns both it and the pages, until put().

        At least one token of the prompt is left to be read, for the logits after it.
        """
        seq, tokens, self._seq, self.tokens = self._seq, self.tokens, 0, []
        if not seq:
            return self.session.create_sequence(), 0
        n = common_prefix(tokens, prompt[:-1])
        try:
            self.session.truncate(seq, n)
        except BaseException:
            self.session.free_sequence(seq)
            raise
        return seq, n

    def put(self, seq: int, tokens: Sequence[int]) -> None:
        """Takes a sequence back. tokens: what was read and sampled; those that the last step did not get to are not in its KV."""
        self.close()
        try:
            n = self.session.length(seq)
        except InvalidArgumentError:  # the session is closed, and the sequence gone with it
            return
        self._seq, self.tokens = seq, list(tokens[:n])

    def close(self) -> None:
        """Gives the pages back. Harmless when called twice; the next prompt is then read from its start."""
        seq, pages, self._seq, self.tokens = self._seq, self.pages, 0, []
        if seq:
            self.session.free_sequence(seq)
            self._budget.give(pages)

    def __enter__(self) -> KeptSequence:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two lists share."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
