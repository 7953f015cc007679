"""Generation with the real model: the same greedy text whatever the way, and every option of a call."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import EMOJI, log_softmax, write_tiny_model

import pyruntime
from pyruntime.batch import Call
from pyruntime.engine import Engine
from pyruntime.errors import InvalidArgumentError, OutOfPagesError
from pyruntime.generate import Request
from pyruntime.sampling import SamplingParams
from pyruntime.session import Entry, Session

N_NEW = 14
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "def add(a, b):\n    return",
    "1, 2, 3, 4,",
    "Water",
    "In the beginning " * 24,
    "A list of three fruits:\n1. Apple\n2.",
    "The quick brown fox jumps over the lazy dog. " * 7,
]


@pytest.fixture(scope="module")
def alone(smollm2: pyruntime.Model) -> list[pyruntime.Completion]:
    """Every prompt by itself, greedy."""
    return [smollm2.generate(p, temperature=0, max_tokens=N_NEW) for p in PROMPTS]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pyruntime.Model(write_tiny_model(tmp_path_factory.mktemp("generate") / "tiny"), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose long prompts take seconds."""
    return write_tiny_model(tmp_path_factory.mktemp("interrupt") / "long", max_position_embeddings=400_000)


@pytest.fixture(autouse=True)
def the_pool_is_left_empty(request: pytest.FixtureRequest) -> Any:
    yield
    for name in ("smollm2", "tiny"):
        if name in request.fixturenames:
            model = request.getfixturevalue(name)
            model.clear_cache()
            stats = model.stats()
            assert (stats["n_sequence"], stats["n_page_free"]) == (0, stats["n_page"])


def decode(session: Session, seq: int, ids: list[int], n: int) -> list[int]:
    """n greedy tokens by hand, after appending `ids`."""
    out: list[int] = []
    while len(out) < n:
        logits = session.step([Entry(seq, ids)], logits="last").logits
        assert logits is not None
        ids = [int(logits[0].argmax())]
        out += ids
    return out


# ---------------------------------------------------------------- one greedy text


def test_a_batch_of_eight(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    together = smollm2.generate(PROMPTS, temperature=0, max_tokens=N_NEW)
    assert len({r.usage.prompt_tokens for r in together}) == len(PROMPTS)
    for one, other in zip(alone, together, strict=True):
        assert (other.token_ids, other.text, other.finish_reason) == (one.token_ids, one.text, one.finish_reason)
        assert other.usage.total_tokens == one.usage.total_tokens
        assert other.usage.completion_tokens == len(other.token_ids) == N_NEW


def test_streaming(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    for prompt, one in zip(PROMPTS[:3], alone, strict=False):
        stream = smollm2.generate(prompt, stream=True, temperature=0, max_tokens=N_NEW)
        pieces = list(stream)
        assert len(pieces) > N_NEW // 2 and "".join(pieces) == one.text == stream.completion.text
        assert stream.completion.token_ids == one.token_ids and stream.completion.finish_reason == "length"


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64, 500])
def test_any_chunk_size(smollm2: pyruntime.Model, alone: list[pyruntime.Completion], max_batch_tokens: int) -> None:
    session = Session(smollm2._weights, max_context=256, max_batch_tokens=max_batch_tokens, threads=2)
    for i in (1, 5) if max_batch_tokens > 1 else (1,):
        seq = session.create_sequence()
        assert decode(session, seq, smollm2.tokenize(PROMPTS[i]), N_NEW) == alone[i].token_ids
        session.free_sequence(seq)


def test_fork_and_truncate(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    session = Session(smollm2._weights, max_context=256, n_page=16, threads=2)
    ids, expected = smollm2.tokenize(PROMPTS[5]), alone[5].token_ids
    first = session.create_sequence()
    session.step([Entry(first, ids[:-1])])
    second = session.fork(first)
    assert decode(session, first, ids[-1:], N_NEW) == expected
    assert decode(session, second, ids[-1:], N_NEW) == expected
    session.truncate(first, len(ids) - 20)
    decode(session, first, [11, 12, 13], 4)
    session.truncate(first, len(ids) - 20)
    assert decode(session, first, ids[-20:], N_NEW) == expected


def test_threads_give_the_same_texts(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    """Four threads call one model at once."""
    results: dict[int, list[int]] = {}

    def work(i: int) -> None:
        results[i] = smollm2.generate(PROMPTS[i], temperature=0, max_tokens=N_NEW).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {i: alone[i].token_ids for i in range(4)}


def test_prompt_as_ids(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    ids = smollm2.tokenize(PROMPTS[0])
    for prompt in (ids, tuple(ids), np.array(ids)):
        assert smollm2.generate(prompt, temperature=0, max_tokens=N_NEW).token_ids == alone[0].token_ids
    assert [r.token_ids for r in smollm2.generate([ids], temperature=0, max_tokens=N_NEW)] == [alone[0].token_ids]


# ---------------------------------------------------------------- sampling


def test_seeds(smollm2: pyruntime.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 1.0, "top_p": 0.95}
    one = smollm2.generate(PROMPTS[1], seed=7, **options)
    assert one.seed == 7
    assert smollm2.generate(PROMPTS[1], seed=7, **options).token_ids == one.token_ids
    assert smollm2.generate([PROMPTS[5], PROMPTS[1], PROMPTS[3]], seed=7, **options)[1].token_ids == one.token_ids
    assert "".join(smollm2.generate(PROMPTS[1], stream=True, seed=7, **options)) == one.text
    assert smollm2.generate(PROMPTS[1], seed=8, **options).token_ids != one.token_ids
    fresh = smollm2.generate(PROMPTS[1], **options)
    assert fresh.seed != smollm2.generate(PROMPTS[1], **options).seed
    assert smollm2.generate(PROMPTS[1], seed=fresh.seed, **options).token_ids == fresh.token_ids


def test_logit_bias(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 3}
    first = alone[0].token_ids[0]
    assert smollm2.generate(PROMPTS[0], logit_bias={first: -float("inf")}, **options).token_ids[0] != first
    assert smollm2.generate(PROMPTS[0], logit_bias={1234: 1000.0}, **options).token_ids == [1234] * 3


def test_repetition_penalties(smollm2: pyruntime.Model) -> None:
    """Enough of either penalty, and no token comes twice."""
    for options in ({"presence_penalty": 100.0}, {"frequency_penalty": 100.0}):
        ids = smollm2.generate("1 1 1 1 1 1", temperature=0, max_tokens=12, ignore_eos=True, **options).token_ids
        assert len(set(ids)) == 12
    one = smollm2.tokenize("1 1 1")[-1]
    assert one not in smollm2.generate("1 1 1 1 1 1", temperature=0, max_tokens=6, repetition_penalty=100.0).token_ids


def test_logprobs_are_the_log_softmax_of_logits(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    """The logits are the same bits, so only the float32 sum over 49,152 exponentials differs: within 1e-4."""
    ids = smollm2.tokenize(PROMPTS[2])
    made = smollm2.generate(PROMPTS[2], temperature=0, max_tokens=6, logprobs=4)
    assert made.logprobs is not None and made.token_ids == alone[2].token_ids[:6]
    logits = smollm2.logits(ids + made.token_ids)[len(ids) - 1 : -1]
    expected = log_softmax(logits)
    for i, entry in enumerate(made.logprobs):
        assert entry.token_id == made.token_ids[i] and entry.text == smollm2.tokenizer.id_to_text(entry.token_id)
        assert abs(entry.logprob - expected[i, entry.token_id]) < 1e-4
        assert [t for t, _, _ in entry.top] == np.argsort(-logits[i], kind="stable")[:4].tolist()
        assert max(abs(p - expected[i, t]) for t, _, p in entry.top) < 1e-4
    only = smollm2.generate(PROMPTS[2], temperature=0, max_tokens=2, logprobs=0)
    assert only.logprobs is not None and [e.top for e in only.logprobs] == [[], []]
    assert smollm2.generate(PROMPTS[2], temperature=0, max_tokens=2).logprobs is None


@pytest.mark.parametrize("k", [0, 3])
def test_prompt_logprobs_are_the_log_softmax_of_logits(smollm2: pyruntime.Model, k: int) -> None:
    """Over a prompt that is scored in several pieces; tolerance as above."""
    ids = smollm2.tokenize(PROMPTS[5])
    assert len(ids) > 70
    made = smollm2.generate(ids, temperature=0, max_tokens=2, prompt_logprobs=k)
    assert made.prompt_logprobs is not None and len(made.prompt_logprobs) == len(ids) and made.prompt_logprobs[0] is None
    logits = smollm2.logits(ids)
    expected = log_softmax(logits)
    for i, entry in enumerate(made.prompt_logprobs[1:]):
        assert entry is not None and entry.token_id == ids[i + 1] and entry.text == smollm2.tokenizer.id_to_text(ids[i + 1])
        assert abs(entry.logprob - expected[i, ids[i + 1]]) < 1e-4
        assert [t for t, _, _ in entry.top] == np.argsort(-logits[i], kind="stable")[:k].tolist()
        assert all(abs(p - expected[i, t]) < 1e-4 for t, _, p in entry.top)
    assert smollm2.generate(ids, temperature=0, max_tokens=2).token_ids == made.token_ids
    assert smollm2.generate(ids, temperature=0, max_tokens=1, n=2, prompt_logprobs=k)[1].prompt_logprobs == made.prompt_logprobs


def test_samples_share_one_prefill(smollm2: pyruntime.Model) -> None:
    """Eight samples read the prompt once, and each is what its seed gives alone."""
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "repetition_penalty": 1.1}
    n_prompt = len(smollm2.tokenize(PROMPTS[5]))
    before = smollm2.stats()
    samples = smollm2.generate(PROMPTS[5], n=8, seed=100, **options)
    after = smollm2.stats()
    assert after["n_prefill_token"] - before["n_prefill_token"] == n_prompt
    assert after["n_decode_token"] - before["n_decode_token"] <= 8 * 5
    assert [s.usage.cached_tokens for s in samples] == [0] + [n_prompt] * 7 and [s.seed for s in samples] == list(range(100, 108))
    for i in (0, 3, 7):
        assert smollm2.generate(PROMPTS[5], seed=100 + i, **options).token_ids == samples[i].token_ids
    assert len({tuple(s.token_ids) for s in samples}) > 4


def test_the_shape_of_samples(tiny: pyruntime.Model) -> None:
    options: dict[str, Any] = {"max_tokens": 4, "seed": 1, "ignore_eos": True, "logprobs": 2}
    single = tiny.generate("abc", **options)
    assert [s.token_ids for s in tiny.generate("abc", n=1, **options)] == [single.token_ids]
    pairs: Any = tiny.generate(["abc", "d"], n=2, **options)
    assert [len(p) for p in pairs] == [2, 2] and pairs[0][0].token_ids == single.token_ids
    for one, other in zip(pairs[0], (single, tiny.generate("abc", **{**options, "seed": 2})), strict=True):
        for a, b in zip(one.logprobs, other.logprobs or [], strict=True):  # on the host and in the step: rounding only
            assert abs(a.logprob - b.logprob) < 1e-5 and [t for t, _, _ in a.top] == [t for t, _, _ in b.top]
    stream = tiny.generate("abc", n=3, stream=True, **options)
    texts = ["", "", ""]
    for i, piece in stream.indexed():
        texts[i] += piece
    assert texts == [s.text for s in tiny.generate("abc", n=3, **options)] == [c.text for c in stream.completions]
    assert tiny.generate([], n=2) == []


def test_logits_processors(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    """In place or returned, one after the other, with the tokens so far; before every other parameter."""
    seen: list[list[int]] = []

    def force(ids: list[int], logits: np.ndarray) -> None:
        seen.append(ids)
        if len(ids) == 1:
            logits[:] = -np.inf
            logits[1234] = 0

    made = smollm2.generate(PROMPTS[0], temperature=0, max_tokens=3, logits_processors=[lambda _, x: x * 2, force], logprobs=2)
    assert made.token_ids[0] == alone[0].token_ids[0] and made.token_ids[1] == 1234
    assert seen == [[], made.token_ids[:1], made.token_ids[:2]]
    assert made.logprobs is not None and made.logprobs[1].logprob < -1 and len(made.logprobs[1].top) == 2  # the model's own
    same = smollm2.generate(PROMPTS[1], temperature=0, max_tokens=N_NEW, logits_processors=[lambda _, x: x])
    assert same.token_ids == alone[1].token_ids
    seeded: dict[str, Any] = {"max_tokens": 5, "seed": 4, "top_k": 50, "repetition_penalty": 1.2}
    assert (
        smollm2.generate(PROMPTS[1], logits_processors=[lambda _, x: None], **seeded).token_ids
        == smollm2.generate(PROMPTS[1], **seeded).token_ids
    )


@pytest.mark.parametrize(
    ("process", "error", "message"),
    [
        (lambda _, x: x[:5], InvalidArgumentError, r"returned an array of shape \(5,\), expected \(96,\)"),
        (lambda _, x: x + np.nan, InvalidArgumentError, "largest logit is nan"),
        (lambda _, x: x - np.inf, InvalidArgumentError, "largest logit is -inf"),
        (lambda _, x: 1 / 0, ZeroDivisionError, "division by zero"),
    ],
)
def test_logits_processors_that_are_wrong(tiny: pyruntime.Model, process: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny.generate("abc", max_tokens=5, logits_processors=[process])
    with pytest.raises(InvalidArgumentError, match="cannot generate or score with its own model"):
        tiny.generate("abc", max_tokens=5, logits_processors=[lambda _, x: tiny.generate("x")])


def test_timings(smollm2: pyruntime.Model) -> None:
    made = smollm2.generate(PROMPTS[5], temperature=0, max_tokens=5, ignore_eos=True)
    t = made.timings
    assert 0 < t.time_to_first_token < t.total
    assert t.prefill_tok_s == pytest.approx(made.usage.prompt_tokens / t.time_to_first_token)
    assert t.decode_tok_s == pytest.approx(4 / (t.total - t.time_to_first_token))


# ---------------------------------------------------------------- where it ends


@pytest.mark.parametrize(("begin", "end"), [(0, 4), (3, 9), (8, 20), (17, 18)])
def test_stop_strings(smollm2: pyruntime.Model, alone: list[pyruntime.Completion], begin: int, end: int) -> None:
    """Any stretch of the greedy text ends it, wherever token borders are, and no part of it is ever shown."""
    text = alone[1].text
    stop = text[begin:end]
    expected = text[: text.index(stop)]
    stream = smollm2.generate(PROMPTS[1], stream=True, temperature=0, max_tokens=N_NEW, stop=["never seen", stop])
    assert "".join(stream) == expected
    done = stream.completion
    assert (done.text, done.finish_reason, done.stop_reason) == (expected, "stop", stop)
    assert alone[1].token_ids[: len(done.token_ids)] == done.token_ids


def test_a_stop_string_that_only_begins(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    """What was held back because it looked like one comes out in the end."""
    stops = [alone[1].text[5:12] + "\0", alone[1].text[-3:] + "\0"]
    made = smollm2.generate(PROMPTS[1], temperature=0, max_tokens=N_NEW, stop=stops)
    assert made.text == alone[1].text and made.finish_reason == "length" and made.stop_reason is None


def test_stop_string_across_token_borders(tiny: pyruntime.Model) -> None:
    """Tokens of one character each: every stop string crosses borders."""
    whole = tiny.generate("Hello", temperature=0, max_tokens=40, ignore_eos=True).text
    for begin in range(0, len(whole) - 5, 3):
        stop = whole[begin : begin + 5]
        pieces = list(tiny.generate("Hello", stream=True, temperature=0, max_tokens=40, ignore_eos=True, stop=stop))
        assert "".join(pieces) == whole[: whole.index(stop)]


def test_stop_token_ids(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    ids = alone[1].token_ids
    at = next(i for i in range(3, len(ids)) if ids[i] not in ids[:i])
    made = smollm2.generate(PROMPTS[1], temperature=0, max_tokens=N_NEW, stop_token_ids=[ids[at]])
    assert made.token_ids == ids[: at + 1]
    assert (made.finish_reason, made.stop_reason, made.text) == ("stop", ids[at], smollm2.detokenize(ids[:at]))


def test_end_token_min_tokens_and_ignore_eos(smollm2: pyruntime.Model) -> None:
    ask: Any = [{"role": "user", "content": "Say only: yes"}]
    ended = smollm2.chat(ask, temperature=0, max_tokens=60)
    assert ended.finish_reason == "stop" and ended.stop_reason is None and ended.token_ids[-1] in smollm2.eos_ids
    assert "<|" not in ended.text
    n = len(ended.token_ids)
    longer = smollm2.chat(ask, temperature=0, max_tokens=60, min_tokens=n + 5)
    assert len(longer.token_ids) >= n + 5 and longer.token_ids[: n - 1] == ended.token_ids[:-1]
    assert not set(longer.token_ids[: n + 4]) & set(smollm2.eos_ids)
    on = smollm2.chat(ask, temperature=0, max_tokens=n + 3, ignore_eos=True)
    assert on.token_ids[:n] == ended.token_ids and len(on.token_ids) == n + 3 and on.finish_reason == "length"


def test_min_tokens_keeps_the_logit_bias(tiny: pyruntime.Model) -> None:
    """The ban on end tokens is on top of the caller's own bias, and the bias is back when the ban is lifted."""
    options: dict[str, Any] = {"temperature": 0, "logit_bias": {2: 1e5, 10: 1e4}, "max_tokens": 9}
    made = tiny.generate("abc", min_tokens=5, **options)
    assert made.token_ids == [10] * 5 + [2] and made.finish_reason == "stop"
    assert tiny.generate("abc", **options).token_ids == [2]


def test_max_tokens(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    assert smollm2.generate(PROMPTS[0], temperature=0, max_tokens=1).token_ids == alone[0].token_ids[:1]
    assert smollm2.generate(PROMPTS[0], temperature=0, max_new_tokens=3).token_ids == alone[0].token_ids[:3]
    with pytest.raises(InvalidArgumentError, match="max_tokens and max_new_tokens are the same parameter"):
        smollm2.generate(PROMPTS[0], max_tokens=3, max_new_tokens=3)


def test_without_max_tokens_it_fills_the_context(tiny: pyruntime.Model) -> None:
    prompt = [5] * 400
    made = tiny.generate(prompt, temperature=0, ignore_eos=True)
    assert len(prompt) + len(made.token_ids) == tiny.max_context and made.finish_reason == "length"
    with pytest.raises(pyruntime.ContextLengthError, match=r"the prompt has 512 tokens, max_context is 512"):
        tiny.generate([5] * 512)


# ---------------------------------------------------------------- text


def test_a_stream_never_breaks_a_character(smollm2: pyruntime.Model) -> None:
    """A few-shot prompt makes the model go on with emoji and Chinese, each of them several tokens."""
    for prompt in ("🙂🎉🙂🎉🙂🎉🙂🎉🙂🎉🙂🎉", "你好世界，你好世界，你好世界，你好世界，你好"):
        stream = smollm2.generate(prompt, stream=True, temperature=0, max_tokens=24)
        pieces = list(stream)
        assert any(c > "\u2000" and len(smollm2.tokenize(c)) > 1 for c in "".join(pieces[:-1])), pieces
        assert not any("\ufffd" in piece for piece in pieces[:-1])
        assert "".join(pieces) == stream.completion.text == smollm2.detokenize(stream.completion.token_ids)


@pytest.mark.parametrize("text", ["naïve 你好，世界 🙂🎉👩‍👩‍👧 ok", "🙂", "é" * 5, "𝔘𝔫𝔦𝔠𝔬𝔡𝔢"])
def test_pieces_of_any_text(smollm2: pyruntime.Model, text: str) -> None:
    """The same path that sampled tokens take, fed with chosen ones."""
    request = smollm2._request([1], SamplingParams())
    pieces = [request.take(token) for token in smollm2.tokenize(text)]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end(tiny: pyruntime.Model) -> None:
    """Cut in the middle of an emoji: one U+FFFD at the very end, in the stream as in the whole text."""
    ids = tiny.tokenize(EMOJI)
    assert len(ids) == 4
    force: dict[str, Any] = {"temperature": 0, "logit_bias": {ids[0]: 1e5}, "max_tokens": 1}
    assert list(tiny.generate("abc", stream=True, **force)) == ["\ufffd"]
    assert tiny.generate("abc", **force).text == "\ufffd"


# ---------------------------------------------------------------- arguments


def test_empty_prompts(smollm2: pyruntime.Model) -> None:
    for prompt in ("", np.array([], dtype=np.int64), [[]], [""]):
        with pytest.raises(InvalidArgumentError, match="the prompt is empty"):
            smollm2.generate(prompt)
    assert smollm2.generate([]) == []


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens is 0, expected an integer from 1"),
    ({"max_tokens": 2.5}, "max_tokens is 2.5"),
    ({"max_tokens": True}, "max_tokens is True"),
    ({"temperature": -1}, "temperature is -1, expected a number from 0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": 10**400}, "temperature is 1000"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"top_p": 0}, "top_p is 0, expected a number above 0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"top_k": -1}, "top_k is -1"),
    ({"min_p": 2}, "min_p is 2"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"stop": ""}, "stop holds ''"),
    ({"stop": 5}, "stop is 5, expected a list"),
    ({"stop": ["ok", b"x"]}, "stop holds b'x'"),
    ({"stop_token_ids": [49152]}, "49152.* is outside the vocabulary of 49152"),
    ({"stop_token_ids": ["2"]}, "stop_token_ids is '2'"),
    ({"logit_bias": {49152: 1.0}}, "49152.* is outside the vocabulary of 49152"),
    ({"logit_bias": {3: float("nan")}}, r"logit_bias\[3\] is nan"),
    ({"logit_bias": {3: float("inf")}}, r"logit_bias\[3\] is inf"),
    ({"logit_bias": {3: 10**400}}, r"logit_bias\[3\] is 1000"),
    ({"logit_bias": {"3": 1.0}}, "a key of logit_bias is '3'"),
    ({"logit_bias": [3]}, r"logit_bias is \[3\]"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"logprobs": 5000}, "logprobs is 5000"),
    ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
    ({"n": 0}, "n is 0, expected an integer from 1 to 128"),
    ({"logits_processors": [5]}, "logits_processors holds 5, expected functions"),
    ({"logits_processors": print}, "logits_processors is <built-in function print>, expected a list"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5, more than max_tokens, 4"),
    ({"ignore_eos": "yes"}, "ignore_eos is 'yes'"),
    ({"temprature": 0.5}, "unknown parameter 'temprature'; known are .*temperature"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(o)[:40] for o, _ in BAD_OPTIONS])
def test_bad_options(smollm2: pyruntime.Model, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        smollm2.generate("Hi", **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (5, "prompt is int, expected text or a list of token ids"),
        (None, "prompt is NoneType"),
        (b"bytes", "prompt is bytes"),
        ([1, 2, "x"], r"prompt\[2\] is 'x', expected a token id from 0 to 49151"),
        ([1, 49152], r"prompt\[1\] is 49152"),
        ([1, -1], r"prompt\[1\] is -1"),
        ([1.0, 2.0], "prompt is float"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_bad_prompts(smollm2: pyruntime.Model, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        smollm2.generate(prompt, max_tokens=1)


def test_a_list_cannot_be_streamed(smollm2: pyruntime.Model) -> None:
    with pytest.raises(InvalidArgumentError, match="stream=True takes one prompt"):
        smollm2.generate(["a", "b"], stream=True)


# ---------------------------------------------------------------- pages


def run(engine: Engine, requests: list[Request]) -> None:
    call = Call([[r] for r in requests])
    engine.submit(call)
    engine.wait(call)


def test_more_prompts_than_pages(tiny: pyruntime.Model) -> None:
    """Twenty requests of two pages each through a pool of five: they go in waves, and each text is the one it gives alone."""
    prompts = [tiny.tokenize("waves " * (8 + i % 5)) for i in range(20)]
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    alone = [tiny.generate(p, temperature=0, max_tokens=30, ignore_eos=True).token_ids for p in prompts]
    session = Session(tiny._weights, max_context=256, n_page=5, threads=1)
    requests = [tiny._request(p, params) for p in prompts]
    run(Engine(session), requests)
    assert [r.token_ids for r in requests] == alone
    stats = session.stats()
    assert stats["n_page_peak"] <= 5 and stats["n_page_free"] == 5


def test_a_request_that_can_never_fit(tiny: pyruntime.Model) -> None:
    session = Session(tiny._weights, max_context=256, n_page=2, threads=1)
    with pytest.raises(OutOfPagesError, match=r"may need 4 KV pages, there are 2"):
        run(Engine(session), [tiny._request([5] * n, SamplingParams(max_tokens=100)) for n in (20, 100)])
    assert session.stats()["n_page_free"] == 2


def test_a_stream_closed_early_frees_its_pages(smollm2: pyruntime.Model) -> None:
    free = smollm2.stats()["n_page_free"]
    stream = smollm2.generate(PROMPTS[0], stream=True, temperature=0, max_tokens=200)
    next(stream)
    assert smollm2.stats()["n_page_free"] < free and stream.completion.finish_reason == "abort"
    stream.close()
    assert smollm2.stats()["n_page_free"] == free
    assert list(stream) == []
    for piece in smollm2.generate(PROMPTS[0], stream=True, temperature=0, max_tokens=200):
        assert piece
        break  # dropping it is enough
    assert smollm2.stats()["n_page_free"] == free
    smollm2.generate(PROMPTS[0], stream=True)  # never read


def test_streams_side_by_side(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    a = smollm2.generate(PROMPTS[0], stream=True, temperature=0, max_tokens=N_NEW)
    b = smollm2.generate(PROMPTS[1], stream=True, temperature=0, max_tokens=N_NEW)
    texts = ["", ""]
    for _ in range(2 * N_NEW):
        texts[0] += next(a, "")
        texts[1] += next(b, "")
    assert texts == [alone[0].text, alone[1].text]


# ---------------------------------------------------------------- cancelling


def test_cancelling_from_another_thread(long_context: Path) -> None:
    """While a prompt is read, while it generates, and a stream; each is over within a second, and keeps what was made."""
    with pyruntime.Model(long_context, threads=1) as model:
        for prompt, options in (([5] * 300_000, {}), ("Hello", {"ignore_eos": True})):
            cancel = threading.Event()
            threading.Timer(0.3, cancel.set).start()
            started = time.perf_counter()
            made: Any = model.generate(prompt, cancel=cancel, temperature=0, **options)  # type: ignore[call-overload]
            assert made.finish_reason == "abort" and time.perf_counter() - started < 3
            assert bool(made.token_ids) == (prompt == "Hello")
        assert made.token_ids[:5] == model.generate("Hello", temperature=0, max_tokens=5, ignore_eos=True).token_ids
        stream = model.generate("Hello", stream=True, ignore_eos=True)
        threading.Timer(0.3, stream.cancel).start()
        text = "".join(stream)
        assert text == stream.completion.text and stream.completion.finish_reason == "abort"
        assert model.generate(["a", "b"], cancel=cancel)[1].finish_reason == "abort"  # set before it began
        model.clear_cache()
        assert model.stats()["n_sequence"] == 0


# ---------------------------------------------------------------- asyncio


def test_async(smollm2: pyruntime.Model, alone: list[pyruntime.Completion]) -> None:
    """Side by side from one event loop: the same texts, whole and in pieces, while the loop goes on."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def pieces(prompt: str) -> list[str]:
        stream = await smollm2.agenerate(prompt, stream=True, temperature=0, max_tokens=N_NEW)
        found = [piece async for piece in stream]
        assert stream.completion.text == "".join(found)
        return found

    async def main() -> None:
        clock = asyncio.create_task(tick())
        whole, streamed, both, samples = await asyncio.gather(
            smollm2.agenerate(PROMPTS[0], temperature=0, max_tokens=N_NEW),
            pieces(PROMPTS[1]),
            smollm2.agenerate([PROMPTS[2], PROMPTS[3]], temperature=0, max_tokens=N_NEW),
            smollm2.agenerate(PROMPTS[1], temperature=0, max_tokens=N_NEW, n=2),
        )
        clock.cancel()
        assert whole.text == alone[0].text
        assert "".join(streamed) == alone[1].text and len(streamed) > N_NEW // 2
        assert [r.text for r in both] == [alone[2].text, alone[3].text]
        assert [r.text for r in samples] == [alone[1].text] * 2
        answer = await smollm2.achat([{"role": "user", "content": "Say only: yes"}], temperature=0, max_tokens=4)
        assert answer.token_ids == smollm2.chat([{"role": "user", "content": "Say only: yes"}], temperature=0, max_tokens=4).token_ids

    asyncio.run(main())
    assert ticks > 3


def test_async_errors_and_cancelling(tiny: pyruntime.Model) -> None:
    async def main() -> None:
        with pytest.raises(InvalidArgumentError, match="the prompt is empty"):
            await tiny.agenerate("")
        with pytest.raises(ZeroDivisionError):
            await tiny.agenerate("abc", logits_processors=[lambda _, x: 1 / 0])
        stream = await tiny.agenerate("abc", stream=True, ignore_eos=True, max_tokens=300)
        async for _ in stream:
            break
        stream.close()
        task = asyncio.create_task(tiny.agenerate("abc", ignore_eos=True, max_tokens=500, logits_processors=[slow]))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        unread = await tiny.agenerate("abc", stream=True, ignore_eos=True, max_tokens=300)
        await asyncio.sleep(0.1)
        del unread

    def slow(_: list[int], logits: np.ndarray) -> None:
        time.sleep(0.01)

    asyncio.run(main())
    for thread in threading.enumerate():
        if thread.name == "pyruntime":
            thread.join(10)
            assert not thread.is_alive()


# ---------------------------------------------------------------- Ctrl-C


INTERRUPTED = """
import sys, time, pyruntime
model = pyruntime.Model(sys.argv[1], threads=1)
expected = model.generate("Hello", temperature=0, max_tokens=20).token_ids
def survived():
    model.clear_cache()
    stats = model.stats()
    assert (stats["n_sequence"], stats["n_page_free"]) == (0, stats["n_page"]), stats
    assert model.generate("Hello", temperature=0, max_tokens=20).token_ids == expected
for what in ("prefill", "stream", "score"):
    stream = None
    try:
        print(what, flush=True)
        if what == "prefill":
            model.generate([5] * 300_000, max_tokens=5)
        elif what == "score":
            model.perplexity([5] * 300_000)
        else:
            stream = model.generate("Hello", stream=True, ignore_eos=True, temperature=0, max_tokens=200_000)
            for piece in stream:
                pass
        raise SystemExit("it was not interrupted")
    except KeyboardInterrupt:
        pass
    if stream is not None:
        assert stream.completion.token_ids[:20] == expected and stream.completion.finish_reason == "abort"
        stream.close()  # the signal may have come between two pieces, where the stream cannot see it
    survived()
print("done", flush=True)
"""


def test_ctrl_c_leaves_the_model_usable(long_context: Path) -> None:
    """A real SIGINT during a long prefill, a stream and a perplexity; each is over within a second, and the model goes on."""
    command = [sys.executable, "-c", INTERRUPTED, str(long_context)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        for what in ("prefill", "stream", "score"):
            assert process.stdout.readline().strip() == what, process.stderr.read()
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            sent = time.perf_counter()
        assert process.stdout.readline().strip() == "done", process.stderr.read()
        assert time.perf_counter() - sent < 3
    finally:
        process.kill()
        process.wait()
    assert process.stderr.read() == ""


def test_a_handler_of_ones_own(long_context: Path) -> None:
    """What the program's own signal handler raises stops the step and arrives; the handler is in place again afterwards."""
    code = """
import os, signal, sys, threading, pyruntime
class Enough(Exception):
    pass
def handler(number, frame):
    raise Enough
for name in (signal.SIGTERM, signal.SIGINT):
    signal.signal(name, handler)
model = pyruntime.Model(sys.argv[1], threads=1)
for name in (signal.SIGTERM, signal.SIGINT):
    threading.Timer(0.5, os.kill, (os.getpid(), name)).start()
    try:
        model.generate([5] * 300_000, max_tokens=5)
    except Enough:
        print("enough")
    assert signal.getsignal(name) is handler
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
model.generate([5] * 300_000, max_tokens=5)
"""
    done = subprocess.run([sys.executable, "-c", code, str(long_context)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("enough\nenough\n", "", 3)


@pytest.mark.parametrize("phase", ["prefill", "stream"])
def test_ctrl_c_on_the_command_line(long_context: Path, tmp_path: Path, phase: str) -> None:
    """Exit code 130, what was made stays on stdout, and no traceback."""
    for delay in (0.4, 1.2, 3):  # seconds; on a busy machine the signal may come before the prompt is being read
        if ctrl_c(long_context, tmp_path, phase, delay):
            return
    raise AssertionError("no signal came while the model was at work")


def ctrl_c(long_context: Path, tmp_path: Path, phase: str, delay: float) -> bool:
    """Whether the signal came during a generation; else it only had to end the program quietly."""
    text = tmp_path / "long.txt"
    text.write_text("abcdefghij" * 20_000 if phase == "prefill" else "abc")
    command = [sys.executable, "-m", "pyruntime.cli", "run", str(long_context), "go", "--file", str(text), "--ignore-eos", "-t", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    assert process.stdout is not None and process.stderr is not None
    try:
        first = process.stderr.readline()  # "loading ..."
        while b"max_context" not in first:
            assert first, "it ended early"
            first = process.stderr.readline()
        shown = process.stdout.read(1) if phase == "stream" else b""
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and b"Traceback" not in err
    if b"stopped by Ctrl-C" not in err:
        assert err.endswith(b"pyruntime: stopped\n"), err
        return False
    assert b"-" not in err.split(b"first token after")[1][:4]
    assert phase == "prefill" or len(shown + out.strip()) > 1
    return True


def test_a_stream_survives_its_model_quietly(tmp_path: Path) -> None:
    """Closing the model under an unfinished stream: reading on is an error, dropping it is silent."""
    code = """
import sys, pyruntime
with pyruntime.Model(sys.argv[1], threads=1) as model:
    stream = model.generate("Hi", stream=True, ignore_eos=True, max_tokens=100)
    other = model.generate("Hi", stream=True, ignore_eos=True, max_tokens=100)
    next(stream), next(other)
try:
    print("read", sum(1 for _ in stream))
except pyruntime.InvalidArgumentError as error:
    print(error)
del stream, other
"""
    folder = write_tiny_model(tmp_path / "tiny")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "closed" in done.stdout


def test_close_stops_a_generation_in_another_thread(long_context: Path) -> None:
    model = pyruntime.Model(long_context, threads=1)
    running = threading.Event()
    model._session.on_progress = lambda done, total: running.set()
    outcome: list[BaseException] = []

    def work() -> None:
        try:
            model.generate([5] * 300_000, max_tokens=5)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert running.wait(20)
    model.close()
    thread.join(10)
    assert [type(e) for e in outcome] == [pyruntime.AbortedError]
