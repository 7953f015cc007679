"""The page pool against a model of it, under random creates, steps, forks, truncates and frees.

The model counts pages the long way: a page is an object, a sequence holds a list of them, and the pages in use are the distinct ones.
"""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from goldens.weights import write_hf_folder
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from tiny import GOLDENS, all_logits, golden_weights

from pyruntime.errors import InvalidArgumentError, OutOfPagesError
from pyruntime.session import Entry, Session, Weights

PAGE, N_PAGE, MAX_CONTEXT, N_VOCAB = 64, 9, 256, 96
CASE = "mistral_window"  # its window, 48, is shorter than a page: old pages must still be counted, and never be read

Pages = list[object]


@lru_cache(maxsize=1)
def weights() -> Weights:
    with tempfile.TemporaryDirectory() as folder:
        return golden_weights(write_hf_folder(GOLDENS / CASE, Path(folder) / CASE, "bf16"))


@lru_cache(maxsize=1)
def fresh_session() -> Session:
    return Session(weights(), max_context=MAX_CONTEXT, threads=1)


@lru_cache(maxsize=4096)
def fresh_logits(tokens: tuple[int, ...]) -> np.ndarray:
    """[n_vocab] after these tokens, in a session that holds nothing else."""
    return all_logits(fresh_session(), np.array(tokens, dtype=np.int32))[-1]


def appended(pages: Pages, n_token: int, n_new: int, others: list[Pages]) -> Pages:
    """The pages of a sequence of n_token tokens after n_new more. A page that others hold is not written into but replaced."""
    pages = list(pages)
    if n_token % PAGE and any(pages[-1] is page for held in others for page in held):
        pages[-1] = object()
    while len(pages) * PAGE < n_token + n_new:
        pages.append(object())
    return pages


class PoolMachine(RuleBasedStateMachine):
    sequences = Bundle("sequences")
    counts = st.one_of(st.sampled_from([1, 2, 63, 64, 65, 127, 128]), st.integers(1, 100), st.just(1))

    def __init__(self) -> None:
        super().__init__()
        self.session = Session(weights(), max_context=MAX_CONTEXT, n_page=N_PAGE, max_batch_tokens=50, threads=1)
        self.tokens: dict[int, list[int]] = {}
        self.pages: dict[int, Pages] = {}
        self.peak = 0

    def used(self, pages: dict[int, Pages]) -> int:
        return len({id(page) for held in pages.values() for page in held})

    @initialize(target=sequences)
    def create_first(self) -> int:
        return self.create()

    @rule(target=sequences)
    def create(self) -> int:
        seq = self.session.create_sequence()
        assert seq not in self.tokens
        self.tokens[seq], self.pages[seq] = [], []
        return seq

    @rule(target=sequences, seq=sequences)
    def fork(self, seq: int) -> int:
        new = self.session.fork(seq)
        assert new not in self.tokens
        self.tokens[new], self.pages[new] = list(self.tokens[seq]), list(self.pages[seq])
        return new

    @rule(target=sequences, seq=sequences, n_fork=st.integers(1, 3), counts=st.lists(counts, min_size=4, max_size=4))
    def fork_and_step(self, seq: int, n_fork: int, counts: list[int]) -> object:
        """All sides write in one batch, most of them into pages that they share."""
        if not self.tokens[seq]:
            self.try_step([(seq, 7)], seed=0)
        forks = [self.fork(seq) for _ in range(n_fork)]
        self.try_step(list(zip([*forks, seq], counts, strict=False)), seed=1)
        return multiple(*forks)

    @rule(seq=sequences, share=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0])), at_border=st.booleans())
    def truncate(self, seq: int, share: float, at_border: bool) -> None:
        n = int(share * len(self.tokens[seq]))
        n = n // PAGE * PAGE if at_border else n
        self.session.truncate(seq, n)
        del self.tokens[seq][n:]
        del self.pages[seq][-(-n // PAGE) :]

    @rule(seq=sequences)
    def truncate_too_far(self, seq: int) -> None:
        with pytest.raises(InvalidArgumentError):
            self.session.truncate(seq, len(self.tokens[seq]) + 1)

    @rule(target=sequences, seq=consumes(sequences))
    def free(self, seq: int) -> object:
        self.session.free_sequence(seq)
        del self.tokens[seq], self.pages[seq]
        return multiple()

    @rule(batch=st.lists(st.tuples(sequences, counts), min_size=1, max_size=4, unique_by=lambda e: e[0]), seed=st.integers(0, 3))
    def step(self, batch: list[tuple[int, int]], seed: int) -> None:
        self.try_step(batch, seed)

    def try_step(self, batch: list[tuple[int, int]], seed: int) -> bool:
        """Whether the step had room; either way the session must have done what the model says."""
        entries, after = [], dict(self.pages)
        for seq, n in batch:
            n_token = len(self.tokens[seq])
            new = np.random.default_rng([seed, n_token]).integers(0, N_VOCAB, n, dtype=np.int32)  # few texts, so that many agree
            entries.append(Entry(seq, new))
            after[seq] = appended(after[seq], n_token, n, [held for other, held in after.items() if other != seq])
        if any(len(self.tokens[seq]) + n > MAX_CONTEXT for seq, n in batch):
            with pytest.raises(InvalidArgumentError, match="max_context"):
                self.session.step(entries)
            return False
        if self.used(after) > N_PAGE:
            event("out of pages")
            needed, free = self.used(after) - self.used(self.pages), N_PAGE - self.used(self.pages)
            with pytest.raises(OutOfPagesError, match=f"needs {needed} KV pages of 64 tokens, {free} of {N_PAGE} are free"):
                self.session.step(entries)
            return False
        logits = self.session.step(entries, logits="last").logits
        assert logits is not None
        if any(a is not b for seq in after for a, b in zip(self.pages[seq], after[seq], strict=False)):
            event("copy on write")
        self.pages = after
        self.peak = max(self.peak, self.used(after))
        for row, entry in zip(logits, entries, strict=True):
            self.tokens[entry.seq] += list(map(int, entry.tokens))
            assert np.array_equal(row, fresh_logits(tuple(self.tokens[entry.seq])))
        return True

    @invariant()
    def the_pool_agrees(self) -> None:
        stats = self.session.stats()
        used = self.used(self.pages)
        assert stats["n_page_free"] == N_PAGE - used
        assert stats["n_page_peak"] == self.peak
        assert stats["n_sequence"] == len(self.tokens)
        for seq, tokens in self.tokens.items():
            assert self.session.length(seq) == len(tokens)
            assert len(self.pages[seq]) == -(-len(tokens) // PAGE)

    def teardown(self) -> None:
        """One more token for every live sequence shows that its cache is whole; freeing them all empties the pool."""
        for seq in list(self.tokens):
            self.try_step([(seq, 1)], seed=9)
            self.free(seq)
            self.the_pool_agrees()
        assert self.session.stats()["n_page_free"] == N_PAGE
        self.session.close()


PoolMachine.TestCase.settings = settings(
    max_examples=120, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
TestPool = PoolMachine.TestCase


def test_the_last_sharer_needs_no_copy() -> None:
    """Three sequences share a page and all write in one batch: two copies are made, and two free pages are enough."""
    session = Session(weights(), max_context=64, n_page=3, threads=1)
    first = session.create_sequence()
    session.step([Entry(first, [1, 2, 3])])
    seqs = [first, session.fork(first), session.fork(first)]
    assert session.stats()["n_page_free"] == 2
    logits = session.step([Entry(seq, [10 + i]) for i, seq in enumerate(seqs)], logits="last").logits
    assert logits is not None
    for i, row in enumerate(logits):
        assert np.array_equal(row, fresh_logits((1, 2, 3, 10 + i)))
    assert session.stats()["n_page_copy"] == 2 and session.stats()["n_page_free"] == 0


def test_a_full_page_is_shared_for_good() -> None:
    session = Session(weights(), max_context=256, n_page=4, threads=1)
    ids = np.arange(128, dtype=np.int32) % N_VOCAB
    first = session.create_sequence()
    session.step([Entry(first, ids)])
    second = session.fork(first)
    session.step([Entry(first, [1]), Entry(second, [2])])
    assert session.stats()["n_page_copy"] == 0 and session.stats()["n_page_free"] == 0
    session.free_sequence(first)
    assert session.stats()["n_page_free"] == 1
