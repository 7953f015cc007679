"""Reuse of what earlier prompts and answers left in the KV cache: what is found, what is given up, and that no answer changes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SPARSE

import pyruntime
from pyruntime.attention import Attention
from pyruntime.batch import Call
from pyruntime.engine import Engine
from pyruntime.errors import InvalidArgumentError
from pyruntime.prefix import MIN_TOKENS, PrefixCache, common_prefix
from pyruntime.sampling import SamplingParams
from pyruntime.session import Entry, Session

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def forgetful(folder: Path) -> Iterator[pyruntime.Model]:
    """Keeps nothing."""
    with pyruntime.Model(folder, threads=1, prefix_cache=0) as model:
        yield model
        assert model.stats()["n_page_free"] == model.stats()["n_page"]


@pytest.fixture
def tiny(folder: Path) -> Iterator[pyruntime.Model]:
    with pyruntime.Model(folder, threads=1) as model:
        yield model
        model.clear_cache()
        stats = model.stats()
        assert (stats["n_sequence"], stats["n_page_free"], stats["n_prefix"]) == (0, stats["n_page"], 0)


def text(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(4, 90, n).tolist()


def n_used(model: pyruntime.Model) -> int:
    stats = model.stats()
    return int(stats["n_page"] - stats["n_page_free"])


# ---------------------------------------------------------------- what is found


@pytest.mark.parametrize(("a", "b", "n"), [([], [], 0), ([1, 2], [], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([5], [6], 0)])
def test_common_prefix(a: list[int], b: list[int], n: int) -> None:
    assert common_prefix(a, b) == n == common_prefix(b, a)


@pytest.mark.parametrize("n_token", [15, 16, 63, 64, 65, 130, 700])
def test_the_difference_is_read_and_the_answer_the_same(tiny: pyruntime.Model, forgetful: pyruntime.Model, n_token: int) -> None:
    """Prompts that go on from, branch off from, repeat and shorten earlier ones, page borders included: all that is shared is reused."""
    base, kept = text(1, n_token), list[list[int]]()
    for prompt in (base, [*base, 7, 8, 9], [*base, 7, 50, 51], [*base, 7, 50, 51], base, [9, *base], [9, *base][: n_token // 2 + 1]):
        before = tiny.stats()["n_prefill_token"] + tiny.stats()["n_decode_token"]
        shared = max((common_prefix(k, prompt[:-1]) for k in kept), default=0)
        shared = shared if shared >= MIN_TOKENS else 0
        assert tiny.n_cached(prompt[:-1]) == shared
        done = tiny.generate(prompt, **GREEDY)
        assert (done.usage.cached_tokens, done.usage.prompt_tokens) == (shared, len(prompt))
        assert tiny.stats()["n_prefill_token"] + tiny.stats()["n_decode_token"] - before == len(prompt) - shared + 4
        assert done.token_ids == forgetful.generate(prompt, **GREEDY).token_ids
        kept.append([*prompt, *done.token_ids[:-1]])


def test_a_table_of_random_texts(tiny: pyruntime.Model) -> None:
    """Against the definition: of all texts put in, the longest shared beginning. A fork has just that in it, and all pages come back."""
    session = Session(tiny._weights, max_context=1024, n_page=600, threads=1)
    cache = PrefixCache(session, n_page=600, max_pages=600)
    rng = random.Random(3)
    made: list[list[int]] = []
    for i in range(60):
        parent = rng.choice(made)[: rng.choice([10, 64, 100, 128, 400])] if made and rng.random() < 0.8 else []
        tokens = parent + text(i, rng.choice([1, 20, 64, 90, 200]))
        seq, n = cache.fork(tokens[:-1])
        found = max((common_prefix(m, tokens[:-1]) for m in made), default=0)
        assert n == (found if found >= MIN_TOKENS else 0) and session.length(seq) == n
        session.step([Entry(seq, tokens[n:])])
        cache.put(seq, tokens)
        if len(tokens) >= MIN_TOKENS:
            made.append(tokens)
    maximal = {tuple(m) for m in made if not any(len(o) > len(m) and o[: len(m)] == m for o in made)}
    assert len(cache) == len(maximal) == session.stats()["n_sequence"]
    cache.clear()
    assert session.stats()["n_page_free"] == 600 and list(cache._after) == [0]
    session.close()


def test_turns_of_a_chat(smollm2: pyruntime.Model) -> None:
    """The second turn reads its new tokens only, and two chats share their system message."""
    smollm2.clear_cache()
    system = {"role": "system", "content": "You are a helpful assistant. " * 20}
    first = [system, {"role": "user", "content": "What is the capital of France?"}]
    one = smollm2.chat(first, temperature=0, max_tokens=30)
    second = [*first, {"role": "assistant", "content": one.text}, {"role": "user", "content": "And of Italy?"}]
    two = smollm2.chat(second, temperature=0, max_tokens=30)
    assert two.usage.cached_tokens == one.usage.total_tokens - 1 and two.usage.prompt_tokens - two.usage.cached_tokens < 25
    other = smollm2.chat([system, {"role": "user", "content": "What is 2 + 3?"}], temperature=0, max_tokens=5)
    assert other.usage.cached_tokens > 100
    smollm2.clear_cache()
    again = smollm2.chat(second, temperature=0, max_tokens=30)
    assert again.usage.cached_tokens == 0 and again.token_ids == two.token_ids
    smollm2.clear_cache()


def test_a_prompt_is_of_use_before_its_answer_is_done(tiny: pyruntime.Model) -> None:
    prompt = text(1, 200)
    stream = tiny.generate(prompt, stream=True, ignore_eos=True, max_tokens=500)
    next(stream)
    made = tiny.generate([*prompt, 5], **GREEDY)
    assert made.usage.cached_tokens == 192
    stream.close()
    assert tiny.generate([*prompt, 5, 6], **GREEDY).usage.cached_tokens == 201


def test_time_to_first_token(tiny: pyruntime.Model) -> None:
    """With 4,000 tokens of the prompt in the cache it comes at least ten times sooner."""
    tiny.generate("warm up", **GREEDY)
    prompt = text(2, 4000)
    cold = tiny.generate(prompt, **GREEDY)
    warm = tiny.generate([*prompt, *text(3, 20)], **GREEDY)
    assert warm.usage.cached_tokens == 4000
    assert warm.timings.time_to_first_token < cold.timings.time_to_first_token / 10


def test_what_needs_the_whole_prompt_reads_it(tiny: pyruntime.Model, forgetful: pyruntime.Model) -> None:
    prompt = text(1, 150)
    tiny.generate(prompt, **GREEDY)
    scored = tiny.generate(prompt, prompt_logprobs=2, **GREEDY)
    assert scored.usage.cached_tokens == 0
    assert scored.prompt_logprobs == forgetful.generate(prompt, prompt_logprobs=2, **GREEDY).prompt_logprobs
    assert tiny.perplexity(prompt) == forgetful.perplexity(prompt)


def test_samples_of_a_known_prompt(tiny: pyruntime.Model, forgetful: pyruntime.Model) -> None:
    prompt, options = text(1, 150), {"n": 4, "seed": 2, "max_tokens": 30, "temperature": 1.0}
    expected = [c.token_ids for c in forgetful.generate(prompt, **options)]
    for cached in (0, 149):
        samples = tiny.generate(prompt, **options)
        assert [s.token_ids for s in samples] == expected and samples[0].usage.cached_tokens == cached


# ---------------------------------------------------------------- what is given up


def test_the_least_recently_used_goes_first(folder: Path) -> None:
    """A budget of ten pages: three texts of three pages fit, then the oldest loses its last pages before its first."""
    with pyruntime.Model(folder, threads=1, max_context=1024, prefix_cache=640) as model:
        a, b, c, d = (text(i, 180) for i in range(4))
        options = {**GREEDY, "max_tokens": 1}
        for prompt in (a, b, c):
            model.generate(prompt, **options)
        assert n_used(model) == 9 and [model.n_cached(p) for p in (b, c, a)] == [180, 180, 180]  # a was asked for last
        model.generate(d, **options)
        assert n_used(model) == 10
        assert [model.n_cached(p) for p in (a, c, d)] == [180, 180, 180] and model.n_cached(b) == 64
        assert model.generate(b, **options).usage.cached_tokens == 64


def test_running_texts_come_first(folder: Path) -> None:
    """Kept texts never stand in the way of a prompt, or of a generation that grows, or of scoring."""
    with pyruntime.Model(folder, threads=1, max_context=1024, prefix_cache=1 << 20) as model:
        n_page = model.stats()["n_page"]
        for i in range(20):
            model.generate(text(i, 1000), **GREEDY)
        assert n_used(model) > n_page - 16
        done = model.generate([5] * 24, temperature=0, max_tokens=1000, ignore_eos=True)
        assert len(done.token_ids) == 1000
        assert len(model.logits(text(50, 1024))) == 1024
        assert model.generate([text(30 + i, 900) for i in range(12)], **GREEDY)[11].finish_reason == "length"
        assert model.stats()["n_preempted"] == 0
        assert model._open_session().stats()["n_page_free"] == n_page  # for those who make sequences of their own


def test_another_policy_starts_afresh(tiny: pyruntime.Model) -> None:
    prompt = text(1, 100)
    tiny.generate(prompt, **GREEDY)
    tiny.set_attention("tactic")
    assert tiny.n_cached(prompt) == 0
    tiny.generate(prompt, **GREEDY)
    assert tiny.n_cached(prompt) == 100
    tiny.set_attention("full")
    assert tiny.n_cached(prompt) == 0


def test_wrong_sizes(folder: Path) -> None:
    for value in (-1, 1.5, True):
        with pytest.raises(InvalidArgumentError, match=f"prefix_cache is {value!r}, expected an integer from 0"):
            pyruntime.Model(folder, prefix_cache=value)  # type: ignore[arg-type]


# ---------------------------------------------------------------- all together


@pytest.mark.parametrize("attention", ["full", SPARSE])
def test_many_threads_over_few_pages(tiny: pyruntime.Model, forgetful: pyruntime.Model, attention: str) -> None:
    """Prompts that share beginnings, a pool that holds few of them, cancels at random. With full attention every answer is that of a model
    that keeps nothing; with sparse attention the clusters of earlier texts are reused, and only lengths and pages are compared."""
    prompts = [text(i % 3, 250)[: 40 + 60 * (i % 4)] + text(100 + i % 5, 30 * (i % 3) + 1) for i in range(30)]
    expected = [forgetful.generate(p, **{**GREEDY, "max_tokens": 20}).token_ids for p in prompts]
    engine = Engine(Session(tiny._weights, max_context=1024, n_page=24, threads=1), prefix_pages=24)
    engine.set_attention(Attention.parse(attention))
    failed: list[BaseException] = []
    n_cached = 0

    def work(seed: int) -> None:
        nonlocal n_cached
        rng = random.Random(seed)
        try:
            for _ in range(25):
                i = rng.randrange(30)
                cancelled = threading.Event()
                request = tiny._request(prompts[i], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
                call = Call([[request]], cancelled=cancelled)
                if rng.random() < 0.3:
                    threading.Timer(0.02 * rng.random(), cancelled.set).start()
                engine.submit(call)
                engine.wait(call)
                assert request.finish_reason == "length" or cancelled.is_set()
                if attention == "full":
                    assert request.token_ids == expected[i][: len(request.token_ids)]
                n_cached += request.n_cached
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
        assert not t.is_alive()
    assert not failed, failed
    assert n_cached > 100 * 30
    engine.clear_prefixes()
    stats = engine.session.stats()
    assert (stats["n_sequence"], stats["n_page_free"]) == (0, 24)
    engine.session.close()
