"""Continuous batching: many callers of one model, each with the text that it would get alone."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SPARSE

import pyruntime
from pyruntime.attention import Attention
from pyruntime.batch import RUN_AHEAD, Call
from pyruntime.engine import Engine
from pyruntime.errors import AbortedError, InvalidArgumentError, OutOfPagesError, QueueFullError
from pyruntime.generate import Request
from pyruntime.sampling import SamplingParams
from pyruntime.session import Entry, Session

# Prompts in chunks, every kind of sampling state, and lengths that cross page borders.
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 40},
    {"temperature": 1.0, "seed": 5, "max_tokens": 70},
    {"temperature": 1.0, "seed": 6, "repetition_penalty": 1.3, "max_tokens": 33},
    {"temperature": 0.8, "seed": 7, "top_k": 9, "frequency_penalty": 0.5, "max_tokens": 64},
]


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[pyruntime.Model]:
    with pyruntime.Model(folder, threads=1) as model:
        yield model
        model.clear_cache()
        stats = model.stats()
        assert (stats["n_sequence"], stats["n_page_free"], stats["n_running"], stats["n_waiting"]) == (0, stats["n_page"], 0, 0)


def prompt(i: int) -> list[int]:
    rng = random.Random(i)
    return [rng.randrange(4, 90) for _ in range(rng.choice([1, 5, 63, 64, 65, 130, 400]))]


def options(i: int) -> dict[str, Any]:
    return {**OPTIONS[i % len(OPTIONS)], "ignore_eos": True}


def requests(model: pyruntime.Model, n: int) -> list[Request]:
    return [model._request(prompt(i), SamplingParams(**options(i)), options(i).get("seed")) for i in range(n)]


@pytest.fixture(scope="module")
def alone(tiny: pyruntime.Model) -> list[list[int]]:
    return [tiny.generate(prompt(i), **options(i)).token_ids for i in range(24)]


def small(model: pyruntime.Model, **session: Any) -> Engine:
    """An engine over a session of its own, with the same weights."""
    return Engine(Session(model._weights, max_context=1024, threads=1, **session))


def in_threads(n: int, work: Callable[[int], None]) -> None:
    failed: list[BaseException] = []

    def run(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
        assert not t.is_alive()
    assert not failed, failed


# ---------------------------------------------------------------- sharing


def test_threads_share_the_steps(tiny: pyruntime.Model, alone: list[list[int]]) -> None:
    """24 threads, some of them streaming: every text as alone, in far fewer steps than there are tokens."""
    together = threading.Barrier(24)
    before = tiny.stats()["n_step"]

    def work(i: int) -> None:
        together.wait()
        if i % 3:
            assert tiny.generate(prompt(i), **options(i)).token_ids == alone[i]
        else:
            stream = tiny.generate(prompt(i), stream=True, **options(i))
            assert "".join(stream) == stream.completion.text
            assert stream.completion.token_ids == alone[i]

    in_threads(24, work)
    assert tiny.stats()["n_step"] - before < sum(map(len, alone)) / 3


def test_coroutines_and_threads(tiny: pyruntime.Model, alone: list[list[int]]) -> None:
    async def main() -> None:
        made = await asyncio.gather(*[tiny.agenerate(prompt(i), **options(i)) for i in range(12)])
        assert [m.token_ids for m in made] == alone[:12]

    def work(i: int) -> None:
        if i == 0:
            asyncio.run(main())
        else:
            assert tiny.generate(prompt(i), **options(i)).token_ids == alone[i]

    in_threads(4, work)


def test_scoring_beside_generations(tiny: pyruntime.Model, alone: list[list[int]]) -> None:
    expected = tiny.perplexity(prompt(3) * 4)

    def work(i: int) -> None:
        if i % 2:
            assert tiny.perplexity(prompt(3) * 4) == expected
        else:
            assert tiny.generate(prompt(i), **options(i)).token_ids == alone[i]

    in_threads(8, work)


@pytest.mark.parametrize("attention", ["full", SPARSE])
def test_chunks_and_company_change_nothing(tiny: pyruntime.Model, alone: list[list[int]], attention: str) -> None:
    """All at once, with prompts in pieces of any size beside decoding ones."""
    expected = alone
    for mixed, rows in ((512, 512), (16, 64), (5, 7)):
        engine = small(tiny, n_page=400, max_batch_tokens=rows)
        engine.batch._mixed_rows = mixed
        engine.set_attention(Attention.parse(attention))
        if attention != "full" and expected is alone:
            expected = []
            for request in requests(tiny, 24):
                run(engine, [request])
                expected.append(request.token_ids)
            assert expected != alone
        made = requests(tiny, 24)
        run(engine, made)
        assert [r.token_ids for r in made] == expected
        engine.session.close()


def run(engine: Engine, made: list[Request]) -> Call:
    call = Call([[r] for r in made])
    engine.submit(call)
    engine.wait(call)
    return call


def test_decoding_goes_on_while_a_prompt_is_read(tiny: pyruntime.Model) -> None:
    """A prompt of 1000 tokens in pieces of at most 50: whoever decodes gets a token with each of them."""
    engine = small(tiny, n_page=40)
    engine.batch._mixed_rows = 50
    sizes: list[list[int]] = []
    step = engine.session.step

    def watch(entries: list[Entry], **how: Any) -> Any:
        sizes.append([len(e.tokens) for e in entries])
        return step(entries, **how)

    engine.session.step = watch  # type: ignore[method-assign, assignment]
    first, late = (tiny._request([5] * n, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)) for n in (10, 1000 - 60))
    stream = Call([[first]], streams=True)
    engine.submit(stream)
    engine.wait(stream)
    run(engine, [late])
    assert sizes[0] == [10] and [1, 50] in sizes
    pieces = [s for s in sizes if len(s) == 2 and s[1] > 1]
    assert len(pieces) == 19 and all(s[0] == 1 and 1 < s[1] <= 50 for s in pieces)
    engine.cancel(stream)
    engine.session.close()


# ---------------------------------------------------------------- pages


@pytest.mark.parametrize(("attention", "prefix_pages"), [("full", 0), ("full", 8), (SPARSE, 0), (SPARSE, 8)])
def test_preempted_and_resumed(tiny: pyruntime.Model, attention: str, prefix_pages: int) -> None:
    """A pool that holds a fraction of what is asked for: the youngest lose their pages, begin again, and say the same, whatever state their
    samplers were in. Sparse attention sees generated tokens one by one again."""

    def all_requests() -> list[Request]:
        growing = SamplingParams(temperature=1.0, seed=0, presence_penalty=0.2, max_tokens=150, ignore_eos=True)
        return [*requests(tiny, 24), *[tiny._request([5 + i, 6], growing, i) for i in range(10)]]

    engine = small(tiny, n_page=400)
    engine.set_attention(Attention.parse(attention))
    expected = all_requests()
    for request in expected:
        run(engine, [request])
    engine.session.close()
    engine = Engine(Session(tiny._weights, max_context=1024, threads=1, n_page=8), prefix_pages=prefix_pages)
    engine.set_attention(Attention.parse(attention))
    made = all_requests()
    run(engine, made)
    assert [r.token_ids for r in made] == [r.token_ids for r in expected]
    assert engine.batch.n_preempted > 2
    engine.clear_prefixes()
    stats = engine.session.stats()
    assert stats["n_page_peak"] == 8 and (stats["n_page_free"], stats["n_sequence"]) == (8, 0)
    engine.session.close()


def test_samples_are_preempted_one_by_one(tiny: pyruntime.Model) -> None:
    params = {"max_tokens": 80, "temperature": 1.0, "ignore_eos": True, "prompt_logprobs": 2}
    expected = tiny.generate(prompt(5), n=6, seed=9, **params)
    engine = small(tiny, n_page=9)
    made = [tiny._request(prompt(5), SamplingParams(**params), 9 + i) for i in range(6)]
    call = Call([made])
    engine.submit(call)
    engine.wait(call)
    assert [r.token_ids for r in made] == [e.token_ids for e in expected]
    assert [r.prompt_logprobs for r in made] == [e.prompt_logprobs for e in expected]
    assert engine.session.stats()["n_page_free"] == 9
    engine.session.close()


def test_pages_that_others_hold(tiny: pyruntime.Model) -> None:
    """Outside of the engine somebody holds all pages but two: an error, not a wait without end."""
    engine = small(tiny, n_page=6)
    seq = engine.session.create_sequence()
    engine.session.step([Entry(seq, [5] * 250)])
    with pytest.raises(OutOfPagesError):
        run(engine, [tiny._request([5] * 200, SamplingParams(max_tokens=5))])
    made = tiny._request([5] * 60, SamplingParams(max_tokens=20, ignore_eos=True))
    run(engine, [made])
    assert len(made.token_ids) == 20
    engine.session.close()


# ---------------------------------------------------------------- the queue


def test_a_full_queue_refuses(tiny: pyruntime.Model) -> None:
    engine = small(tiny, n_page=16)
    engine.max_queue = 3
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    calls = [Call([[tiny._request([5, 6], params)]]) for _ in range(4)]
    for call in calls[:3]:
        engine.submit(call)
    with pytest.raises(QueueFullError, match="3 calls are waiting for the model, as many as may: try again later"):
        engine.submit(calls[3])
    calls[0].cancelled.set()  # nobody has swept it out yet; it will not begin, and takes nobody's place
    engine.submit(calls[3])
    for call in calls[1:]:
        engine.wait(call)
    assert [c.requests[0].finish_reason for c in calls] == [None, *["length"] * 3]
    engine.session.close()


def test_a_long_list_lets_others_in(tiny: pyruntime.Model) -> None:
    """Forty prompts of one caller, a pool for four: a later call has its turn long before the list is done."""
    engine = small(tiny, n_page=8)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    many = Call([[tiny._request([5] * 40, params)] for _ in range(40)])
    one = Call([[tiny._request([5] * 40, params)]])
    engine.submit(many)
    engine.submit(one)
    engine.wait(one)
    assert sum(r.finish_reason is not None for r in many.requests) < 8
    engine.wait(many)
    assert all(len(r.token_ids) == 60 for r in many.requests)
    engine.session.close()


def test_a_stream_that_nobody_reads_pauses(tiny: pyruntime.Model, alone: list[list[int]]) -> None:
    """It makes some pieces ahead of its reader, gives up its pages where others need them, and goes on when it is read."""
    engine = small(tiny, n_page=8)
    request = tiny._request([5] * 10, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    expected = tiny.generate([5] * 10, temperature=0, max_tokens=400, ignore_eos=True)
    unread = Call([[request]], streams=True)
    engine.submit(unread)
    others = requests(tiny, 24)
    run(engine, others)
    assert [r.token_ids for r in others] == alone
    assert RUN_AHEAD <= len(request.token_ids) < 120
    text = ""
    while piece := engine.wait(unread):
        text += piece[1]
    assert request.token_ids == expected.token_ids and text == expected.text
    engine.session.close()


# ---------------------------------------------------------------- what goes wrong


def test_an_error_of_one_is_not_that_of_others(tiny: pyruntime.Model, alone: list[list[int]]) -> None:
    def work(i: int) -> None:
        if i % 3 == 0:
            with pytest.raises(ZeroDivisionError):
                tiny.generate(prompt(i), logits_processors=[lambda ids, _: None if len(ids) < 5 else 1 / 0], **options(i))
        elif i % 3 == 1:
            cancel = threading.Event()
            threading.Timer(0.01 * i, cancel.set).start()
            made = tiny.generate(prompt(i), cancel=cancel, **options(i))
            assert made.token_ids == alone[i][: len(made.token_ids)]
        else:
            assert tiny.generate(prompt(i), **options(i)).token_ids == alone[i]

    in_threads(24, work)


def test_an_interrupted_leader_costs_the_others_nothing(tiny: pyruntime.Model, alone: list[list[int]]) -> None:
    """What comes out of a step that was already done is kept before it is raised, so that samplers and texts agree."""
    engine = small(tiny, n_page=100)
    others = Call([[r] for r in requests(tiny, 6)])
    engine.submit(others)

    def press(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    for _ in range(5):
        mine = Call([[tiny._request([5], SamplingParams(max_tokens=50, ignore_eos=True))]])
        engine.submit(mine)
        engine.session.on_progress = press
        with pytest.raises(KeyboardInterrupt):
            engine.wait(mine)
        engine.session.on_progress = None
        engine.cancel(mine)
        assert mine.requests[0].finish_reason is None
    engine.wait(others)
    assert [r.token_ids for r in others.requests] == alone[:6]
    engine.session.close()


def test_a_failing_step_fails_its_calls(tiny: pyruntime.Model) -> None:
    engine = small(tiny, n_page=16)
    step = engine.session.step
    engine.session.step = lambda *_, **__: (_ for _ in ()).throw(pyruntime.DeviceError("gone"))  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(pyruntime.DeviceError, match="gone"):
            run(engine, requests(tiny, 3))
    engine.session.step = step  # type: ignore[method-assign]
    engine.session.abort()
    with pytest.raises(AbortedError):
        run(engine, [tiny._request([5] * 1000, SamplingParams(max_tokens=20))])
    assert engine.stats()["n_running"] == engine.stats()["n_waiting"] == engine.session.stats()["n_sequence"] == 0
    run(engine, requests(tiny, 3))
    engine.session.close()
    with pytest.raises(InvalidArgumentError, match="the model is closed"):
        run(engine, requests(tiny, 1))


CTRL_C = """
import sys, threading, pyruntime
model = pyruntime.Model(sys.argv[1], threads=1)
expected = model.generate("abc", temperature=0, max_tokens=600, ignore_eos=True).token_ids
made = []
def work():
    made.append(model.generate("abc", temperature=0, max_tokens=600, ignore_eos=True).token_ids)
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads:
    t.start()
print("go", flush=True)
try:
    while True:
        model.generate("x" * 1000, max_tokens=500, ignore_eos=True)
except KeyboardInterrupt:
    pass
for t in threads:
    t.join()
assert made == [expected] * 4
model.clear_cache()
stats = model.stats()
assert (stats["n_sequence"], stats["n_running"]) == (0, 0), stats
print("done")
"""


@pytest.mark.parametrize("delay", [0.05, 0.2, 0.35])
def test_ctrl_c_ends_the_call_of_the_main_thread_only(folder: Path, delay: float) -> None:
    process = subprocess.Popen([sys.executable, "-c", CTRL_C, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline() == "go\n", process.stderr.read()
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (out, err) == ("done\n", "")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("attention", ["full", SPARSE])
def test_sixty_four_streams_with_random_cancels(folder: Path, attention: str) -> None:
    """Streams that are read, cancelled, dropped or closed at random for some seconds; what was made is right, and no page is lost."""
    with pyruntime.Model(folder, threads=1, attention=attention, prefix_cache=None if attention == "full" else 0) as model:
        come_and_go(model, [model.generate(prompt(i), **options(i)).token_ids for i in range(24)])
        assert (model.stats()["n_clustered_token"] > 0) == (attention != "full")


def come_and_go(tiny: pyruntime.Model, alone: list[list[int]]) -> None:
    rng = random.Random(1)
    end = time.perf_counter() + 5

    async def reader(seed: int) -> int:
        mine, n_whole = random.Random(seed), 0
        while time.perf_counter() < end:
            i = mine.randrange(24)
            stream = await tiny.agenerate(prompt(i), stream=True, **options(i))
            leave = mine.choice([0, 1, 10, 1000, 1000])
            n = 0
            async for _ in stream:
                n += 1
                if n >= leave:
                    mine.choice([stream.cancel, stream.close, lambda: None])()
                    break
                if mine.random() < 0.05:
                    await asyncio.sleep(0.01)
            made = stream.completion.token_ids
            assert made == alone[i][: len(made)]
            if n < leave:
                assert made == alone[i]
                n_whole += 1
        return n_whole

    async def main() -> None:
        assert sum(await asyncio.gather(*[reader(rng.randrange(10**6)) for _ in range(64)])) > 20

    asyncio.run(main())
    deadline = time.perf_counter() + 10
    while tiny.stats()["n_running"] and time.perf_counter() < deadline:
        time.sleep(0.01)
    tiny.clear_cache()
    stats = tiny.stats()
    assert (stats["n_sequence"], stats["n_page_free"], stats["n_running"], stats["n_waiting"]) == (0, stats["n_page"], 0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["full", SPARSE])
def test_on_a_gpu(folder: Path, attention: str) -> None:
    """Threads, samples, prefixes, preemption on a GPU. Other kernels run for other numbers of rows, so texts are not compared: under full
    attention every token is as likely as when the same text is scored in one piece, within what f32 sums in another order differ by."""
    with pyruntime.Model(folder, device="cuda", dtype="f32", attention=attention, max_context=1024) as model:
        engine = Engine(Session(model._weights, max_context=1024, n_page=8), prefix_pages=8)
        engine.set_attention(model.attention)
        made = requests(model, 24)
        run(engine, made)
        assert [len(r.token_ids) for r in made] == [options(i)["max_tokens"] for i in range(24)] and engine.batch.n_preempted > 0
        engine.session.close()

        def work(i: int) -> None:
            for sample in model.generate(prompt(i), n=2, logprobs=0, **{"seed": 1, **options(i)}):
                assert len(sample.token_ids) == options(i)["max_tokens"] and sample.logprobs is not None
                if attention == "full":
                    ids = prompt(i) + sample.token_ids
                    whole = model.generate(ids, max_tokens=1, prompt_logprobs=0).prompt_logprobs or []
                    for there, here in zip(whole[-len(sample.token_ids) :], sample.logprobs, strict=True):
                        assert there is not None and abs(there.logprob - here.logprob) < 1e-2

        for _ in range(2):  # the second time with most of it in the cache
            in_threads(16, work)
        model.clear_cache()
        stats = model.stats()
        assert (stats["n_sequence"], stats["n_page_free"]) == (0, stats["n_page"])


# ---------------------------------------------------------------- StreamingLLM with eviction: texts longer than the context

EVICTING = "streaming:sinks=4,window=128,min_context=190,evict=1"


def test_a_text_goes_on_past_the_context(folder: Path, tiny: pyruntime.Model) -> None:
    """In constant memory, and token for token as a session of one's own under the same policy."""
    ids, n = prompt(3)[:60], 1200
    session = Session(tiny._weights, max_context=512, threads=1)
    session.set_attention(Attention.parse(EVICTING))
    seq, want, given = session.create_sequence(), [], ids
    for _ in range(n):
        logits = session.step([Entry(seq, given, n_logits=1)]).logits
        assert logits is not None
        want.append(int(logits[-1].argmax()))
        given = [want[-1]]
    session.close()
    with pyruntime.Model(folder, threads=1, max_context=512, attention=EVICTING) as model:
        for _ in range(2):  # the second one finds the prompt, but no text with holes
            done = model.generate(ids, max_tokens=n, temperature=0, ignore_eos=True)
            assert done.token_ids == want and done.finish_reason == "length"
            assert model.stats()["n_page"] - model.stats()["n_page_free"] <= 2
        several = model.generate([ids, ids[::-1]], max_tokens=n, temperature=0, ignore_eos=True)
        assert several[0].token_ids == want and len(several[1].token_ids) == n
        assert model.stats()["n_page_peak"] <= 2 * 8
        assert len(model.generate(ids, temperature=0, ignore_eos=True).token_ids) == 512 - len(ids), (
            "without max_tokens the context is the end"
        )
        with pytest.raises(pyruntime.ContextLengthError, match="the prompt has 600 tokens, max_context is 512"):
            model.generate([5] * 600, max_tokens=1)
        model.set_attention("full")
        assert len(model.generate(ids, max_tokens=n, temperature=0, ignore_eos=True).token_ids) == 512 - len(ids)


def test_a_preempted_text_without_end_goes_on(tiny: pyruntime.Model) -> None:
    """It is read again token by token, so that it gives up the same tokens."""
    session = Session(tiny._weights, max_context=512, n_page=9, threads=1)
    engine = Engine(session)
    engine.set_attention(Attention.parse(EVICTING))
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (700, 300)]
    made = [
        Request(prompt(3)[:60], p, tiny.tokenizer, eos_ids=tiny.eos_ids, n_vocab=tiny.config.n_vocab, max_context=512, longest_context=512,
                endless=True) for p in params
    ]  # fmt: skip
    call = Call([[r] for r in made])
    engine.submit(call)
    engine.wait(call)
    long, short = (r.token_ids for r in made)
    assert len(long) == 700 and long[:300] == short
    assert engine.stats()["n_preempted"] > 0
    session.close()
