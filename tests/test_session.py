"""Sessions over a small golden model: what a step returns does not depend on anything but the tokens of its sequence."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from goldens.weights import write_hf_folder
from tiny import GOLDENS, all_logits, golden_weights, log_softmax

from pyruntime.errors import AbortedError, InvalidArgumentError, OutOfMemoryError, OutOfPagesError
from pyruntime.sampling import SamplingParams
from pyruntime.session import Entry, Sampler, Session, Weights

CASE, N_VOCAB = "qwen3", 96
Open = Callable[..., Session]


@pytest.fixture(scope="module", params=["bf16", "f32"])
def weights(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Weights:
    return golden_weights(write_hf_folder(GOLDENS / CASE, tmp_path_factory.mktemp("session") / CASE, request.param))


@pytest.fixture
def open_session(weights: Weights) -> Iterator[Open]:
    """Session(weights, ...) with 2 threads; all are closed at the end."""
    opened: list[Session] = []

    def open_one(**options: Any) -> Session:
        opened.append(Session(weights, **{"threads": 2, **options}))
        return opened[-1]

    yield open_one
    for session in opened:
        session.close()


def prompt(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n, dtype=np.int32)


def step_logits(session: Session, entries: list[Entry], which: str = "last") -> np.ndarray:
    logits = session.step(entries, logits=which).logits
    assert logits is not None
    return logits


def filled(session: Session, ids: np.ndarray) -> int:
    """A new sequence that holds `ids`."""
    seq = session.create_sequence()
    session.step([Entry(seq, ids)])
    return seq


def state(session: Session, *seqs: int) -> tuple[Any, ...]:
    stats = session.stats()
    return tuple(session.length(s) for s in seqs), stats["n_page_free"], stats["n_sequence"]


# ---------------------------------------------------------------- the same bits in any company


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64, 512])
@pytest.mark.parametrize("threads", [1, 2])
def test_prefill_and_decode_rows_mix(open_session: Open, max_batch_tokens: int, threads: int) -> None:
    """A batch of prompts of many lengths and decode rows gives each row the logits that it has alone, bit for bit, with any chunk size
    and number of threads."""
    lengths = [130, 1, 64, 65, 2, 1, 7, 63]
    past = [0, 70, 0, 100, 64, 129, 1, 65]
    prompts = [prompt(p + n, seed) for seed, (p, n) in enumerate(zip(past, lengths, strict=True))]
    alone = open_session()
    expected = [all_logits(alone, ids)[p:] for ids, p in zip(prompts, past, strict=True)]

    session = open_session(n_page=64, max_batch_tokens=max_batch_tokens, threads=threads)
    seqs = [session.create_sequence() for _ in prompts]
    for seq, ids, p in zip(seqs, prompts, past, strict=True):
        if p:
            session.step([Entry(seq, ids[:p])])
    logits = step_logits(session, [Entry(s, ids[p:]) for s, ids, p in zip(seqs, prompts, past, strict=True)], "all")
    assert np.array_equal(logits, np.concatenate(expected))
    assert [session.length(s) for s in seqs] == [len(ids) for ids in prompts]


def test_fork_then_diverge(open_session: Open) -> None:
    alone = open_session()
    common, a, b, c = prompt(100), prompt(70, 1), prompt(5, 2), prompt(64, 3)
    session = open_session(n_page=32)
    first = filled(session, common)
    second = session.fork(first)
    third = session.fork(second)
    assert [session.length(s) for s in (first, second, third)] == [100] * 3
    logits = step_logits(session, [Entry(first, a), Entry(third, c), Entry(second, b)])
    for row, tail in zip(logits, (a, c, b), strict=True):
        assert np.array_equal(row, all_logits(alone, np.append(common, tail))[-1])
    assert session.stats()["n_page_copy"] == 2  # the last of three sharers keeps the page
    session.free_sequence(first)
    again = step_logits(session, [Entry(second, a)])
    assert np.array_equal(again[0], all_logits(alone, np.concatenate([common, b, a]))[-1])


def test_truncate_and_redo(open_session: Open) -> None:
    alone = open_session()
    ids, other = prompt(150), prompt(150, 1)
    session = open_session()
    seq = filled(session, ids)
    for keep in (149, 130, 128, 127, 64, 63, 1, 0):
        session.truncate(seq, keep)
        assert session.length(seq) == keep
        assert session.stats()["n_page"] - session.stats()["n_page_free"] == -(-keep // 64)
        expected = all_logits(alone, np.append(ids[:keep], other[keep:]))[-1]
        assert np.array_equal(step_logits(session, [Entry(seq, other[keep:])])[0], expected)
        session.truncate(seq, keep)
        session.step([Entry(seq, ids[keep:])])
    assert np.array_equal(step_logits(session, [Entry(seq, [5])])[0], all_logits(alone, np.append(ids, 5))[-1])


# ---------------------------------------------------------------- scores and samples


def test_target_logprobs(open_session: Open) -> None:
    """Within the float32 rounding of a logit (at most 2^-24 of 10) and of a sum of 96 exponentials: 1e-5."""
    session = open_session(max_batch_tokens=50)
    ids = prompt(160)
    expected = log_softmax(all_logits(session, ids))
    targets = np.append(ids[1:], np.int32(-1))
    targets[::10] = -1
    seq = session.create_sequence()
    scores = session.step([Entry(seq, ids)], targets=targets).target_logprobs
    assert scores is not None
    wanted = np.flatnonzero(targets >= 0)
    assert np.abs(scores[wanted] - expected[wanted, targets[wanted]]).max() < 1e-5
    assert not scores[targets < 0].any()


def test_sampled_and_top_logprobs(open_session: Open) -> None:
    session = open_session(n_page=16)
    ids = [prompt(90), prompt(3, 1), prompt(40, 2)]
    seqs = [session.create_sequence() for _ in ids]
    greedy = SamplingParams(temperature=0.0)
    hot = SamplingParams(temperature=3.0, logit_bias={7: -5.0}, presence_penalty=1.0)
    samplers = [Sampler(greedy, N_VOCAB, seed=0), None, Sampler(hot, N_VOCAB, seed=1)]
    result = session.step([Entry(*e) for e in zip(seqs, ids, samplers, strict=True)], logits="last", logprobs=True, n_top=5)
    assert result.logits is not None and result.logprobs is not None and result.top_ids is not None and result.top_logprobs is not None
    expected = log_softmax(result.logits)
    assert result.sampled[0] == result.logits[0].argmax() and result.sampled[1] == -1
    for row in (0, 2):
        assert abs(result.logprobs[row] - expected[row, result.sampled[row]]) < 1e-5
        assert result.top_ids[row].tolist() == np.argsort(-result.logits[row], kind="stable")[:5].tolist()
        assert np.abs(result.top_logprobs[row] - expected[row, result.top_ids[row]]).max() < 1e-5
        assert (np.diff(result.top_logprobs[row]) <= 0).all()
    assert [session.length(s) for s in seqs] == [90, 3, 40]  # a sampled token is not in the cache until it is given back


def test_a_seed_gives_the_same_tokens_in_any_company(open_session: Open) -> None:
    def draw(session: Session, n_other: int) -> list[int]:
        params = SamplingParams(temperature=1.5, top_k=40)
        seq, sampler = session.create_sequence(), Sampler(params, N_VOCAB, seed=42)
        others = [(session.create_sequence(), Sampler(params, N_VOCAB, seed=i)) for i in range(n_other)]
        tokens, out = prompt(20).tolist(), []
        for i in range(12):
            extra = [Entry(s, prompt(1 + i % 3, 10 * i + k), p) for k, (s, p) in enumerate(others)]
            sampled = session.step([*extra[: n_other // 2], Entry(seq, tokens, sampler), *extra[n_other // 2 :]]).sampled
            tokens = [sampled[n_other // 2]]
            out += tokens
        return out

    alone = draw(open_session(), 0)
    assert len(set(alone)) > 4
    assert draw(open_session(n_page=16, threads=1), 5) == alone
    assert draw(open_session(n_page=16, max_batch_tokens=7), 2) == alone


# ---------------------------------------------------------------- stopping a step


def abort_here(session: Session) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        session.abort()
        time.sleep(0.03)  # the abort flag is looked at every 20 ms

    return progress


def abort_elsewhere(session: Session) -> Callable[[int, int], None]:
    running, stopped = threading.Event(), threading.Event()

    def other_thread() -> None:
        running.wait(10)
        session.abort()
        stopped.set()

    threading.Thread(target=other_thread).start()

    def progress(done: int, total: int) -> None:
        running.set()
        stopped.wait(10)
        time.sleep(0.03)

    return progress


class MineError(Exception):
    pass


def raise_here(session: Session) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        raise MineError

    return progress


@pytest.mark.parametrize("past", [0, 64, 100])
@pytest.mark.parametrize(("stop", "error"), [(abort_here, AbortedError), (abort_elsewhere, AbortedError), (raise_here, MineError)])
def test_a_stopped_step_changes_nothing(open_session: Open, stop: Any, error: type[Exception], past: int) -> None:
    ids, other = prompt(past + 60), prompt(33, 1)
    alone = open_session()
    session = open_session(n_page=16, max_batch_tokens=16)
    seq, bystander = session.create_sequence(), filled(session, other)
    if past:
        session.step([Entry(seq, ids[:past])])
    before = state(session, seq, bystander)
    session.on_progress = stop(session)
    with pytest.raises(error):
        session.step([Entry(bystander, [3, 4]), Entry(seq, ids[past:])])
    session.on_progress = None
    assert state(session, seq, bystander) == before
    logits = step_logits(session, [Entry(seq, ids[past:]), Entry(bystander, [9])])
    assert np.array_equal(logits[0], all_logits(alone, ids)[-1])
    assert np.array_equal(logits[1], all_logits(alone, np.append(other, 9))[-1])


def test_an_error_after_the_last_chunk_changes_nothing(open_session: Open) -> None:
    """The callback fails when the work is already done: the step is undone."""
    session = open_session()
    session.on_progress = raise_here(session)
    seq = session.create_sequence()
    with pytest.raises(MineError):
        session.step([Entry(seq, prompt(70))])
    assert state(session, seq) == ((0,), session.stats()["n_page"], 1)


def test_stopping_a_fork(open_session: Open) -> None:
    """A page that was copied for a step that then stopped stays copied; both sides keep their tokens."""
    alone = open_session()
    session = open_session(n_page=8, max_batch_tokens=8)
    ids, tail = prompt(90), prompt(30, 1)
    first = filled(session, ids)
    second = session.fork(first)
    session.on_progress = abort_here(session)
    with pytest.raises(AbortedError):
        session.step([Entry(second, tail)])
    session.on_progress = None
    assert [session.length(first), session.length(second)] == [90, 90]
    for seq in (first, second):
        assert np.array_equal(step_logits(session, [Entry(seq, tail)])[0], all_logits(alone, np.append(ids, tail))[-1])
        session.free_sequence(seq)
    assert session.stats()["n_page_free"] == 8


def test_progress_counts_tokens(open_session: Open) -> None:
    session = open_session(max_batch_tokens=32)
    seen: list[tuple[int, int]] = []
    session.on_progress = lambda done, total: seen.append((done, total))
    filled(session, prompt(100))
    assert seen == [(32, 100), (64, 100), (96, 100), (100, 100)]


# ---------------------------------------------------------------- errors leave everything as it was


def test_out_of_pages_says_needed_and_free(open_session: Open) -> None:
    session = open_session(n_page=4, max_context=512)
    a, b = filled(session, prompt(100)), filled(session, prompt(10, 1))
    before = state(session, a, b)
    with pytest.raises(OutOfPagesError, match=r"needs 5 KV pages of 64 tokens, 1 of 4 are free"):
        session.step([Entry(b, prompt(60, 2)), Entry(a, prompt(29 + 192, 3))])
    assert state(session, a, b) == before
    logits = step_logits(session, [Entry(a, [1]), Entry(b, [2])])
    alone = open_session()
    assert np.array_equal(logits[0], all_logits(alone, np.append(prompt(100), 1))[-1])
    assert np.array_equal(logits[1], all_logits(alone, np.append(prompt(10, 1), 2))[-1])


def test_a_shared_page_needs_room_for_its_copy(open_session: Open) -> None:
    session = open_session(n_page=1, max_context=64)
    a = filled(session, prompt(10))
    b = session.fork(a)
    with pytest.raises(OutOfPagesError, match="needs 1 KV pages of 64 tokens, 0 of 1 are free"):
        session.step([Entry(b, [1])])
    session.free_sequence(a)
    session.step([Entry(b, [1])])
    assert session.length(b) == 11


BAD_STEPS: dict[str, tuple[Callable[[int, int], list[Entry]], str]] = {
    "max_context": (lambda a, b: [Entry(b, [1]), Entry(a, prompt(101))], "has 100 tokens; 101 more do not fit max_context 200"),
    "longer than max_context": (lambda a, b: [Entry(a, prompt(201))], r"n_token of entry 0 is 201, expected 1\.\.200"),
    "duplicate sequence": (lambda a, b: [Entry(a, [1]), Entry(b, [1]), Entry(a, [2])], "sequence 1 appears twice"),
    "unknown sequence": (lambda a, b: [Entry(a, [1]), Entry(77, [1])], "sequence 77 does not exist"),
    "negative sequence": (lambda a, b: [Entry(-1, [1])], "sequence -1 does not exist"),
    "token above": (lambda a, b: [Entry(b, [1]), Entry(a, [1, N_VOCAB])], "token 96 at 1 of entry 1 is outside the vocabulary of 96"),
    "token below": (lambda a, b: [Entry(a, [-1])], "token -1 at 0 of entry 0"),
    "huge token": (lambda a, b: [Entry(a, [2**40])], "1099511627776, which is not a token id"),
    "token of 70 bits": (lambda a, b: [Entry(a, [2**70])], "tokens must be integers"),
    "float token": (lambda a, b: [Entry(a, [1.5])], "tokens must be integers"),
    "text token": (lambda a, b: [Entry(a, ["x"])], "tokens must be integers"),
    "no tokens": (lambda a, b: [Entry(a, [])], r"n_token of entry 0 is 0, expected 1\.\."),
    "no entries": (lambda a, b: [], "n_seq is 0, expected 1 or more"),
}


@pytest.mark.parametrize("what", BAD_STEPS)
def test_bad_steps(open_session: Open, what: str) -> None:
    make, message = BAD_STEPS[what]
    session = open_session(max_context=200, n_page=8)
    a, b = filled(session, prompt(100)), filled(session, prompt(64, 1))
    before = state(session, a, b)
    with pytest.raises(InvalidArgumentError, match=message):
        session.step(make(a, b))
    assert state(session, a, b) == before
    assert np.array_equal(step_logits(session, [Entry(a, [1])])[0], all_logits(open_session(), np.append(prompt(100), 1))[-1])


def test_a_sampler_belongs_to_one_entry(open_session: Open) -> None:
    session = open_session(n_page=4)
    a, b = session.create_sequence(), session.create_sequence()
    sampler = Sampler(SamplingParams(), N_VOCAB, seed=0)
    with pytest.raises(InvalidArgumentError, match="sampler"):
        session.step([Entry(a, [1], sampler), Entry(b, [2], sampler)])
    with pytest.raises(InvalidArgumentError, match="made for a vocabulary of 95, the model has 96"):
        session.step([Entry(a, [1], Sampler(SamplingParams(), N_VOCAB - 1, seed=0))])
    assert session.length(a) == session.length(b) == 0


def test_bad_targets_and_counts(open_session: Open) -> None:
    session = open_session()
    seq = session.create_sequence()
    sampler = Sampler(SamplingParams(), N_VOCAB, seed=0)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"targets": np.array([1, 2])}, "targets has 2 entries, expected 3"),
        ({"targets": np.array([1, 2, N_VOCAB])}, "target 96 at 2 of entry 0"),
        ({"targets": np.array([1, 2, -2])}, "-2, which is not a token id"),
        ({"n_top": N_VOCAB + 1}, r"n_top is 97, expected 0\.\.96"),
    ]
    for options, message in bad:
        with pytest.raises(InvalidArgumentError, match=message):
            session.step([Entry(seq, [1, 2, 3], sampler)], **options)
    assert session.length(seq) == 0


def test_sequence_errors(open_session: Open) -> None:
    session = open_session()
    seq = filled(session, prompt(10))
    for call in (session.fork, session.length, session.free_sequence, lambda s: session.truncate(s, 0)):
        with pytest.raises(InvalidArgumentError, match="sequence 99 does not exist"):
            call(99)
    for n in (11, -1):
        with pytest.raises(InvalidArgumentError, match=f"n_token is {n}, sequence {seq} has 10 tokens"):
            session.truncate(seq, n)
    session.free_sequence(seq)
    with pytest.raises(InvalidArgumentError, match=f"sequence {seq} does not exist"):
        session.free_sequence(seq)
    assert session.create_sequence() != seq  # ids are not used twice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_context": -1}, "max_context is -1"),
        ({"n_page": -5}, "n_page is -5"),
        ({"max_batch_tokens": 1 << 20}, "max_batch_tokens is 1048576"),
        ({"threads": 5000}, "n_threads is 5000"),
        ({"cpu_isa": "mmx"}, "mmx"),
    ],
)
def test_bad_session_options(weights: Weights, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Session(weights, **options)


def test_a_pool_that_does_not_fit(weights: Weights) -> None:
    with pytest.raises(OutOfMemoryError, match=r"16777216 pages .* needs \d+ MiB .* MiB are free, which fits \d+ tokens"):
        Session(weights, n_page=1 << 24, threads=1)


# ---------------------------------------------------------------- threads, counters, lifetime


def test_two_threads_in_one_session(open_session: Open) -> None:
    alone = open_session()
    session = open_session(n_page=32)
    texts = [prompt(150, seed) for seed in range(4)]
    expected = [all_logits(alone, ids) for ids in texts]
    got: dict[int, list[np.ndarray]] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        seq = session.create_sequence()
        for begin in range(0, 150, 15):
            got[i].append(step_logits(session, [Entry(seq, texts[i][begin : begin + 15])], "all"))
        session.free_sequence(seq)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(4):
        assert np.array_equal(np.concatenate(got[i]), expected[i])
    assert session.stats()["n_page_free"] == 32 and session.stats()["n_sequence"] == 0


def test_closing_while_another_thread_works(open_session: Open) -> None:
    """close() stops the step, waits for it, and later calls say that the session is gone."""
    session = open_session(max_context=4096, n_page=64, max_batch_tokens=16)
    seq = session.create_sequence()
    running = threading.Event()
    outcome: list[BaseException] = []

    def progress(done: int, total: int) -> None:
        running.set()
        time.sleep(0.005)

    session.on_progress = progress

    def work() -> None:
        try:
            session.step([Entry(seq, prompt(4000))])
        except BaseException as error:
            outcome.append(error)
        session.free_sequence(seq)

    thread = threading.Thread(target=work)
    thread.start()
    assert running.wait(10)
    session.close()
    thread.join(10)
    assert len(outcome) == 1 and isinstance(outcome[0], AbortedError)
    session.close()
    with pytest.raises(InvalidArgumentError, match="the session is closed"):
        session.step([Entry(seq, [1])])


def test_counters(open_session: Open) -> None:
    session = open_session(n_page=8, max_context=256, max_batch_tokens=64, threads=2)
    fresh = session.stats()
    page = 2 * 2 * 2 * 128 * 64  # K and V, layers, h_kv, d_head, tokens
    assert fresh["page_bytes"] in (2 * page, 4 * page) and fresh["kv_bytes"] == 8 * fresh["page_bytes"]
    assert [fresh[k] for k in ("n_page", "n_page_free", "n_page_peak", "n_sequence", "n_step")] == [8, 8, 0, 0, 0]
    assert [fresh[k] for k in ("n_threads", "max_context", "max_batch_tokens")] == [2, 256, 64]
    a, b = filled(session, prompt(100)), session.create_sequence()
    session.step([Entry(a, [1]), Entry(b, prompt(70))])
    session.step([Entry(a, [1]), Entry(b, [2])])
    fork = session.fork(a)
    session.step([Entry(fork, [1])])
    with pytest.raises(InvalidArgumentError):
        session.step([Entry(a, [-1])])
    stats = session.stats()
    assert [stats[k] for k in ("n_step", "n_prefill_token", "n_decode_token", "n_page_copy", "n_sequence")] == [4, 170, 4, 1, 3]
    assert [stats[k] for k in ("n_page_free", "n_page_peak")] == [3, 5]
    assert stats["prefill_seconds"] > 0 and stats["decode_seconds"] > 0
    for seq in (a, b, fork):
        session.free_sequence(seq)
    assert [session.stats()[k] for k in ("n_page_free", "n_page_peak", "n_sequence")] == [8, 5, 0]


def test_a_session_keeps_its_weights(tmp_path: Path) -> None:
    weights = golden_weights(write_hf_folder(GOLDENS / CASE, tmp_path / CASE, "bf16"))
    session = Session(weights, threads=1)
    expected = all_logits(session, prompt(20))
    golden_weights.cache_clear()
    weights.close()
    assert np.array_equal(all_logits(session, prompt(20)), expected)
    with pytest.raises(InvalidArgumentError, match="model is NULL"):
        Session(weights)


def test_a_dropped_session_is_freed_at_once(weights: Weights) -> None:
    session = Session(weights, threads=1)
    all_logits(session, prompt(20))
    there = weakref.ref(session)
    del session
    assert there() is None
