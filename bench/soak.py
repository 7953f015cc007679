#!/usr/bin/env python3
"""Many clients that come and go: does the server give everybody the answer that they would get alone, and all its memory back?

    python bench/soak.py smollm2-135m --seconds 120
    python bench/soak.py smollm2-135m --seconds 120 --attention tactic:min_context=128,segment=256,window=32,p=0.5

Starts a server and talks to it with OpenAI's client: --clients streams at a time, of which many are left in the middle. First every
question is asked alone. Ends with one line of JSON and with exit code 1 if
  - an answer that was not left differs from the one given alone (greedy),
  - there was an error other than 429 and 503, which the full queue is meant to give,
  - a page of the KV cache, a sequence or a request was still in use at the end,
  - the policy is a sparse one, and no context was long enough for it.
Needs the extra "server" and the package openai.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

WORDS = ["time", "light", "water", "stone", "river", "paper", "garden", "winter", "engine", "signal", "number", "letter"]
N_QUESTIONS = 24


def questions(longest: int) -> list[list[dict[str, str]]]:
    """Chats of up to `longest` words of context; some share their beginnings."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(5, longest))) for _ in range(N_QUESTIONS // 2)]
    asked = [f"{texts[i % len(texts)]}\nWrite about the {rng.choice(WORDS)} number {i}." for i in range(N_QUESTIONS)]
    return [[{"role": "user", "content": text}] for text in asked]


@contextmanager
def serving(
    model: str, *, attention: str, max_queue: int, prefix_cache: int | None, threads: int | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server in a process of its own: (where it is, what it says about its memory when it has ended)."""
    options = {"attention": attention, "max_queue": max_queue, "prefix_cache": prefix_cache, "threads": threads, "device": "auto"}
    command = [sys.executable, __file__, "--server", json.dumps({"name": model, **options})]
    left: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                raise SystemExit("the server did not start")
            yield url, left
            process.send_signal(signal.SIGTERM)
            left.update(json.loads(process.stdout.readline() or "{}"))
        finally:
            if process.poll() is None and not left:
                process.kill()


def serve(options: dict[str, Any]) -> None:
    """The child: what `pyruntime serve` does, and at the end what is still in use once nothing is kept for later prompts."""
    import pyruntime
    from pyruntime.server import Server, Settings

    with pyruntime.Model(options.pop("name"), **options) as model:
        server = Server(model, Settings(name="soak"), port=0)
        print(server.url, flush=True)
        server.run()
        model.clear_cache()
        stats = model.stats()
        used = {"pages": stats["n_page"] - stats["n_page_free"], "requests": len(server.api._active)}
        used |= {name: stats[f"n_{name}"] for name in ("sequence", "running", "waiting")}
        print(json.dumps({"in_use": used, "preempted": stats["n_preempted"], "clustered_tokens": stats["n_clustered_token"]}), flush=True)


async def ask(
    client: openai.AsyncOpenAI, question: list[dict[str, str]], max_tokens: int, leave_after: int = -1
) -> tuple[str, float] | None:
    """(the answer, seconds to its first piece); None: left after so many pieces.

    Pieces are taken one by one: `async for` wraps the stream in a generator, which after a break is closed some time later by the event
    loop, while the connection below it is being closed as well; the two can meet.
    """
    started, first, text = time.monotonic(), 0.0, ""
    stream = await client.chat.completions.create(
        model="soak", messages=question, stream=True, temperature=0, max_tokens=max_tokens, extra_body={"ignore_eos": True}
    )
    try:
        while True:
            try:
                chunk = await stream.__anext__()
            except StopAsyncIteration:
                return text, first
            piece = chunk.choices[0].delta.content if chunk.choices else None
            first = first or (time.monotonic() - started if piece else 0.0)
            text += piece or ""
            leave_after -= bool(piece)
            if leave_after == 0:
                return None
    finally:
        await stream.close()


async def soak(url: str, arguments: argparse.Namespace) -> tuple[collections.Counter[str], list[str]]:
    """(how often what happened, what should not have)."""
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    asked = questions(arguments.words)
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=600) as client:
        alone = [await ask(client, question, arguments.max_tokens) for question in asked]
        end = time.monotonic() + arguments.seconds

        async def one(seed: int) -> None:
            rng = random.Random(seed)
            while time.monotonic() < end:
                i = rng.randrange(len(asked))
                how, timeout = rng.random(), None
                leave_after = rng.choice([1, 2, 5, arguments.max_tokens // 2]) if how < 0.25 else -1
                if 0.25 <= how < 0.5:  # whenever that is: in the queue, while the prompt is read, between two pieces
                    timeout = rng.random() ** 2 * arguments.patience
                try:
                    got = await asyncio.wait_for(ask(client, asked[i], arguments.max_tokens, leave_after), timeout)
                except asyncio.TimeoutError:
                    counts["left at some time"] += 1
                except openai.APIStatusError as error:
                    counts[str(error.status_code)] += 1
                    if error.status_code not in (429, 503):
                        wrong.append(f"{error.status_code}: {error}")
                    await asyncio.sleep(float(error.response.headers.get("retry-after", 1)) * rng.random())
                except openai.APIError as error:
                    counts["error"] += 1
                    wrong.append(f"{type(error).__name__}: {error}")
                else:
                    counts["left after some pieces" if got is None else "whole"] += 1
                    if got is not None and got[0] != (alone[i] or [""])[0]:
                        wrong.append(f"question {i} has another answer: {got[0]!r}, alone {(alone[i] or [''])[0]!r}")

        await asyncio.gather(*[one(seed) for seed in range(arguments.clients)])
    return counts, wrong


def main() -> int:
    if sys.argv[1:2] == ["--server"]:
        serve(json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=120, help="(default 120)")
    parser.add_argument("--clients", type=int, default=64, help="streams at a time (default 64)")
    parser.add_argument("--attention", default="full", help="(default full); a sparse one keeps no prefixes, whose clusters would show")
    parser.add_argument("--max-tokens", type=int, default=24, help="of an answer (default 24)")
    parser.add_argument("--words", type=int, default=400, help="most words of a question (default 400)")
    parser.add_argument("--patience", type=float, default=20, help="most seconds after which a client leaves (default 20)")
    parser.add_argument("--max-queue", type=int, default=32, help="requests that may wait; the others get 429 (default 32)")
    parser.add_argument("--threads", type=int, help="of the model")
    arguments = parser.parse_args()
    prefix_cache = None if arguments.attention == "full" else 0
    with serving(
        arguments.model,
        attention=arguments.attention,
        max_queue=arguments.max_queue,
        prefix_cache=prefix_cache,
        threads=arguments.threads,
    ) as (url, left):
        started = time.monotonic()
        counts, wrong = asyncio.run(soak(url, arguments))
        seconds = time.monotonic() - started
    if not left or any(left["in_use"].values()):
        wrong.append(f"still in use: {left.get('in_use', 'the server did not say')}")
    if arguments.attention != "full" and not left.get("clustered_tokens"):
        wrong.append("nothing was clustered: every context was too short for the policy")
    if not counts["whole"]:
        wrong.append("no answer was waited for")
    print(json.dumps({"seconds": round(seconds), "clients": arguments.clients, **counts, **left, "wrong": len(wrong)}))
    for line in wrong[:10]:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
